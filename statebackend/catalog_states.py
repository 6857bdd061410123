"""Whose state a catalog shows: one checkpoint, or an open store as it is when a query is planned.

*Committed* (`CommittedState`): the checkpoint that was opened stays the one that is shown.

*Live* (`LiveStates`): every query sees a snapshot that is taken before it is planned (``snapshot.py``), one for all
its tables. Its files are read through a runtime, storage connections and a block cache of the catalog's own, so that a
scan of everything neither takes the threads of the job nor pushes its working set out of its cache; only what no URL
leads to (a store in memory, collaborators of a test) is read through the store.

Both open other checkpoints of the same store when a query names them, and pin them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pyarrow.compute as pc

from statebackend.cache import BlockCache, BlockReader, CachePool
from statebackend.checkpoint_reader import CheckpointReader
from statebackend.compaction import CompactionPlan
from statebackend.errors import CheckpointGoneError, CheckpointNotFoundError, ObjectMissingError, StoreClosedError
from statebackend.manifest import Manifest
from statebackend.merge import TableLayout
from statebackend.metrics import Sample
from statebackend.objectstore_counting import CountingObjectStore
from statebackend.retention import KeptCheckpoint
from statebackend.runtime import IsolatedRuntime
from statebackend.settings import StoreSettings
from statebackend.snapshot import LiveState, StateSnapshot, StoreLocation
from statebackend.sweep import ReadCount, Sweep
from statebackend.table_view import FileHost, TableView
from statebackend.tables import TableSpec
from statebackend.toolbox import open_toolbox

__all__ = ["At", "CommittedState", "LiveStates", "Moment", "States", "SweptTable"]

T = TypeVar("T")
At = int | str
"""A checkpoint by its id, or by the name of a savepoint."""

_CLOSE_TIMEOUT_S = 10.0
_OTHERS_MAX = 32
"""More than one query names: it would lose those that it named first."""


class SweptTable(Protocol):
    """One table at one moment."""

    @property
    def spec(self) -> TableSpec:
        """Its declaration."""

    @property
    def layout(self) -> TableLayout:
        """Its stored form and merge rule."""

    def sweep(
        self, predicate: pc.Expression | None = None, *, count: ReadCount | None = None, range_bytes: int = ...
    ) -> AbstractContextManager[Sweep]:
        """The table in pieces of bounded size; see `Sweep.begin`."""


class Moment(Protocol):
    """All tables at one moment: a checkpoint, or a running job between two batches."""

    @property
    def url(self) -> str:
        """Of which store."""

    @property
    def tables(self) -> Mapping[str, TableSpec]:
        """The tables there are."""

    @property
    def manifest(self) -> Manifest:
        """What a manifest of that moment says."""

    def table(self, name: str) -> SweptTable:
        """A table with finalised results. Raises ``KeyError``, `SchemaMismatchError`, `UnsupportedAggregateError`."""

    def raw_table(self, name: str) -> SweptTable:
        """A table with partial states as they are stored. Raises ``KeyError``."""

    def latest(self) -> Manifest:
        """The newest manifest: what merges have done since."""

    def unflushed(self) -> Mapping[str, tuple[int, int]]:
        """By table, rows that are in no file yet, superseded ones among them, and their bytes."""

    def kept(self) -> list[KeptCheckpoint]:
        """Every checkpoint that the store keeps now, oldest first."""

    def samples(self) -> Sequence[Sample]:
        """The figures of the store now."""

    def merges(self) -> tuple[StoreSettings, tuple[CompactionPlan, ...]]:
        """By which settings merges are due, and those under way as far as they are known."""


class States(Protocol):
    """Where a catalog gets its tables from."""

    def now(self) -> Moment:
        """What ``state``, ``raw`` and ``system`` show."""

    def planning(self) -> AbstractContextManager[None]:
        """Until the end of the block `now` is the same moment for everybody."""

    def at(self, at: At) -> CheckpointReader:
        """A checkpoint of the store. Raises `CheckpointNotFoundError`, `CheckpointGoneError`."""

    def fetched(self) -> tuple[int, int]:
        """Requests to the storage for parts of tables, and the bytes that they brought."""

    def close(self) -> None:
        """Let go of everything."""


class _OtherCheckpoints:
    """Checkpoints of a store that are opened when they are asked for; thread-safe.

    Those that were asked for last stay open, and so pinned: a catalog of a running job may live as long as the job.
    """

    def __init__(self, opened: Callable[..., CheckpointReader], url: str) -> None:
        self._open = opened
        self._url = url
        # State below is protected by _lock.
        self._lock = threading.Lock()
        self._readers: dict[At, CheckpointReader] = {}
        self._closed = False

    def at(self, at: At, latest: Callable[[], Manifest]) -> CheckpointReader:
        """The reader of a checkpoint. Raises `CheckpointNotFoundError`, `CheckpointGoneError`."""
        with self._lock:
            if self._closed:
                raise StoreClosedError(f"{self._url}: the catalog is closed")
            reader = self._readers.pop(at, None) or self._opened(at, latest)
            self._readers[at] = reader  # as the last
            past = [self._readers.pop(next(iter(self._readers)))] if len(self._readers) > _OTHERS_MAX else []
        for one in past:
            one.close()
        return reader

    def _opened(self, at: At, latest: Callable[[], Manifest]) -> CheckpointReader:
        if isinstance(at, str):
            return self._open(savepoint=at)
        try:
            return self._open(at)
        except CheckpointNotFoundError as error:
            newest = latest()
            for name, savepoint in newest.savepoints.items():
                if savepoint.checkpoint_id == at:
                    return self._open(savepoint=name)
            if 0 < at <= newest.checkpoint_id:
                raise CheckpointGoneError(f"{error}; it was there and is kept no longer") from error
            raise

    @property
    def readers(self) -> list[CheckpointReader]:
        """Those that are open."""
        return list(self._readers.values())

    def close(self) -> None:
        with self._lock:
            self._closed = True
            readers, self._readers = self.readers, {}
        for reader in readers:
            reader.close()


class CommittedState:
    """One checkpoint, opened from outside; see `States`. ``opened`` opens others of the store."""

    def __init__(self, current: CheckpointReader, opened: Callable[..., CheckpointReader]) -> None:
        self._current = current
        self._others = _OtherCheckpoints(opened, current.url)

    def now(self) -> CheckpointReader:
        """The checkpoint."""
        return self._current

    def planning(self) -> AbstractContextManager[None]:
        """It never changes."""
        return nullcontext()

    def at(self, at: At) -> CheckpointReader:
        """See `States.at`."""
        if at == int(self._current.checkpoint.checkpoint_id):
            return self._current
        return self._others.at(at, self._current.latest)

    def fetched(self) -> tuple[int, int]:
        """See `States.fetched`."""
        return _sum(reader.fetched for reader in [self._current, *self._others.readers])

    def close(self) -> None:
        """Let go of every checkpoint."""
        self._others.close()
        self._current.close()


class LiveStates:
    """A store that is open in this process; see `States`. ``opened`` opens a checkpoint, given a `StoreLocation`."""

    def __init__(self, source: LiveState, opened: Callable[..., CheckpointReader], cache_bytes: int) -> None:
        self._source = source
        self._opened = opened
        self._cache_bytes = cache_bytes
        self._planning = threading.Lock()
        self._current: LiveMoment | None = None  # while a query is planned; guarded by _planning
        # State below is protected by _lock.
        self._lock = threading.Lock()
        self._files: dict[str, _Files] = {}
        self._others: dict[str, _OtherCheckpoints] = {}
        self._closed = False

    def now(self) -> LiveMoment:
        """The moment that the query being planned sees, else a new one."""
        return self._current or self._taken()

    @contextmanager
    def planning(self) -> Iterator[None]:
        """One query is planned at a time; what it was planned with stays with it, and nowhere else."""
        with self._planning:
            self._current = self._taken()
            try:
                yield
            finally:
                self._current = None

    def at(self, at: At) -> CheckpointReader:
        """See `States.at`."""
        location = _location(self.now().snapshot)
        with self._lock:
            if self._closed:
                raise StoreClosedError(f"{location.url}: the catalog is closed")
            others = self._others.setdefault(
                location.url, _OtherCheckpoints(lambda *a, **k: self._opened(location, *a, **k), location.url)
            )
        return others.at(at, self._files_of(location).latest)

    def fetched(self) -> tuple[int, int]:
        """See `States.fetched`; what went through the store itself is in its own figures."""
        readers = [reader for others in self._others.values() for reader in others.readers]
        return _sum([*(f.fetched for f in self._files.values()), *(reader.fetched for reader in readers)])

    def close(self) -> None:
        """Let go of every checkpoint and of the connections; the store stays open."""
        with self._lock:
            self._closed = True
            others, files = list(self._others.values()), list(self._files.values())
        for checkpoints in others:
            checkpoints.close()
        for connections in files:
            connections.close()

    def _taken(self) -> LiveMoment:
        snapshot = self._source.snapshot()
        location = snapshot.location
        return LiveMoment(snapshot, None if location is None else self._files_of(location))

    def _files_of(self, location: StoreLocation) -> _Files:
        with self._lock:
            if self._closed:
                raise StoreClosedError(f"{location.url}: the catalog is closed")
            if location.url not in self._files:
                self._files[location.url] = _Files(location, self._cache_bytes)
            return self._files[location.url]


@dataclass(frozen=True, slots=True)
class LiveMoment:
    """A snapshot as the tables of a catalog; see `Moment`. ``files`` is None where the store reads for itself."""

    snapshot: StateSnapshot
    files: _Files | None

    @property
    def url(self) -> str:
        """Of which store."""
        return self.snapshot.url

    @property
    def tables(self) -> Mapping[str, TableSpec]:
        """The tables there are."""
        return {name: state.spec for name, state in self.snapshot.manifest.tables.items()}

    @property
    def manifest(self) -> Manifest:
        """The newest one, with what holds at this moment."""
        return self.snapshot.manifest

    def table(self, name: str) -> LiveTable:
        """See `Moment.table`."""
        return LiveTable(self.snapshot, self.snapshot.view(name, self._host()))

    def raw_table(self, name: str) -> LiveTable:
        """See `Moment.raw_table`."""
        return LiveTable(self.snapshot, self.snapshot.raw_view(name, self._host()))

    def latest(self) -> Manifest:
        """That of this moment."""
        return self.snapshot.manifest

    def unflushed(self) -> Mapping[str, tuple[int, int]]:
        """See `Moment.unflushed`."""
        return {
            name: (sum(p.batch.num_rows for p in view.pieces), sum(p.batch.nbytes for p in view.pieces))
            for name, view in self.snapshot.views.items()
        }

    def kept(self) -> list[KeptCheckpoint]:
        """See `Moment.kept`; none of a store that no URL leads to."""
        return [] if self.files is None else self.files.kept()

    def samples(self) -> Sequence[Sample]:
        """Those of the open store."""
        return self.snapshot.samples()

    def merges(self) -> tuple[StoreSettings, tuple[CompactionPlan, ...]]:
        """By the store's own settings, and what it was merging."""
        return self.snapshot.settings, self.snapshot.merging

    def _host(self) -> FileHost | None:
        return None if self.files is None else _FilesOfSnapshot(self.snapshot, self.files)


