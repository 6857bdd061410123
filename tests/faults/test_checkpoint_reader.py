"""Checkpoints read beside the job that owns the store: what a pin keeps, how it ends, and what is told then."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from math import inf
from pathlib import Path

import pyarrow as pa
import pytest

from statebackend import (
    CheckpointGoneError,
    CheckpointNotFoundError,
    CheckpointReader,
    ObjectMissingError,
    StateStore,
    StateStoreError,
    StorageUnavailableError,
    StoreClosedError,
    StoreSettings,
    clone,
    open_checkpoint,
    open_kv,
)
from statebackend.cli import main
from statebackend.inspect import read_store
from statebackend.maintenance import collect, create_savepoint, drop_savepoint, explain_object
from statebackend.manifest import Manifest
from statebackend.manifest_store import Clock
from statebackend.verification import verify
from tests.support.faulty_objectstore import CrashedError, FaultPlan, ManualClock, When
from tests.support.places import process
from tests.support.stores import KV, LOG, contents, job, put
from tests.unit.test_golden import JOB, aggregation, rows, states, write_golden

FEW = StoreSettings(retained_checkpoints=2, l0_files_max=2, block_rows=16, gc_interval_s=None)


class TestClock(ManualClock, Clock):
    __test__ = False

    def monotonic(self) -> float:
        return self()


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store whose newest checkpoint, the fourth, holds ``step`` 3."""
    path = str(tmp_path / "main")
    fill(path, range(4))
    return path


def fill(url: str, steps: range, clock: Clock | None = None) -> None:
    with StateStore.open(url, FEW, clock=clock) as store:
        for step in steps:
            put(store, **{f"k{step % 5}": step, "step": step})
            store.checkpoint(job(step)).result(10)


def step_of(reader: CheckpointReader) -> int:
    found: int = {r["key"]: r["value"] for b in reader.table("kv").scan() for r in b.to_pylist()}["step"]
    return found


def latest(url: str) -> Manifest:
    return read_store(url, manifests_max=1).latest


def files(url: str) -> set[str]:
    return {str(p.relative_to(url)) for p in Path(url).rglob("*") if p.is_file()}


def test_every_table_reads_as_it_did_at_the_checkpoint(tmp_path: Path) -> None:
    write_golden(tmp_path / "golden")
    of = aggregation()
    with open_checkpoint(tmp_path / "golden") as reader:
        assert reader.checkpoint.job == JOB
        assert {"upserts", "appends", "states"} <= set(reader.tables)
        assert rows(reader.table("appends").scan()) == [(5, "b"), (5, "b")]
        assert reader.table("appends").watermark == 2
        assert rows(reader.table("appends").scan(["name"], (5, 6))) == [("b",), ("b",)]
        found = reader.table("upserts").lookup(pa.record_batch({"id": [1, 2, 3]}))
        assert found.hit.to_pylist() == [True, False, True]
        final = of.merger.final(reader.table("states").scan())
        assert {(r["window"].minute, r["key"]): r["n"] for b in final for r in b.to_pylist()}[0, "a"] == 2
        assert reader.tables["states"].schema == states(of).schema
        with pytest.raises(KeyError, match="no table 'x'"):
            reader.table("x")


def test_tables_in_key_order_are_read_by_ranges(tmp_path: Path) -> None:
    with open_kv(tmp_path / "kv") as store:
        for i in range(30):
            store.put(b"%02d" % i, b"v")
        store.flush()
    with open_checkpoint(tmp_path / "kv") as reader:
        (name,) = reader.tables
        found = [k for b in reader.table(name).scan_keys(b"10", b"13") for k in b.column(0).to_pylist()]
        assert found == [b"10", b"11", b"12"]


def test_a_pinned_checkpoint_stays_as_it_was_while_the_job_goes_on(url: str) -> None:
    with StateStore.open(url, FEW) as store, open_checkpoint(url, 3) as reader:
        for step in range(10, 30):
            put(store, step=step)
            store.checkpoint(job(step)).result(10)
        collect(url)
        assert [int(r.checkpoint_id) for r in latest(url).retained] == [23, 24]
        assert step_of(reader) == 2
        assert reader.checkpoint.checkpoint_id == 3
        assert reader.checkpoint.job == job(2)
        assert contents(store)["step"] == 29
        assert store.health().ok
        (pin,) = latest(url).pins
        name = next(iter(reader._kept.manifest.files))
        assert f"named by pin {pin}" in explain_object(url, name)
    assert latest(url).pins == {}
    collect(url)
    assert not [n for n in files(url) if n.startswith("savepoint/")]
    assert name not in files(url)
    assert verify(url).problems == ()


