"""Schedules so rare that few seeds meet them, made on purpose with real threads."""

from __future__ import annotations

import asyncio
import time
from math import inf

import pyarrow as pa
import pytest

from statebackend import CommitUnknownError, StateStore, StorageUnavailableError, StoreSettings
from statebackend import inspect as store_inspect
from statebackend.manifest_store import ManifestStore, manifest_name
from tests.support.faulty_objectstore import FaultPlan
from tests.support.stores import KV, LOG, World, contents, job, put


def append(store: StateStore, at: int) -> None:
    store.table(LOG).write(pa.record_batch({"at": [at], "text": [f"row {at}"]}, schema=LOG.schema))


def log(store: StateStore) -> list[int]:
    return [row["at"] for batch in store.table(LOG).scan() for row in batch.to_pylist()]


def test_rows_of_an_unknown_commit_are_read_once_when_a_merge_finds_it_committed(world: World) -> None:
    plan = FaultPlan()
    settings = StoreSettings(l0_files_max=1, commit_timeout_s=0.2, gc_interval_s=None)
    with world.open(plan, settings=settings) as store:
        merge = plan.hang("put_if_absent", "sst/c*")
        for at in (1, 2):
            append(store, at)
            store.checkpoint(job(at)).result(10)
        merge.wait_until_reached()
        append(store, 3)
        plan.lose_response("put_if_absent", "manifest/*", times=inf)
        plan.fail("get", "manifest/*", times=inf)
        with pytest.raises(CommitUnknownError):
            store.checkpoint(job(3)).result(20)
        assert log(store) == [1, 2, 3]
        plan.clear()
        merge.release()
        deadline = time.monotonic() + 10
        while not store._compactor.progress.completed and time.monotonic() < deadline:
            time.sleep(0.01)
        assert store.manifest.checkpoint_id == 3, "the merge is built on the commit whose outcome was unknown"
        assert log(store) == [1, 2, 3]
    with world.open() as again:
        assert log(again) == [1, 2, 3]


def test_what_a_failed_checkpoint_uploaded_stays_older_than_what_is_flushed_early(world: World) -> None:
    plan = FaultPlan()
    settings = StoreSettings(memory_bytes=2000, commit_timeout_s=0.1, l0_files_max=8, gc_interval_s=None)
    with world.open(plan, settings=settings) as store:
        put(store, key=1)
        append(store, 1)
        plan.fail("put_if_absent", lambda name: name.endswith("-2.arrow"), times=inf)
        with pytest.raises(StorageUnavailableError):
            store.checkpoint(job(1)).result(10)
        plan.clear()
        put(store, key=2)
        put(store, **{f"other{i}": i for i in range(500)})  # more than memory may hold, so it is flushed early
        put(store, last=0)
        assert store._early.early is not None
        store._early.early.result(10)
        assert contents(store)["key"] == 2
        found = store.table(KV).lookup(pa.record_batch({"key": ["key"]}))
        assert found.batch.column("value").to_pylist() == [2]
        store.checkpoint(job(2)).result(10)
    with world.open() as again:
        assert contents(again)["key"] == 2


def test_a_reader_whose_manifest_is_collected_before_it_is_read_looks_again(world: World) -> None:
    with world.open() as store:
        for step in range(4):
            put(store, a=step)
            store.checkpoint(job(step)).result(10)
        newest = int(store.manifest.number)

    class Stalled(ManifestStore):
        async def numbers(self) -> list[int]:
            first, self.numbers = [1], super().numbers  # type: ignore[method-assign]
            return first

    asyncio.run(world.objects.delete(manifest_name(1)))
    view = asyncio.run(store_inspect._read("memory://world", Stalled(world.objects), world.objects, 10))
    assert view.latest.number == newest
