"""``python -m operators sql``: scripts and the shell, as their user meets them."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from operators.cli import main
from operators.console.running import SqlSettings
from operators.console.shell import Shell, run_shell
from operators.exit_codes import ExitCode
from operators.sinks import ParquetSink

DEFINITIONS = """
CREATE EXTERNAL TABLE x STORED AS PARQUET LOCATION 'x.parquet' OPTIONS ('event_time' 't');
CREATE EXTERNAL TABLE o (k VARCHAR, n BIGINT) STORED AS PARQUET LOCATION 'o' OPTIONS ('mode' 'sink');
"""
INSERT = "INSERT INTO o SELECT k, count(*) FROM x GROUP BY k, tumble(t, INTERVAL '10 s');"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a stream of a row per second."""
    times = pa.array(range(0, 20_000, 1000), pa.timestamp("ms"))
    pq.write_table(pa.table({"t": times, "k": ["a", "[b]"] * 10, "v": range(20)}), tmp_path / "x.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    return tmp_path


def script(text: str) -> str:
    Path("script.sql").write_text(text)
    return "script.sql"


def rows(place: Path) -> int:
    return sum(file.num_rows for file in map(pq.read_table, (place / "o").rglob("part*.parquet")))


def test_a_script_runs_to_its_end_and_then_adds_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sql", script(DEFINITIONS + INSERT), "--state", "state"]
    assert main(command) == ExitCode.DONE
    assert rows(place) == 4
    assert capsys.readouterr().err.startswith("20 rows read in")
    assert main(command) == ExitCode.DONE
    assert rows(place) == 4
    assert "restored from checkpoint" in capsys.readouterr().err


def test_rows_go_to_standard_output_and_everything_else_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    select = "SHOW TABLES; SELECT k, v FROM x WHERE v < 3; EXPLAIN SELECT v FROM x; SELECT 1 WHERE false;"
    assert main(["sql", script(DEFINITIONS + select), "--rows", "2"]) == ExitCode.DONE
    out, err = capsys.readouterr()
    for shown in ("stream", "[b]", "and 1 more", "source x", "no rows"):
        assert shown in out
    assert "20 rows read" in err


def test_rows_are_lines_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    select = """SELECT k, v, t FROM x WHERE v < 2; SELECT 'a,"b' AS text, CAST(NULL AS INT) AS nothing, 1.5 AS x;"""
    command = ["sql", script(DEFINITIONS + select), "--state", "state", "--format"]
    assert main([*command, "json"]) == ExitCode.DONE
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[0] == {"text": 'a,"b', "nothing": None, "x": 1.5}
    assert [(row["k"], row["v"]) for row in found[1:]] == [("a", 0), ("[b]", 1)]
    assert main([*command, "csv"]) == ExitCode.DONE  # how rows are shown is no part of the job
    assert list(csv.reader(io.StringIO(capsys.readouterr().out))) == [
        ["text", "nothing", "x"],
        ['a,"b', "", "1.5"],
        ["k", "v", "t"],
    ]


def test_a_script_comes_by_standard_input_where_that_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["sql"], ["sql", "-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("SELECT 41 + 1 AS answer"))
        assert main(command) == ExitCode.DONE
        assert "42" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.DONE)])
