"""Notebooks run from top to bottom, and what is committed of them is what a reader should see."""

from __future__ import annotations

import base64
import shutil
import sys
from pathlib import Path

import pytest
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import operators
from tests.support.notebooks import PROJECT, clean, execute, images, problems, read

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
CELL_TIMEOUT_S = 120

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def notebook_of(*sources: str) -> NotebookNode:
    return new_notebook(cells=[new_code_cell(source) for source in sources])  # type: ignore[no-untyped-call, no-any-return]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.soak  # with `make notebooks`; every run of the tests looks at the outputs, and at what is imported
@notebooks
def test_every_cell_runs_in_a_fresh_copy(path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(path, tmp_path))
    notebook = read(copy)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    execute(notebook, tmp_path, CELL_TIMEOUT_S)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    assert len(images(notebook)) == len(images(read(path)))
    assert list(tmp_path.iterdir()) == [copy], "a notebook leaves nothing beside itself"


@notebooks
def test_a_committed_notebook_has_its_outputs_and_nothing_of_the_machine(path: Path) -> None:
    notebook = read(path)
    assert problems(notebook) == []
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images(notebook))
    cleaned = read(path)
    clean(cleaned, path.parent)
    assert cleaned == notebook, "run `make notebooks`"


def test_a_cell_that_raises_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(notebook_of("1 / 0"), tmp_path)


def test_a_cell_that_never_ends_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CellTimeoutError):
        execute(notebook_of("import time", "time.sleep(60)"), tmp_path, cell_timeout_s=2)


def test_a_notebook_runs_with_this_interpreter_and_this_project(tmp_path: Path) -> None:
    notebook = notebook_of("import sys, operators; print(sys.executable, operators.__file__)")
    execute(notebook, tmp_path)
    assert notebook.cells[0].outputs[0].text.split() == [sys.executable, operators.__file__]


def test_cleaning_takes_paths_times_and_versions_out(tmp_path: Path) -> None:
    notebook = notebook_of("import os, sys; print(os.getcwd(), sys.prefix)")
    execute(notebook, tmp_path)
    notebook.cells[0].metadata.execution = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    clean(notebook, tmp_path)
    assert notebook.cells[0].outputs[0].text == "<notebook> <python>\n"
    assert notebook.cells[0].metadata == {}
    assert "version" not in notebook.metadata.language_info


def test_placeholders_take_the_place_of_whole_names_and_are_no_elements(tmp_path: Path) -> None:
    paths = f"{tmp_path}/a {tmp_path}b"
    notebook = notebook_of("1")
    notebook.cells[0].outputs = [new_output("display_data", data={"text/html": paths, "text/plain": paths})]  # type: ignore[no-untyped-call]
    clean(notebook, tmp_path)
    data = notebook.cells[0].outputs[0].data
    assert data["text/plain"].startswith("<notebook>/a ")
    assert data["text/html"].startswith("&lt;notebook&gt;/a ")
    assert not data["text/plain"].endswith("<notebook>b")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (new_output("stream", name="stdout", text="Writing /tmp/x1/job.py"), "shows a path"),  # type: ignore[no-untyped-call]
        (new_output("display_data", data={"text/html": r"<b>C:\Users\me</b>"}), "shows a path"),  # type: ignore[no-untyped-call]
        (new_output("display_data", data={"image/svg+xml": "<svg><text>/home/me</text></svg>"}), "shows a path"),  # type: ignore[no-untyped-call]
        (new_output("stream", name="stderr", text="FutureWarning: soon"), "wrote to stderr"),  # type: ignore[no-untyped-call]
        (new_output("error", ename="KeyError", evalue="x", traceback=[]), "raised KeyError"),  # type: ignore[no-untyped-call]
    ],
)
def test_what_should_not_be_committed_is_named(output: NotebookNode, reason: str) -> None:
    notebook = notebook_of("1")
    notebook.cells[0].outputs, notebook.cells[0].execution_count = [output], 1
    assert any(reason in problem for problem in problems(notebook))


def test_a_path_in_the_text_of_a_notebook_is_named() -> None:
    notebook = notebook_of()
    notebook.cells.append(new_markdown_cell("see `/home/me/data.csv`"))  # type: ignore[no-untyped-call]
    assert any("has a path" in problem for problem in problems(notebook))


@pytest.mark.parametrize("source", ["from operators import NoSuchThing", "from statebackend.nothing import x"])
def test_what_a_notebook_imports_and_is_gone_is_named(source: str) -> None:
    assert any("does not exist" in problem for problem in problems(notebook_of(source)))


def test_cells_run_out_of_order_are_named() -> None:
    notebook = notebook_of("1", "2")
    notebook.cells[0].execution_count, notebook.cells[1].execution_count = 2, 1
    assert sum("not run from top to bottom" in problem for problem in problems(notebook)) == 2
