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

import random
from collections.abc import Callable, Sequence

import pyarrow as pa

from statebackend.cache import BlockReader
from statebackend.compaction import CompactionPlan, plan_compaction
from statebackend.errors import CommitConflictError, StateStoreError
from statebackend.flusher import MemtableFlusher, upload_sstable
from statebackend.ids import SequenceNumber
from statebackend.manifest import CompactionCommit, Manifest
from statebackend.manifest_store import Clock
from statebackend.merge import TableLayout
from statebackend.objectstore import ObjectStore
from statebackend.runtime import IsolatedRuntime
from statebackend.settings import StoreSettings
from statebackend.sstable import EncodedSSTable, encode_sstable

__all__ = ["Compactor"]


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
        self._running = False
        self._sequence = 0
        self.last_error: BaseException | None = None
        self.completed = 0
        self.failures = 0

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
        try:
            commit = await self._merge(plan, layout)
            manifest = await self._flusher.write_manifest_safely(commit.apply)
        except CommitConflictError:
            return True  # abandoned: plan again on the newer manifest
        except StateStoreError as error:
            self.failures += 1
            self.last_error = error
            return False
        self._on_commit(manifest)
        self.completed += 1
        self.last_error = None
        return True

    async def _merge(self, plan: CompactionPlan, layout: TableLayout) -> CompactionCommit:
        pieces = []
        with self._reader.using(plan.inputs):  # they may leave the manifest while they are read
            for meta in plan.inputs:
                pieces.extend(await self._reader.read_times(layout, meta, plan.watermark, None))
        self._sequence += 1
        owner = f"c{self._flusher.manifest.compactor_epoch}-0-0"
        name = f"sst/{owner}-{self._sequence}.arrow"
        rows = await self._runtime.run_cpu(_merge_pieces, layout, pieces, plan)
        output = None
        if rows.num_rows:
            encoded = await self._runtime.run_cpu(_encode, layout, rows, name, self._sequence, self._settings)
            await upload_sstable(self._objects, encoded, self._clock, self._rng, self._settings.commit_timeout_s)
            self._reader.keep(encoded)
            output = encoded.meta
        return CompactionCommit(
            table=plan.table,
            timeline=plan.timeline,
            owner=owner,
            sequence=SequenceNumber(self._sequence),
            inputs=plan.inputs,
            output=output,
        )


def _merge_pieces(layout: TableLayout, pieces: Sequence[pa.RecordBatch], plan: CompactionPlan) -> pa.RecordBatch:
    return layout.merge(pieces, watermark=plan.watermark, drop_tombstones=plan.oldest)


def _encode(
    layout: TableLayout, rows: pa.RecordBatch, name: str, sequence: int, settings: StoreSettings
) -> EncodedSSTable:
    return encode_sstable(layout, rows, name, sequence, 1, settings=settings)
