"""An object store around a remote one that keeps what was read of SSTables, and what was written, on the local disk.

An SSTable never changes, so what is kept is never stale. It is kept in chunks of a fixed size: a read takes the chunks
that it touches, and those that are not there are fetched, neighbours in one request. Everything else goes through.
"""

# ruff: noqa: D102  (the methods of a store are documented in `ObjectStore`)
from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import ParamSpec, TypeAlias, TypeVar

from statebackend.disk_cache import DiskCache
from statebackend.objectstore_base import Data, ObjectStore, PutResult

__all__ = ["DiskCachingObjectStore"]

_T = TypeVar("_T")
_P = ParamSpec("_P")
_Chunks: TypeAlias = list[bytes | None]

CHUNK_BYTES = 256 << 10
"""Larger means fewer files and requests, smaller less that is read in vain around a block."""


class DiskCachingObjectStore:
    """See the module. ``executor`` runs the calls to the local disk. ``hits`` and ``misses`` count chunks."""

    def __init__(self, inner: ObjectStore, cache: DiskCache, executor: Executor, *, chunk_bytes: int = CHUNK_BYTES):
        self._inner = inner
        self.cache = cache
        self._executor = executor
        self._chunk_bytes = chunk_bytes
        self.hits = 0
        self.misses = 0

    async def get(self, name: str) -> bytes:
        return await self._inner.get(name)

    async def get_range(self, name: str, start: int, end: int | None = None) -> bytes:
        if not _is_sstable(name) or start < 0 or end is None or end <= start:
            return await self._inner.get_range(name, start, end)
        first, last = start // self._chunk_bytes, (end - 1) // self._chunk_bytes
        chunks = await self._run(self._look, name, range(first, last + 1))
        found = sum(c is not None for c in chunks)
        self.hits += found
        self.misses += len(chunks) - found
        for low, high in _gaps(chunks):
            at, size = (first + low) * self._chunk_bytes, (high - low) * self._chunk_bytes
            data = await self._inner.get_range(name, at, at + size)
            fetched = [data[i : i + self._chunk_bytes] for i in range(0, size, self._chunk_bytes)]
            chunks[low:high] = fetched
            await self._run(self._keep, name, first + low, fetched)
        offset = start - first * self._chunk_bytes
        data = b"".join(c for c in chunks if c is not None)[offset : offset + end - start]
        if len(data) < end - start:
            # Beyond the end of the object, or a chunk was cut short on its way here: the storage itself decides.
            await self._run(self.cache.forget, name)
            return await self._inner.get_range(name, start, end)
        return data

    async def put(self, name: str, data: Data) -> None:
        await self._inner.put(name, data)

    async def put_if_absent(self, name: str, data: Data) -> PutResult:
        result = await self._inner.put_if_absent(name, data)
        if result is PutResult.CREATED and _is_sstable(name):
            view = memoryview(data).cast("B")
            step = self._chunk_bytes
            await self._run(self._keep, name, 0, [view[i : i + step] for i in range(0, len(view), step)])
        return result

    async def list(self, prefix: str) -> list[str]:
        return await self._inner.list(prefix)

    async def delete(self, name: str) -> None:
        await self._inner.delete(name)
        if _is_sstable(name):
            await self._run(self.cache.forget, name)

    def describe(self) -> str:
        return self._inner.describe()

    def _look(self, name: str, numbers: range) -> _Chunks:
        return [self.cache.get(name, number) for number in numbers]

    def _keep(self, name: str, first: int, chunks: Sequence[bytes | memoryview]) -> None:
        for number, chunk in enumerate(chunks, first):
            if len(chunk):
                self.cache.put(name, number, chunk)

    async def _run(self, call: Callable[_P, _T], *args: _P.args, **_: _P.kwargs) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)


def _is_sstable(name: str) -> bool:
    return "/sst/" in f"/{name}"


def _gaps(chunks: Sequence[bytes | None]) -> Iterator[tuple[int, int]]:
    """Runs of missing chunks as ``(first, after the last)``."""
    begin: int | None = None
    for number, chunk in enumerate([*chunks, b""]):
        if chunk is None and begin is None:
            begin = number
        elif chunk is not None and begin is not None:
            yield begin, number
            begin = None
