"""The queries of the suite as scripts of SQL, files beside this package's code.

Each reads ``events/``, as `write_dataset` makes it, and writes ``out/`` and the name of the query, both below
the working directory; columns of the results are those of `operators.nexmark.queries`.
"""

from __future__ import annotations

from importlib.resources import files

__all__ = ["script"]


def script(query: str) -> str:
    """The script of a query, by its name."""
    return files("operators.nexmark").joinpath("sql", f"{query}.sql").read_text(encoding="utf-8")
