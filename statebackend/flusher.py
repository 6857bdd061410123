"""MemTables to SSTables to one manifest: the write path's second half.

The flusher is the one task of a process that writes manifests. It takes checkpoint requests in
the order in which they were cut, uploads the frozen MemTables and whatever the sinks stage, and
only then publishes the manifest that names them.

Invariants:

* Requests commit one after the other, in order; compactions commit between them.
* A manifest is written only after every file that it names is durable and every ``prepare``
  callable of its request has returned.
* What a failed request uploaded is remembered and goes into the next manifest; frozen rows stay
  readable and are never encoded twice under one name.
* After `FencedError` or `CorruptionError` nothing is written any more.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from statebackend.backend import Checkpoint, JobState
from statebackend.errors import (
    CommitUnknownError,
    CorruptionError,
    FencedError,
    StateStoreError,
    StorageUnavailableError,
)
from statebackend.histogram import HistogramRecorder
from statebackend.ids import CheckpointId, SequenceNumber
from statebackend.logs import context
from statebackend.manifest import CheckpointCommit, Manifest, TableCut, TableMoves
from statebackend.manifest_store import Clock, FenceableManifest
from statebackend.memtable import FrozenMemTable
from statebackend.merge import TableLayout
from statebackend.objectstore_base import ObjectStore, PutResult, needs_operator
from statebackend.progress import TaskProgress
from statebackend.runtime import IsolatedRuntime
from statebackend.settings import StoreSettings
from statebackend.sstable import EncodedSSTable, SSTableMeta, encode_sstable

__all__ = ["FlushRequest", "MemtableFlusher", "upload_sstable"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushRequest:
    """One barrier: what was frozen up to ``low_mark`` and what the job committed with it."""

    checkpoint_id: CheckpointId
    low_mark: SequenceNumber
    job: JobState
    prepare: Sequence[Callable[[], None]]
    tables: Mapping[str, TableCut]
    layouts: Mapping[str, TableLayout]
    frozen: Sequence[FrozenMemTable]
    started: float
    moves: TableMoves | None = None


class MemtableFlusher:
    """Flushes and commits for one writer. Every coroutine runs on the store's runtime."""

    def __init__(
        self,
        fenceable: FenceableManifest,
        objects: ObjectStore,
        runtime: IsolatedRuntime,
        settings: StoreSettings,
        clock: Clock,
        rng: random.Random,
        on_commit: Callable[[Manifest, Sequence[EncodedSSTable]], None],
    ) -> None:
        self._fenceable = fenceable
        self._objects = objects
        self._runtime = runtime
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._on_commit = on_commit
        self._turn = asyncio.Lock()  # fair: first come, first served
        self._commit = asyncio.Lock()
        self._must_load = False
        self._committed_mark = SequenceNumber(0)
        self._encoded: dict[int, EncodedSSTable | None] = {}
        self._uploaded: dict[int, tuple[str, SSTableMeta]] = {}
        self.fatal: StateStoreError | None = None
        self.progress = TaskProgress(clock.now_ms)
        self.durations = HistogramRecorder()
        self.commits = 0
        self.conflicts = 0
        self.unknown_outcomes = 0

    @property
    def owner(self) -> str:
        """This writer's name in file names and low marks: role, epoch, subtask, attempt."""
        return f"w{self._fenceable.epoch}-0-0"

    @property
    def manifest(self) -> Manifest:
        """The newest manifest that this writer knows."""
        return self._fenceable.manifest

    async def load_manifest(self) -> Manifest:
        """Find the newest manifest; raises `FencedError` when a newer writer owns the store."""
        return await self._fenceable.load()

    async def refresh(self) -> Manifest:
        """Find the newest manifest, between two commits. Raises `FencedError`, which ends this flusher as well."""
        async with self._commit:
            try:
                return await self.load_manifest()
            except (FencedError, CorruptionError) as error:
                self.fatal = error
                raise

    async def write_manifest(self, transition: Callable[[Manifest], Manifest], deadline: float) -> Manifest | None:
        """One attempt to commit; None when another commit took the number."""
        self._must_load = True  # unless the outcome is known to be ours
        manifest = await self._fenceable.write(transition, deadline)
        self._must_load = manifest is None
        return manifest

    async def write_manifest_safely(self, transition: Callable[[Manifest], Manifest]) -> Manifest:
        """Commit ``transition``, reloading and applying it again whenever another commit came first.

        Raises `FencedError` when a newer writer owns the store, `CommitUnknownError` when the
        outcome stays unknown, `StorageUnavailableError` when the manifest cannot be read or others win
        until the deadline, and `CommitConflictError` when the transition no longer fits.
        """
        deadline = self._clock.monotonic() + self._settings.commit_timeout_s
        async with self._commit:
            if self.fatal is not None:
                raise self.fatal
            try:
                conflicts = 0
                while True:
                    if self._must_load:
                        await self.load_manifest()
                    # One conflict is never the end: it may be an attempt of one's own that arrived late.
                    if conflicts > 1 and self._clock.monotonic() > deadline:
                        raise StorageUnavailableError(
                            f"manifest {self.manifest.number + 1}: other commits came first for "
                            f"{self._settings.commit_timeout_s:g} s"
                        )
                    if (manifest := await self.write_manifest(transition, deadline)) is not None:
                        self.commits += 1
                        return manifest
                    conflicts += 1
                    self.conflicts += 1
                    logger.info(
                        "manifest %d was taken by another commit", self.manifest.number + 1, extra=self._context()
                    )
            except CommitUnknownError:
                self.unknown_outcomes += 1
                raise
            except (FencedError, CorruptionError) as error:
                self.fatal = error
                logger.error("nothing is written any more: %s", error, extra=self._context())
                raise

    async def flush_imm_memtables_to_l0(self, request: FlushRequest) -> Checkpoint:
        """Upload what was frozen for this request and commit it with the job's state."""
        async with self._turn:
            try:
                with self.progress.run():
                    if self.fatal is not None:
                        raise self.fatal
                    written = await self._upload_all(request)
                    manifest = await self._commit_request(request, written)
            except StateStoreError as error:
                logger.warning(
                    "checkpoint %d failed, the next one commits its rows too: %s", request.checkpoint_id, error,
                    extra=self._context(checkpoint_id=int(request.checkpoint_id)),
                )  # fmt: skip
                raise
        metas = [w.meta for w in written]
        checkpoint = manifest.checkpoint
        assert checkpoint is not None
        done = replace(
            checkpoint,
            bytes_written=sum(m.size for m in metas),
            rows_written=sum(m.rows for m in metas),
            duration_s=self._clock.monotonic() - request.started,
        )
        self.durations.record(done.duration_s)
        logger.info(
            "checkpoint %d committed in manifest %d: %d files, %d rows, %d bytes in %.3f s",
            done.checkpoint_id, manifest.number, len(metas), done.rows_written, done.bytes_written, done.duration_s,
            extra=self._context(checkpoint_id=done.checkpoint_id, duration_s=done.duration_s),
        )  # fmt: skip
        return done

    async def _upload_all(self, request: FlushRequest) -> list[EncodedSSTable]:
        frozen = [f for f in request.frozen if f.sequence > self._committed_mark]
        outcomes = await asyncio.gather(
            *(self._runtime.run_io(callable_) for callable_ in request.prepare),
            *(self._flush_one(f, request.layouts[f.table], request.tables[f.table].watermark) for f in frozen),
            return_exceptions=True,
        )
        # Every upload has ended, one way or the other, before the first failure is raised.
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [o for o in outcomes if isinstance(o, EncodedSSTable)]

    async def flush_early(
        self,
        frozen: Sequence[FrozenMemTable],
        layout: TableLayout,
        on_upload: Callable[[FrozenMemTable, SSTableMeta | None, EncodedSSTable | None], None],
    ) -> None:
        """Upload frozen MemTables of one table, oldest first, before the checkpoint that will name them.

        Their sequences are above the low mark of every checkpoint cut before, so they belong to the next.
        Those that a failed checkpoint has uploaded are reported as well: a file must not hold newer rows
        than a MemTable that is still in memory. ``on_upload`` gets None for the file if no row is alive.
        """
        async with self._turn:
            for one in frozen:
                if self.fatal is not None:
                    raise self.fatal
                if one.sequence > self._committed_mark:
                    encoded = await self._flush_one(one, layout, one.watermark)
                    _, meta = self._uploaded.get(one.sequence, (one.table, None))
                    on_upload(one, meta, encoded)

    async def _flush_one(
        self, frozen: FrozenMemTable, layout: TableLayout, watermark: int | None
    ) -> EncodedSSTable | None:
        if frozen.sequence in self._uploaded:
            return None
        if frozen.sequence not in self._encoded:
            # Encoded once: a name is never used with other bytes, not even by another attempt.
            self._encoded[frozen.sequence] = await self._runtime.run_cpu(
                _encode, frozen, layout, watermark, f"sst/{self.owner}-{frozen.sequence}.arrow", self._settings
            )
        encoded = self._encoded[frozen.sequence]
        if encoded is not None:
            began = self._clock.monotonic()
            await upload_sstable(self._objects, encoded, self._clock, self._rng, self._settings.commit_timeout_s)
            logger.debug(
                "flushed %d rows, %d bytes", encoded.meta.rows, encoded.meta.size,
                extra=self._context(
                    table=frozen.table, object=encoded.meta.name, duration_s=self._clock.monotonic() - began
                ),
            )  # fmt: skip
            self._uploaded[frozen.sequence] = (frozen.table, encoded.meta)
            self._encoded[frozen.sequence] = None  # the bytes are in the storage now
        return encoded

    async def _commit_request(self, request: FlushRequest, written: Sequence[EncodedSSTable]) -> Manifest:
        files: dict[str, list[SSTableMeta]] = {}
        for sequence in sorted(self._uploaded):
            if sequence <= request.low_mark:
                table, meta = self._uploaded[sequence]
                files.setdefault(table, []).append(meta)
        commit = CheckpointCommit(
            checkpoint_id=request.checkpoint_id,
            owner=self.owner,
            low_mark=request.low_mark,
            job=request.job,
            tables=request.tables,
            files=files,
            retained_max=self._settings.retained_checkpoints,
            duration_ms=round((self._clock.monotonic() - request.started) * 1000),
            moves=request.moves,
        )
        manifest = await self.write_manifest_safely(commit.apply)
        self._committed_mark = request.low_mark
        self._uploaded = {s: u for s, u in self._uploaded.items() if s > request.low_mark}
        self._encoded = {s: e for s, e in self._encoded.items() if s > request.low_mark}
        self._on_commit(manifest, written)
        return manifest

    def _context(self, **fields: Any) -> dict[str, Any]:
        return context(store_id=self.manifest.store_id, **fields)