def test_the_first_signal_stops_a_job_gracefully(
    number: int, code: ExitCode, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ParquetSink.write

    def interrupted(self: ParquetSink, batch: pa.RecordBatch) -> None:
        os.kill(os.getpid(), number)
        write(self, batch)

    command = ["sql", script(DEFINITIONS + "INSERT INTO o SELECT k, v FROM x;"), "--state", "state"]
    with monkeypatch.context() as patch:
        patch.setattr(ParquetSink, "write", interrupted)
        assert main(command) == code
    assert "the same command goes on from there" in capsys.readouterr().err
    assert main(command) == ExitCode.DONE
    assert rows(place) == 20


def test_errors_name_the_line_and_keep_their_exit_codes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sql", script("\n\nSELECT nothing FROM nowhere;")]) == ExitCode.FAILED
    assert capsys.readouterr().err.endswith("in line 3: SELECT nothing FROM nowhere\n")
    assert main(["sql", "no.sql"]) == ExitCode.FAILED
    Path("script.sql").write_bytes(b"SELECT '\xff'")
    assert main(["sql", "script.sql"]) == ExitCode.FAILED
    assert "not UTF-8" in capsys.readouterr().err
    for wrong in (["--rows", "0"], ["--checkpoint-interval", "never"], ["--storage-option", "hidden"]):
        with pytest.raises(SystemExit) as left:
            main(["sql", *wrong])
        assert left.value.code == ExitCode.USAGE
    assert "hidden" not in capsys.readouterr().err
    assert main(["sql", "--storage-option", "a=1", "--storage-option", "a=2", "script.sql"]) == ExitCode.USAGE


def test_a_script_that_was_changed_goes_on_when_it_says_what_became_of_its_operators(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["sql", script(DEFINITIONS + INSERT), "--state", "state"])
    more = "COPY (SELECT v FROM x) TO 'more' STORED AS CSV;"
    changed = ["sql", script(DEFINITIONS + INSERT + more), "--state", "state"]
    assert main(changed) == ExitCode.FAILED
    err = capsys.readouterr().err
    assert "+ copy-more (sink)" in err
    assert "--upgrade add=ID" in err
    assert main([*changed, "--upgrade", "add=copy-more"]) == ExitCode.DONE
    assert rows(place) == 4
    for wrong in ("add", "add=", "keep=x", "rename=x", "add=x:y"):
        with pytest.raises(SystemExit) as left:
            main(["sql", "--upgrade", wrong])
        assert left.value.code == ExitCode.USAGE


def test_the_help_has_an_example_that_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sql", "--help"])
    example = capsys.readouterr().out.split("example:\n")[1].split("  $ python")[0]
    main(["nexmark", "generate", "--events", "2000", "--output", "events"])
    assert main(["sql", script(example)]) == ExitCode.DONE
    assert (place / "out" / "busy").is_dir()


# -- the shell


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


def test_the_shell_takes_statements_of_several_lines_until_it_is_left(
    keys: PipeInput, capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    keys.send_text(DEFINITIONS.replace("\n", "\r"))
    keys.send_text("SELECT k,\rv FROM x WHERE v = 17;\r\\q\r")
    assert run_shell(SqlSettings()) is ExitCode.DONE
    assert "17" in capsys.readouterr().out
    assert "v FROM x WHERE v = 17" in (place / "xdg" / "datafusion-statebackend" / "sql_history").read_text()


def test_interrupts_and_errors_do_not_end_the_shell_and_the_end_of_input_does(
    keys: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    keys.send_text("SELECT 1 +\x03SELECT nothing;\rSELECT 42;\r\x04")
    assert run_shell(SqlSettings()) is ExitCode.DONE
    out, err = capsys.readouterr()
    assert "42" in out
    assert "error: SchemaError" in err


def test_every_insert_in_the_shell_is_a_job_with_its_own_state(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell(SqlSettings(state="state"))
    shell.run(DEFINITIONS + DEFINITIONS.replace(" o ", " p ").replace("'o'", "'p'").split(";")[1])
    shell.run(INSERT + INSERT.replace("INTO o", "INTO p") + INSERT)
    assert rows(place) == 4
    assert sorted(path.name for path in (place / "state").iterdir()) == ["o", "p"]
    assert "error" not in capsys.readouterr().err


def test_the_shell_completes_what_is_known(place: Path) -> None:
    shell = Shell(SqlSettings())
    shell.run(DEFINITIONS)
    assert {"x", "o", "k", "SELECT", "tumble", "approx_distinct"} <= set(shell.words())
    shell.run("DROP TABLE o")
    assert "o" not in set(shell.words())
