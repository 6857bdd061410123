"""The memory that the stores of one process share: bytes of rows that are in no file yet, and bytes of caches.

When the rows of all stores together exceed their limit, the largest MemTable of any of them is flushed before its
checkpoint. Beyond twice the limit writers wait until the storage has taken some: a slow storage slows its
writers down, and nothing grows.

Invariants:

* A store whose early flush failed (its storage is full, another writer fenced it) does not keep the others from
  flushing theirs; its rows stay in memory, readable.
* A store that closes gives its share back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Protocol

from statebackend.cache import CachePool

__all__ = ["BudgetMember", "MemoryBudget"]


class BudgetMember(Protocol):
    """The MemTables of one store."""

    @property
    def memory_bytes(self) -> int:
        """Bytes of rows that are in no file yet."""

    @property
    def largest_bytes(self) -> int:
        """Those of the largest table."""

    @property
    def early(self) -> Future[None] | None:
        """The latest early flush."""

    def flush_largest(self) -> None:
        """Begin an early flush of the largest table, unless one is under way or the store is being closed."""


class MemoryBudget:
    """See the module. Given to every store that shares it, see `StateStore.open`; thread-safe.

    ``memory_bytes``: bytes of rows of all stores that are in no file yet. ``cache_bytes``: bytes of decoded blocks,
    filters and indexes of all stores.
    """

    def __init__(self, *, memory_bytes: int = 512 << 20, cache_bytes: int = 256 << 20) -> None:
        if memory_bytes < 1 or cache_bytes < 0:
            raise ValueError(f"need memory_bytes >= 1 and cache_bytes >= 0, not {memory_bytes} and {cache_bytes}")
        self.memory_bytes = memory_bytes
        self.cache = CachePool(cache_bytes)
        self._lock = threading.Lock()
        self._members: tuple[BudgetMember, ...] = ()  # replaced under the lock, read without

    def join(self, member: BudgetMember) -> None:
        """Count this store."""
        with self._lock:
            self._members = (*self._members, member)

    def leave(self, member: BudgetMember) -> None:
        """Count it no longer; it is fine if it never was."""
        with self._lock:
            self._members = tuple(m for m in self._members if m is not member)

    @property
    def used_bytes(self) -> int:
        """Bytes of rows of all stores that are in no file yet."""
        return sum(m.memory_bytes for m in self._members)

    def relieve(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> float:
        """Flush early when memory is short; wait, ``timeout_s`` at most, when the storage does not keep up.

        Called after every write, without the lock of any store. Returns the seconds that were waited.
        """
        began, waited = clock(), 0.0
        while (used := self.used_bytes) > self.memory_bytes and clock() < began + timeout_s:
            members = self._members
            under_way = [m.early for m in members if m.early is not None and not m.early.done()]
            if under_way and used <= 2 * self.memory_bytes:
                break
            idle = [m for m in members if m.largest_bytes and (m.early is None or m.early.done())]
            if well := [m for m in idle if not _failed(m.early)]:
                _largest(well).flush_largest()
            elif under_way:
                before = clock()
                wait(under_way, timeout=max(0.0, began + timeout_s - before), return_when=FIRST_COMPLETED)
                waited += clock() - before
                if not any(early.done() for early in under_way):
                    break
            else:  # what failed is tried again where there is nothing better to do, and not waited for
                if idle:
                    _largest(idle).flush_largest()
                break
        return waited


def _largest(members: Sequence[BudgetMember]) -> BudgetMember:
    return max(members, key=lambda m: m.largest_bytes)


def _failed(early: Future[None] | None) -> bool:
    return early is not None and early.done() and (early.cancelled() or early.exception() is not None)
