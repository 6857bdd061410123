"""Real processes, real disks, real signals: what happens outside of the program that uses the store.

A process is killed by SIGTERM or interrupted, exits without closing, its disk fills up, its files must not grow, its
permission goes: either the store says so and goes on when the cause is gone, or the next opening finds every checkpoint
that was acknowledged.
"""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from statebackend import StateStore, StorageFullError, StoreSettings
from statebackend.maintenance import collect
from statebackend.verification import verify
from tests.support.stores import contents, job, put

ROOT = Path(__file__).resolve().parents[2]
HEADER = """
    import os, resource, signal, sys, threading
    from statebackend import *
    from tests.support.stores import put, contents, job
    directory = sys.argv[1]
"""
CHECKPOINTS = """
    with StateStore.open(directory, StoreSettings(l0_files_max=2)) as store:
        n = store.restored.checkpoint_id if store.restored else 0
        while True:
            n += 1
            put(store, at=n, **{f"k{n}": n})
            print(store.checkpoint(job(n)).result().checkpoint_id, flush=True)
"""


def start(code: str, directory: Path, **options: object) -> subprocess.Popen[str]:
    script = textwrap.dedent(HEADER) + textwrap.dedent(code)
    command = [sys.executable, "-X", "faulthandler", "-c", script, str(directory)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options)  # type: ignore[call-overload,no-any-return]


def run(code: str, directory: Path) -> str:
    process = start(code, directory)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def check_recovered(directory: Path, acknowledged: int) -> None:
    assert verify(str(directory)).problems == ()
    with StateStore.open(directory) as again:
        assert again.restored is not None
        newest = again.restored.checkpoint_id
        assert newest >= acknowledged
        assert again.restored.job == job(newest)
        assert contents(again) == {"at": newest, **{f"k{n}": n for n in range(1, newest + 1)}}


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL], ids=lambda s: s.name)
def test_a_signal_at_any_moment_loses_no_acknowledged_checkpoint(tmp_path: Path, sign: signal.Signals) -> None:
    acknowledged = 0
    for after in (1, 4, 9):
        process = start(CHECKPOINTS, tmp_path / "db")
        assert process.stdout is not None
        for _ in range(after):
            acknowledged = int(process.stdout.readline())
        process.send_signal(sign)
        out, err = process.communicate(timeout=60)
        acknowledged = int(out.split()[-1]) if out.split() else acknowledged
        assert process.returncode == -sign, err
        if sign is signal.SIGINT:
            assert "KeyboardInterrupt" in err
    check_recovered(tmp_path / "db", acknowledged)


def test_a_handler_that_closes_the_store_on_sigterm_leaves_nothing_unfinished(tmp_path: Path) -> None:
    handler = """
    def leave(*_):
        raise SystemExit(0)
    signal.signal(signal.SIGTERM, leave)
    """
    process = start(handler + CHECKPOINTS, tmp_path / "db")
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err == ""
    with StateStore.open(tmp_path / "db") as again:
        assert again.restored is not None
        assert again.restored.checkpoint_id - int((out.split() or ["3"])[-1]) in (0, 1)


def test_leaving_without_close_ends_the_metrics_port_and_the_disk_cache_too(tmp_path: Path) -> None:
    code = """
        settings = StoreSettings(metrics_port=0, disk_cache_dir=f"{directory}-cache", flush_interval_s=0.01)
        store = StateStore.open(directory, settings)
        put(store, a=1)
        store.flush()
        put(store, a=2)
        print(store.metrics_port)
    """
    assert int(run(code, tmp_path / "db")) > 0
    with StateStore.open(tmp_path / "db") as again:
        assert contents(again)["a"] in (1, 2)


