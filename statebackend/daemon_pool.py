"""A bounded thread pool that never keeps the interpreter from exiting.

The executor of the standard library joins its threads at exit, so one that is stuck in a storage call
hangs the process. Here all threads are daemons, started when there is work for them.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from statebackend.errors import StoreClosedError

__all__ = ["DaemonPool"]

_T = TypeVar("_T")
_P = ParamSpec("_P")


class DaemonPool(Executor):
    """An executor of at most ``size`` threads named ``<name>-<n>``.

    After `shutdown` and in a forked process, `submit` raises `StoreClosedError`.
    """

    def __init__(self, name: str, size: int) -> None:
        if size < 1:
            raise ValueError(f"pool {name!r}: needs at least one thread, not {size}")
        # Constant after construction.
        self._name = name
        self._size = size
        self._pid = os.getpid()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        # State below is protected by lock.
        self._threads: list[threading.Thread] = []
        self._unfinished = 0
        self._closed = False

    @property
    def threads(self) -> tuple[threading.Thread, ...]:
        """The threads started so far."""
        return tuple(self._threads)

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run ``fn(*args, **kwargs)`` on a thread of the pool as soon as one is free."""
        if self._pid != os.getpid():  # before the lock, which may be held for ever here
            raise StoreClosedError(f"pool {self._name!r} was inherited through fork: open the store in this process")
        future: Future[_T] = Future()
        with self._lock:
            if self._closed:
                raise StoreClosedError(f"pool {self._name!r} is shut down")
            if self._unfinished >= len(self._threads) < self._size:
                thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
                thread.start()
                self._threads.append(thread)
            self._unfinished += 1
            self._queue.put(_Job(future, fn, args, kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End every thread after the work before it; with ``cancel_futures`` what has not begun is dropped."""
        with self._lock:
            self._closed = True
            if cancel_futures:
                with suppress(queue.Empty):
                    while True:
                        if (job := self._queue.get_nowait()) is not None:
                            job.future.cancel()
            for _ in self._threads:
                self._queue.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            job.run()
            del job  # an idle thread keeps nothing alive
            with self._lock:
                self._unfinished -= 1


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    future: Future[Any]
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.fn(*self.args, **self.kwargs)
        except BaseException as error:  # noqa: BLE001  (all of it belongs to the one who waits)
            self.future.set_exception(error)
        else:
            self.future.set_result(result)
