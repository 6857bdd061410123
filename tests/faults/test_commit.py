"""Conflicts, fences and lost responses: the three that must never be taken for one another."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf
from pathlib import Path

import pyarrow as pa
import pytest

from statebackend import (
    CommitUnknownError,
    CorruptionError,
    FencedError,
    JobState,
    StateStore,
    StorageFullError,
    StorageUnavailableError,
    StoreSettings,
)
from statebackend.manifest_store import manifest_name
from tests.support.faulty_objectstore import CrashedError, FaultPlan, When
from tests.support.stores import KV, QUICK, World, contents, job, put


def test_prefill_then_flush_from_many_threads_beside_the_ticker(world: World, tmp_path: Path) -> None:
    """A database that is filled and then flushed from several places is still its own only writer."""
    ticking = StoreSettings(flush_interval_s=0.002, l0_files_max=4)
    for store in (
        StateStore.open(tmp_path / "db", ticking),
        StateStore.open("memory://", ticking, objects=world.objects),
    ):
        with store:
            for start in range(0, 20_000, 1000):
                put(store, **{f"k{i}": i for i in range(start, start + 1000)})

            def write_and_flush(i: int, store: StateStore = store) -> int:
                put(store, **{f"x{i}": i})
                return int(store.flush().checkpoint_id)

            with ThreadPoolExecutor(8) as pool:
                ids = list(pool.map(write_and_flush, range(40)))
            assert len(set(ids)) == 40
            assert store.health().ok, store.health()
            store.flush()
    for again in (StateStore.open(tmp_path / "db"), StateStore.open("memory://", objects=world.objects)):
        with again:
            assert len(contents(again)) == 20_040


def test_a_lost_response_on_the_manifest_is_recognised_as_ones_own(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan) as store:
        put(store, a=1)
        plan.lose_response("put_if_absent", "manifest/*")
        assert store.checkpoint(job(1)).result(10).checkpoint_id == 1
        assert store.manifest.number == 2, "the attempt must not be repeated under another number"
        put(store, a=2)
        store.checkpoint(job(2)).result(10)
    with world.open() as again:
        assert contents(again) == {"a": 2}


def test_a_lost_response_while_opening_does_not_fence_the_opener(world: World) -> None:
    plan = FaultPlan()
    plan.lose_response("put_if_absent", "manifest/*")
    with world.open(plan) as store:
        put(store, a=1)
        store.checkpoint(job(1)).result(10)


def test_a_lost_response_on_an_sstable_is_recognised_by_its_bytes(world: World) -> None:
    plan = FaultPlan()
    plan.lose_response("put_if_absent", "sst/*")
    with world.open(plan) as store:
        put(store, a=1)
        store.checkpoint(job(1)).result(10)
        assert contents(store) == {"a": 1}


@pytest.mark.parametrize("when", list(When))
def test_an_unknown_outcome_is_settled_by_the_next_commit(world: World, when: When) -> None:
    plan = FaultPlan()
    with world.open(plan, settings=StoreSettings(commit_timeout_s=0.2)) as store:
        put(store, a=1)
        break_ = plan.fail if when is When.BEFORE else plan.lose_response
        break_("put_if_absent", "manifest/*", times=inf)
        plan.fail("get", "manifest/*", times=inf)
        with pytest.raises(CommitUnknownError):
            store.checkpoint(job(1)).result(20)
        plan.clear()
        assert contents(store) == {"a": 1}
        put(store, b=2)
        store.checkpoint(job(2)).result(10)
        assert sum(f.rows for f in store.manifest.files.values()) == 2, "nothing is added twice"
    with world.open() as again:
        assert contents(again) == {"a": 1, "b": 2}
        assert again.restored is not None
        assert again.restored.job == job(2)


def test_a_request_that_arrives_late_is_met_as_ones_own(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan, settings=StoreSettings(commit_timeout_s=5, request_timeout_s=0.1)) as store:
        put(store, a=1)
        late = plan.hang("put_if_absent", "manifest/*")
        future = store.checkpoint(job(1))
        late.wait_until_reached()
        assert future.result(10).checkpoint_id == 1
        late.release()
        put(store, a=2)
        assert store.checkpoint(job(2)).result(10).checkpoint_id == 2


def test_a_second_opener_fences_the_first(world: World) -> None:
    with world.open(seed=1) as old:
        put(old, a=1)
        old.checkpoint(job(1)).result(10)
        with world.open(seed=2) as new:
            put(old, a=666)
            with pytest.raises(FencedError, match="epoch 2"):
                old.checkpoint(job(666)).result(10)
            with pytest.raises(FencedError):
                put(old, a=666)
            assert not old.health().ok
            put(new, b=2)
            new.checkpoint(job(2)).result(10)
            assert contents(new) == {"a": 1, "b": 2}


def test_of_racing_openers_each_gets_an_epoch_of_its_own(world: World) -> None:
    barrier = threading.Barrier(8)

    def race(seed: int) -> tuple[int, int]:
        barrier.wait()
        with world.open(seed=seed) as store:
            return int(store.manifest.writer_epoch), int(store.manifest.number)

    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(race, range(8)))
    assert sorted(epoch for epoch, _ in opened) == list(range(1, 9))
    assert sorted(number for _, number in opened) == list(range(1, 9))


def test_a_writer_that_stalled_before_creating_a_collected_number_does_not_acknowledge(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan, seed=1) as stalled:
        put(stalled, a=666)
        held = plan.hang("put_if_absent", "manifest/*")
        future = stalled.checkpoint(job(666))
        held.wait_until_reached()
        with world.open(seed=2) as successor:
            for i in range(5):
                put(successor, a=i)
                successor.checkpoint(job(i)).result(10)
            newest = int(successor.manifest.number)
            for number in range(1, newest - 1):  # what a collector may remove: all but the newest two
                asyncio.run(world.objects.delete(manifest_name(number)))
            held.release()
            with pytest.raises(FencedError):
                future.result(10)
            put(successor, a=7)
            successor.checkpoint(job(7)).result(10)
    with world.open() as again:
        assert contents(again) == {"a": 7}


def test_a_full_disk_fails_the_checkpoint_and_loses_nothing(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan) as store:
        put(store, a=1)
        plan.fail("put_if_absent", "sst/*", error=StorageFullError("no space left on device"))
        with pytest.raises(StorageFullError):
            store.checkpoint(job(1)).result(10)
        assert contents(store) == {"a": 1}
        assert isinstance(store.health().error, StorageFullError)
        put(store, b=2)
        store.checkpoint(job(2)).result(10)
    with world.open() as again:
        assert contents(again) == {"a": 1, "b": 2}


def test_a_path_that_can_never_be_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    began = time.monotonic()
    with pytest.raises(StorageUnavailableError, match="file"):
        StateStore.open(tmp_path / "file" / "db")
    assert time.monotonic() - began < 5, "what only an operator can mend is not tried again for a minute"


def test_a_manifest_is_never_written_before_what_it_names(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan) as store:
        put(store, a=1)
        held = plan.hang("put_if_absent", "sst/*")
        staged = threading.Event()
        future = store.checkpoint(job(1), prepare=[staged.set])
        held.wait_until_reached()
        assert staged.wait(5)
        assert manifest_name(2) not in asyncio.run(world.objects.list("manifest/"))
        held.release()
        future.result(10)


def test_a_store_without_manifests_but_with_files_is_not_a_new_store(world: World) -> None:
    with world.open() as store:
        put(store, a=1)
        store.checkpoint(job(1)).result(10)
    for name in asyncio.run(world.objects.list("manifest/")):
        asyncio.run(world.objects.delete(name))
    with pytest.raises(CorruptionError, match="no manifest"), world.open():
        pass


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_file_is_a_typed_error_that_names_it(world: World, damage: str) -> None:
    with world.open() as store:
        put(store, **{f"k{i}": i for i in range(500)})
        store.checkpoint(job(1)).result(10)
        name = next(iter(store.manifest.files))
    data = bytearray(asyncio.run(world.objects.get(name)))
    if damage == "missing":
        asyncio.run(world.objects.delete(name))
    else:
        data[len(data) // 2] ^= 1
        asyncio.run(world.objects.put(name, bytes(data[: len(data) // 3] if damage == "truncated" else data)))
    with world.open() as again, pytest.raises(Exception, match=name) as caught:
        contents(again)
    assert type(caught.value).__name__ in ("CorruptionError", "ObjectMissingError")


def test_a_damaged_manifest_stops_the_opening_and_is_named(world: World) -> None:
    with world.open() as store:
        put(store, a=1)
        store.checkpoint(job(1)).result(10)
    name = manifest_name(2)
    data = bytearray(asyncio.run(world.objects.get(name)))
    data[-1] ^= 1
    asyncio.run(world.objects.put(name, bytes(data)))
    with pytest.raises(CorruptionError, match=name), world.open():
        pass


@pytest.mark.parametrize("when", list(When))
def test_a_crash_at_any_storage_call_loses_no_acknowledged_checkpoint(when: When) -> None:
    """A short history with flushes, a merge of files and an expiry, crashed at every call in turn."""
    crashed_everywhere = False
    call = 0
    while not crashed_everywhere:
        call += 1
        world = World()
        plan = FaultPlan()
        plan.crash(nth=call, when=when)
        acknowledged: list[int] = []
        try:
            with world.open(plan) as store:
                for step in range(1, 7):
                    put(store, **{f"k{step % 3}": step, f"n{step}": step})
                    store.checkpoint(job(step)).result(10)
                    acknowledged.append(step)
                crashed_everywhere = True
        except CrashedError:
            pass
        with world.open(seed=call) as again:
            state = again.restored.job.sources["source"]["next"] if again.restored else 0
            assert state >= (acknowledged[-1] if acknowledged else 0)
            expected = {f"k{s % 3}": s for s in range(1, state + 1)} | {f"n{s}": s for s in range(1, state + 1)}
            assert contents(again) == expected, f"crashed at call {call}"
            put(again, after=1)
            again.checkpoint(job(99)).result(10)
        world.close()
    assert call > 15


@pytest.mark.parametrize("when", list(When))
def test_one_error_at_any_storage_call_never_loses_or_doubles_anything(when: When) -> None:
    call = 0
    while True:
        call += 1
        world = World()
        plan = FaultPlan()
        (plan.fail if when is When.BEFORE else plan.lose_response)(nth=call)
        with world.open(plan) as store:
            for step in range(1, 6):
                put(store, **{f"k{step % 3}": step, f"n{step}": step})
                store.checkpoint(job(step)).result(10)
            expected = {"k0": 3, "k1": 4, "k2": 5} | {f"n{s}": s for s in range(1, 6)}
            assert contents(store) == expected
            made = len(store._observer.stack.rooted._own.calls)
        with world.open() as again:
            assert contents(again) == expected, f"error at call {call}"
        world.close()
        if made < call:
            break


def test_the_same_seed_gives_the_same_bytes() -> None:
    def history() -> dict[str, bytes]:
        world = World()
        clock = _StillClock()
        # A still clock would let the collector run all the time, at whatever moment.
        with world.open(seed=42, settings=replace(QUICK, gc_interval_s=None), clock=clock) as store:
            for step in range(3):
                put(store, **{f"k{i}": step for i in range(100)})
                store.checkpoint(job(step)).result(10)
        world.close()
        return {name: bytes(file.getvalue()) for name, file in world.files.items()}

    assert history() == history()


class _StillClock:
    def now_ms(self) -> int:
        return 1_000

    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


def test_flush_is_refused_for_the_store_of_a_job(world: World) -> None:
    with world.open() as store:
        store.checkpoint(job(1)).result(10)
        with pytest.raises(ValueError, match="belongs to a job"):
            store.flush()


def test_storage_that_is_gone_is_reported_and_kept_in_health(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan, settings=StoreSettings(commit_timeout_s=0.1)) as store:
        put(store, a=1)
        plan.fail("put_if_absent", times=inf)
        with pytest.raises(StorageUnavailableError):
            store.checkpoint(JobState()).result(10)
        assert isinstance(store.health().error, StorageUnavailableError)
        plan.clear()
        store.checkpoint(JobState()).result(10)
        assert store.health().ok


def test_reads_go_on_while_a_flush_hangs(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan) as store:
        put(store, a=1)
        held = plan.hang("put_if_absent", "sst/*")
        future = store.checkpoint(job(1))
        held.wait_until_reached()
        put(store, a=2, b=3)
        assert contents(store) == {"a": 2, "b": 3}
        assert store.table(KV).lookup(pa.record_batch({"key": ["a"]})).batch.column("value").to_pylist() == [2]
        held.release()
        future.result(10)