@dataclass(frozen=True, slots=True)
class LiveTable:
    """One table of a snapshot, which stays for as long as somebody refers to this."""

    snapshot: StateSnapshot
    view: TableView

    @property
    def spec(self) -> TableSpec:
        """Its declaration."""
        return self.view.layout.spec

    @property
    def layout(self) -> TableLayout:
        """Its stored form and merge rule."""
        return self.view.layout

    @contextmanager
    def sweep(
        self, predicate: pc.Expression | None = None, *, count: ReadCount | None = None, **options: Any
    ) -> Iterator[Sweep]:
        """The table in pieces of bounded size; see `Sweep.begin`."""
        yield Sweep.begin(self.view, predicate, count, **options)


class _Files:
    """Reads of a store's files that share nothing with the store: own threads, connections and cache."""

    def __init__(self, location: StoreLocation, cache_bytes: int) -> None:
        self.url = location.url
        self._runtime = IsolatedRuntime("statestore-live", io_threads=8, cpu_threads=1)
        self._runtime.start()
        try:
            self._tools = open_toolbox(
                self._runtime, location.url, location.storage_options, location.root_options, allow_unsafe_create=True
            )
            self._runtime.call(self._tools.latest)  # which also tells it of the stores that this one was branched from
        except BaseException:
            self._runtime.close(_CLOSE_TIMEOUT_S)
            raise
        self._counting = CountingObjectStore(self._tools.objects)
        self.reader = BlockReader(self._counting, BlockCache(CachePool(cache_bytes)))

    def latest(self) -> Manifest:
        """The newest manifest."""
        return self._runtime.call(self._tools.latest)

    def kept(self) -> list[KeptCheckpoint]:
        """Every checkpoint that the store keeps now, oldest first."""
        return self._runtime.call(self._tools.all_kept)

    def read(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a read and wait for it."""
        return self._runtime.call(work, None)

    @property
    def fetched(self) -> tuple[int, int]:
        """Requests, and the bytes that they brought."""
        return self._counting.fetched

    def close(self) -> None:
        """Stop every thread."""
        self._runtime.close(_CLOSE_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class _FilesOfSnapshot:
    """The reads of one snapshot: they know whether a file that is missing may be. See `FileHost`."""

    snapshot: StateSnapshot
    files: _Files

    @property
    def reader(self) -> BlockReader:
        return self.files.reader

    def read(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        try:
            return self.files.read(work)
        except ObjectMissingError as error:
            # The collector of this process leaves the files alone, one elsewhere knows nothing of the snapshot.
            if self.snapshot.manifest.files.keys() <= self.files.latest().files.keys():
                raise
            raise CheckpointGoneError(
                f"{self.snapshot.url}: {error}: another process has merged and collected it since the query was "
                "planned; ask again"
            ) from error


def _location(snapshot: StateSnapshot) -> StoreLocation:
    if snapshot.location is None:
        raise CheckpointNotFoundError(f"{snapshot.url}: no checkpoints are kept that a URL leads to")
    return snapshot.location


def _sum(counts: Any) -> tuple[int, int]:
    requests, nbytes = zip(*counts, strict=True) if (counts := list(counts)) else ((), ())
    return sum(requests), sum(nbytes)
