"""The scripts of the suite say over streams what the reference says in batch."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pytest

from operators import StreamContext
from operators.cli import main
from operators.nexmark.scripts import script
from tests.nexmark.reference import REFERENCES, expected
from tests.sql.running import as_rows


@pytest.fixture
def place(ordered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a script."""
    (tmp_path / "events").symlink_to(ordered)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(place: Path, query: str) -> pa.Table:
    partitions = pads.partitioning(pa.schema({"dt": pa.string(), "hm": pa.string()}), flavor="hive")
    files = pads.dataset(place / "out" / query, partitioning=partitions if query == "q10" else None)
    return files.to_table(columns=[name for name in files.schema.names if query == "q10" or name not in ("dt", "hm")])


@pytest.mark.parametrize("query", REFERENCES)
def test_every_query_is_a_script(query: str, place: Path) -> None:
    context = StreamContext()
    context.execute(script(query))
    context.run()
    found, wanted = written(place, query), expected(query, place / "events")
    assert found.column_names == wanted.column_names
    assert wanted.num_rows > 0
    assert as_rows(found) == as_rows(wanted)


def test_a_script_is_printed_and_run_from_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nexmark", "sql", "q2"]) == 0
    printed = capsys.readouterr().out
    assert main(["nexmark", "sql", "q2", "--output", "q2.sql"]) == 0
    assert Path("q2.sql").read_text() == printed
    for _ in range(2):
        assert main(["sql", "q2.sql", "--state", "state"]) == 0
        assert as_rows(written(place, "q2")) == as_rows(expected("q2", place / "events"))
