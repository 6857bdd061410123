"""Runs an iterator some items ahead in a thread of its own, so that input overlaps computation.

Invariants:

* Items come out in the order of the iterator; an error comes out after the items before it, and
  again at every later call.
* At most ``depth`` items wait; the iterator is closed in its own thread, also when `close` stops
  it half-way, and `close` returns only when the thread has ended.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Generator
from typing import Generic, TypeVar

__all__ = ["ReadAhead"]

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """An iterator that is run by a thread, at most ``depth`` items ahead."""

    def __init__(self, items: Generator[T, None, None], *, depth: int, name: str) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        self._items = items
        self._depth = depth
        self._changed = threading.Condition()
        # State below is protected by _changed.
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def next(self) -> T | None:
        """The next item, or None after the last one. Blocks; raises what the iterator raised."""
        with self._changed:
            while not self._ready and not self._ended:
                self._changed.wait()
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            return None

    def wait(self, timeout_s: float) -> bool:
        """Whether `next` would not block; waits for that so long at most."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._ready) or self._ended, timeout_s)

    def close(self) -> None:
        """Stop the thread after the item it is making, and wait for it."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            with contextlib.closing(self._items):
                for item in self._items:
                    if not self._offer(item):
                        break
        except BaseException as e:  # noqa: BLE001 - handed to the thread that polls
            error = e
        with self._changed:
            self._error = error
            self._ended = True
            self._changed.notify_all()

    def _offer(self, item: T) -> bool:
        with self._changed:
            while len(self._ready) >= self._depth and not self._stopped:
                self._changed.wait()
            if not self._stopped:
                self._ready.append(item)
                self._changed.notify_all()
            return not self._stopped
