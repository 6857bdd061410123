"""State in the memory of this process: for tests, notebooks and jobs whose state may be lost.

The tables are the LSM store's MemTables without files under them; a checkpoint keeps the (immutable)
pieces of every table. A `MemoryStateSpace` outlives the backend that writes to it, so that a job can
be restored in the same process, and it fences like a store: opening it again ends the older backend.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from statebackend.backend import Checkpoint, Health, JobState, StoredTable
from statebackend.cache import BlockReader
from statebackend.errors import FencedError, StoreClosedError
from statebackend.ids import AttemptId, CheckpointId, ManifestNumber, StoreId, WriterEpoch, WriterId
from statebackend.keys import Hasher
from statebackend.manifest import Manifest, TableCut
from statebackend.memtable import Piece
from statebackend.merge import TableLayout
from statebackend.settings import StoreSettings
from statebackend.snapshot import StateSnapshot, with_live_tables
from statebackend.states_check import require_same_states
from statebackend.table import LsmTable
from statebackend.tables import TableSpec

if TYPE_CHECKING:
    from datafusion.user_defined import AggregateUDF

T = TypeVar("T")

__all__ = ["MemoryStateBackend", "MemoryStateSpace", "open_memory"]


@dataclass(frozen=True, slots=True)
class _TableSnapshot:
    cut: TableCut
    pieces: tuple[Piece, ...]

    @property
    def stored(self) -> StoredTable:
        """What there is of it, for people."""
        batches = [piece.batch for piece in self.pieces]
        return StoredTable(
            spec=self.cut.spec, rows=sum(b.num_rows for b in batches), bytes=sum(b.nbytes for b in batches)
        )


@dataclass(slots=True)
class MemoryStateSpace:
    """What survives a backend: the latest checkpoint. Guarded by ``lock``."""

    _named: ClassVar[dict[str, MemoryStateSpace]] = {}

    store_id: StoreId = field(default_factory=lambda: StoreId(uuid.uuid4().hex))
    lock: threading.Lock = field(default_factory=threading.Lock)
    epoch: int = 0
    checkpoint_id: int = 0
    checkpoint: Checkpoint | None = None
    tables: Mapping[str, _TableSnapshot] = field(default_factory=dict)

    @classmethod
    def named(cls, name: str) -> MemoryStateSpace:
        """The space of this name in this process."""
        return cls._named.setdefault(name, cls())


class MemoryStateBackend:
    """A `StateBackend` that keeps everything in this process."""

    reader: BlockReader

    def __init__(
        self, space: MemoryStateSpace | None = None, *, udafs: Mapping[str, AggregateUDF] | None = None
    ) -> None:
        self._space = space or MemoryStateSpace()
        self._udafs = dict(udafs or {})
        self._hasher = Hasher()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="memorystate")
        self.lock = threading.RLock()
        self._tables: dict[str, LsmTable] = {}
        self._closed = False
        self._last_error: BaseException | None = None
        with self._space.lock:
            self._space.epoch += 1
            self._epoch = self._space.epoch
            self.restored = self._space.checkpoint
            self._snapshots = dict(self._space.tables)
        self._gone: frozenset[str] = frozenset()

    @property
    def store_id(self) -> StoreId:
        """Identity of the space."""
        return self._space.store_id

    @property
    def tables(self) -> dict[str, LsmTable]:
        """The tables that are open, by name."""
        with self.lock:
            return dict(self._tables)

    def table(self, spec: TableSpec) -> LsmTable:
        """Create or open a table, perhaps with other columns; see `StateBackend.table`."""
        self.check_usable()
        where = f"memory state {self.store_id}"
        with self.lock:
            if (table := self._tables.get(spec.name)) is not None:
                table.layout.history.require_unchanged(table.spec, spec, where)
                require_same_states(table.spec, spec, where)
                return table
            snapshot = self._snapshots.get(spec.name)
            if snapshot is None:
                table = LsmTable(self, TableLayout.of(spec, self._hasher, self._udafs), (), None)
            else:
                known, version = snapshot.cut.spec, snapshot.cut.history.number
                history = snapshot.cut.history.evolved(known, spec, where)
                layout = TableLayout.of(spec, self._hasher, self._udafs, history)
                table = LsmTable(self, layout, (), snapshot.cut.watermark)
                table.memtable.restore(tuple(p.upgraded(layout, version) for p in snapshot.pieces))
            self._tables[spec.name] = table
            return table

    def stored_tables(self) -> Mapping[str, StoredTable]:
        """What the restored checkpoint holds; see `StateBackend.stored_tables`."""
        return {name: snapshot.stored for name, snapshot in self._snapshots.items()}

    def move_tables(self, names: Mapping[str, str | None]) -> None:
        """Rename and drop tables with the next checkpoint; see `StateBackend.move_tables`."""
        self.check_usable()
        where = f"memory state {self.store_id}"
        with self.lock:
            if self._tables or self._gone:
                raise ValueError(f"{where}: tables are renamed and dropped once, before any is opened")
            if missing := [name for name in names if name not in self._snapshots]:
                raise ValueError(f"{where}: no tables {missing}; there are {sorted(self._snapshots)}")
            moved: dict[str, _TableSnapshot] = {}
            for name, snapshot in self._snapshots.items():
                if (new := names.get(name, name)) is None:
                    continue
                if new in moved:
                    raise ValueError(f"{where}: two tables would be called {new!r}")
                cut = replace(snapshot.cut, spec=replace(snapshot.cut.spec, name=new))
                moved[new] = replace(snapshot, cut=cut)
            self._gone, self._snapshots = frozenset(self._snapshots), moved

    def checkpoint(self, job: JobState, prepare: Sequence[Callable[[], None]] = ()) -> Future[Checkpoint]:
        """Cut now, commit on the backend's thread; see `StateBackend.checkpoint`."""
        self.check_usable()
        with self.lock:
            started = time.monotonic()
            cut = {name: _TableSnapshot(t.cut(), t.memtable.pieces()) for name, t in self._tables.items()}
            return self._pool.submit(self._commit, job, tuple(prepare), cut, started)

    def snapshot(self, job: JobState | None = None) -> StateSnapshot:
        """Every table at this moment, for a reader of this process; see `StateStore.snapshot`."""
        self.check_usable()
        with self.lock:
            checkpoint = self._space.checkpoint
            last = JobState() if checkpoint is None else checkpoint.job
            nothing = Manifest(
                number=ManifestNumber(0),
                parent_attempt=AttemptId(""),
                store_id=self.store_id,
                writer_epoch=WriterEpoch(self._epoch),
                writer_id=WriterId(""),
                attempt_id=AttemptId(""),
                checkpoint_id=CheckpointId(self._space.checkpoint_id),
                created_ms=0 if checkpoint is None else checkpoint.created_ms,
            )
            return StateSnapshot(
                url=f"memory state {self.store_id}",
                manifest=with_live_tables(nothing, job or last, self._tables),
                views={name: table.moment() for name, table in self._tables.items()},
                location=None,
                settings=StoreSettings(),
                layout_of=lambda state: TableLayout.of(state.spec, self._hasher, self._udafs, state.history),
                samples=list,
            )

    def health(self) -> Health:
        """Whether the backend works; `Health.error` is the last failed checkpoint's error."""
        return Health(ok=not self._closed and self._last_error is None, error=self._last_error)

    def close(self, deadline_s: float = 30.0) -> None:  # noqa: ARG002  (commits here take no time)
        """Finish what was handed over and stop the thread."""
        self._closed = True
        self._pool.shutdown(wait=True)

    def check_usable(self) -> None:
        """Raise `StoreClosedError` or `FencedError` when this backend must not be used any more."""
        if self._closed:
            raise StoreClosedError(f"memory state {self.store_id}: closed")
        if self._space.epoch != self._epoch:
            raise FencedError(
                f"memory state {self.store_id}: opened again with epoch {self._space.epoch}, this one has {self._epoch}"
            )

    def relieve(self) -> None:
        """Everything stays in memory."""

    def read(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Never called: there are no files."""
        raise AssertionError(f"memory state has no files to read: {work}")

    def _commit(
        self,
        job: JobState,
        prepare: Sequence[Callable[[], None]],
        cut: Mapping[str, _TableSnapshot],
        started: float,
    ) -> Checkpoint:
        try:
            for callable_ in prepare:
                callable_()
            with self._space.lock:
                if self._space.epoch != self._epoch:
                    raise FencedError(f"memory state {self.store_id}: a newer backend owns it")
                self._space.checkpoint_id += 1
                checkpoint = Checkpoint(
                    checkpoint_id=CheckpointId(self._space.checkpoint_id),
                    manifest_number=self._space.checkpoint_id,
                    created_ms=time.time_ns() // 1_000_000,
                    job=job,
                    rows_written=sum(p.batch.num_rows for t in cut.values() for p in t.pieces),
                    duration_s=time.monotonic() - started,
                )
                kept = {name: t for name, t in self._space.tables.items() if name not in self._gone}
                moved = self._snapshots if self._gone else {}
                self._space.tables = {**kept, **moved, **cut}
                self._space.checkpoint = checkpoint
        except BaseException as error:
            self._last_error = error
            raise
        self._last_error = None
        return checkpoint


def open_memory(url: str, *, udafs: Mapping[str, AggregateUDF] | None = None, **_: Any) -> MemoryStateBackend:
    """Open the process-wide space named by ``url``; the entry point ``memory``."""
    return MemoryStateBackend(MemoryStateSpace.named(url), udafs=udafs)
