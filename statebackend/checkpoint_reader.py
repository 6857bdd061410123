"""Reads a checkpoint of a store that somebody else may own: tables of one moment, for as long as it is kept.

Nothing is taken over and nobody is fenced; the reader has a runtime of its own. With a pin, a commit names a
copy of the checkpoint's manifest, so that the collector keeps its files; the pin is a lease, renewed in the
background. It ends by a commit (of a checkpoint, or of ``gc``) that comes later than its time, never by a clock
alone. Without a pin nothing is written at all, and the reader lives on what retention keeps.

Invariants:

* What is read is exactly the checkpoint, or an error; files are never rewritten and names never used again.
* A file that is missing means `CheckpointGoneError` if the newest manifest says that the checkpoint is kept no longer,
  and damage otherwise.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from statebackend import display
from statebackend.backend import Checkpoint, LookupResult, Matches
from statebackend.cache import BlockCache, BlockReader, CachePool
from statebackend.compaction import CompactionPlan
from statebackend.errors import (
    CheckpointGoneError,
    CheckpointNotFoundError,
    ObjectMissingError,
    StateStoreError,
)
from statebackend.inspect_metrics import look_metrics
from statebackend.keys import Hasher
from statebackend.manifest import Manifest, Pin, TableState
from statebackend.manifest_store import Clock, new_id
from statebackend.merge import HashRange, TableLayout
from statebackend.metrics import Sample
from statebackend.objectstore_counting import CountingObjectStore
from statebackend.retention import KeptCheckpoint, RenewalCommit
from statebackend.runtime import IsolatedRuntime
from statebackend.settings import StoreSettings
from statebackend.states_check import require_known_states
from statebackend.sweep import SWEEP_BYTES, ReadCount, Sweep
from statebackend.table import LsmTable
from statebackend.tables import TableSpec
from statebackend.toolbox import Options, RootOptions, Toolbox, open_toolbox

if TYPE_CHECKING:
    from datafusion.user_defined import AggregateUDF

__all__ = ["CheckpointReader", "CheckpointTable", "open_checkpoint"]

T = TypeVar("T")

_CLOSE_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


def open_checkpoint(
    url: str | os.PathLike[str],
    checkpoint_id: int | None = None,
    *,
    savepoint: str | None = None,
    pin: bool = True,
    lease_s: float = 60.0,
    cache_bytes: int = 64 << 20,
    udafs: Mapping[str, AggregateUDF] | None = None,
    storage_options: Options = None,
    root_options: RootOptions = None,
    clock: Clock | None = None,
) -> CheckpointReader:
    """Open a retained checkpoint (default: the newest) or a savepoint for reading, beside whoever owns the store.

    ``pin``: keep it while it is open, by a lease of ``lease_s`` seconds that is renewed three times as often; needs
    to write to the store. Without it nothing is written, and reading fails with `CheckpointGoneError` once
    the checkpoint is kept no longer: then open a newer one.
    ``cache_bytes``: decoded blocks kept in memory. ``udafs``: Python aggregate functions by name.
    ``storage_options`` and ``root_options`` as in `StateStore.open`; ``clock``: for tests.

    Raises `CheckpointNotFoundError` when there is no such checkpoint, ``ValueError`` when both are named.
    """
    if checkpoint_id is not None and savepoint is not None:
        raise ValueError("name either a checkpoint or a savepoint")
    if lease_s <= 0:
        raise ValueError(f"lease_s must be positive, not {lease_s}")
    runtime = IsolatedRuntime("statestore-reader", io_threads=8, cpu_threads=1)
    runtime.start()
    try:
        tools = open_toolbox(
            runtime, os.fspath(url), storage_options, root_options, allow_unsafe_create=not pin, clock=clock
        )
        lease = _Lease(tools, lease_s) if pin else None
        if lease is not None:
            kept = runtime.call(lambda: lease.begin(checkpoint_id, savepoint))
            runtime.submit(lease.renew(), background=True)
        else:
            kept = runtime.call(lambda: _find(tools, checkpoint_id, savepoint))
    except BaseException:
        runtime.close(_CLOSE_TIMEOUT_S)
        raise
    return CheckpointReader(runtime, tools, kept, lease, BlockCache(CachePool(cache_bytes)), dict(udafs or {}))


class CheckpointReader:
    """One checkpoint, open for reading; a context manager. See `open_checkpoint`."""

    def __init__(
        self,
        runtime: IsolatedRuntime,
        tools: Toolbox,
        kept: KeptCheckpoint,
        lease: _Lease | None,
        cache: BlockCache,
        udafs: Mapping[str, AggregateUDF],
    ) -> None:
        # Constant after construction.
        self.url = tools.url
        self._counting = CountingObjectStore(tools.objects)
        self.reader = BlockReader(self._counting, cache)
        self.lock = threading.RLock()
        self._runtime = runtime
        self._tools = tools
        self._kept = kept
        self._lease = lease
        self._udafs = udafs
        # State below is protected by lock.
        self._tables: dict[str, CheckpointTable] = {}
        self._closed = False

    @property
    def checkpoint(self) -> Checkpoint:
        """Which checkpoint is read, and what the job committed with it."""
        checkpoint = self._kept.manifest.checkpoint
        assert checkpoint is not None, "only checkpoints are kept"
        return checkpoint

    @property
    def tables(self) -> dict[str, TableSpec]:
        """The tables of the checkpoint, by name."""
        return {name: state.spec for name, state in self._kept.manifest.tables.items()}

    def table(self, name: str) -> CheckpointTable:
        """A table of the checkpoint.

        Raises ``KeyError`` when it has no such table, `SchemaMismatchError` when its partial states are of a
        layout that this DataFusion does not make.
        """
        with self.lock:
            if name not in self._tables:
                self._tables[name] = CheckpointTable(self._open(self._state(name)))
            return self._tables[name]

    def table_as(self, name: str, later: TableState) -> CheckpointTable:
        """A table of the checkpoint in the columns of a later state of it, whose schema began as this one.

        Raises ``KeyError`` and `SchemaMismatchError` as `table` does.
        """
        state = self._state(name)
        return CheckpointTable(
            self._open(replace(state, spec=later.spec, history=later.history, fingerprint=later.fingerprint))
        )

    def raw_table(self, name: str) -> CheckpointTable:
        """A table of which partial states are only read as they were written: needs no aggregate functions.

        Raises ``KeyError`` when the checkpoint has no such table.
        """
        state = self._state(name)
        return CheckpointTable(self._table(state, TableLayout.for_reading(state.spec, Hasher(), state.history)))

    @property
    def manifest(self) -> Manifest:
        """The manifest that committed the checkpoint."""
        return self._kept.manifest

    def latest(self) -> Manifest:
        """The newest manifest of the store, read now."""
        return self._runtime.call(self._tools.latest)

    def kept(self) -> list[KeptCheckpoint]:
        """Every checkpoint that the store keeps now; see `Toolbox.all_kept`."""
        return self._runtime.call(self._tools.all_kept)

    def unflushed(self) -> Mapping[str, tuple[int, int]]:
        """A checkpoint has no rows outside of files."""
        return {}

    def samples(self) -> list[Sample]:
        """What can be known of the store from outside, see `look_metrics`; the storage is listed."""
        return self._runtime.call(lambda: look_metrics(self._tools))

    def merges(self) -> tuple[StoreSettings, tuple[CompactionPlan, ...]]:
        """By which settings merges are taken to be due; those under way are known to whoever merges only."""
        return StoreSettings(), ()

    @property
    def fetched(self) -> tuple[int, int]:
        """Requests for parts of tables so far, and the bytes that they brought."""
        return self._counting.fetched

    def close(self) -> None:
        """End the pin, as far as the storage allows, and stop every thread."""
        with self.lock:
            first, self._closed = not self._closed, True
        if not first:
            return
        try:
            if self._lease is not None:
                self._runtime.call(self._lease.end, _CLOSE_TIMEOUT_S)
        except (StateStoreError, TimeoutError) as error:
            logger.warning("the pin on checkpoint %d stays until it expires: %s", self._kept.checkpoint_id, error)
        finally:
            self._runtime.close(_CLOSE_TIMEOUT_S)

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _repr_html_(self) -> str:
        return display.checkpoint_tables(self.checkpoint, self.url, self.manifest)

    # --- what its tables need ---

    def check_usable(self) -> None:
        """Raise `CheckpointGoneError` when the lease has ended, `StoreClosedError` when the reader was closed."""
        self._runtime.check_usable()
        if self._lease is not None:
            self._lease.check()

    def relieve(self) -> None:
        """Nothing is ever written here."""

    def read(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a read on the runtime and wait for it."""
        try:
            return self._runtime.call(work)
        except ObjectMissingError:
            self._runtime.call(self._require_kept)
            raise

    async def _require_kept(self) -> None:
        """Raise `CheckpointGoneError` unless the newest manifest still keeps the checkpoint."""
        latest = await self._tools.latest()
        try:
            if self._lease is not None:
                self._lease.require_kept_in(latest)
            else:
                self._kept.require_kept_in(latest)
        except CheckpointGoneError:
            raise
        except CheckpointNotFoundError as error:
            raise CheckpointGoneError(f"{self.url}: {error}; open a newer one") from error

    def _state(self, name: str) -> TableState:
        if (state := self._kept.manifest.tables.get(name)) is None:
            raise KeyError(f"{self.url}: no table {name!r}; there are {sorted(self._kept.manifest.tables)}")
        return state

    def _table(self, state: TableState, layout: TableLayout) -> LsmTable:
        return LsmTable(self, layout, state.files, state.watermark)

    def _open(self, state: TableState) -> LsmTable:
        layout = TableLayout.of(state.spec, Hasher(), self._udafs, state.history)
        require_known_states(state, layout, self._udafs, self.url)
        return self._table(state, layout)