def test_a_fork_that_runs_the_exit_handlers_does_not_touch_the_parents_store(tmp_path: Path) -> None:
    code = """
        store = StateStore.open(directory, StoreSettings(metrics_port=0))
        put(store, a=1)
        for leave in (sys.exit, os._exit, lambda code: None):
            if (pid := os.fork()) == 0:
                store.lock = None  # whoever takes it might wait for ever
                for use in (store.metrics, store.health, store.flush, store.close, lambda: put(store, a=2)):
                    try:
                        use()
                        os._exit(1)
                    except StoreClosedError as error:
                        assert "fork" in str(error)
                leave(0)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        store.flush()
        assert contents(store) == {"a": 1}
        store.close()
        print("parent fine")
    """
    assert "parent fine" in run(code, tmp_path / "db")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of four megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True)
    if not done or done.returncode != 0:
        pytest.skip(f"cannot mount a small filesystem here: {done.stderr.decode() if done else 'no mount command'}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    return filler


def test_a_disk_that_is_really_full_fails_checkpoints_until_there_is_space(small_disk: Path) -> None:
    db = small_disk / "db"
    with StateStore.open(db, StoreSettings(commit_timeout_s=5, gc_interval_s=None)) as store:
        put(store, at=1)
        store.checkpoint(job(1)).result(20)
        filler = fill(small_disk)
        for step in (2, 3):
            put(store, at=step, **{f"k{step}-{n}": n for n in range(2000)})
            with pytest.raises(StorageFullError, match="No space left"):
                store.checkpoint(job(step)).result(20)
            assert not store.health().ok
            assert len(contents(store)) == 1 + 2000 * (step - 1), "readable all the same"
        filler.unlink()
        assert not list(db.rglob(".tmp-*")), "what could not be finished was removed"
        assert store.checkpoint(job(4)).result(20).checkpoint_id >= 2
        assert store.health().ok
        expected = contents(store)
    assert verify(str(db)).problems == ()
    with StateStore.open(db) as again:
        assert contents(again) == expected


def test_garbage_can_be_collected_on_a_full_disk(small_disk: Path) -> None:
    db = small_disk / "db"
    for step in range(4):
        with StateStore.open(db, StoreSettings(retained_checkpoints=1, gc_interval_s=None)) as store:
            put(store, at=step)
            store.checkpoint(job(step)).result(20)
    filler = fill(small_disk)
    assert collect(str(db)).objects
    filler.unlink()
    assert verify(str(db)).problems == ()


def test_a_full_disk_of_the_cache_does_not_stop_the_store(small_disk: Path, tmp_path: Path) -> None:
    fill(small_disk)
    settings = StoreSettings(disk_cache_dir=small_disk / "cache")
    with StateStore.open(tmp_path / "db", settings) as store:
        put(store, **{f"k{n}": n for n in range(5000)})
        store.checkpoint(job(1)).result(20)
    with StateStore.open(tmp_path / "db", settings) as again:
        assert len(contents(again)) == 5000
        assert again.health().ok


def test_a_file_that_may_not_grow_fails_the_checkpoint_until_it_may(tmp_path: Path) -> None:
    code = """
        store = StateStore.open(directory, StoreSettings(commit_timeout_s=2, compression=None))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        put(store, **{f"k{n}": n for n in range(20_000)})
        try:
            store.checkpoint(job(1)).result(60)
        except StorageUnavailableError as error:
            assert "File too large" in str(error) and "sst/w1" in str(error), error
        else:
            raise SystemExit("no error")
        assert len(contents(store)) == 20_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        store.checkpoint(job(2)).result(60)
        store.close()
        print("done")
    """
    assert "done" in run(code, tmp_path / "db")
    with StateStore.open(tmp_path / "db") as again:
        assert len(contents(again)) == 20_000


LOST = """
    with StateStore.open(directory + "-loads-modules") as other:  # which may be readable for root alone
        put(other, a=1)
        other.checkpoint(job(1)).result(60)
    if os.geteuid() == 0:  # permissions mean nothing to root
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    store = StateStore.open(directory, StoreSettings(commit_timeout_s=5, gc_interval_s=None))
    put(store, a=1)
    store.checkpoint(job(1)).result(60)
    place = os.path.join(directory, PLACE)
    os.chmod(place, MODE)
    put(store, b=2)
    for step in (2, 3):
        try:
            store.checkpoint(job(step)).result(60)
        except StateStoreError as error:
            assert "Permission denied" in str(error), error
        else:
            raise SystemExit("no error")
    assert contents(store) == {"a": 1, "b": 2}
    assert not store.health().ok
    os.chmod(place, 0o755)
    assert store.checkpoint(job(4)).result(60).checkpoint_id >= 2
    assert store.health().ok
    store.close()
    print("done")
"""


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that anybody may reach and write to, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="statestore-test-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.mark.parametrize(("place", "mode"), [("sst", 0o500), ("manifest", 0o500), ("manifest", 0o000)])
def test_a_permission_that_is_lost_fails_checkpoints_until_it_is_back(
    open_directory: Path, place: str, mode: int
) -> None:
    code = f"PLACE, MODE = {place!r}, {mode}\n" + textwrap.dedent(LOST)
    assert "done" in run(textwrap.indent(code, "    "), open_directory / "db")
    with StateStore.open(open_directory / "db") as again:
        assert contents(again) == {"a": 1, "b": 2}


def test_two_processes_that_write_one_store_never_both_acknowledge(tmp_path: Path) -> None:
    """The older is fenced with the first commit after the younger opened, whatever it was doing."""
    older = start(CHECKPOINTS, tmp_path / "db")
    assert older.stdout is not None
    for _ in range(3):
        older.stdout.readline()
    younger = start(CHECKPOINTS, tmp_path / "db")
    assert younger.stdout is not None
    first_of_younger = int(younger.stdout.readline())
    rest, err = older.communicate(timeout=60)
    assert older.returncode == 1
    assert "FencedError" in err
    assert int(([*rest.split()] or ["3"])[-1]) < first_of_younger
    younger.send_signal(signal.SIGKILL)
    younger.communicate(timeout=60)
    check_recovered(tmp_path / "db", first_of_younger)


def test_a_process_that_was_stopped_for_long_is_fenced_when_it_goes_on(tmp_path: Path) -> None:
    process = start(CHECKPOINTS, tmp_path / "db")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    with StateStore.open(tmp_path / "db") as store:
        assert store.restored is not None
        newest = store.restored.checkpoint_id
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "FencedError" in err
        assert int((out.split() or ["1"])[-1]) <= newest
        put(store, at=newest + 1, **{f"k{newest + 1}": newest + 1})
        store.checkpoint(job(newest + 1)).result(20)
    check_recovered(tmp_path / "db", newest + 1)
