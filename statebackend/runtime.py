"""The isolated runtime: one thread with its own event loop, and two small pools, that nothing outside can disturb.

The store's coroutines run here, so that a cancelled query, a closed event loop or a Ctrl-C of the host
program cannot stop a flush half-way. Callers hand over a coroutine and get a
``concurrent.futures.Future``; blocking storage calls and encoding run on the pools.

Invariants:
* Cancelling or dropping the returned future drops only the wait; the work goes on.
* A failure that nobody looked at is kept in `failures` and told to ``on_failure``; none is lost.
* After `IsolatedRuntime.close` no thread is left, or the error names those that are.
* No thread keeps the interpreter from exiting: all are daemons, and an exit handler stops idle ones first.
* A process forked after the start cannot use the runtime: every call raises `StoreClosedError`.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from contextlib import suppress
from types import TracebackType
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

from statebackend.daemon_pool import DaemonPool
from statebackend.errors import StoreClosedError
from statebackend.logs import context

__all__ = ["IsolatedRuntime"]

_T = TypeVar("_T")
_P = ParamSpec("_P")
Work: TypeAlias = Coroutine[Any, Any, _T] | Callable[[], Coroutine[Any, Any, _T]]

_FAILURES_KEPT = 100
_GRACE_S = 1.0  # for cancelled work and for threads to end, when the deadline has passed already
_EXIT_DEADLINE_S = 0.5

logger = logging.getLogger(__name__)


class IsolatedRuntime:
    """See the module. Use ``start()`` and ``close()``, or a ``with`` block.

    ``name``: prefix of the names of all threads. ``io_threads``, ``cpu_threads``: sizes of the pools.
    ``on_failure``: called with every failure that nobody looked at, on whatever thread notices it.
    """

    def __init__(
        self,
        name: str,
        io_threads: int = 8,
        cpu_threads: int = 2,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        # Constant after construction (the thread and the pid after the start).
        self.name = name
        self._on_failure = on_failure
        self._io = DaemonPool(f"{name}-io", io_threads)
        self._cpu = DaemonPool(f"{name}-cpu", cpu_threads)
        self._loop = asyncio.SelectorEventLoop()  # never the host's loop policy
        self._thread = threading.Thread(target=self._run_loop, name=f"{name}-loop", daemon=True)
        self._pid: int | None = None
        # State below is protected by lock.
        self._lock = threading.Lock()
        self._closing = False
        self._pending: set[_Result[Any]] = set()
        # State below belongs to the loop's thread.
        self._tasks: set[asyncio.Task[Any]] = set()
        self._background: set[asyncio.Task[Any]] = set()
        self._failures: deque[BaseException] = deque(maxlen=_FAILURES_KEPT)

    # --- life ---

    def start(self) -> IsolatedRuntime:
        """Start the thread; raises ``RuntimeError`` if it was started before."""
        if self._pid is not None or self._closing:
            raise RuntimeError(f"runtime {self.name!r} was started before")
        self._pid = os.getpid()
        self._loop.set_exception_handler(self._on_loop_error)
        self._thread.start()
        _running.add(self)
        return self

    def close(self, deadline_s: float = 30.0) -> None:
        """Refuse new work, finish what was handed over, stop and join every thread.

        Background work is cancelled at once, and its futures with it; other work that is not done after ``deadline_s``
        seconds is cancelled too, and whoever waits for it gets `StoreClosedError`. Raises ``TimeoutError`` naming the
        threads that are still inside a blocking call a few seconds after the deadline; they end with the call or with
        the process. May be called again, from any thread but the runtime's own.
        """
        if self._pid is None:
            self._closing = True
            self._loop.close()
            return
        self.check_process()
        if self._inside():
            raise RuntimeError(f"runtime {self.name!r} cannot be closed from its own thread")
        deadline = time.monotonic() + max(deadline_s, 0.0)
        with self._lock:
            first, self._closing = not self._closing, True
        if first:
            asyncio.run_coroutine_threadsafe(self._wind_up(deadline), self._loop)
        self._thread.join(max(deadline - time.monotonic(), 0.0) + 2 * _GRACE_S)
        self._io.shutdown(wait=False, cancel_futures=True)
        self._cpu.shutdown(wait=False, cancel_futures=True)
        threads = [self._thread, *self._io.threads, *self._cpu.threads]
        grace = max(deadline, time.monotonic() + _GRACE_S)
        for thread in threads:
            thread.join(max(grace - time.monotonic(), 0.0))
        _running.discard(self)
        stuck = [thread.name for thread in threads if thread.is_alive()]
        self._abandon()
        if stuck:
            raise TimeoutError(f"runtime {self.name!r}: still in a blocking call after {deadline_s:g} s: {stuck}")

    def check_usable(self) -> None:
        """Raise `StoreClosedError` unless work can be handed over."""
        if self._pid is None:
            raise StoreClosedError(f"runtime {self.name!r} was not started")
        self.check_process()
        if self._closing:
            raise StoreClosedError(f"runtime {self.name!r} is closed")

    def check_process(self) -> None:
        """Raise `StoreClosedError` in a process that inherited the runtime through fork; takes no lock."""
        if self._pid != os.getpid():
            raise StoreClosedError(
                f"runtime {self.name!r} was started in process {self._pid} and inherited through fork by process "
                f"{os.getpid()}: open the store in the process that uses it (for multiprocessing, start with 'spawn')"
            )

    @property
    def failures(self) -> tuple[BaseException, ...]:
        """The latest failures that nobody looked at, oldest first."""
        return tuple(self._failures)

    @property
    def io_executor(self) -> Executor:
        """The pool for blocking storage calls; bounds how many run at once."""
        return self._io

    def __enter__(self) -> IsolatedRuntime:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- work from outside ---

    def submit(self, work: Work[_T], *, background: bool = False) -> Future[_T]:
        """Run a coroutine (or a function that makes one) on the loop. Any thread; never blocks.

        ``background``: work that has no end of its own, or that may be left undone: `close` cancels it instead of
        waiting for it, and while closing it is not even started. Raises `StoreClosedError`.
        """
        result: _Result[_T] = _Result(self._record)
        try:
            self.check_process()  # first: after a fork the lock may be held for ever
            with self._lock:
                if background and self._closing and self._inside():
                    result.cancel()
                    _drop(work)
                else:
                    self.check_usable()
                    self._pending.add(result)
                    self._loop.call_soon_threadsafe(self._begin, work, result, background)
        except StoreClosedError:
            _drop(work)
            raise
        return result

    def call(self, work: Work[_T], timeout_s: float | None = None) -> _T:
        """Run a coroutine on the loop and wait for its result.

        Raises what it raises, ``TimeoutError`` if it is not done within ``timeout_s`` seconds (it goes on), and
        ``RuntimeError`` on the runtime's own thread, which would wait for itself.
        """
        if self._inside():
            _drop(work)
            raise RuntimeError(f"runtime {self.name!r}: a blocking call from its own thread would never return")
        return self.submit(work).result(timeout_s)

    # --- work from inside ---

    async def run_io(self, fn: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run a blocking storage call on the I/O pool."""
        return await asyncio.wrap_future(self._io.submit(fn, *args, **kwargs))

    async def run_cpu(self, fn: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run a computation (that releases the GIL, one hopes) on the CPU pool."""
        return await asyncio.wrap_future(self._cpu.submit(fn, *args, **kwargs))

    # --- on the loop's thread ---

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        while True:
            try:
                self._loop.run_forever()
            except (KeyboardInterrupt, SystemExit):  # raised by a task, whose future tells; the others go on
                continue
            break
        self._loop.close()

    def _begin(self, work: Work[_T], result: _Result[_T], background: bool) -> None:
        try:
            task = self._loop.create_task(work() if callable(work) else work)
        except Exception as error:  # noqa: BLE001  (what the function raises belongs to the caller)
            self._settle(result, None, error)
            return
        group = self._background if background else self._tasks
        group.add(task)
        task.add_done_callback(lambda done: self._end(done, result, group))

    def _end(self, task: asyncio.Task[_T], result: _Result[_T], group: set[asyncio.Task[Any]]) -> None:
        group.discard(task)
        if not task.cancelled():
            error = task.exception()
            self._settle(result, None if error else task.result(), error)
        elif self._closing and group is self._tasks:
            self._settle(result, None, StoreClosedError(f"runtime {self.name!r} was closed before this work was done"))
        else:
            result.cancel()
            self._settle(result, None, None)

    def _settle(self, result: _Result[_T], value: _T | None, error: BaseException | None) -> None:
        with self._lock:
            if result not in self._pending:
                return  # `close` gave it up before
            self._pending.discard(result)
        result.settle(value, error)

    async def _wind_up(self, deadline: float) -> None:
        """Finish or cancel everything, then stop the loop."""
        for task in self._background:
            task.cancel()
        while self._tasks and (left := deadline - time.monotonic()) > 0:
            await asyncio.wait(self._tasks, timeout=left)
        # Also what the work started by itself; what ignores its cancellation is left behind.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=_GRACE_S)
        await self._loop.shutdown_asyncgens()  # and lets the callbacks run that hand over the results
        self._loop.stop()

    # --- helpers ---

    def _inside(self) -> bool:
        return threading.current_thread() is self._thread  # (not by ident: an ended thread's is given to a new one)

    def _abandon(self) -> None:
        """Whoever still waits for work that will never end is told so."""
        for result in tuple(self._pending):
            self._settle(result, None, StoreClosedError(f"runtime {self.name!r} was closed before this work was done"))

    def _record(self, error: BaseException) -> None:
        self._failures.append(error)
        logger.error("runtime %r: a task failed and nobody waited for it: %r", self.name, error, extra=context())
        if self._on_failure is not None:
            try:
                self._on_failure(error)
            except Exception:
                logger.exception("runtime %r: on_failure failed", self.name, extra=context())

    def _on_loop_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A task that the work started by itself failed unseen, or a callback raised."""
        self._record(context.get("exception") or RuntimeError(context["message"]))


class _Result(Future[_T]):
    """The caller's end of some work: cancelling it is local, and a failure that it takes to the grave is reported."""

    def __init__(self, report: Callable[[BaseException], None]) -> None:
        super().__init__()
        self._report = report
        self._seen = False

    def result(self, timeout: float | None = None) -> _T:
        try:
            return super().result(timeout)
        finally:
            self._seen = self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        try:
            return super().exception(timeout)
        finally:
            self._seen = self.done()

    def settle(self, value: _T | None, error: BaseException | None) -> None:
        """Hand over the outcome, unless the caller has given up waiting."""
        if not self.set_running_or_notify_cancel():
            if error is not None:
                self._report(error)
        elif error is not None:
            self.set_exception(error)
        else:
            self.set_result(cast("_T", value))

    def __del__(self) -> None:
        if not self._seen and self.done() and not self.cancelled() and (error := super().exception()) is not None:
            self._report(error)


def _drop(work: Work[Any]) -> None:
    if not callable(work):
        work.close()  # else it would warn that it was never awaited


_running: weakref.WeakSet[IsolatedRuntime] = weakref.WeakSet()


@atexit.register
def _close_at_exit() -> None:
    """Stop what was not closed, so that no thread runs into the interpreter's end; never waits for long."""
    for runtime in tuple(_running):
        with suppress(StoreClosedError, TimeoutError):
            runtime.close(_EXIT_DEADLINE_S)
