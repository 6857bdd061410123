"""A plain embedded key-value database on one table of order ``key``: bytes to bytes.

Single puts and deletes gather in a small buffer and reach the table as one batch; reads see them at
once. Nothing is durable before `KeyValueStore.flush` (or the interval of `StoreSettings.flush_interval_s`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from statebackend.points import KEYS_MAX
from statebackend.settings import StoreSettings
from statebackend.store import StateStore
from statebackend.tables import TableKind, TableOrder, TableSpec

__all__ = ["KeyValueStore", "open_kv"]

_SPEC = TableSpec(
    name="kv",
    schema=pa.schema([pa.field("key", pa.binary(), nullable=False), ("value", pa.binary())]),
    key=("key",),
    kind=TableKind.UPSERT,
    order=TableOrder.KEY,
)
_BUFFER_MAX = 4096


def open_kv(url: str | os.PathLike[str], settings: StoreSettings | None = None, **options: Any) -> KeyValueStore:
    """Open (or create) the key-value store at ``url``; an older opener is fenced. See `StateStore.open`."""
    return KeyValueStore(StateStore.open(url, settings, **options))


class KeyValueStore:
    """Keys and values are bytes. Thread-safe; a context manager.

    Closing flushes; leaving a ``with`` block by an error does not.
    """

    def __init__(self, store: StateStore) -> None:
        self.store = store
        self._table = store.table(_SPEC)
        self._lock = threading.Lock()
        self._buffer: dict[bytes, bytes | None] = {}

    def put(self, key: bytes, value: bytes) -> None:
        """Set a key."""
        self.put_many({key: value})

    def delete(self, key: bytes) -> None:
        """Remove a key; it is fine if there is none."""
        self.delete_many([key])

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, or None."""
        return self.get_many([key])[0]

    def put_many(self, items: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]]) -> None:
        """Set many keys; of equal ones the last wins."""
        pairs = dict(items)
        _check(*pairs, *pairs.values())
        self._add(pairs)

    def delete_many(self, keys: Iterable[bytes]) -> None:
        """Remove many keys."""
        gone = list(keys)
        _check(*gone)
        self._add(dict.fromkeys(gone))

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of many keys, None where there is none, in their order."""
        _check(*keys)
        with self._lock:
            buffered = {k: self._buffer[k] for k in keys if k in self._buffer}
        wanted = [k for k in keys if k not in buffered]
        found: dict[bytes, bytes | None] = dict(buffered)
        if len(wanted) <= KEYS_MAX and (few := self._table.find([(key,) for key in wanted])) is not None:
            values = [None if row is None else row[0].payload.column(1)[row[1]].as_py() for row in few]
            found.update(zip(wanted, values, strict=True))
        elif wanted:
            rows = self._table.lookup(pa.record_batch([pa.array(wanted, pa.binary())], names=["key"]))
            found.update(zip(wanted, rows.batch.column("value").to_pylist(), strict=True))
        return [found[k] for k in keys]

    def scan(
        self, *, prefix: bytes | None = None, start: bytes | None = None, end: bytes | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        """Pairs with ``start <= key < end`` (or all that begin with ``prefix``), in the order of the keys."""
        if prefix is not None:
            if start is not None or end is not None:
                raise ValueError("scan by a prefix or by a range, not both")
            start, end = prefix, _after(prefix)
        self._write_buffer()
        for batch in self._table.scan_keys(start, end):
            yield from zip(batch.column("key").to_pylist(), batch.column("value").to_pylist(), strict=True)

    def flush(self) -> None:
        """Make everything written so far durable."""
        self._write_buffer()
        self.store.flush()

    def close(self) -> None:
        """Flush, then stop every thread."""
        try:
            self.flush()
        finally:
            self.store.close()

    def __enter__(self) -> KeyValueStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.store.close()

    def _add(self, changes: Mapping[bytes, bytes | None]) -> None:
        self.store.check_usable()
        with self._lock:
            self._buffer.update(changes)
            if len(self._buffer) >= _BUFFER_MAX:
                self._drain()

    def _write_buffer(self) -> None:
        with self._lock:
            self._drain()

    def _drain(self) -> None:
        """Hand the buffer to the table; the lock is held. What the table refuses stays in the buffer."""
        puts = {k: v for k, v in self._buffer.items() if v is not None}
        gone = [k for k, v in self._buffer.items() if v is None]
        if puts:
            arrays = [pa.array(list(puts), pa.binary()), pa.array(list(puts.values()), pa.binary())]
            self._table.write(pa.RecordBatch.from_arrays(arrays, schema=_SPEC.schema))
        if gone:
            self._table.delete(pa.record_batch([pa.array(gone, pa.binary())], names=["key"]))
        self._buffer = {}


def _check(*values: object) -> None:
    for value in values:
        if not isinstance(value, bytes):
            raise TypeError(f"keys and values are bytes, not {type(value).__name__}")


def _after(prefix: bytes) -> bytes | None:
    """The first key that is greater than every key with this prefix; None if there is none."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else None
