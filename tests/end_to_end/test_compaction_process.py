"""Compactors as real processes: beside a writer and each other, killed, stopped, left behind by their parent."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from statebackend import StateStore, StoreSettings, TableKind, TableSpec
from statebackend.compactor import SUPERSEDED_EXIT_CODE
from statebackend.inspect import read_store
from statebackend.verification import verify

SPEC = TableSpec(name="t", schema=pa.schema([("k", pa.int64()), ("v", pa.int64())]), key=("k",), kind=TableKind.UPSERT)
KEYS = 20_000
SETTINGS = StoreSettings(compaction="none", l0_files_max=3, gc_interval_s=0.2, retained_checkpoints=2)


def flush(store: StateStore, step: int) -> None:
    """Write every key and a few more, so that what is there is known."""
    keys = np.arange(step, KEYS + step)
    store.table(SPEC).write(pa.record_batch([keys, np.full(KEYS, step)], schema=SPEC.schema))
    store.flush()


def check(store: StateStore, last: int, first: int = 0) -> None:
    found = pa.Table.from_batches(store.table(SPEC).scan()).sort_by("k")
    assert found["k"].to_pylist() == list(range(first, KEYS + last))
    expected = [*range(first, last), *[last] * KEYS]
    assert found["v"].to_pylist() == expected


def eventually(condition: Callable[[], bool], deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@contextmanager
def compact(path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "statebackend", "compact", str(path), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def claimed(path: Path, epoch: int) -> Callable[[], bool]:
    def holds() -> bool:
        latest = read_store(str(path)).latest
        return latest.compactor_epoch >= epoch and latest.compactor_id is not None

    return holds


def test_two_compactors_and_a_running_writer_keep_the_store_sound_and_the_first_ends_quietly(tmp_path: Path) -> None:
    with StateStore.open(tmp_path, SETTINGS) as store:
        flush(store, 0)
        with compact(tmp_path, "--follow") as first:
            eventually(claimed(tmp_path, 2))
            for step in range(1, 10):
                flush(store, step)
            with compact(tmp_path, "--follow") as second:
                eventually(claimed(tmp_path, 3))
                for step in range(10, 30):
                    flush(store, step)
                assert first.wait(60) == SUPERSEDED_EXIT_CODE
                assert "another compactor took over" in first.communicate()[0]
                merged = f"sst/c{read_store(str(tmp_path)).latest.compactor_epoch}-"
                eventually(lambda: any(n.startswith(merged) for n in read_store(str(tmp_path)).latest.files))
                second.send_signal(signal.SIGTERM)
                assert second.wait(60) == 0
                assert "the claim is released" in second.communicate()[0]
        flush(store, 30)
        check(store, 30)
        assert store.manifest.compactor_id is None
    assert not verify(str(tmp_path)).problems


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_releases_its_claim(tmp_path: Path, signal_number: signal.Signals) -> None:
    with StateStore.open(tmp_path, SETTINGS) as store:
        flush(store, 0)
    with compact(tmp_path, "--follow") as process:
        eventually(claimed(tmp_path, 2))
        process.send_signal(signal_number)
        assert process.wait(60) == 0
    assert read_store(str(tmp_path)).latest.compactor_id is None


def test_a_store_whose_compactor_process_is_killed_at_random_moments_stays_sound(tmp_path: Path) -> None:
    rng = random.Random(0)
    settings = StoreSettings(
        compaction="process", compaction_takeover_s=3.0, l0_files_max=2, gc_interval_s=0.2, retained_checkpoints=2
    )
    with StateStore.open(tmp_path, settings) as store:
        child = store._compactor_process
        assert child is not None
        step = 0
        for kill in range(3):
            eventually(lambda: child.pid is not None)
            eventually(lambda: read_store(str(tmp_path)).latest.compactor_id not in (None, store.manifest.writer_id))
            for _ in range(rng.randrange(3, 8)):
                flush(store, step)
                step += 1
            time.sleep(rng.random() / 2)
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            eventually(lambda n=kill: child.starts > n + 1 or child.last_error is not None)  # type: ignore[misc]
            if child.last_error is not None:
                assert "ended with code -9" in str(child.last_error)
                assert not store.health().ok
            eventually(lambda n=kill: child.starts > n + 1)  # type: ignore[misc]
        flush(store, step)
        eventually(lambda: any(f.level for f in read_store(str(tmp_path)).latest.tables["t"].files))
        check(store, step)
        pid = child.pid
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with StateStore.open(tmp_path, SETTINGS) as store:
        check(store, step)
    assert not verify(str(tmp_path)).problems


OPEN_AND_DIE = """
import os, sys
from statebackend import StateStore, StoreSettings
from tests.end_to_end.test_compaction_process import flush
store = StateStore.open(sys.argv[1], StoreSettings(compaction="process", l0_files_max=2))
flush(store, 0)
print(store._compactor_process.pid, flush=True)
sys.stdin.readline()
os._exit(9)
"""


def test_the_compactor_process_ends_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", OPEN_AND_DIE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    eventually(claimed(tmp_path, 2))
    parent.communicate("die\n")

    def gone() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return Path(f"/proc/{pid}/stat").exists() and " Z " in Path(f"/proc/{pid}/stat").read_text()

    eventually(gone)
    assert not verify(str(tmp_path)).problems


def test_the_writer_takes_over_from_a_compactor_process_that_cannot_work(tmp_path: Path) -> None:
    settings = StoreSettings(compaction="process", compaction_takeover_s=0.2, l0_files_max=2, gc_interval_s=None)
    with StateStore.open(tmp_path, settings) as store:
        child = store._compactor_process
        assert child is not None
        eventually(lambda: child.pid is not None)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGSTOP)
        try:
            for step in range(4):
                flush(store, step)
            eventually(lambda: store._compactor.progress.completed > 0)
            check(store, 3)
        finally:
            os.kill(child.pid, signal.SIGCONT)


def test_a_store_in_memory_has_no_compactor_process() -> None:
    with pytest.raises(ValueError, match="cannot reach a store in memory"):
        StateStore.open("memory://nowhere", StoreSettings(compaction="process"))


def test_storage_options_are_told_by_stdin_and_never_on_the_command_line(tmp_path: Path) -> None:
    options = {"auto_mkdir": True}
    with StateStore.open(tmp_path, StoreSettings(compaction="process"), storage_options=options) as store:
        child = store._compactor_process
        assert child is not None
        eventually(lambda: child.pid is not None)
        assert "auto_mkdir" in child._told
        assert b"auto_mkdir" not in Path(f"/proc/{child.pid}/cmdline").read_bytes()
    with pytest.raises(ValueError, match="plain storage options"):
        StateStore.open(tmp_path, StoreSettings(compaction="process"), storage_options={"asynchronous": object()})
