"""Carries out compaction plans on the isolated runtime, never on the checkpoint's path.

A failed compaction is kept for `health` and tried again after the next commit; it harms nobody,
for its output is named by no manifest. The commit goes through the flusher, the one task that
writes manifests.

Invariants:

* Rows are dropped only by the watermark in the manifest that the plan was made from, which every
  later manifest has reached too.
* Inputs stay untouched; the output gets a name of its own for every attempt.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence

import pyarrow as pa

from statebackend.cache import BlockReader
from statebackend.compaction import CompactionPlan, KeyRange, plan_compaction, plan_ranges
from statebackend.errors import CommitConflictError, StateStoreError
from statebackend.flusher import MemtableFlusher, upload_sstable
from statebackend.ids import SequenceNumber
from statebackend.logs import context
from statebackend.manifest import CompactionCommit, Manifest
from statebackend.manifest_store import Clock
from statebackend.merge import TableLayout, concat
from statebackend.objectstore import ObjectStore
from statebackend.progress import TaskProgress
from statebackend.runtime import IsolatedRuntime
from statebackend.settings import StoreSettings
from statebackend.sstable import EncodedSSTable, SSTableIndex, SSTableMeta, encode_sstable, read_blocks

__all__ = ["Compactor"]

logger = logging.getLogger(__name__)


class Compactor:
    """Merges flushed files of one store in the background."""

    def __init__(
        self,
        flusher: MemtableFlusher,
        objects: ObjectStore,
        reader: BlockReader,
        runtime: IsolatedRuntime,
        settings: StoreSettings,
        clock: Clock,
        rng: random.Random,
        layout_of: Callable[[str], TableLayout | None],
        on_commit: Callable[[Manifest], None],
    ) -> None:
        self._flusher = flusher
        self._objects = objects
        self._reader = reader
        self._runtime = runtime
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._layout_of = layout_of
        self._on_commit = on_commit
        self._owner = f"c{flusher.manifest.compactor_epoch}-0-0"  # of this opening; a successor has another
        self._running = False
        self._sequence = 0
        self.progress = TaskProgress(clock.now_ms)

    async def run_if_due(self) -> None:
        """Merge until no table is crowded; at most one call works at a time."""
        if self._running:
            return
        self._running = True
        try:
            while (plan := plan_compaction(self._flusher.manifest, self._settings)) is not None:
                layout = self._layout_of(plan.table)
                if layout is None:  # a table that this process has not opened stays as it is
                    return
                if not await self._run(plan, layout):
                    return
        finally:
            self._running = False

    async def _run(self, plan: CompactionPlan, layout: TableLayout) -> bool:
        began = self._clock.monotonic()
        fields = context(store_id=self._flusher.manifest.store_id, table=plan.table)
        try:
            with self.progress.run(CommitConflictError):
                commit = await self._merge(plan, layout)
                manifest = await self._flusher.write_manifest_safely(commit.apply)
        except CommitConflictError as error:
            logger.info("compaction abandoned, to be planned again: %s", error, extra=fields)
            return True
        except StateStoreError as error:
            logger.warning("compaction failed, the next commit tries again: %s", error, extra=fields)
            return False
        self._on_commit(manifest)
        took = self._clock.monotonic() - began
        logger.info(
            "merged %d files, %d bytes into %d files, %d bytes in %.3f s",
            len(plan.inputs), sum(f.size for f in plan.inputs),
            len(commit.output), sum(f.size for f in commit.output), took, extra=fields | {"duration_s": took},
        )  # fmt: skip
        return True

    async def _merge(self, plan: CompactionPlan, layout: TableLayout) -> CompactionCommit:
        """Write the run, range by range and file by file; memory is bounded by ``compaction_rows``."""
        owner = self._owner
        run = f"{owner}-{self._sequence + 1}"
        size, rows = sum(f.size for f in plan.inputs), sum(f.rows for f in plan.inputs)
        file_rows = max(self._settings.block_rows, rows * self._settings.file_bytes_max // max(size, 1))
        output: list[SSTableMeta] = []
        pending: list[pa.RecordBatch] = []
        with self._reader.using(plan.inputs):  # they may leave the manifest while they are read
            indexes = [await self._reader.index(meta) for meta in plan.inputs]
            for keys in plan_ranges(layout.spec, indexes, self._settings.compaction_rows):
                pieces: list[pa.RecordBatch] = []
                for meta, index in zip(plan.inputs, indexes, strict=True):
                    pieces.extend(await self._read(layout, meta, index, keys, plan.watermark))
                pending.append(await self._runtime.run_cpu(_merge_pieces, layout, pieces, plan))
                if sum(b.num_rows for b in pending) >= file_rows:
                    output += await self._write(layout, pending, owner, run)
                    pending = []
        output += await self._write(layout, pending, owner, run)
        return CompactionCommit(
            table=plan.table,
            timeline=plan.timeline,
            owner=owner,
            sequence=SequenceNumber(self._sequence),
            inputs=plan.inputs,
            output=tuple(output),
        )

    async def _read(
        self, layout: TableLayout, meta: SSTableMeta, index: SSTableIndex, keys: KeyRange, watermark: int | None
    ) -> list[pa.RecordBatch]:
        """The rows of one file in a range of keys, block by block; not through the cache, it is for readers."""
        pieces = []
        for number in index.overlapping_keys(layout.spec, keys.low, keys.high, watermark):
            (block,) = await read_blocks(self._objects, meta, index, [number], layout.stored)
            rows = keys.select(layout.order_columns(block))
            if rows.stop > rows.start:
                pieces.append(block.slice(rows.start, rows.stop - rows.start))
        return pieces

    async def _write(
        self, layout: TableLayout, pieces: Sequence[pa.RecordBatch], owner: str, run: str
    ) -> list[SSTableMeta]:
        alive = [p for p in pieces if p.num_rows]
        if not alive:
            return []
        self._sequence += 1
        encoded = await self._runtime.run_cpu(
            _encode, layout, alive, f"sst/{owner}-{self._sequence}.arrow", self._sequence, run, self._settings
        )
        await upload_sstable(self._objects, encoded, self._clock, self._rng, self._settings.commit_timeout_s)
        return [encoded.meta]


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
