"""Blocks, filters and indexes of SSTables in memory, least recently used first out, and the reads through them.

What is in memory is read on the caller's thread; only what is missing costs a change of threads.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakValueDictionary

import pyarrow as pa

from statebackend.bloom import BloomFilter
from statebackend.merge import TableLayout
from statebackend.objectstore import ObjectStore
from statebackend.probe import SortedRows
from statebackend.sstable import EncodedSSTable, SSTableMeta, read_blocks, read_filter, read_index
from statebackend.sstable_index import SSTableIndex

__all__ = ["BlockCache", "BlockReader", "BlockSelector", "CachePool", "OpenFile"]

BlockSelector: TypeAlias = Callable[[SSTableMeta, SSTableIndex], Sequence[int]]
"""Numbers of the blocks of a file that a read needs, in order, by its index."""


_Entry: TypeAlias = SortedRows | BloomFilter | SSTableIndex
_FILTER, _INDEX = -1, -2
"""In place of the number of a block."""
_HELD_BYTES_MIN, _HELD_BYTES_MAX = 4 << 20, 32 << 20


@dataclass(frozen=True, slots=True)
class OpenFile:
    """What is known of a file before any block is read; ``filter`` is None where there is none to ask."""

    meta: SSTableMeta
    index: SSTableIndex
    filter: BloomFilter | None


class CachePool:
    """Blocks, filters and indexes of any number of stores, up to a number of bytes; thread-safe."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.lock = threading.Lock()
        # Guarded by it; by (whose, file, number of the block).
        self.entries: OrderedDict[tuple[BlockCache, str, int], _Entry] = OrderedDict()
        self.nbytes = 0

    def make_room(self, nbytes: int) -> bool:
        """Let go of what was not used for longest, until so much fits; False if it never does. The lock is held."""
        if nbytes > self.bytes_max:
            return False
        while self.nbytes + nbytes > self.bytes_max:
            (owner, _, _), entry = self.entries.popitem(last=False)
            owner.count(entry, -1)
        return True


class BlockCache:
    """One store's part of a pool: blocks by (file, number), filters and indexes by file; thread-safe."""

    def __init__(self, pool: CachePool) -> None:
        self._pool = pool
        # State below is protected by the pool's lock.
        self._bytes = self._index_bytes = 0
        self._hits = self._misses = 0

    @property
    def bytes_max(self) -> int:
        """The limit, of the whole pool."""
        return self._pool.bytes_max

    @property
    def requests(self) -> tuple[int, int]:
        """How many blocks were asked for and found, and not found, so far."""
        return self._hits, self._misses

    @property
    def nbytes(self) -> int:
        """Bytes held now by this store."""
        return self._bytes

    @property
    def index_bytes(self) -> int:
        """How many of them are indexes."""
        return self._index_bytes

    def get(self, name: str, number: int) -> SortedRows | None:
        """The block, or None."""
        with self._pool.lock:
            block = self._get(name, number)
            self._hits += block is not None
            self._misses += block is None
        return block if isinstance(block, SortedRows) else None

    def get_all(self, name: str, numbers: Sequence[int]) -> list[SortedRows] | None:
        """The blocks if all are there, else None and nothing is counted."""
        with self._pool.lock:
            found = [self._get(name, number) for number in numbers]
            blocks = [block for block in found if isinstance(block, SortedRows)]
            if len(blocks) < len(numbers):
                return None
            self._hits += len(blocks)
        return blocks

    def get_filter(self, name: str) -> BloomFilter | None:
        """The filter of the file, or None."""
        with self._pool.lock:
            found = self._get(name, _FILTER)
        return found if isinstance(found, BloomFilter) else None

    def get_index(self, name: str) -> SSTableIndex | None:
        """The index of the file, or None."""
        with self._pool.lock:
            found = self._get(name, _INDEX)
        return found if isinstance(found, SSTableIndex) else None

    def put(self, name: str, number: int, block: SortedRows) -> None:
        """Keep a block; what was not used for longest gives way."""
        self._put(name, number, block)

    def put_filter(self, name: str, bloom: BloomFilter) -> None:
        """Keep the filter of a file."""
        self._put(name, _FILTER, bloom)

    def put_index(self, name: str, index: SSTableIndex) -> None:
        """Keep the index of a file."""
        self._put(name, _INDEX, index)

    def drop(self, names: Collection[str]) -> None:
        """Let go of everything of some files."""
        self._remove(lambda name: name in names)

    def clear(self) -> None:
        """Let go of everything."""
        self._remove(lambda _: True)

    def count(self, entry: _Entry, sign: int) -> None:
        """An entry came or went; the pool's lock is held."""
        self._pool.nbytes += sign * entry.nbytes
        self._bytes += sign * entry.nbytes
        if isinstance(entry, SSTableIndex):
            self._index_bytes += sign * entry.nbytes

    def _put(self, name: str, number: int, entry: _Entry) -> None:
        with self._pool.lock:
            key = (self, name, number)
            if key not in self._pool.entries and self._pool.make_room(entry.nbytes):
                self._pool.entries[key] = entry
                self.count(entry, 1)

    def _remove(self, chosen: Callable[[str], bool]) -> None:
        entries = self._pool.entries
        with self._pool.lock:
            for key in [key for key in entries if key[0] is self and chosen(key[1])]:
                self.count(entries.pop(key), -1)

    def _get(self, name: str, number: int) -> _Entry | None:
        key = (self, name, number)
        entry = self._pool.entries.get(key)
        if entry is not None:
            self._pool.entries.move_to_end(key)
        return entry


