"""State beyond memory: early flushes, backpressure, and what a crash between them and their checkpoint leaves."""

from __future__ import annotations

import asyncio
import random
from math import inf

import numpy as np
import pyarrow as pa
import pytest

from statebackend import StateStore, StoreSettings, TableKind, TableSpec
from statebackend.garbage_collector import GarbageCollector
from statebackend.manifest_store import ManifestStore
from tests.support.faulty_objectstore import FaultPlan
from tests.support.stores import World, job

BIG = TableSpec(
    name="big", schema=pa.schema([("key", pa.int64()), ("value", pa.int64())]), key=("key",), kind=TableKind.UPSERT
)
TIGHT = StoreSettings(memory_bytes=64 << 10, cache_bytes=32 << 10, block_rows=512, l0_files_max=4, gc_interval_s=None)


def write(store: StateStore, start: int, rows: int = 1000, value: int = 0) -> None:
    keys = np.arange(start, start + rows)
    store.table(BIG).write(pa.record_batch([keys, np.full(rows, value)], schema=BIG.schema))


def count(store: StateStore) -> int:
    return sum(b.num_rows for b in store.table(BIG).scan())


def test_state_ten_times_the_budget_stays_inside_it(world: World) -> None:
    with world.open(settings=TIGHT) as store:
        for i in range(60):
            write(store, i * 1000)
            assert store.health().details["memory_bytes"] <= 2 * TIGHT.memory_bytes + 20_000
        assert store.reader.cache_bytes <= TIGHT.cache_bytes
        assert count(store) == 60_000
        probe = pa.record_batch({"key": [0, 31_234, 59_999, 60_000]})
        assert store.table(BIG).lookup(probe).hit.to_pylist() == [True, True, True, False]
        store.checkpoint(job(1)).result(20)
    with world.open(settings=TIGHT) as again:
        assert count(again) == 60_000


def test_an_early_flush_is_not_recovered_before_its_checkpoint(world: World) -> None:
    with world.open(settings=TIGHT) as store:
        write(store, 0, 10)
        store.checkpoint(job(1)).result(10)
        for i in range(20):
            write(store, i * 1000, value=9)
        assert asyncio.run(world.objects.list("sst/w1-0-0-2")) != []
    with world.open(settings=TIGHT) as again:
        assert count(again) == 10
        assert again.restored is not None
        assert again.restored.job == job(1)


def test_an_early_flush_after_the_barrier_belongs_to_the_next_checkpoint(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan, settings=TIGHT) as store:
        write(store, 0, 10, value=1)
        held = plan.hang("put_if_absent", "manifest/*")
        first = store.checkpoint(job(1))
        held.wait_until_reached()
        write(store, 0, 6000, value=2)
        held.release()
        first.result(10)
        named = sum(f.rows for f in store.manifest.tables["big"].files)
        assert named == 10
        assert count(store) == 6000
        store.checkpoint(job(2)).result(10)
    with world.open(settings=TIGHT) as again:
        assert {r["value"] for b in again.table(BIG).scan() for r in b.to_pylist()} == {2}


def test_a_slow_store_slows_the_writer_and_nothing_grows(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan, settings=TIGHT) as store:
        plan.delay("put_if_absent", "sst/*", seconds=0.02, times=inf)
        for i in range(40):
            write(store, i * 1000)
            assert store.health().details["memory_bytes"] <= 2 * TIGHT.memory_bytes + 20_000
        plan.clear()
        assert count(store) == 40_000


def test_a_failing_early_flush_loses_nothing_and_is_tried_again(world: World) -> None:
    plan = FaultPlan()
    settings = StoreSettings(memory_bytes=16 << 10, commit_timeout_s=0.05, gc_interval_s=None)
    with world.open(plan, settings=settings) as store:
        plan.fail("put_if_absent", "sst/*", times=inf)
        for i in range(5):
            write(store, i * 1000)
        assert count(store) == 5000
        plan.clear()
        store.checkpoint(job(1)).result(10)
    with world.open() as again:
        assert count(again) == 5000


@pytest.mark.parametrize("seed", range(5))
def test_collection_between_early_flushes_and_checkpoints_removes_nothing_that_is_needed(
    world: World, seed: int
) -> None:
    rng = random.Random(seed)
    expected: dict[int, int] = {}
    collector = GarbageCollector(world.objects, ManifestStore(world.objects))
    with world.open(settings=TIGHT, seed=seed) as store:
        for step in range(25):
            start, rows = rng.randrange(5000), rng.randrange(1, 3000)
            write(store, start, rows, step)
            expected.update(dict.fromkeys(range(start, start + rows), step))
            if rng.random() < 0.3:
                store.checkpoint(job(step)).result(10)
            if rng.random() < 0.3:
                asyncio.run(collector.run())
            assert count(store) == len(expected)
        store.checkpoint(job(99)).result(10)
    with world.open(settings=TIGHT) as again:
        found = {r["key"]: r["value"] for b in again.table(BIG).scan() for r in b.to_pylist()}
        assert found == expected
