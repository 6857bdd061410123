"""The stores that are compared, behind one small interface: 8-byte keys, 100-byte values, batches.

Keys are random 64-bit integers; the peers get them big-endian. Every engine is used the way that its binding makes
fastest: ours by Arrow batches, slatedb by one write batch and gathered gets, rocksdict by write batches and lists of
keys, sqlite3 by ``executemany`` and ``IN``.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import rocksdict
from slatedb import uniffi as slatedb

from statebackend import StateStore, StoreSettings, TableKind, TableSpec
from statebackend.compaction_tool import compact
from statebackend.inspect import read_store

__all__ = ["ENGINES", "VALUE_BYTES", "Engine", "Ours", "raw_keys"]

T = TypeVar("T")
Keys = npt.NDArray[np.int64]

VALUE_BYTES = 100
_POOL = np.random.default_rng(0).bytes(VALUE_BYTES * 65_536)
_VALUES = [_POOL[i : i + VALUE_BYTES] for i in range(0, len(_POOL), VALUE_BYTES)]
ROWS = TableSpec(
    name="rows",
    schema=pa.schema([pa.field("key", pa.int64(), nullable=False), ("value", pa.binary())]),
    key=("key",),
    kind=TableKind.UPSERT,
)


class Engine(Protocol):
    """``writes_max``, ``reads_max``: how many keys the engine is given where it is slow; None: as many as asked for.

    ``large_max``: rows of its large tables, where filling them takes longer than everything else.
    """

    name: ClassVar[str]
    writes_max: ClassVar[int | None]
    reads_max: ClassVar[int | None]
    large_max: ClassVar[int | None]

    def __init__(self, place: Path | None) -> None:
        """Open at a directory, or in memory. Raises ``NotImplementedError`` when it only knows disks."""

    def upsert(self, keys: Keys) -> None:
        """Write one batch."""

    def flush(self) -> None:
        """Make everything durable."""

    def compact(self) -> None:
        """Leave one version of every key."""

    def lookup(self, keys: Keys) -> int:
        """How many of the keys are there; their values are made Python's (or Arrow's)."""

    def scan(self, part: float) -> int:
        """Read this part of the keys; how many."""

    def close(self) -> None:
        """Release everything."""


def raw_keys(keys: Keys) -> list[bytes]:
    """The keys as 8 bytes each, in their order."""
    raw = keys.astype(">i8").tobytes()
    return [raw[i : i + 8] for i in range(0, len(raw), 8)]


class Ours:
    """The LSM store, by Arrow batches; a part of the keys is a range of hashes."""

    name, writes_max, reads_max, large_max = "ours", None, None, None

    def __init__(self, place: Path | None) -> None:
        self.url = f"memory://{time.monotonic_ns()}/store" if place is None else str(place)
        self.store = StateStore.open(self.url, StoreSettings(cache_bytes=1 << 30))
        self.table = self.store.table(ROWS)

    def upsert(self, keys: Keys) -> None:
        offsets = np.arange(len(keys) + 1, dtype=np.int32) * VALUE_BYTES
        values = pa.Array.from_buffers(pa.binary(), len(keys), [None, pa.py_buffer(offsets), pa.py_buffer(_POOL)])
        self.table.write(pa.RecordBatch.from_arrays([pa.array(keys), values], schema=ROWS.schema))

    def flush(self) -> None:
        self.store.flush()

    def compact(self) -> None:
        """Merges every table into one run, as ``python -m statebackend compact --all`` does beside the store."""
        compact(self.url, everything=True)

    @property
    def live_bytes(self) -> int:
        """Of the files that the newest manifest names; those that were merged go with old checkpoints."""
        return sum(f.size for f in read_store(self.url, manifests_max=1).latest.files.values())

    def lookup(self, keys: Keys) -> int:
        found = self.table.lookup(pa.record_batch([pa.array(keys)], names=["key"]))
        return int(found.hit.true_count)

    def scan(self, part: float) -> int:
        return sum(b.num_rows for b in self.table.scan(hash_range=(None, int(part * (1 << 64)))))

    def close(self) -> None:
        self.store.close()


class SlateDb:
    """SlateDB by its official binding."""

    name, writes_max, reads_max, large_max = "slatedb", 20_000, 2_000, 20_000

    def __init__(self, place: Path | None) -> None:
        self._loop = asyncio.new_event_loop()
        objects = slatedb.ObjectStore.resolve("memory:///" if place is None else "file:///")
        path = "db" if place is None else str(place).strip("/")
        self._db = self._run(slatedb.DbBuilder(path, objects).build())

    def _run(self, work: Awaitable[T]) -> T:
        async def wait() -> T:
            return await work

        return self._loop.run_until_complete(wait())

    def upsert(self, keys: Keys) -> None:
        batch = slatedb.WriteBatch()
        for key, value in zip(raw_keys(keys), _VALUES, strict=False):
            batch.put(key, value)
        self._run(self._db.write(batch))

    def flush(self) -> None:
        self._run(self._db.flush())

    def compact(self) -> None:
        """Its compactor works by itself."""

    def lookup(self, keys: Keys) -> int:
        return sum(v is not None for v in self._run(self._gather(raw_keys(keys))))

    async def _gather(self, keys: Sequence[bytes]) -> list[Any]:
        return await asyncio.gather(*(self._db.get(k) for k in keys))

    def scan(self, part: float) -> int:
        return self._run(self._scan(_upper(part)))

    async def _scan(self, end: bytes) -> int:
        limits = slatedb.KeyRange(start=b"\0", start_inclusive=True, end=end, end_inclusive=False)
        iterator, count = await self._db.scan(limits), 0
        while more := await iterator.next_batch(5000):
            count += len(more)
        return count

    def close(self) -> None:
        self._run(self._db.shutdown())
        self._loop.close()


class RocksDict:
    """RocksDB by rocksdict, raw bytes."""

    name, writes_max, reads_max, large_max = "rocksdict", None, None, None

    def __init__(self, place: Path | None) -> None:
        if place is None:
            raise NotImplementedError
        self._db = rocksdict.Rdict(str(place), rocksdict.Options(raw_mode=True))

    def upsert(self, keys: Keys) -> None:
        batch = rocksdict.WriteBatch(raw_mode=True)
        for key, value in zip(raw_keys(keys), _VALUES, strict=False):
            batch.put(key, value)
        self._db.write(batch)

    def flush(self) -> None:
        self._db.flush_wal(True)
        self._db.flush()

    def compact(self) -> None:
        self._db.compact_range(None, None)

    def lookup(self, keys: Keys) -> int:
        raw = raw_keys(keys)
        if len(raw) == 1:
            return int(self._db.get(raw[0]) is not None)
        return sum(v is not None for v in self._db.get(raw))

    def scan(self, part: float) -> int:
        end, count = _upper(part), 0
        for key, value in self._db.items():
            if key >= end:
                break
            count += value is not None
        return count

    def close(self) -> None:
        self._db.close()


class Sqlite:
    """sqlite3, WAL, one transaction for each batch."""

    name, writes_max, reads_max, large_max = "sqlite3", None, None, 1_000_000

    def __init__(self, place: Path | None) -> None:
        if place is not None:
            place.mkdir(exist_ok=True)
        self._db = sqlite3.connect(":memory:" if place is None else place / "db", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute("CREATE TABLE IF NOT EXISTS rows (k BLOB PRIMARY KEY, v BLOB) WITHOUT ROWID")

    def upsert(self, keys: Keys) -> None:
        self._db.execute("BEGIN")
        pairs = zip(raw_keys(keys), _VALUES, strict=False)
        self._db.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", pairs)
        self._db.execute("COMMIT")

    def flush(self) -> None:
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def compact(self) -> None:
        """It keeps one version of every key."""

    def lookup(self, keys: Keys) -> int:
        raw, count = raw_keys(keys), 0
        for start in range(0, len(raw), 1000):
            some = raw[start : start + 1000]
            marks = ",".join("?" * len(some))
            count += len(self._db.execute(f"SELECT k, v FROM rows WHERE k IN ({marks})", some).fetchall())
        return count

    def scan(self, part: float) -> int:
        return sum(1 for _ in self._db.execute("SELECT k, v FROM rows WHERE k < ?", (_upper(part),)))

    def close(self) -> None:
        self._db.close()


def _upper(part: float) -> bytes:
    """The end of the lowest part of the keys, which are not negative."""
    return b"\xff" * 9 if part >= 1 else int(part * (1 << 63)).to_bytes(8, "big")


ENGINES: tuple[type[Engine], ...] = (Ours, SlateDb, RocksDict, Sqlite)