class BlockReader:
    """Reads blocks of SSTables through the cache; thread-safe."""

    def __init__(self, objects: ObjectStore, cache: BlockCache) -> None:
        self._objects = objects
        self._cache = cache
        # What somebody uses is in memory, whether the cache has let go of it or not.
        self._used: WeakValueDictionary[str, SSTableIndex] = WeakValueDictionary()
        self._in_use: Counter[str] = Counter()  # guarded by _lock
        self._released: deque[list[str]] = deque()
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

    def hold(self, files: Iterable[SSTableMeta], owner: object) -> None:
        """Keep the collector of this process from deleting files for as long as ``owner`` is referred to."""
        names = [f.name for f in files]
        with self._lock:
            self._in_use.update(names)
        # An object may end on any thread at any moment, under the lock too: its end only leaves a note.
        weakref.finalize(owner, self._released.append, names).atexit = False

    def in_use(self) -> frozenset[str]:
        """Names of the files that reads are using now."""
        with self._lock:
            while self._released:
                self._in_use.subtract(self._released.popleft())
            self._in_use = +self._in_use
            return frozenset(self._in_use)

    @property
    def cache(self) -> BlockCache:
        """The cache that is read through."""
        return self._cache

    @property
    def cache_bytes(self) -> int:
        """Bytes of decoded blocks, filters and indexes held now."""
        return self._cache.nbytes

    @property
    def held_bytes(self) -> int:
        """Bytes of blocks that one lookup should hold at once, beside those in the cache: no more than fit there."""
        return max(_HELD_BYTES_MIN, min(_HELD_BYTES_MAX, self._cache.bytes_max))

    @property
    def index_bytes(self) -> int:
        """How many of them are block indexes."""
        return self._cache.index_bytes

    def keep(self, table: EncodedSSTable) -> None:
        """Keep what was just written, so that it need not be read back."""
        for number, block in enumerate(table.blocks):
            # A copy: the blocks are slices of the whole file, which one of them would hold.
            own = block if len(table.blocks) == 1 else pa.concat_batches([block])
            self._cache.put(table.meta.name, number, SortedRows.of(table.layout, own))
        if table.filter is not None and self.wants_filter(table.index):
            self._cache.put_filter(table.meta.name, table.filter)
        self._keep_index(table.meta, table.index)  # last, as what is used first

    def forget(self, names: Collection[str]) -> None:
        """Let go of files that are no longer live."""
        if names:
            self._cache.drop(names)

    # --- what is in memory; any thread, no request ---

    def index_now(self, meta: SSTableMeta) -> SSTableIndex | None:
        """The index of a file, if it is in memory."""
        return self._cache.get_index(meta.name) or self._used.get(meta.name)

    def open_now(self, meta: SSTableMeta) -> OpenFile | None:
        """The index and the filter of a file, if they are in memory as far as they are wanted."""
        if (index := self.index_now(meta)) is None:
            return None
        bloom = self._cache.get_filter(meta.name)
        return OpenFile(meta, index, bloom) if bloom is not None or not self.wants_filter(index) else None

    def wants_filter(self, index: SSTableIndex) -> bool:
        """Whether the file has a filter, and one that does not push everything else out of the cache."""
        return 0 < index.filter_bytes <= self._cache.bytes_max // 4

    def block_now(self, meta: SSTableMeta, number: int) -> SortedRows | None:
        """A block, if it is in memory."""
        return self._cache.get(meta.name, number)

    def blocks_now(self, meta: SSTableMeta, select: BlockSelector) -> list[SortedRows] | None:
        """The selected blocks, if all of them are in memory."""
        index = self.index_now(meta)
        return None if index is None else self._cache.get_all(meta.name, select(meta, index))

    # --- what may have to be read; on the store's runtime ---

    async def index(self, meta: SSTableMeta) -> SSTableIndex:
        """The index of a file."""
        if (index := self.index_now(meta)) is None:
            index, bloom = await read_index(self._objects, meta)
            self._keep_index(meta, index)
            if bloom is not None and self.wants_filter(index):
                self._cache.put_filter(meta.name, bloom)
        return index

    async def open(self, meta: SSTableMeta) -> OpenFile:
        """The index and the filter of a file, unless it has none or one that is too big for the cache."""
        index = await self.index(meta)
        bloom = self._cache.get_filter(meta.name)
        if bloom is None and self.wants_filter(index):
            bloom = await read_filter(self._objects, meta, index)
            self._cache.put_filter(meta.name, bloom)
        return OpenFile(meta, index, bloom)

    async def blocks(self, layout: TableLayout, meta: SSTableMeta, select: BlockSelector) -> list[SortedRows]:
        """The selected blocks, in order."""
        index = await self.index(meta)
        found = {number: self._cache.get(meta.name, number) for number in select(meta, index)}
        missing = [number for number, block in found.items() if block is None]
        if missing:
            read = await read_blocks(self._objects, meta, index, missing, layout)
            for number, batch in zip(missing, read, strict=True):
                found[number] = block = SortedRows.of(layout, batch)
                self._cache.put(meta.name, number, block)
        return [block for block in found.values() if block is not None]

    def _keep_index(self, meta: SSTableMeta, index: SSTableIndex) -> None:
        self._used[meta.name] = index
        self._cache.put_index(meta.name, index)
