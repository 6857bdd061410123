"""The corpus: the queries in ``queries/*.sql``, by the names of the files.

Statements end with a semicolon at the end of a line. One that follows a line ``-- in DuckDB`` is the same question as
the statement before it, in DuckDB's words; where there is none the words are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

__all__ = ["Query", "corpus"]

_IN_DUCKDB = "-- in DuckDB\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A query as a stream, and the same question for DuckDB."""

    text: str
    reference: str


@lru_cache(1)
def corpus() -> Mapping[str, list[Query]]:
    """The queries of every family."""
    return {path.stem: _queries(path.read_text()) for path in sorted(Path(__file__).parent.glob("queries/*.sql"))}


def _queries(script: str) -> list[Query]:
    found: list[Query] = []
    for statement in re.split(r";\n", script):
        said_before = statement.startswith(_IN_DUCKDB)
        text = "\n".join(line for line in statement.splitlines() if not line.startswith("--")).strip()
        if said_before:
            found[-1] = Query(text=found[-1].text, reference=text)
        elif text:
            found.append(Query(text=text, reference=text))
    return found
