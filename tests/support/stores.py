"""Stores for tests: a shared in-process object store, faults, a fixed random source, small tables."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from fsspec.implementations.memory import MemoryFileSystem

from statebackend import JobState, StateStore, StoreSettings, TableKind, TableOrder, TableSpec
from statebackend.objectstore import FsspecObjectStore
from tests.support.faulty_objectstore import FaultPlan, FaultyObjectStore

QUICK = StoreSettings(block_rows=64, l0_files_max=3, commit_timeout_s=2.0)

KV = TableSpec(
    name="kv", schema=pa.schema([("key", pa.string()), ("value", pa.int64())]), key=("key",), kind=TableKind.UPSERT
)
LOG = TableSpec(
    name="log",
    schema=pa.schema([("at", pa.int64()), ("text", pa.string())]),
    key=("at",),
    kind=TableKind.APPEND,
    order=TableOrder.TIME,
    time_field="at",
)


class World:
    """One place where objects live, and any number of openers, each with its own faults."""

    def __init__(self) -> None:
        fs = MemoryFileSystem(skip_instance_cache=True)
        fs.store, fs.pseudo_dirs = {}, [""]
        self.files: dict[str, Any] = fs.store
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="world")
        self.objects = FsspecObjectStore(fs, "/world", self._pool)

    @contextmanager
    def open(
        self, plan: FaultPlan | None = None, *, seed: int = 0, settings: StoreSettings = QUICK, **options: Any
    ) -> Iterator[StateStore]:
        store = StateStore.open(
            "memory://world",
            settings,
            objects=FaultyObjectStore(self.objects, plan or FaultPlan()),
            rng=random.Random(seed),
            **options,
        )
        try:
            yield store
        finally:
            store.close(5.0)

    def close(self) -> None:
        self._pool.shutdown()


def put(store: StateStore, **rows: int) -> None:
    store.table(KV).write(pa.record_batch({"key": list(rows), "value": list(rows.values())}, schema=KV.schema))


def contents(store: StateStore, spec: TableSpec = KV) -> dict[str, Any]:
    return {r["key"]: r["value"] for b in store.table(spec).scan() for r in b.to_pylist()}


def merged(store: StateStore) -> None:
    """Wait until the merges that a checkpoint has set off have ended, one way or the other."""

    async def ended() -> None:
        await store._compactor.run_if_due()
        while store._compactor.running:  # noqa: ASYNC110  (it has no event to wait for)
            await asyncio.sleep(0.001)

    store._runtime.call(ended)


def job(position: int) -> JobState:
    return JobState(sources={"source": {"next": position}}, watermarks={"source": position})
