"""Carries out one compaction plan: sorted files in, the files of one sorted run out.

The merge goes through consecutive key ranges (`plan_ranges`). While the CPU threads merge some, the
blocks of the next one are read, and a full file of the run is encoded and uploaded meanwhile. Blocks
that two ranges share are read once.

Invariants:

* Merges of one `RunMerger` together have read no more than ``compaction_bytes`` bytes of rows that are not
  merged yet (neither one key nor one block can be cut, so a range of one may be larger); beside these each holds
  what it merged for the file that it is about to write and the one it is writing, ``file_bytes_max`` each.
* Rows are dropped only by the watermark in the manifest that the plan was made from, which every
  later manifest has reached too.
* Inputs stay untouched; every file gets a name that was never used before.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from statebackend.cache import BlockReader
from statebackend.compaction import CompactionPlan, KeyRange, plan_ranges
from statebackend.flusher import upload_sstable
from statebackend.manifest_store import Clock
from statebackend.merge import TableLayout, concat
from statebackend.objectstore import ObjectStore
from statebackend.runtime import IsolatedRuntime
from statebackend.settings import StoreSettings
from statebackend.sstable import EncodedSSTable, SSTableMeta, encode_sstable, read_blocks
from statebackend.sstable_index import SSTableIndex

__all__ = ["Lane", "RunMerger", "let_go"]

_Blocks = Mapping[tuple[int, int], pa.RecordBatch]
"""Decoded blocks by (number of the input, number of the block)."""


@dataclass(slots=True, kw_only=True)
class Lane:
    """One merge at a time; its files have an owner of their own, so that its low mark speaks for no other merge.

    ``number`` among the lanes of a compactor; ``epoch`` of the compactor when the merge began; ``sequence``: the
    last one allotted in this epoch; ``plan``: what is being merged; ``taken``: whether somebody works here.
    """

    number: int
    epoch: int = 0
    sequence: int = 0
    plan: CompactionPlan | None = None
    taken: bool = False

    @property
    def owner(self) -> str:
        """Role, epoch, subtask, attempt, as in names of files and low marks."""
        return f"c{self.epoch}-{self.number}-0"

    def begin(self, plan: CompactionPlan, epoch: int) -> None:
        """Begin a merge under this epoch."""
        if epoch != self.epoch:
            self.epoch, self.sequence = epoch, 0
        self.plan = plan


class RunMerger:
    """Merges files of one store; see the module. Runs on the store's runtime."""

    def __init__(
        self,
        objects: ObjectStore,
        reader: BlockReader,
        runtime: IsolatedRuntime,
        settings: StoreSettings,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._objects = objects
        self._reader = reader
        self._runtime = runtime
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._budget = _ByteBudget(settings.compaction_bytes)

    async def merge(
        self, plan: CompactionPlan, layout: TableLayout, lane: Lane, on_rows: Callable[[int], Awaitable[None]]
    ) -> tuple[SSTableMeta, ...]:
        """Write the run; its files, in order, count once a manifest names them. None when nothing is alive.

        ``on_rows`` is awaited with the number of input rows merged by each step; what it raises ends the merge.
        """
        width = self._settings.cpu_threads
        output = _RunOutput(self, plan, layout, lane)
        merging: deque[tuple[int, asyncio.Task[pa.RecordBatch]]] = deque()
        blocks: _Blocks = {}

        async def take() -> None:
            rows, task = merging.popleft()
            await output.add(await task)
            await on_rows(rows)

        with self._reader.using(plan.inputs):  # they may leave the manifest while they are read
            indexes = await asyncio.gather(*(self._reader.index(meta) for meta in plan.inputs))
            ranges = plan_ranges(layout.spec, indexes, self._settings.compaction_bytes // (width + 1))
            try:
                for keys in ranges:
                    wanted = _wanted(layout, indexes, keys, plan.watermark)
                    fresh = sum(int(indexes[i].entries["memory"][n]) for i, n in wanted if (i, n) not in blocks)
                    while not self._budget.fits(fresh) and merging:
                        await take()
                    held = await self._budget.take(fresh)
                    try:
                        blocks = await self._read(plan, layout, indexes, wanted, blocks)
                        pieces = _pieces(layout, keys, blocks)
                    except BaseException:
                        self._budget.give_back(held)
                        raise
                    task = asyncio.create_task(self._runtime.run_cpu(_merge_pieces, layout, pieces, plan))
                    task.add_done_callback(partial(self._merged, held))
                    merging.append((sum(p.num_rows for p in pieces), task))
                    if len(merging) > width:
                        await take()
                while merging:
                    await take()
                return await output.finish()
            finally:
                output.abandon()
                let_go(task for _, task in merging)

    async def write(
        self, layout: TableLayout, pieces: Sequence[pa.RecordBatch], lane: Lane, run: str, sequence: int
    ) -> SSTableMeta:
        """Encode and upload one file of a run."""
        encoded = await self._runtime.run_cpu(
            _encode, layout, pieces, f"sst/{lane.owner}-{sequence}.arrow", sequence, run, self._settings
        )
        await upload_sstable(self._objects, encoded, self._clock, self._rng, self._settings.commit_timeout_s)
        return encoded.meta

    @property
    def file_bytes_max(self) -> int:
        """Bytes of rows of one file."""
        return self._settings.file_bytes_max

    def _merged(self, held: int, _: asyncio.Task[pa.RecordBatch]) -> None:
        self._budget.give_back(held)

    async def _read(
        self,
        plan: CompactionPlan,
        layout: TableLayout,
        indexes: Sequence[SSTableIndex],
        wanted: Sequence[tuple[int, int]],
        before: _Blocks,
    ) -> _Blocks:
        """The wanted blocks, all files at once; not through the cache, which is for readers."""

        async def of_file(i: int) -> dict[tuple[int, int], pa.RecordBatch]:
            numbers = [n for j, n in wanted if j == i and (i, n) not in before]
            found = await read_blocks(self._objects, plan.inputs[i], indexes[i], numbers, layout)
            return {(i, n): block for n, block in zip(numbers, found, strict=True)}

        missing = sorted({i for i, n in wanted if (i, n) not in before})
        found = await asyncio.gather(*(of_file(i) for i in missing))
        fresh = {at: block for of_one in found for at, block in of_one.items()}
        return {at: fresh[at] if at in fresh else before[at] for at in wanted}


@dataclass(slots=True)
class _RunOutput:
    """Gathers merged rows in order and writes them file by file, one while the next is being gathered."""

    merger: RunMerger
    plan: CompactionPlan
    layout: TableLayout
    lane: Lane
    files: list[SSTableMeta] = field(default_factory=list)
    pending: list[pa.RecordBatch] = field(default_factory=list)
    writing: asyncio.Task[SSTableMeta] | None = None
    run: str = ""

    def __post_init__(self) -> None:
        self.run = f"{self.lane.owner}-{self.lane.sequence + 1}"

    async def add(self, rows: pa.RecordBatch) -> None:
        """Rows that come after all those before."""
        if rows.num_rows:
            self.pending.append(rows)
        if sum(p.nbytes for p in self.pending) >= self.merger.file_bytes_max:
            await self._begin_file()

    async def finish(self) -> tuple[SSTableMeta, ...]:
        """Write what is left; all files are durable."""
        if self.pending:
            await self._begin_file()
        await self._written()
        return tuple(self.files)

    def abandon(self) -> None:
        """Let go of what is under way."""
        if self.writing is not None:
            let_go([self.writing])

    async def _begin_file(self) -> None:
        await self._written()
        self.lane.sequence += 1
        pieces, self.pending = self.pending, []
        write = self.merger.write(self.layout, pieces, self.lane, self.run, self.lane.sequence)
        self.writing = asyncio.create_task(write)

    async def _written(self) -> None:
        if self.writing is not None:
            self.files.append(await self.writing)
            self.writing = None


class _ByteBudget:
    """Bytes of rows that were read and are not merged yet, for all merges together."""

    def __init__(self, nbytes: int) -> None:
        self._total = self._free = nbytes
        self._returned = asyncio.Event()

    def fits(self, nbytes: int) -> bool:
        """Whether `take` would not wait."""
        return min(nbytes, self._total) <= self._free

    async def take(self, nbytes: int) -> int:
        """Wait until so many bytes are free; what was taken, for `give_back`. Larger than all: all of them."""
        nbytes = min(nbytes, self._total)
        while nbytes > self._free:
            self._returned.clear()
            await self._returned.wait()
        self._free -= nbytes
        return nbytes

    def give_back(self, nbytes: int) -> None:
        """Free what was taken."""
        self._free += nbytes
        self._returned.set()


def let_go(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks of what has ended or failed already; their own outcomes interest nobody."""
    for task in tasks:
        task.cancel()
        task.add_done_callback(lambda done: done.cancelled() or done.exception())


def _wanted(
    layout: TableLayout, indexes: Sequence[SSTableIndex], keys: KeyRange, watermark: int | None
) -> list[tuple[int, int]]:
    """Blocks of a range that may hold live rows, by input, oldest first."""
    return [
        (i, number)
        for i, index in enumerate(indexes)
        for number in index.overlapping_keys(layout.spec, keys.low, keys.high, watermark)
    ]


def _pieces(layout: TableLayout, keys: KeyRange, blocks: _Blocks) -> list[pa.RecordBatch]:
    """The rows of the blocks that lie in the range."""
    pieces = []
    for block in blocks.values():
        rows = keys.select(layout.order_columns(block))
        if rows.stop > rows.start:
            pieces.append(block.slice(rows.start, rows.stop - rows.start))
    return pieces


def _merge_pieces(layout: TableLayout, pieces: Sequence[pa.RecordBatch], plan: CompactionPlan) -> pa.RecordBatch:
    return layout.merge(pieces, watermark=plan.watermark, drop_tombstones=plan.oldest)


def _encode(
    layout: TableLayout,
    pieces: Sequence[pa.RecordBatch],
    name: str,
    sequence: int,
    run: str,
    settings: StoreSettings,
) -> EncodedSSTable:
    return encode_sstable(layout, concat(pieces, layout.stored), name, sequence, run, settings=settings)
