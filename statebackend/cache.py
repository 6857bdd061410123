"""Decoded blocks of SSTables in memory, least recently used first out, and the reads through them.

What is in memory is read on the caller's thread; only what is missing costs a change of threads.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import pyarrow as pa

from statebackend.merge import TableLayout
from statebackend.objectstore import ObjectStore
from statebackend.sstable import EncodedSSTable, SSTableIndex, SSTableMeta, read_blocks, read_index

__all__ = ["BlockCache", "BlockReader", "BlockSelector"]

BlockSelector: TypeAlias = Callable[[SSTableIndex], Sequence[int]]
"""Numbers of the blocks that a read needs, in order, by the index."""


class BlockCache:
    """Blocks by (file, number) up to a number of bytes; thread-safe."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        # State below is protected by _lock.
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[str, int], pa.RecordBatch] = OrderedDict()
        self._bytes = 0
        self._hits = self._misses = 0

    @property
    def bytes_max(self) -> int:
        """The limit."""
        return self._bytes_max

    @property
    def requests(self) -> tuple[int, int]:
        """How many blocks were asked for and found, and not found, so far."""
        return self._hits, self._misses

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._bytes

    def get(self, name: str, number: int) -> pa.RecordBatch | None:
        """The block, or None."""
        with self._lock:
            block = self._blocks.get((name, number))
            if block is None:
                self._misses += 1
                return None
            self._hits += 1
            self._blocks.move_to_end((name, number))
            return block

    def put(self, name: str, number: int, block: pa.RecordBatch) -> None:
        """Keep the block; older ones give way."""
        with self._lock:
            if (name, number) in self._blocks:
                return
            self._blocks[name, number] = block
            self._bytes += block.nbytes
            while self._bytes > self._bytes_max and self._blocks:
                _, old = self._blocks.popitem(last=False)
                self._bytes -= old.nbytes


class BlockReader:
    """Reads blocks of SSTables through the cache; thread-safe."""

    def __init__(self, objects: ObjectStore, cache: BlockCache) -> None:
        self._objects = objects
        self._cache = cache
        self._indexes: dict[str, SSTableIndex] = {}
        self._in_use: Counter[str] = Counter()  # guarded by _lock
        self._lock = threading.Lock()

    @contextmanager
    def using(self, files: Sequence[SSTableMeta]) -> Iterator[None]:
        """Keep the collector of this process from deleting files while they are read."""
        names = [f.name for f in files]
        with self._lock:
            self._in_use.update(names)
        try:
            yield
        finally:
            with self._lock:
                self._in_use.subtract(names)

    def in_use(self) -> frozenset[str]:
        """Names of the files that reads are using now."""
        with self._lock:
            self._in_use = +self._in_use
            return frozenset(self._in_use)

    @property
    def cache(self) -> BlockCache:
        """The cache that is read through."""
        return self._cache

    @property
    def cache_bytes(self) -> int:
        """Bytes of decoded blocks held now."""
        return self._cache.nbytes

    @property
    def index_bytes(self) -> int:
        """Bytes of block indexes held now; they stay as long as their file is live, outside the cache's limit."""
        return sum(index.entries.nbytes for index in tuple(self._indexes.values()))

    def keep(self, table: EncodedSSTable) -> None:
        """Keep what was just written, so that it need not be read back."""
        self._indexes[table.meta.name] = table.index
        for number, block in enumerate(table.blocks):
            self._cache.put(table.meta.name, number, block)

    def forget(self, live: set[str]) -> None:
        """Let go of the indexes of files that are no longer live."""
        self._indexes = {name: index for name, index in self._indexes.items() if name in live}

    async def index(self, meta: SSTableMeta) -> SSTableIndex:
        """The index of a file, read once."""
        if (index := self._indexes.get(meta.name)) is None:
            index = self._indexes[meta.name] = await read_index(self._objects, meta)
        return index

    def cached(self, meta: SSTableMeta, select: BlockSelector) -> list[pa.RecordBatch] | None:
        """The selected blocks if all of them are in memory; any thread, no request."""
        if (index := self._indexes.get(meta.name)) is None:
            return None
        blocks: list[pa.RecordBatch] = []
        for number in select(index):
            if (block := self._cache.get(meta.name, number)) is None:
                return None
            blocks.append(block)
        return blocks

    async def read(self, layout: TableLayout, meta: SSTableMeta, select: BlockSelector) -> list[pa.RecordBatch]:
        """The selected blocks, in order; runs on the store's runtime."""
        index = await self.index(meta)
        found = {number: self._cache.get(meta.name, number) for number in select(index)}
        missing = [number for number, block in found.items() if block is None]
        if missing:
            for number, block in zip(
                missing, await read_blocks(self._objects, meta, index, missing, layout.stored), strict=True
            ):
                found[number] = block
                self._cache.put(meta.name, number, block)
        return [block for block in found.values() if block is not None]
