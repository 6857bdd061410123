"""One store's part in a `MemoryBudget`: its MemTables, and how the largest is flushed before its checkpoint.

A failed early flush is no error: the rows stay in memory, readable, and the next write or checkpoint tries again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from statebackend.cache import BlockReader
from statebackend.errors import StoreClosedError
from statebackend.flusher import MemtableFlusher
from statebackend.ids import SequenceNumber
from statebackend.logs import context
from statebackend.memtable import FrozenMemTable
from statebackend.runtime import IsolatedRuntime
from statebackend.sstable import EncodedSSTable, SSTableMeta
from statebackend.table import LsmTable

__all__ = ["EarlyFlusher"]

logger = logging.getLogger(__name__)


class EarlyFlusher:
    """A `BudgetMember`. ``tables`` and ``next_sequence`` belong to the store, whose ``lock`` guards them."""

    def __init__(
        self,
        lock: Any,
        tables: Mapping[str, LsmTable],
        next_sequence: Callable[[], SequenceNumber],
        flusher: MemtableFlusher,
        reader: BlockReader,
        runtime: IsolatedRuntime,
    ) -> None:
        self._lock = lock
        self._tables = tables
        self._next_sequence = next_sequence
        self._flusher = flusher
        self._reader = reader
        self._runtime = runtime
        self._early: Future[None] | None = None

    @property
    def memory_bytes(self) -> int:
        """Bytes of rows that are in no file yet."""
        return sum(t.memory_bytes for t in tuple(self._tables.values()))

    @property
    def largest_bytes(self) -> int:
        """Those of the largest table."""
        return max((t.memory_bytes for t in tuple(self._tables.values())), default=0)

    @property
    def early(self) -> Future[None] | None:
        """The latest early flush."""
        return self._early

    def flush_largest(self) -> None:
        """Begin an early flush of the largest table, unless one is under way or the store is being closed."""
        with self._lock:
            if not self._tables or (self._early is not None and not self._early.done()):
                return
            table = max(self._tables.values(), key=lambda t: t.memory_bytes)
            table.freeze(self._next_sequence())
            work = self._flusher.flush_early(table.frozen, table.layout, partial(self._flushed, table))
            try:
                self._early = self._runtime.submit(work)
            except StoreClosedError as error:  # being closed, while another store needs memory
                self._early = Future()
                self._early.set_exception(error)
                return
            self._early.add_done_callback(log_failure(self._flusher))

    def _flushed(
        self, table: LsmTable, frozen: FrozenMemTable, meta: SSTableMeta | None, encoded: EncodedSSTable | None
    ) -> None:
        if encoded is not None:
            self._reader.keep(encoded)
        with self._lock:
            table.flushed_early(frozen.sequence, meta)


def log_failure(flusher: MemtableFlusher) -> Callable[[Future[Any]], None]:
    """What is done with a flush that nobody waits for."""

    def done(future: Future[Any]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            logger.warning(
                "a flush in the background failed, the rows go with the next one: %s", error,
                extra=context(store_id=flusher.manifest.store_id),
            )  # fmt: skip

    return done