def _encode(
    frozen: FrozenMemTable, layout: TableLayout, watermark: int | None, name: str, settings: StoreSettings
) -> EncodedSSTable | None:
    """Merge, sort and encode on a CPU thread; None when nothing of it is alive.

    Dropping by the table's watermark at the barrier (or earlier) is safe: the file becomes visible
    only in a manifest that holds this watermark or a later one.
    """
    rows = layout.merge(frozen.stored(layout), watermark=watermark)
    if not rows.num_rows:
        return None
    return encode_sstable(layout, rows, name, int(frozen.sequence), None, settings=settings)


async def upload_sstable(
    objects: ObjectStore, table: EncodedSSTable, clock: Clock, rng: random.Random, timeout_s: float
) -> None:
    """Create the file; a lost response is recognised by the bytes that are there.

    Raises `StorageUnavailableError` when the storage gives no answer in time, and
    `CorruptionError` when other bytes stand under this name.
    """
    deadline = clock.monotonic() + timeout_s
    pause = 0.02
    while True:
        try:
            if await objects.put_if_absent(table.meta.name, table.data) is PutResult.EXISTS:
                present = await objects.get(table.meta.name)
                if present != table.data:
                    raise CorruptionError(f"{table.meta.name}: exists with other bytes than this writer's")
            return
        except StorageUnavailableError as error:
            if needs_operator(error) or clock.monotonic() + pause > deadline:
                raise
            await clock.sleep(pause * (0.5 + rng.random()))
            pause = min(pause * 2, 2.0)
