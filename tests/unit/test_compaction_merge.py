"""How one merge is carried out: several ranges at once, within a budget, and no merge in the way of another."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from statebackend import StoreSettings, compaction_merge
from statebackend.compaction_merge import _ByteBudget
from tests.support.faulty_objectstore import FaultPlan
from tests.support.stores import KV, LOG, World, contents, put

SETTINGS = StoreSettings(block_rows=8, l0_files_max=1, compaction_bytes=1200, cpu_threads=2, gc_interval_s=None)


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_ranges_of_one_merge_are_merged_on_several_threads_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, calls, merge = threading.Barrier(2), [0], compaction_merge._merge_pieces

    def meets_another(*args: object) -> pa.RecordBatch:
        calls[0] += 1
        if calls[0] <= 2:
            both.wait(30)  # raises unless two of them are under way
        return merge(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(compaction_merge, "_merge_pieces", meets_another)
    with world.open(settings=SETTINGS) as store:
        for step in range(2):
            put(store, **{f"k{i}": step for i in range(100)})
            store.flush()
        eventually(lambda: store._compactor.progress.completed == 1)
        assert calls[0] > 4
        assert contents(store) == {f"k{i}": 1 for i in range(100)}
        stats = store._compactor.stats
        assert (stats.runs, stats.rows_in, stats.rows_dropped) == (1, 200, 100)
        assert 0 < stats.bytes_out < stats.bytes_in


def test_a_block_that_two_ranges_share_is_read_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []
    ranges, read_blocks = [0], compaction_merge.read_blocks

    async def counts(objects: Any, meta: Any, index: Any, numbers: Any, schema: Any) -> Any:
        ranges[0] += 1
        read.extend((meta.name, number) for number in numbers)
        return await read_blocks(objects, meta, index, numbers, schema)

    monkeypatch.setattr(compaction_merge, "read_blocks", counts)
    with world.open(settings=replace(SETTINGS, block_rows=50, compaction_bytes=5000)) as store:
        for step in range(2):
            put(store, **{f"k{i}": step for i in range(400)})
            store.flush()
        eventually(lambda: store._compactor.progress.completed == 1)
    assert len(read) == len(set(read)) == 2 * 400 / 50
    assert ranges[0] > 4


def test_bytes_under_way_never_exceed_the_budget_and_one_that_is_larger_waits_for_all_of_it() -> None:
    async def scenario() -> None:
        budget = _ByteBudget(100)
        assert [await budget.take(60), await budget.take(40)] == [60, 40]
        assert not budget.fits(1)
        larger = asyncio.create_task(budget.take(500))
        await asyncio.sleep(0)
        budget.give_back(60)
        await asyncio.sleep(0)
        assert not larger.done()
        budget.give_back(40)
        assert await larger == 100

    asyncio.run(scenario())


def test_a_large_merge_keeps_a_small_one_of_another_table_not_waiting(world: World) -> None:
    plan = FaultPlan()
    settings = StoreSettings(block_rows=8, l0_files_max=1, file_bytes_max=4000, gc_interval_s=None)
    with world.open(plan, settings=settings) as store:
        stalled = plan.hang("put_if_absent", "sst/c1-0-*")
        for step in range(2):
            put(store, **{f"k{i}": step for i in range(1000)})
            store.flush()
        stalled.wait_until_reached()
        for step in range(2):
            store.table(LOG).write(pa.record_batch({"at": [step], "text": ["x"]}, schema=LOG.schema))
            store.flush()
        eventually(lambda: [f.level for f in store.manifest.tables["log"].files] == [1])
        assert [f.level for f in store.manifest.tables["kv"].files] == [0, 0]
        stalled.release()
        eventually(lambda: {f.level for f in store.manifest.tables["kv"].files} == {1})
        assert contents(store) == {f"k{i}": 1 for i in range(1000)}


def test_a_crowded_table_that_this_process_did_not_open_is_merged_and_starves_no_other(world: World) -> None:
    quiet = StoreSettings(l0_files_max=2, compaction="none", gc_interval_s=None)
    with world.open(settings=quiet) as store:
        for step in range(6):
            store.table(LOG).write(pa.record_batch({"at": [step], "text": ["x"]}, schema=LOG.schema))
            store.flush()
    with world.open(settings=StoreSettings(l0_files_max=2, gc_interval_s=None)) as store:
        store.table(KV)
        for step in range(3):
            put(store, k=step)
            store.flush()
        eventually(lambda: all({f.level for f in t.files} == {1} for t in store.manifest.tables.values()))