def test_a_savepoint_is_read_even_if_it_is_dropped_meanwhile(url: str) -> None:
    create_savepoint(url, "old", checkpoint_id=3)
    fill(url, range(10, 20))
    with open_checkpoint(url, savepoint="old") as reader:
        drop_savepoint(url, "old")
        collect(url)
        assert step_of(reader) == 2


def test_a_pin_that_nobody_renews_ends_with_a_commit_after_its_time(url: str) -> None:
    writer, sleeper = TestClock(time.time()), TestClock(time.time())  # the reader's time stands still
    with open_checkpoint(url, lease_s=60, clock=sleeper) as reader:
        writer.advance(59)
        fill(url, range(10, 20), writer)
        collect(url)
        assert step_of(reader) == 3
        writer.advance(120)
        assert len(latest(url).pins) == 1, "time alone ends nothing"
        fill(url, range(20, 30), writer)
        assert latest(url).pins == {}
        collect(url)
    with open_checkpoint(url, pin=False) as reader:
        assert step_of(reader) == 29


def test_reading_after_the_pin_has_ended_says_that_the_checkpoint_is_gone(url: str) -> None:
    writer, sleeper = TestClock(time.time()), TestClock(time.time())
    with open_checkpoint(url, lease_s=60, clock=sleeper) as reader:
        writer.advance(120)
        fill(url, range(20, 30), writer)
        collect(url)
        with pytest.raises(CheckpointGoneError, match="has ended"):
            step_of(reader)
        assert isinstance(CheckpointGoneError(), CheckpointNotFoundError)


