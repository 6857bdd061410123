"""Executes notebooks and keeps what is committed of them free of the machine they ran on.

``python -m tests.support.notebooks notebooks/*.ipynb`` executes each notebook in its own directory and
writes it back with its outputs. Only what tells a reader something stays: sources, outputs, the name
of the kernel. Times of execution, versions and widget state go; absolute paths are replaced by
placeholders such as ``<project>``.

Invariants:

* The kernel is the interpreter that runs this, whatever kernels are installed on the machine, and
  knows nothing of the user's IPython settings.
* A notebook with a cell that raises is never written back.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

__all__ = ["clean", "execute", "images", "main", "problems", "read", "write"]

CELL_TIMEOUT_S = 120
BYTES_MAX = 500_000
PROJECT = Path(__file__).resolve().parents[2]

_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
_LANGUAGE = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
_PATH = re.compile(
    r"(?<![\w.:/<-])(?<!notebook>)(?<!project>)(?<!python>)(?<!temporary>)(?<!home>)/(?:home|root|Users|tmp|var|private|opt|usr|mnt|srv|work|workspace|builds?|data|nix|app|etc)/[\w.-]+"
    r"|\b[A-Za-z]:\\{1,2}\w+"
    r"|file://\S+"
)
"""What looks like the path of a machine: Unix roots, Windows drives, file URLs."""
_MARKUP = re.compile(r"<(notebook|project|python|temporary|home)>")
"""Placeholders, where they would be elements."""


def read(path: Path) -> NotebookNode:
    """The notebook in a file."""
    return nbformat.read(path, as_version=4)  # type: ignore[no-any-return, no-untyped-call]


def write(notebook: NotebookNode, path: Path) -> None:
    """Check it against the notebook format and write it, whole or not at all."""
    nbformat.validate(notebook)
    part = path.with_suffix(".part")
    nbformat.write(notebook, part)  # type: ignore[no-untyped-call]
    part.replace(path)


def execute(notebook: NotebookNode, directory: Path, cell_timeout_s: int = CELL_TIMEOUT_S) -> None:
    """Run all cells in ``directory``; the outputs are in the notebook afterwards.

    Raises `nbclient.exceptions.CellExecutionError` for a cell that raises, `CellTimeoutError` for one
    that takes longer than ``cell_timeout_s``.
    """
    with tempfile.TemporaryDirectory() as settings:
        specs = KernelSpecManager(kernel_dirs=[])  # leaves the interpreter that runs this as the only kernel
        client = NotebookClient(
            notebook,
            timeout=cell_timeout_s,
            record_timing=False,
            resources={"metadata": {"path": str(directory)}},
            extra_arguments=["--IPKernelApp.log_level=40"],  # it warns of every connection over TCP
        )
        # Given to the client after it was made, so that the client also ends the kernel.
        client.km = AsyncKernelManager(kernel_name=_KERNEL["name"], kernel_spec_manager=specs)
        paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
        client.execute(env={**os.environ, "IPYTHONDIR": settings, "PYTHONPATH": os.pathsep.join(paths)})


def clean(notebook: NotebookNode, directory: Path) -> None:
    """Leave nothing of the machine and the moment in an executed notebook. Changes it in place.

    ``directory`` is where it ran.
    """
    notebook.metadata = nbformat.from_dict({"kernelspec": _KERNEL, "language_info": _LANGUAGE})  # type: ignore[no-untyped-call]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})  # type: ignore[no-untyped-call]
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})  # type: ignore[no-untyped-call]
            for holder, key, text in _texts(output):
                cleaned = _without_roots(text, directory)
                holder[key] = _MARKUP.sub(r"&lt;\1&gt;", cleaned) if key in ("text/html", "image/svg+xml") else cleaned


def problems(notebook: NotebookNode) -> list[str]:
    """Why a notebook should not be committed as it is: a line for each reason, none if it may."""
    found: list[str] = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    for number, cell in enumerate(code, 1):
        if cell.execution_count != number:
            found.append(f"code cell {number} has execution count {cell.execution_count}: not run from top to bottom")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"code cell {number} raised {output.ename}: {output.evalue}")
            elif output.get("name") == "stderr":
                found.append(f"code cell {number} wrote to stderr: {output.text.strip()[:200]}")
            found += [f"code cell {number} shows a path: {p}" for _, _, t in _texts(output) for p in _PATH.findall(t)]
    for number, cell in enumerate(notebook.cells, 1):
        found += [f"the source of cell {number} has a path: {p}" for p in _PATH.findall(cell.source)]
    found += [f"{name} does not exist" for name in _missing(code)]
    if not images(notebook):
        found.append("no image among the outputs")
    size = len(nbformat.writes(notebook).encode())  # type: ignore[no-untyped-call]
    if size > BYTES_MAX:
        found.append(f"{size} bytes, more than {BYTES_MAX}")
    return found


def images(notebook: NotebookNode) -> list[str]:
    """The PNG images among the outputs, base64."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def main(arguments: Sequence[str] | None = None) -> int:
    """Execute the notebooks in place; 1 if any of them may not be committed."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.notebooks", description=main.__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--cell-timeout", type=int, default=CELL_TIMEOUT_S, metavar="S", help="seconds for each cell")
    options = parser.parse_args(arguments)
    failed = False
    for path in options.notebooks:
        started = time.monotonic()
        notebook, directory = read(path), path.resolve().parent
        execute(notebook, directory, options.cell_timeout)
        clean(notebook, directory)
        write(notebook, path)
        reasons = problems(notebook)
        failed = failed or bool(reasons)
        print(f"{path}: {time.monotonic() - started:.1f} s", *reasons, sep="\n  ")
    return int(failed)


def _texts(output: Any) -> Iterator[tuple[Any, Any, str]]:
    """Every text of an output: what holds it, under which key, and the text itself. No images but those of text."""
    for key in ("text", "evalue"):
        if isinstance(output.get(key), str):
            yield output, key, output[key]
    if "traceback" in output:
        yield from ((output.traceback, i, line) for i, line in enumerate(output.traceback))
    data = output.get("data", {})
    for key, text in list(data.items()):
        if isinstance(text, str) and (key == "image/svg+xml" or not key.startswith("image/")):
            yield data, key, text


def _missing(code: Sequence[NotebookNode]) -> Iterator[str]:
    """What the cells import from this project and is not there: it was renamed since they were run."""
    for cell in code:
        if cell.source.startswith("%%"):
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("operators", "statebackend"):
                try:
                    module = importlib.import_module(node.module or "")
                except ImportError:
                    yield str(node.module)
                    continue
                yield from (f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name))


def _without_roots(text: str, directory: Path) -> str:
    """Placeholders for the directories of this machine, the longest first as they may lie in each other.

    A directory below one of them is no other: ``/tmp/x`` is ``<temporary>/x``, ``/tmpx`` stays.
    """
    roots = {
        str(directory): "<notebook>",
        str(PROJECT): "<project>",
        sys.prefix: "<python>",
        tempfile.gettempdir(): "<temporary>",
        str(Path(tempfile.gettempdir()).resolve()): "<temporary>",
        str(Path.home()): "<home>",
    }
    for root in sorted(roots, key=len, reverse=True):
        if len(root) > 1:
            text = re.sub(rf"{re.escape(root)}(?![\w-])", roots[root], text)
    return text


if __name__ == "__main__":
    sys.exit(main())
