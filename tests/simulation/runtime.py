"""The store's runtime, on the simulated event loop: the same interface as `IsolatedRuntime`, without threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any

from statebackend.errors import StoreClosedError
from statebackend.manifest_store import Clock
from tests.simulation.scheduler import Process, Scheduler, current_process

__all__ = ["SimulatedClock", "SimulatedRuntime"]

Work = Coroutine[Any, Any, Any] | Callable[[], Coroutine[Any, Any, Any]]


class SimulatedClock(Clock):
    """The time of the simulated loop."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._loop = scheduler.loop

    def now_ms(self) -> int:
        return round(self._loop.now * 1000)

    def monotonic(self) -> float:
        return self._loop.now

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class SimulatedFuture(Future[Any]):
    """A future whose ``result`` lets the world go on instead of blocking the only thread."""

    def __init__(self, scheduler: Scheduler, process: Process) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._process = process

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            self._scheduler.run_until(self.done, self._process)
        return super().result(0)


class SimulatedRuntime:
    """Work of one store of one process."""

    io_executor = None

    def __init__(self, scheduler: Scheduler, process: Process) -> None:
        self._scheduler = scheduler
        self._process = process
        self._tasks: set[asyncio.Task[Any]] = set()
        self._background: set[asyncio.Task[Any]] = set()
        self._closed = False

    def start(self) -> SimulatedRuntime:
        return self

    def __enter__(self) -> SimulatedRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_process(self) -> None:
        """There is only one."""

    def check_usable(self) -> None:
        if self._closed:
            raise StoreClosedError("closed")

    def submit(self, work: Work, *, background: bool = False) -> Future[Any]:
        result = SimulatedFuture(self._scheduler, self._process)
        if self._closed:
            if not callable(work):
                work.close()
            if background:
                result.cancel()
                return result
            raise StoreClosedError("closed")
        group = self._background if background else self._tasks
        token = current_process.set(self._process)
        task = self._scheduler.loop.create_task(work() if callable(work) else work)
        current_process.reset(token)
        group.add(task)

        def end(task: asyncio.Task[Any]) -> None:
            group.discard(task)
            if self._process.dead:
                task.cancelled() or task.exception()
            elif task.cancelled():
                result.cancel()
            elif (error := task.exception()) is not None:
                result.set_exception(error)
                if background:
                    self._scheduler.fail(f"{self._process.name}: work in the background failed: {error!r}")
            else:
                result.set_result(task.result())

        task.add_done_callback(end)
        return result

    def call(self, work: Work, timeout_s: float | None = None) -> Any:
        return self.submit(work).result()

    async def run_io(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return await self._later(fn, *args, **kwargs)

    async def run_cpu(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return await self._later(fn, *args, **kwargs)

    def close(self, deadline_s: float = 30.0) -> None:
        if self._scheduler.problem is not None or self._process.dead:
            return
        self._closed = True
        for task in tuple(self._background):
            task.cancel()
        self._scheduler.run_until(lambda: not self._tasks and not self._background, self._process)

    async def _later(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        done = self._scheduler.loop.create_future()
        name = getattr(fn, "__name__", "work")
        self._scheduler.at(self._process, name, lambda: done.done() or done.set_result(None))
        await done
        return fn(*args, **kwargs)


def wait_for_first(
    futures: Iterable[SimulatedFuture], timeout: float | None = None, return_when: str | None = None
) -> None:
    """In place of `concurrent.futures.wait` for the first one."""
    waited_for = list(futures)
    if waited_for and not any(future.done() for future in waited_for):
        first = waited_for[0]
        first._scheduler.run_until(lambda: any(future.done() for future in waited_for), first._process)
