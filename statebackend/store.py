"""The state store: tables in memory and in files, cut and committed together.

Wiring only. Writes go to MemTables; `StateStore.checkpoint` swaps them out under one lock
(microseconds) and hands them to the flusher on the isolated runtime; a commit swaps frozen
MemTables for files. Reads see MemTable, frozen MemTables and files at one moment.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from statebackend import display
from statebackend.backend import Checkpoint, Health, JobState, StateCheck, StoredTable
from statebackend.background import collect_garbage, commit_new_rows
from statebackend.cache import BlockCache, BlockReader
from statebackend.compaction_merge import RunMerger
from statebackend.compactor import CompactionLayouts, Compactor
from statebackend.compactor_process import CompactorProcess
from statebackend.early_flush import EarlyFlusher
from statebackend.errors import CorruptionError
from statebackend.flusher import FlushRequest, MemtableFlusher
from statebackend.garbage_collector import GarbageCollector
from statebackend.ids import CheckpointId, SequenceNumber, StoreId
from statebackend.keys import Hasher
from statebackend.logs import context
from statebackend.manifest import Manifest, TableMoves, TableState
from statebackend.manifest_store import Clock, FenceableManifest, ManifestStore, SystemClock, new_id
from statebackend.memory_budget import MemoryBudget
from statebackend.merge import TableLayout
from statebackend.metrics import Sample, StoreMetrics
from statebackend.metrics_server import MetricsServer
from statebackend.objectstore_base import ObjectStore
from statebackend.objectstore_stack import ObjectStoreStack
from statebackend.observer import StoreObserver
from statebackend.runtime import IsolatedRuntime
from statebackend.settings import StoreSettings
from statebackend.snapshot import StateSnapshot, StoreLocation, with_live_tables
from statebackend.sstable import EncodedSSTable
from statebackend.states_check import require_known_states, require_same_states
from statebackend.table import LsmTable
from statebackend.tables import TableSpec

if TYPE_CHECKING:
    from datafusion.user_defined import AggregateUDF

__all__ = ["StateStore"]

T = TypeVar("T")

logger = logging.getLogger(__name__)


class StateStore:
    """An open store; a context manager. See `StateStore.open`."""

    def __init__(
        self,
        url: str,
        stack: ObjectStoreStack,
        fenceable: FenceableManifest,
        found: Manifest,
        runtime: IsolatedRuntime,
        settings: StoreSettings,
        clock: Clock,
        rng: random.Random,
        hasher: Hasher,
        udafs: Mapping[str, AggregateUDF],
        budget: MemoryBudget,
        location: StoreLocation | None,
    ) -> None:
        objects = stack.top
        # Constant after construction.
        self.url = url
        self.settings = settings
        self.restored = found.checkpoint
        self.reader = BlockReader(objects, BlockCache(budget.cache))
        self.lock = threading.RLock()
        self._runtime = runtime
        self._budget = budget
        self._location = location
        self._clock = clock
        self._hasher = hasher
        self._udafs = udafs
        self._store_id = fenceable.manifest.store_id
        self._flusher = MemtableFlusher(fenceable, objects, runtime, settings, clock, rng, self._committed)
        merger = RunMerger(objects, self.reader, runtime, settings, clock, rng)
        self._layouts = CompactionLayouts(hasher, udafs)
        # Opening claimed the merges for this writer. One that leaves them to a process of its own has another
        # name, and merges only after a time without progress.
        compactor_id = fenceable.manifest.writer_id if settings.compaction == "embedded" else new_id(rng)
        self._compactor = Compactor(compactor_id, self._flusher, merger, settings, clock, self._layout_of, self._adopt)
        self._compactor_process: CompactorProcess | None = None
        self._collector = GarbageCollector(objects, ManifestStore(objects), self.reader.in_use, clock)
        self._observer = StoreObserver(
            settings=settings, stack=stack, reader=self.reader,
            flusher=self._flusher, compactor=self._compactor, collector=self._collector,
        )  # fmt: skip
        self._metrics_server: MetricsServer | None = None
        # State below is protected by lock.
        self._tables: dict[str, LsmTable] = {}
        self._manifest = fenceable.manifest
        self._moves: TableMoves | None = None
        self._sequence = 0
        self._checkpoint_id = int(found.checkpoint_id)
        self._job = found.job
        self._closed = False
        self._early = EarlyFlusher(self.lock, self._tables, self._next_sequence, self._flusher, self.reader, runtime)

    @classmethod
    def open(
        cls,
        url: str | os.PathLike[str],
        settings: StoreSettings | None = None,
        *,
        memory: MemoryBudget | None = None,
        udafs: Mapping[str, AggregateUDF] | None = None,
        objects: ObjectStore | None = None,
        open_root: Callable[[str], ObjectStore] | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        hasher: Hasher | None = None,
        storage_options: Mapping[str, Any] | None = None,
        root_options: Mapping[str, Mapping[str, Any]] | None = None,
        allow_unsafe_create: bool = False,
        check: StateCheck | None = None,
    ) -> StateStore:
        """Open the store at ``url`` for writing, creating it if there is none; older writers are fenced.

        ``memory``: a budget that this store shares with others of the process; None: one of its own, of
        ``settings.memory_bytes`` and ``settings.cache_bytes``, which mean nothing otherwise.
        ``udafs``: Python aggregate functions by name, for tables that were declared with them.
        ``storage_options`` are for the store itself; ``root_options``, by URL, for the stores that it was branched
        from, see `root_opener`.
        ``check`` is called with what is there before anybody is fenced; when it raises, nobody is.
        ``objects``, ``open_root``, ``clock``, ``rng``, ``hasher``: collaborators, for tests.

        Raises `CorruptionError`, `AtomicCreateError`, `StorageUnavailableError`.
        """
        settings = settings or StoreSettings()
        if settings.compaction == "process" and (objects is not None or "memory://" in os.fspath(url)):
            raise ValueError(f"{os.fspath(url)}: a compactor in a process of its own cannot reach a store in memory")
        memory = memory or MemoryBudget(memory_bytes=settings.memory_bytes, cache_bytes=settings.cache_bytes)
        clock = clock or SystemClock()
        rng = rng or random.SystemRandom()
        runtime = IsolatedRuntime("statestore", io_threads=settings.io_threads, cpu_threads=settings.cpu_threads)
        runtime.start()
        try:
            stack = ObjectStoreStack.open(
                os.fspath(url), runtime.io_executor, settings, clock, rng, objects=objects, open_root=open_root,
                storage_options=storage_options, root_options=root_options, allow_unsafe_create=allow_unsafe_create,
            )  # fmt: skip
            if check is not None and (present := runtime.call(ManifestStore(stack.top).latest_listed(), None)):
                check(present.checkpoint, {name: state.stored for name, state in present.tables.items()})
            fenceable, found = runtime.call(_take_over(stack.top, clock, rng, settings), None)
            stack = stack.cached(settings, runtime.io_executor, fenceable.manifest.store_id)
            location = None if objects is not None else StoreLocation(
                url=os.fspath(url), storage_options=storage_options, root_options=root_options
            )  # fmt: skip
            stack.rooted.use({number: root.url for number, root in found.roots.items()})
            store = cls(
                os.fspath(url), stack, fenceable, found, runtime, settings, clock, rng,
                hasher or Hasher(), dict(udafs or {}), memory, location,
            )  # fmt: skip
            if settings.compaction == "process":
                child = CompactorProcess(store.url, settings, storage_options, root_options, runtime, clock)
                store._compactor_process = store._observer.compactor_process = child
                runtime.submit(child.watch, background=True)
            if settings.metrics_port is not None:
                store._metrics_server = MetricsServer(store, settings.metrics_port, settings.metrics_host)
        except BaseException:
            runtime.close(5.0)
            raise
        memory.join(store._early)
        if settings.flush_interval_s is not None:
            ticks = commit_new_rows(store._commit_new_rows, store._flusher, clock, settings.flush_interval_s)
            runtime.submit(ticks, background=True)
        if settings.gc_interval_s is not None:
            collects = collect_garbage(
                store._collector, store._flusher, lambda: store._manifest, clock, settings.gc_interval_s
            )
            runtime.submit(collects, background=True)
        logger.info(
            "opened %s at checkpoint %d, writer epoch %d", stack.top.describe(), found.checkpoint_id, fenceable.epoch,
            extra=store._context(checkpoint_id=int(found.checkpoint_id)),
        )  # fmt: skip
        return store

    @property
    def store_id(self) -> StoreId:
        """Random identity of this store, given when it was created."""
        return self._store_id

    @property
    def manifest(self) -> Manifest:
        """The newest manifest that this writer knows."""
        return self._manifest

    def table(self, spec: TableSpec) -> LsmTable:
        """Create the table or open the one of this name.

        Its columns may differ from those that it has in the store, as far as `SchemaChanges` describes; the change
        becomes durable with the next checkpoint. Raises `SchemaMismatchError` if the table cannot become what is
        asked for.
        """
        self.check_usable()
        with self.lock:
            if (table := self._tables.get(spec.name)) is not None:
                table.layout.history.require_unchanged(table.spec, spec, self.url)
                require_same_states(table.spec, spec, self.url)
                return table
            state, history = self._renamed(self._manifest).tables.get(spec.name), None
            if state is not None:
                history = state.history.evolved(state.spec, spec, self.url)
            layout = TableLayout.of(spec, self._hasher, self._udafs, history)
            if state is not None:
                require_known_states(state, layout, self._udafs, self.url)
            table = LsmTable(
                self, layout, state.files if state is not None else (), state.watermark if state is not None else None
            )
            self._tables[spec.name] = table
        logger.debug("%s table", "opened" if state is not None else "created", extra=self._context(table=spec.name))
        return table

    def stored_tables(self) -> Mapping[str, StoredTable]:
        """What the newest manifest holds; see `StateBackend.stored_tables`."""
        return {name: state.stored for name, state in self._manifest.tables.items()}

    def move_tables(self, names: Mapping[str, str | None]) -> None:
        """Rename and drop tables with the next checkpoint, on a new timeline; see `StateBackend.move_tables`."""
        self.check_usable()
        with self.lock:
            if self._tables or self._moves is not None:
                raise ValueError(f"{self.url}: tables are renamed and dropped once, before any is opened")
            self._moves = TableMoves.of(self._manifest, names, self.url)

    def checkpoint(self, job: JobState, prepare: Sequence[Callable[[], None]] = ()) -> Future[Checkpoint]:
        """Cut now, commit in the background; see `StateBackend.checkpoint`."""
        self.check_usable()
        with self.lock:
            self._job = job
            request = self._cut(job, prepare)
            future: Future[Checkpoint] = self._runtime.submit(self._flusher.flush_imm_memtables_to_l0(request))
        return future

    def flush(self) -> Checkpoint:
        """Make everything written so far durable and wait for it; for use without a job.

        Raises `ValueError` when the store belongs to a job: its tables and its positions become
        durable together, at a barrier.
        """
        self.check_usable()
        with self.lock:
            if self._job.sources:
                raise ValueError(f"{self.url}: the store belongs to a job with sources {sorted(self._job.sources)}")
            future = self.checkpoint(self._job)
        return future.result()

    def snapshot(self, job: JobState | None = None) -> StateSnapshot:
        """Every table at this moment, for a reader of this process; from any thread.

        It is a moment between two calls of `LsmTable.write` and the like; for one between two batches of a job, ask the
        job. ``job``: its positions now; None: those of the last barrier.
        """
        self.check_usable()
        with self.lock:
            snapshot = StateSnapshot(
                url=self.url,
                manifest=with_live_tables(self._renamed(self._manifest), job or self._job, self._tables),
                views={name: table.moment() for name, table in self._tables.items()},
                location=self._location,
                settings=self.settings,
                layout_of=self._layout_for_results,
                samples=self.samples,
                merging=self._compactor.merging,
            )
            self.reader.hold(snapshot.manifest.files.values(), snapshot)
        return snapshot

    def health(self) -> Health:
        """What the background work is doing; `Health.error` keeps a failure until work succeeds again."""
        self._runtime.check_process()
        with self.lock:
            return self._observer.health(self._observer.metrics(self._manifest, self._tables), closed=self._closed)

    def metrics(self) -> StoreMetrics:
        """What the store has done since it was opened and holds now; cheap enough for every few seconds."""
        self._runtime.check_process()
        with self.lock:
            return self._observer.metrics(self._manifest, self._tables)

    def samples(self) -> list[Sample]:
        """The figures of `metrics` by name, for exporters."""
        return self.metrics().samples()

    @property
    def metrics_port(self) -> int | None:
        """The port at which the figures are served, see `StoreSettings`."""
        return self._metrics_server.port if self._metrics_server is not None else None

    def close(self, deadline_s: float = 30.0) -> None:
        """Finish what was handed over and stop every thread; rows written after the last checkpoint are not kept."""
        self._runtime.check_process()  # before the lock, which may have been held when this process was forked
        with self.lock:
            first, self._closed = not self._closed, True
            server, self._metrics_server = self._metrics_server, None
        if server is not None:
            server.close()
        if self._compactor_process is not None:
            self._compactor_process.stop()
        try:
            self._runtime.close(deadline_s)
        finally:
            self._give_back()
        if first:
            logger.info("closed", extra=self._context(checkpoint_id=int(self._manifest.checkpoint_id)))

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _repr_html_(self) -> str:
        with self.lock:
            return display.metrics(self.metrics(), self.url, closed=self._closed)

    def check_usable(self) -> None:
        """Raise the error that ended the store, if one did."""
        self._runtime.check_usable()
        if self._flusher.fatal is not None:
            raise self._flusher.fatal

    def relieve(self) -> None:
        """Flush early when the rows of all stores that share the budget exceed it; wait when the storage is slow."""
        if waited := self._budget.relieve(self.settings.commit_timeout_s, self._clock.monotonic):
            self._observer.stalled(waited)
            logger.info("a writer waited %.3f s for the storage", waited, extra=self._context(duration_s=waited))

    def _context(self, **fields: Any) -> dict[str, Any]:
        return context(store_id=self._store_id, **fields)

    def read(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a read on the runtime and wait for it."""
        return self._runtime.call(work, None)

    def _cut(self, job: JobState, prepare: Sequence[Callable[[], None]]) -> FlushRequest:
        """Freeze every MemTable; the lock is held."""
        for table in self._tables.values():
            table.freeze(self._next_sequence())
        self._checkpoint_id += 1
        return FlushRequest(
            checkpoint_id=CheckpointId(self._checkpoint_id),
            low_mark=SequenceNumber(self._sequence),
            job=job,
            prepare=tuple(prepare),
            tables={n: t.cut() for n, t in self._tables.items()},
            layouts={n: t.layout for n, t in self._tables.items()},
            frozen=[f for t in self._tables.values() for f in t.frozen],
            started=self._clock.monotonic(),
            moves=self._moves,
        )

    def _renamed(self, manifest: Manifest) -> Manifest:
        """The manifest under the names that its tables have for this process, committed or not."""
        return manifest if self._moves is None else self._moves.apply(manifest)

    def _committed(self, manifest: Manifest, written: Sequence[EncodedSSTable]) -> None:
        """A checkpoint was committed: frozen MemTables give way to files. Runs on the runtime's thread."""
        for table in written:
            self.reader.keep(table)
        self._adopt(manifest)
        if self.settings.compaction != "none":
            self._runtime.submit(self._compactor.run_if_due, background=True)

    def _adopt(self, manifest: Manifest) -> None:
        """Read from the files of this manifest, and no longer from the frozen MemTables that are in them."""
        # Its mark, not that of a request: the outcome of a checkpoint may become known by a compaction.
        low_mark = manifest.low_marks.get(self._flusher.owner, 0)
        with self.lock:
            gone = self._manifest.files.keys() - manifest.files.keys()
            self._manifest = manifest
            renamed = self._renamed(manifest).tables
            for name, table in self._tables.items():
                if (state := renamed.get(name)) is not None:
                    table.flushed(low_mark, state.files)
        self.reader.forget(gone)

    def _layout_for_results(self, state: TableState) -> TableLayout:
        """The layout of a table that nobody has open, to finalise its states."""
        layout = TableLayout.of(state.spec, self._hasher, self._udafs, state.history)
        require_known_states(state, layout, self._udafs, self.url)
        return layout

    def _layout_of(self, state: TableState) -> TableLayout:
        """The layout of a table for a merge, whether this process opened it or not."""
        with self.lock:
            table = self._tables.get(state.spec.name)
        if table is not None and table.layout.history.number == state.history.number:
            return table.layout
        return self._layouts.of(state)  # also where columns have changed and no manifest says so yet

    def _give_back(self) -> None:
        """Leave the budget to the stores that share it."""
        self._budget.leave(self._early)
        self.reader.cache.clear()

    def _next_sequence(self) -> SequenceNumber:
        """The next in the order of freezing; the lock is held."""
        self._sequence += 1
        return SequenceNumber(self._sequence)

    def _commit_new_rows(self) -> Future[Checkpoint] | None:
        """Cut and commit if anything was written since the last time."""
        with self.lock:
            if self._closed or not any(t.memtable.rows for t in self._tables.values()):
                return None
            request = self._cut(self._job, ())
            return self._runtime.submit(self._flusher.flush_imm_memtables_to_l0(request))


async def _take_over(
    objects: ObjectStore, clock: Clock, rng: random.Random, settings: StoreSettings
) -> tuple[FenceableManifest, Manifest]:
    manifests = ManifestStore(objects)
    # Listed before and after: another writer may have created the store in between.
    if not await manifests.numbers() and (orphans := await objects.list("sst/")) and not await manifests.numbers():
        raise CorruptionError(
            f"{objects.describe()}: holds {len(orphans)} SSTables such as {orphans[0]} and no manifest: "
            "the manifests were deleted; refusing to start from nothing"
        )
    return await FenceableManifest.init_writer(manifests, clock, rng, settings.commit_timeout_s)
