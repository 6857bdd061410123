"""State in SlateDB, by its official binding: what another LSM engine looks like behind the `StateBackend` protocol.

Between checkpoints rows stay in memory. A checkpoint is one SlateDB write batch: the changed rows of every table and
the `JobState`, so that they become durable together; then the write-ahead log is flushed. Reads see a snapshot of the
database, renewed with every checkpoint, below the rows in memory.

SlateDB's calls are coroutines and run on the isolated runtime; every key costs one call into the
binding (about 40 microseconds), which bounds the speed. See the architecture document for what one gains and loses.

Invariants:

* Nothing is written to the database between checkpoints, so it always holds exactly the latest one.
* A commit is computed from the snapshot that the last successful one left, so that repeating one whose outcome is
  unknown writes the same entries again.
* A newer opener makes the next commit fail with SlateDB's "detected newer DB client": `FencedError`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from urllib.parse import urlsplit

try:
    from slatedb import uniffi as slatedb
except ImportError as missing:
    raise ImportError(f"the backend 'slatedb' needs the extra 'slatedb': {missing}") from missing

from statebackend.backend import Checkpoint, Health, JobState, StoredTable
from statebackend.errors import (
    CorruptionError,
    FencedError,
    SchemaMismatchError,
    StateStoreError,
    StorageUnavailableError,
    StoreClosedError,
)
from statebackend.ids import AttemptId, CheckpointId, ManifestNumber, SequenceNumber, StoreId, WriterEpoch, WriterId
from statebackend.keys import Hasher
from statebackend.manifest import CheckpointCommit, Manifest
from statebackend.manifest_codec import decode_manifest, encode_manifest
from statebackend.manifest_store import new_id
from statebackend.merge import TableLayout
from statebackend.objectstore_base import check_url
from statebackend.runtime import IsolatedRuntime
from statebackend.slatedb_rows import RowCodec
from statebackend.slatedb_table import SlateTable
from statebackend.tables import TableKind, TableOrder, TableSpec

if TYPE_CHECKING:
    from datafusion.user_defined import AggregateUDF

__all__ = ["SlateStateBackend", "open_slatedb"]

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_STATE_KEY = b"s"
"""The entry that holds the job's state and the declarations of the tables; keys of rows begin with another letter."""
_OWNER = "slatedb"
_BATCH = 1000