class CheckpointTable:
    """A table of a checkpoint: it reads like a `StateTable`, and is never written."""

    def __init__(self, table: LsmTable) -> None:
        self._table = table

    @property
    def spec(self) -> TableSpec:
        """The declaration of the table."""
        return self._table.spec

    @property
    def watermark(self) -> int | None:
        """Rows with a time below this were dead at the checkpoint."""
        return self._table.watermark

    def scan(
        self,
        columns: Sequence[str] | None = None,
        time_range: tuple[int | None, int | None] = (None, None),
        *,
        merged: bool = True,
        hash_range: HashRange = (None, None),
    ) -> list[pa.RecordBatch]:
        """Live rows; see `StateTable.scan`."""
        return self._table.scan(columns, time_range, merged=merged, hash_range=hash_range)

    def scan_keys(self, start: bytes | None = None, end: bytes | None = None) -> Iterator[pa.RecordBatch]:
        """Live rows in the order of the key; see `LsmTable.scan_keys`."""
        return self._table.scan_keys(start, end)

    @property
    def layout(self) -> TableLayout:
        """Its stored form and merge rule."""
        return self._table.layout

    def sweep(
        self,
        predicate: pc.Expression | None = None,
        *,
        count: ReadCount | None = None,
        range_bytes: int = SWEEP_BYTES,
    ) -> AbstractContextManager[Sweep]:
        """The whole table in pieces of bounded size; see `LsmTable.sweep`. Not limited to what fits in memory."""
        return self._table.sweep(predicate, count=count, range_bytes=range_bytes)

    def lookup(self, keys: pa.RecordBatch) -> LookupResult:
        """The row of each key; see `StateTable.lookup`."""
        return self._table.lookup(keys)

    def matches(self, keys: pa.RecordBatch, time_range: tuple[int | None, int | None] = (None, None)) -> Matches:
        """All live rows of the given partition keys; see `StateTable.matches`."""
        return self._table.matches(keys, time_range)

    def _repr_html_(self) -> str:
        return display.table_spec(self.spec)


