"""An object store around another that counts requests, bytes, errors and latencies, by operation and kind of object."""

# ruff: noqa: D102  (the methods of a store are documented in `ObjectStore`)
from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from statebackend.histogram import Histogram, HistogramRecorder
from statebackend.objectstore_base import Data, ObjectStore, PutResult

__all__ = ["CountingObjectStore", "OperationCount", "object_kind"]


def object_kind(name: str) -> str:
    """What an object is, by its name: manifest, flushed or merged SSTable, savepoint, inherited by a branch."""
    directory, _, file = name.partition("/")
    if directory == "sst":
        return {"w": "flushed", "c": "merged"}.get(file[:1], "sstable")
    return {"manifest": "manifest", "savepoint": "savepoint", "root": "inherited"}.get(directory, "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationCount:
    """What one operation on one kind of object has cost.

    ``requests`` calls, ``errors`` of them raised; bytes that were read and written; how long the calls took.
    """

    requests: int = 0
    errors: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    latency: Histogram = field(default_factory=Histogram)


class CountingObjectStore:
    """Counts what goes to ``inner``; used from one event loop, read from anywhere."""

    def __init__(self, inner: ObjectStore, clock: Callable[[], float] = time.perf_counter) -> None:
        self._inner = inner
        self._clock = clock
        self._counters: dict[tuple[str, str], _Counter] = {}

    def snapshot(self) -> Mapping[tuple[str, str], OperationCount]:
        """The counts up to now by (method's name, kind of object); the value does not change any more."""
        return {key: counter.snapshot() for key, counter in sorted(self._counters.copy().items())}

    @property
    def fetched(self) -> tuple[int, int]:
        """Requests that read, and the bytes that they brought."""
        counters = list(self._counters.copy().values())
        return sum(c.requests for c in counters), sum(c.bytes_read for c in counters)

    async def get(self, name: str) -> bytes:
        async with self._counted("get", name) as counter:
            data = await self._inner.get(name)
        counter.bytes_read += len(data)
        return data

    async def get_range(self, name: str, start: int, end: int | None = None) -> bytes:
        async with self._counted("get_range", name) as counter:
            data = await self._inner.get_range(name, start, end)
        counter.bytes_read += len(data)
        return data

    async def put(self, name: str, data: Data) -> None:
        async with self._counted("put", name) as counter:
            await self._inner.put(name, data)
        counter.bytes_written += memoryview(data).nbytes

    async def put_if_absent(self, name: str, data: Data) -> PutResult:
        async with self._counted("put_if_absent", name) as counter:
            result = await self._inner.put_if_absent(name, data)
        counter.bytes_written += memoryview(data).nbytes if result is PutResult.CREATED else 0
        return result

    async def list(self, prefix: str) -> list[str]:
        async with self._counted("list", prefix):
            return await self._inner.list(prefix)

    async def delete(self, name: str) -> None:
        async with self._counted("delete", name):
            await self._inner.delete(name)

    def describe(self) -> str:
        return self._inner.describe()

    @asynccontextmanager
    async def _counted(self, operation: str, name: str) -> AsyncIterator[_Counter]:
        counter = self._counters.setdefault((operation, object_kind(name)), _Counter())
        began = self._clock()
        try:
            yield counter
        except BaseException:
            counter.errors += 1
            raise
        finally:
            counter.requests += 1
            counter.latency.record(self._clock() - began)


class _Counter:
    """The mutable side of `OperationCount`."""

    def __init__(self) -> None:
        self.requests = self.errors = self.bytes_read = self.bytes_written = 0
        self.latency = HistogramRecorder()

    def snapshot(self) -> OperationCount:
        return OperationCount(
            requests=self.requests,
            errors=self.errors,
            bytes_read=self.bytes_read,
            bytes_written=self.bytes_written,
            latency=self.latency.snapshot(),
        )