def test_a_renewal_that_comes_too_late_learns_that_the_pin_has_ended(url: str) -> None:
    writer, sleeper = TestClock(time.time()), TestClock(time.time())
    with open_checkpoint(url, lease_s=60, clock=sleeper) as reader:
        assert step_of(reader) == 3
        writer.advance(120)
        fill(url, range(20, 21), writer)
        sleep_until(sleeper, 1)
        sleeper.advance(20)
        until(lambda: reader._lease is not None and reader._lease._gone is not None)
        with pytest.raises(CheckpointGoneError, match="open the checkpoint again"):  # although its blocks are in memory
            step_of(reader)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what the background does."""
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    pytest.fail("nothing happens in the background")


def sleep_until(clock: TestClock, sleeps: int) -> None:
    """Wait until the renewal has gone to sleep so many times."""
    until(lambda: len(clock.slept) >= sleeps)


def test_a_pin_is_renewed_while_it_is_open(url: str) -> None:
    clock = TestClock(time.time())
    with open_checkpoint(url, lease_s=60, clock=clock) as reader:
        (before,) = latest(url).pins.values()
        for turn in range(1, 10):
            sleep_until(clock, turn)
            clock.advance(20)
        sleep_until(clock, 10)
        (after,) = latest(url).pins.values()
        assert after.expires_ms - before.expires_ms == 180_000
        fill(url, range(10, 20), clock)
        collect(url)
        assert step_of(reader) == 3


def test_a_pin_that_cannot_be_renewed_in_its_time_is_not_trusted(url: str) -> None:
    clock, plan = TestClock(time.time(), auto=False), FaultPlan()
    with process(plan), open_checkpoint(url, lease_s=60, clock=clock) as reader:
        assert step_of(reader) == 3
        plan.fail("list", times=inf)
        clock.advance(61)
        with pytest.raises(CheckpointGoneError, match="could not be renewed within its lease"):
            step_of(reader)
        plan.clear()


def test_without_a_pin_nothing_is_written_and_retention_ends_it(url: str) -> None:
    plan = FaultPlan()
    with process(plan) as running, open_checkpoint(url, pin=False) as reader:
        assert step_of(reader) == 3
        assert not [c for s in running.stores for c in s.calls if c.op not in ("get", "get_range", "list")]
    with open_checkpoint(url, pin=False) as reader:
        fill(url, range(10, 20))
        collect(url)
        with pytest.raises(CheckpointGoneError, match="checkpoint 4 is not retained any more"):
            step_of(reader)


def test_a_read_only_store_is_read_without_a_pin(url: str) -> None:
    for path in [Path(url), *Path(url).rglob("*")]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        with open_checkpoint(url, pin=False) as reader:
            assert step_of(reader) == 3
        if os.geteuid():
            with pytest.raises(StorageUnavailableError):
                open_checkpoint(url)
    finally:
        for path in [Path(url), *Path(url).rglob("*")]:
            path.chmod(0o700 if path.is_dir() else 0o600)


def test_a_missing_file_of_a_checkpoint_that_is_kept_is_damage(url: str) -> None:
    for pin in (True, False):
        with open_checkpoint(url, pin=pin) as reader:
            for name in reader._kept.manifest.files:
                (Path(url) / name).rename(f"{url}-{name.replace('/', '-')}")
            with pytest.raises(ObjectMissingError, match="does not exist"):
                step_of(reader)
            for name in reader._kept.manifest.files:
                Path(f"{url}-{name.replace('/', '-')}").rename(Path(url) / name)


def test_what_does_not_exist_cannot_be_opened(url: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="checkpoint 1 is not retained; retained are"):
        open_checkpoint(url, 1)
    with pytest.raises(CheckpointNotFoundError, match="no savepoint 'x'"):
        open_checkpoint(url, savepoint="x")
    with pytest.raises(CheckpointNotFoundError, match="no state store"):
        open_checkpoint(f"{url}-nope")
    with pytest.raises(ValueError, match="either"):
        open_checkpoint(url, 4, savepoint="x")
    with pytest.raises(ValueError, match="lease_s"):
        open_checkpoint(url, lease_s=0)
    reader = open_checkpoint(url)
    reader.close()
    reader.close()
    with pytest.raises(StoreClosedError):
        reader.table("kv").scan()


def test_no_thread_is_left_behind(url: str) -> None:
    before = set(threading.enumerate())
    with open_checkpoint(url) as reader:
        step_of(reader)
    with pytest.raises(CheckpointNotFoundError):
        open_checkpoint(url, 99)
    assert [t for t in threading.enumerate() if t not in before] == []


def test_a_crash_at_any_call_of_opening_and_closing_leaves_a_sound_store(url: str) -> None:
    for when in When:
        call, crashed = 0, True
        while crashed:
            call += 1
            plan = FaultPlan()
            plan.crash(nth=call, when=when)
            with process(plan) as running, suppress(CrashedError), open_checkpoint(url) as reader:
                step_of(reader)
            crashed = running.crashed is not None
            collect(url)
            assert verify(url).problems == ()
        assert call > 8
    late = TestClock(time.time() + 3600)
    fill(url, range(50, 51), late)
    assert latest(url).pins == {}, "whatever a crash left has expired"
    collect(url)
    assert not [n for n in files(url) if n.startswith("savepoint/")]


def test_collecting_ends_the_leases_of_a_store_without_a_job(tmp_path: Path) -> None:
    url = str(tmp_path / "old")
    fill(url, range(2), TestClock())
    with open_checkpoint(url, clock=TestClock()):  # its lease ended long ago, by the clock of the collector
        create_savepoint(url, "short", expires_ms=1)
        collect(url, dry_run=True)
        assert len(latest(url).leases) == 2
        collect(url)
        assert latest(url).leases == ()


def test_a_branch_is_read_as_any_store(url: str, tmp_path: Path) -> None:
    new = str(tmp_path / "branch")
    clone(url, new)
    with open_checkpoint(new) as reader:
        fill(new, range(100, 120))
        fill(url, range(100, 120))
        collect(new)
        collect(url)
        assert step_of(reader) == 3


def test_a_checkpoint_is_read_by_another_process(url: str) -> None:
    program = (
        "import sys, statebackend\n"
        "with statebackend.open_checkpoint(sys.argv[1]) as reader:\n"
        "    print(reader.checkpoint.checkpoint_id, sum(b.num_rows for b in reader.table('kv').scan()))\n"
    )
    with StateStore.open(url, FEW) as store:
        put(store, fresh=1)
        done = subprocess.run(
            [sys.executable, "-c", program, url], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.split() == ["4", "5"], "not what is not committed"
        store.checkpoint(job(9)).result(10)
        assert store.health().ok


def test_pins_are_shown(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with open_checkpoint(url):
        (pin,) = latest(url).pins
        assert main(["ls", url]) == 0
        assert pin in capsys.readouterr().out


def test_a_reader_of_many_files_reports_the_first_failure_as_a_state_store_error(url: str) -> None:
    with StateStore.open(url, FEW) as store:
        store.table(LOG).write(pa.record_batch({"at": [1], "text": ["x"]}, schema=LOG.schema))
        store.checkpoint(job(1)).result(10)
    plan = FaultPlan()
    with process(plan), open_checkpoint(url) as reader:
        plan.fail("get_range", times=inf, error=StateStoreError("broken"))
        with pytest.raises(StateStoreError, match="broken"):
            reader.table(LOG.name).scan()
        plan.clear()
        assert KV.name in reader.tables