class _Lease:
    """A pin in the manifest of the store, kept alive from the runtime's thread."""

    def __init__(self, tools: Toolbox, lease_s: float) -> None:
        self._tools = tools
        self._lease_s = lease_s
        self._pin_id = new_id(tools.rng)
        self._pin: Pin | None = None
        self._valid_until = 0.0
        self._gone: CheckpointGoneError | None = None

    async def begin(self, checkpoint_id: int | None, savepoint: str | None) -> KeptCheckpoint:
        """Pin the checkpoint: a copy of its manifest, then a commit that names it."""
        began = self._tools.clock.monotonic()
        self._pin, kept = await self._tools.keep_copy(
            self._pin_id, partial(_pin, lease_ms=self._lease_ms), checkpoint_id=checkpoint_id, savepoint=savepoint
        )
        self._valid_until = began + self._lease_s
        return kept

    async def renew(self) -> None:
        """Renew for ever; ends when the pin is gone. A failure is logged, and the next turn tries again."""
        clock = self._tools.clock
        while True:
            await clock.sleep(self._lease_s / 3)
            began = clock.monotonic()
            commit = RenewalCommit(self._pin_id, clock.now_ms() + self._lease_ms)
            try:
                await self._tools.commit_safely(commit.apply)
            except CheckpointGoneError as error:
                self._gone = error
                return
            except StateStoreError as error:
                logger.warning("a pin could not be renewed, the next turn tries again: %s", error)
            else:
                self._valid_until = began + self._lease_s

    async def end(self) -> None:
        """Drop the pin, unless it has ended."""
        if self._gone is None and self._pin is not None:
            await self._tools.drop_copy(self._pin.object_name)

    def check(self) -> None:
        """Raise `CheckpointGoneError` when the pin has ended, or may have: it could not be renewed in time."""
        if self._gone is not None:
            raise CheckpointGoneError(f"{self._tools.url}: {self._gone}; open the checkpoint again") from self._gone
        if self._tools.clock.monotonic() > self._valid_until:
            raise CheckpointGoneError(f"{self._tools.url}: pin {self._pin_id} could not be renewed within its lease")

    def require_kept_in(self, manifest: Manifest) -> None:
        """Raise `CheckpointGoneError` unless the manifest names the pin."""
        if self._pin_id not in manifest.pins:
            raise CheckpointGoneError(f"{self._tools.url}: pin {self._pin_id} has ended; open the checkpoint again")

    @property
    def _lease_ms(self) -> int:
        return round(self._lease_s * 1000)


def _pin(*, object_name: str, checkpoint_id: Any, created_ms: int, lease_ms: int) -> Pin:
    return Pin(
        object_name=object_name,
        checkpoint_id=checkpoint_id,
        created_ms=created_ms,
        expires_ms=created_ms + lease_ms,
    )


async def _find(tools: Toolbox, checkpoint_id: int | None, savepoint: str | None) -> KeptCheckpoint:
    return await tools.kept(await tools.latest(), checkpoint_id, savepoint)
