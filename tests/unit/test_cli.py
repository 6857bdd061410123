"""The command line, as its user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from statebackend import StateStore
from statebackend.cli import main
from tests.support.stores import job, put


@pytest.fixture
def url(tmp_path: Path) -> str:
    path = tmp_path / "db"
    with StateStore.open(path) as store:
        for step in range(3):
            put(store, a=step)
            store.checkpoint(job(step)).result(10)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    code = main(args)
    out = capsys.readouterr()
    return code, out.out + out.err


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("ls", "show", "verify", "gc", "savepoint", "rollback", "bench"):
        with pytest.raises(SystemExit) as done:
            main([command, "--help"])
        assert done.value.code == 0
        assert "URL" in capsys.readouterr().out


def test_ls_and_show_tell_what_is_there(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "ls", url)
    assert code == 0
    assert "checkpoint 3" in out
    assert "kv" in out
    code, out = run(capsys, "show", url)
    assert "int64" in out
    code, out = run(capsys, "show", url, "--checkpoint", "2")
    assert code == 0
    assert '{"next": 1}' in out
    assert "sst/w1-0-0-1.arrow" in out


def test_what_is_not_there_is_one_clear_line_and_exit_code_1(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["ls", f"{url}-nope"], ["show", url, "--checkpoint", "77"], ["show", url, "--table", "nope"]):
        code, out = run(capsys, *args)
        assert code == 1
        assert len(out.strip().splitlines()) == 1
        assert "Error" in out


def test_verify_ends_with_a_verdict_and_an_exit_code(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "verify", url)
    assert code == 0
    assert "sound" in out
    next(Path(url).glob("sst/*")).unlink()
    code, out = run(capsys, "verify", url)
    assert code == 1
    assert "does not exist" in out


def test_savepoint_rollback_and_collection_from_the_shell(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "savepoint", url, "--name", "x", "--checkpoint", "1")[0] == 0
    assert "x" in run(capsys, "savepoint", url)[1]
    assert run(capsys, "rollback", url, "--savepoint", "x")[0] == 0
    assert run(capsys, "gc", url, "--dry-run")[0] == 0
    assert "kept" in run(capsys, "gc", url, "--explain", "sst/w1-0-0-1.arrow")[1]
    with StateStore.open(url) as store:
        assert store.restored is not None
        assert store.restored.job == job(0)


def test_the_benchmark_runs_and_checks_what_it_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "bench", str(tmp_path / "b"), "--prefill", "5000", "--batch-rows", "500")
    assert code == 0
    assert "flush from 4 threads" in out
