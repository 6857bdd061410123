"""Prefill a store, flush it from several threads at once beside its own ticker, read everything back.

The story behind it: filling a database and flushing it from several places must never look like a
second writer to itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from statebackend.errors import CorruptionError
from statebackend.settings import StoreSettings
from statebackend.store import StateStore
from statebackend.tables import TableKind, TableSpec
from statebackend.toolbox import Options

__all__ = ["Figure", "run_bench"]


@dataclass(frozen=True, slots=True)
class Figure:
    """How long one step took for how many rows."""

    step: str
    rows: int
    seconds: float


def run_bench(
    url: str, *, rows: int, batch_rows: int, threads: int, value_bytes: int, storage_options: Options = None
) -> list[Figure]:
    """Write ``rows`` rows with ``threads`` threads that also flush, reopen, read all back and check them.

    Raises `CorruptionError` when what is read differs from what was written.
    """
    if rows < 1 or batch_rows < 1 or threads < 1 or value_bytes < 1:
        raise ValueError("rows, batch_rows, threads and value_bytes must be at least 1")
    figures: list[Figure] = []

    @contextmanager
    def timed(step: str, rows: int = rows) -> Iterator[None]:
        started = time.perf_counter()
        yield
        figures.append(Figure(step, rows, time.perf_counter() - started))

    schema = pa.schema([("key", pa.int64()), ("value", pa.binary())])
    spec = TableSpec(name=f"bench_{rows}_{value_bytes}", schema=schema, key=("key",), kind=TableKind.UPSERT)
    with StateStore.open(url, StoreSettings(flush_interval_s=0.05), storage_options=storage_options) as store:
        table = store.table(spec)

        def fill(start: int) -> None:
            end = min(start + batch_rows, rows)
            values = _random_values(start, end - start, value_bytes)
            table.write(pa.record_batch([np.arange(start, end), values], schema=schema))

        with timed("write, ticker running"):
            _all_threads(threads, fill, range(0, rows, batch_rows))
        with timed(f"flush from {threads} threads"):
            _all_threads(threads, lambda _: store.flush(), range(threads))
        with timed("scan"):
            _check(table.scan(), rows)
        with timed("lookup all keys"):
            for start in range(0, rows, batch_rows):
                keys = pa.record_batch({"key": np.arange(start, min(start + batch_rows, rows))})
                if table.lookup(keys).hit.false_count:
                    raise CorruptionError(f"{url}: a key that was written is not found")
    with timed("reopen", 0):
        store = StateStore.open(url, storage_options=storage_options)
    with store, timed("scan after reopening"):
        _check(store.table(spec).scan(), rows)
    return figures


def _random_values(seed: int, count: int, size: int) -> pa.BinaryArray:
    """Values that no codec can shrink."""
    data = np.random.default_rng(seed).bytes(count * size)
    offsets = np.arange(count + 1, dtype=np.int32) * size
    return pa.Array.from_buffers(pa.binary(), count, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def _all_threads(threads: int, work: Callable[[int], object], items: range) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, items):
            pass


def _check(batches: list[pa.RecordBatch], rows: int) -> None:
    keys = np.sort(np.concatenate([b.column("key").to_numpy() for b in batches])) if batches else np.array([])
    if len(keys) != rows or not (keys == np.arange(rows)).all():
        raise CorruptionError(f"read back {len(keys)} rows, wrote {rows}")
