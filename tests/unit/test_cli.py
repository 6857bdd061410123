"""The command line, as its user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from statebackend import StateStore
from statebackend.cli import main
from tests.support.stores import job, put

COMMANDS = (
    "ls", "show", "metrics", "bench", "verify", "gc", "savepoint", "rollback", "clone", "branches", "compact",
    "sql",
)  # fmt: skip


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
    with pytest.raises(SystemExit):
        main(["--help"])
    whole = capsys.readouterr().out
    for command in COMMANDS:
        assert f"    {command} " in whole or f"    {command}\n" in whole
        with pytest.raises(SystemExit) as done:
            main([command, "--help"])
        assert done.value.code == 0
        text = capsys.readouterr().out
        assert "URL" in text
        assert "--storage-option KEY=VALUE" in text


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


def test_a_clone_its_branches_and_metrics_from_the_shell(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "clone", url, f"{url}-copy")
    assert (code, "reads 3 files there" in out) == (0, True)
    store_id = out.split()[4].rstrip(",")
    assert store_id in run(capsys, "branches", url)[1]
    assert run(capsys, "verify", f"{url}-copy")[0] == 0
    code, out = run(capsys, "branches", url, "--drop", store_id)
    assert (code, "still reads files" in out) == (1, True)
    assert run(capsys, "branches", url, "--drop", store_id, "--force")[0] == 0
    assert "does not keep files for a branch" in run(capsys, "verify", f"{url}-copy")[1]
    code, out = run(capsys, "metrics", url, "--prometheus")
    assert code == 0
    assert "statebackend_table_rows" in out
    assert {line.split()[0] for line in out.splitlines() if line.startswith("#")} == {"#"}


def test_compact_says_what_it_merged(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "compact", url, "--all", "--threads", "1")
    assert code == 0
    assert out.startswith("1 merge in ")
    assert "2 of 3 rows dropped" in out
    assert run(capsys, "compact", url) == (0, "nothing is due\n")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["savepoint", "--drop"], "need --name"),
        (["savepoint", "--checkpoint", "1"], "need --name"),
        (["savepoint", "--name", "x", "--expires-hours", "-1"], "more than 0"),
        (["savepoint", "--name", "x", "--expires-hours", "nan"], "more than 0"),
        (["savepoint", "--name", "x", "--drop", "--checkpoint", "1"], "--name alone"),
        (["branches", "--force"], "needs --drop"),
        (["ls", "--manifests", "0"], "at least 1"),
        (["compact", "--threads", "0"], "at least 1"),
        (["bench", "--prefill", "-5"], "at least 1"),
        (["rollback"], "required"),
        (["ls", "--storage-option", "a=1", "--storage-option", "a=2"], "a is given twice"),
        (["ls", "--storage-option", "a=1", "--storage-option", "a.b=2"], "a has a value of its own"),
        (["ls", "--storage-option", "a=env:NOT_SET_ANYWHERE"], "no environment variable NOT_SET_ANYWHERE"),
        (["clone", "there", "--storage-option-of", "there", "a"], "expected KEY=VALUE"),
    ],
)
def test_wrong_usage_is_said_and_has_exit_code_2(
    url: str, capsys: pytest.CaptureFixture[str], args: list[str], why: str
) -> None:
    before = sorted(Path(url).rglob("*"))
    try:
        code, out = run(capsys, args[0], url, *args[1:])
    except SystemExit as done:
        code, out = done.code, capsys.readouterr().err
    assert code == 2
    assert why in out
    assert sorted(Path(url).rglob("*")) == before


def test_explain_says_so_when_there_is_no_such_object(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such object" in run(capsys, "gc", url, "--explain", "w1-0-0-1.arrow")[1]
    assert "is kept" in run(capsys, "gc", url, "--explain", "manifest/00000000000000000004.manifest")[1]


def test_long_lines_of_prose_are_not_broken_in_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(tmp_path / ("x" * 200))
    with StateStore.open(url) as store:
        put(store, a=1)
        store.checkpoint(job(0)).result(10)
    assert len(run(capsys, "clone", url, f"{url[:-1]}y")[1].splitlines()) == 1


def test_storage_options_are_text_unless_they_say_otherwise(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def takes(url: str, **options: object) -> object:
        seen.append(options["storage_options"])
        raise ValueError("enough")

    monkeypatch.setattr("statebackend.inspect.open_object_store", lambda url, _, **options: takes(url, **options))
    monkeypatch.setenv("THE_SECRET", "from=outside")
    given = ["key=007", "anon=true", "secret=env:THE_SECRET", "a.b.c=x", "a.b.d=json:[1,null]", "e="]
    assert run(capsys, "ls", "s3://b/p", *(a for g in given for a in ("--storage-option", g)))[0] == 2
    assert run(capsys, "ls", "s3://b/p")[0] == 2
    nested = {"b": {"c": "x", "d": [1, None]}}
    assert seen == [{"key": "007", "anon": True, "secret": "from=outside", "a": nested, "e": ""}, None]


def test_values_of_storage_options_are_never_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_SECRET", "hush-hush")

    def tells(*_: object, storage_options: object, **__: object) -> None:
        raise ValueError(f"cannot use {storage_options}")

    monkeypatch.setattr("statebackend.inspect.open_object_store", tells)
    monkeypatch.setattr("statebackend.toolbox.open_object_store", tells)
    options = ["--storage-option", "secret=env:THE_SECRET", "--storage-option", 'a.token=json:{"x": ["top-secret"]}']
    for command in (["ls"], ["gc"], ["metrics"]):
        code, out = run(capsys, command[0], "s3://b/p", *options)
        assert code == 2
        assert "cannot use" in out
        assert "hush-hush" not in out
        assert "top-secret" not in out
    with pytest.raises(SystemExit):
        main(["ls", "s3://b/p", "--storage-option", "hush-hush"])
    assert "hush-hush" not in capsys.readouterr().err


def test_the_benchmark_runs_and_checks_what_it_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "bench", str(tmp_path / "b"), "--prefill", "5000", "--batch-rows", "500")
    assert code == 0
    assert "flush from 4 threads" in out