def open_slatedb(
    url: str,
    *,
    udafs: Mapping[str, AggregateUDF] | None = None,
    storage_options: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
) -> SlateStateBackend:
    """Open the database at ``url`` (a path, ``file://``, ``memory://name``, ``s3://bucket/path``); the entry point.

    ``storage_options``: configuration of SlateDB's object store; ``settings``: of SlateDB, as JSON values by name.
    Raises ``ValueError`` for settings that SlateDB refuses, `StorageUnavailableError`, `CorruptionError`.
    """
    check_url(url)
    return SlateStateBackend(url, dict(udafs or {}), dict(storage_options or {}), dict(settings or {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """One barrier on its way into the database."""

    commit: CheckpointCommit
    prepare: tuple[Callable[[], None], ...]
    started: float


class SlateStateBackend:
    """A `StateBackend` on SlateDB; see `open_slatedb`."""

    _memory: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        url: str,
        udafs: Mapping[str, AggregateUDF],
        storage_options: Mapping[str, str],
        settings: Mapping[str, str],
    ) -> None:
        # Constant after construction.
        self._url = url
        self._udafs = udafs
        self._hasher = Hasher()
        self._runtime = IsolatedRuntime("statestore-slatedb", io_threads=4, cpu_threads=1)
        self.lock = threading.RLock()
        self._one_commit = asyncio.Lock()
        # State below is protected by lock.
        self._tables: dict[str, SlateTable] = {}
        self._sequence = 0
        self._fatal: StateStoreError | None = None
        self._last_error: BaseException | None = None
        self._closed = False
        self._runtime.start()
        try:
            self._runtime.call(self._open(storage_options, settings))
        except BaseException:
            self._runtime.close(5.0)
            raise
        self.restored = self._manifest.checkpoint
        self._checkpoint_id = int(self._manifest.checkpoint_id)
        self._sequence = int(self._manifest.low_marks.get(_OWNER, 0))

    @property
    def store_id(self) -> StoreId:
        """Random identity of the state, given when it was created."""
        return self._manifest.store_id

    def table(self, spec: TableSpec) -> SlateTable:
        """Create or open a table; raises `SchemaMismatchError` for another spec under its name."""
        self.check_usable()
        with self.lock:
            state = self._manifest.tables.get(spec.name)
            known = self._tables[spec.name].spec if spec.name in self._tables else state.spec if state else spec
            if known != spec:
                raise SchemaMismatchError(
                    f"{self._url}: table {spec.name!r} is {known}, asked for {spec}; this backend keeps rows without "
                    "the version of their schema, so that columns cannot change"
                )
            if spec.name not in self._tables:
                layout = TableLayout.of(spec, self._hasher, self._udafs)
                if state is not None and state.fingerprint != layout.fingerprint:
                    raise SchemaMismatchError(
                        f"{self._url}: table {spec.name!r} holds states of layout {state.fingerprint}, this "
                        f"DataFusion makes {layout.fingerprint}"
                    )
                self._tables[spec.name] = SlateTable(self, RowCodec(layout), state.watermark if state else None)
            return self._tables[spec.name]

    def stored_tables(self) -> Mapping[str, StoredTable]:
        """The tables of the newest checkpoint; their rows are not counted."""
        return {n: StoredTable(spec=t.spec, rows=None, bytes=None) for n, t in self._manifest.tables.items()}

    def move_tables(self, names: Mapping[str, str | None]) -> None:
        """Not possible here, unless there is nothing to do: the name of a table is part of its keys."""
        if missing := [name for name in names if name not in self._manifest.tables]:
            raise ValueError(f"{self._url}: no tables {missing}; there are {sorted(self._manifest.tables)}")
        if names:
            raise StateStoreError(
                f"{self._url}: tables {sorted(names)} cannot be renamed or dropped in a database of SlateDB"
            )

    def checkpoint(self, job: JobState, prepare: Sequence[Callable[[], None]] = ()) -> Future[Checkpoint]:
        """Cut now, commit in the background; see `StateBackend.checkpoint`."""
        self.check_usable()
        with self.lock:
            self._sequence += 1
            self._checkpoint_id += 1
            for table in self._tables.values():
                table.freeze(self._sequence)
            commit = CheckpointCommit(
                checkpoint_id=CheckpointId(self._checkpoint_id),
                owner=_OWNER,
                low_mark=SequenceNumber(self._sequence),
                job=job,
                tables={n: t.cut() for n, t in self._tables.items()},
                files={},
                retained_max=1,
            )
            request = _Request(commit=commit, prepare=tuple(prepare), started=time.monotonic())
            return self._runtime.submit(self._commit(request))

    def health(self) -> Health:
        """Whether the backend works; `Health.error` is the last failed checkpoint's error."""
        error = self._fatal or self._last_error
        return Health(ok=error is None and not self._closed, error=error)

    def close(self, deadline_s: float = 30.0) -> None:
        """Finish what was handed over, close the database, stop every thread."""
        with self.lock:
            first, self._closed = not self._closed, True
        if first:
            self._runtime.submit(self._shut_down())
        self._runtime.close(deadline_s)

    def relieve(self) -> None:
        """Rows wait in memory for their checkpoint: half of one must not be in the database."""

    def check_usable(self) -> None:
        """Raise `StoreClosedError` or `FencedError` when this backend must not be used any more."""
        if self._closed:
            raise StoreClosedError(f"{self._url}: closed")
        self._runtime.check_usable()
        if self._fatal is not None:
            raise self._fatal

    # --- reads, for the tables ---

    def get(self, snapshot: Any, keys: Sequence[bytes]) -> list[bytes]:
        """The values of those keys that are there."""
        return self._runtime.call(self._get(snapshot, keys)) if keys else []

    def scan(self, snapshot: Any, low: bytes, high: bytes) -> list[bytes]:
        """The values of the keys from ``low`` up to ``high``, in their order."""
        return [entry.value for entry in self._runtime.call(self._scan(snapshot, low, high))]

    async def _get(self, snapshot: Any, keys: Sequence[bytes]) -> list[bytes]:
        found: list[bytes | None] = []
        for start in range(0, len(keys), _BATCH):
            found += await self._slate(asyncio.gather(*(snapshot.get(k) for k in keys[start : start + _BATCH])))
        return [value for value in found if value is not None]

    async def _scan(self, snapshot: Any, low: bytes, high: bytes) -> list[Any]:
        if low >= high:
            return []
        limits = slatedb.KeyRange(start=low, start_inclusive=True, end=high, end_inclusive=False)
        entries: list[Any] = []
        iterator = await self._slate(snapshot.scan(limits))
        while more := await self._slate(iterator.next_batch(_BATCH)):
            entries += more
        return entries

    # --- on the runtime ---

    async def _open(self, storage_options: Mapping[str, str], settings: Mapping[str, str]) -> None:
        store, path = self._resolve(storage_options)
        builder = slatedb.DbBuilder(path, store)
        chosen = slatedb.Settings.default()
        for name, value in settings.items():
            try:
                chosen.set(name, value)
            except slatedb.Error as error:
                raise ValueError(f"{self._url}: setting {name!r} of SlateDB cannot be {value!r}: {error}") from error
        builder.with_settings(chosen)
        self._db = await self._slate(builder.build())
        self.snapshot = await self._slate(self._db.snapshot())
        found = await self._slate(self.snapshot.get(_STATE_KEY))
        if found is not None:
            self._manifest = decode_manifest(found, f"{self._url} entry {_STATE_KEY!r}")
            return
        nobody = new_id(random.SystemRandom())
        self._manifest = Manifest(
            number=ManifestNumber(0), parent_attempt=AttemptId(""), store_id=StoreId(nobody), created_ms=_now_ms(),
            writer_epoch=WriterEpoch(0), writer_id=WriterId(_OWNER), attempt_id=AttemptId(nobody),
        )  # fmt: skip
        await self._write({_STATE_KEY: encode_manifest(self._manifest)})

    def _resolve(self, storage_options: Mapping[str, str]) -> tuple[Any, str]:
        parts = urlsplit(self._url)
        try:
            if parts.scheme in ("", "file"):
                return slatedb.ObjectStore.resolve("file:///"), parts.path.strip("/")
            if parts.scheme == "memory":
                name = parts.netloc + parts.path
                return self._memory.setdefault(name, slatedb.ObjectStore.resolve("memory:///")), "db"
            builder = slatedb.ObjectStoreBuilder.from_url(f"{parts.scheme}://{parts.netloc}")
            for name, value in storage_options.items():
                builder.with_config(name, value)
            return builder.build(), parts.path.strip("/") or "db"
        except slatedb.Error as error:
            raise self._failure(error) from error

    async def _commit(self, request: _Request) -> Checkpoint:
        async with self._one_commit:
            try:
                for stage in request.prepare:
                    await self._runtime.run_io(stage)
                checkpoint = await self._publish(request)
            except BaseException as error:
                self._last_error = error
                raise
            self._last_error = None
            return checkpoint

    async def _publish(self, request: _Request) -> Checkpoint:
        base, snapshot, commit = self._manifest, self.snapshot, request.commit
        following = base.next(
            writer_id=WriterId(_OWNER), attempt_id=AttemptId(str(commit.checkpoint_id)), created_ms=_now_ms()
        )
        manifest = commit.apply(following)
        changes: dict[bytes, bytes | None] = {}
        for name in commit.tables:
            old = base.tables[name].watermark if name in base.tables else None
            changes |= await self._changes(snapshot, self._tables[name], commit, old)
        rows = len(changes)
        changes[_STATE_KEY] = encode_manifest(manifest)
        await self._write(changes)
        renewed = await self._slate(self._db.snapshot())
        with self.lock:
            self._manifest, self.snapshot = manifest, renewed
            for table in self._tables.values():
                table.committed(commit.low_mark)
        return Checkpoint(
            checkpoint_id=manifest.checkpoint_id,
            manifest_number=manifest.number,
            created_ms=manifest.created_ms,
            job=commit.job,
            bytes_written=sum(len(k) + len(v or b"") for k, v in changes.items()),
            rows_written=rows,
            duration_s=time.monotonic() - request.started,
        )

    async def _changes(
        self, snapshot: Any, table: SlateTable, commit: CheckpointCommit, old_watermark: int | None
    ) -> dict[bytes, bytes | None]:
        """What a checkpoint changes in the entries of one table."""
        codec, watermark = table.codec, commit.tables[table.spec.name].watermark
        changes: dict[bytes, bytes | None] = {}
        if table.spec.order is TableOrder.TIME and watermark is not None and watermark != old_watermark:
            expired = await self._scan(snapshot, *codec.range_of(None, watermark))
            changes = {entry.key: None for entry in expired}
        pieces = {s: p for s, p in table.frozen.items() if s <= commit.low_mark}
        if table.spec.kind is TableKind.APPEND:
            changes |= await self._runtime.run_cpu(codec.appended, pieces, watermark)
        elif pieces:
            written = await self._runtime.run_cpu(codec.merged, [p for part in pieces.values() for p in part])
            values = await self._get(snapshot, sorted(set(codec.keys_of(written))))
            existing = await self._runtime.run_cpu(codec.rows_of, values)
            changes |= await self._runtime.run_cpu(codec.changes, existing, written, watermark)
        return changes

    async def _write(self, changes: Mapping[bytes, bytes | None]) -> None:
        """One atomic batch, durable when it returns."""
        batch = slatedb.WriteBatch()

        def fill() -> None:
            for key, value in changes.items():
                if value is None:
                    batch.delete(key)
                else:
                    batch.put(key, value)

        await self._runtime.run_cpu(fill)
        handle = await self._slate(self._db.write(batch))
        await self._slate(self._db.flush())
        await self._slate(handle.await_durable())

    async def _shut_down(self) -> None:
        async with self._one_commit:
            with suppress(slatedb.Error):  # a fenced database cannot be closed properly, nor need it be
                await self._db.shutdown()

    async def _slate(self, call: Awaitable[_T]) -> _T:
        try:
            return await call
        except (slatedb.Error, slatedb.InternalError) as error:
            failure = self._failure(error)
            if isinstance(error, slatedb.Error.Closed):
                self._fatal = failure
            raise failure from error

    def _failure(self, error: Exception) -> StateStoreError:
        message = f"{self._url}: SlateDB: {error}"
        if isinstance(error, slatedb.Error.Closed):
            fenced = error.reason == slatedb.CloseReason.FENCED
            return FencedError(message) if fenced else StoreClosedError(message)
        if isinstance(error, slatedb.Error.Unavailable):
            return StorageUnavailableError(message)
        if isinstance(error, slatedb.Error.Data):
            return CorruptionError(message)
        return StateStoreError(message)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
