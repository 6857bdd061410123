"""One thread, one event loop, one random source: decides what happens next, and writes it down.

Coroutines run until every one of them waits. Then the scheduler picks one thing that could happen in
the world: a storage request arrives, its answer does, a host program goes on, a computation ends, a
timer fires, a process crashes. So a schedule is decided at storage calls and nowhere else, and the
same seed gives the same schedule.

A blocking call of a host program runs the world until its answer is there; the other programs go on
meanwhile, so calls of several programs nest.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Crashed", "Process", "Scheduler", "SimulationOver", "current_process"]

Program = Generator[Callable[[], bool] | None, None, None]
"""A host program: yields to let others go on, or yields what it waits for."""

STEPS_MAX = 100_000
"""A schedule that is not over by then never ends; sound ones take some thousand."""


class SimulationOver(BaseException):
    """A property was violated; unwinds every program. Not an Exception, so that nobody handles it."""


class Crashed(BaseException):
    """The process of this program is gone."""


@dataclass(eq=False)
class Process:
    """One process: what it runs dies with it, what it sent may still arrive."""

    name: str
    dead: bool = False
    outage_until: int = 0  # step until which its storage requests fail
    program: Program | None = None
    running: bool = False
    waits_for: Callable[[], bool] | None = None

    @property
    def ready(self) -> bool:
        return not self.running and (self.waits_for is None or self.waits_for())


current_process: ContextVar[Process | None] = ContextVar("current_process", default=None)
"""Whose coroutine is running; what it starts is its own."""


@dataclass(eq=False)
class Event:
    """Something that may happen from a step on."""

    process: Process | None
    label: str
    act: Callable[[], None]
    not_before: int = 0


@dataclass
class Scheduler:
    """See the module. ``timer_chance``: how likely time moves on although something else could happen."""

    rng: random.Random
    timer_chance: float = 0.05
    crash_chance: float = 0.0
    step: int = 0
    trace: list[str] = field(default_factory=list)
    problem: str | None = None
    processes: list[Process] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loop = SimulatedLoop(self)

    def fail(self, problem: str) -> None:
        """A property does not hold; the first one counts."""
        if self.problem is None:
            self.problem = problem
            self.note(None, f"VIOLATION: {problem}")

    def note(self, process: Process | None, text: str) -> None:
        name = process.name if process is not None else "-"
        self.trace.append(f"{self.step:5} {self.loop.now:9.3f} {name:10} {text}")

    def start(self, name: str, program: Callable[[Process], Program]) -> Process:
        process = Process(name)
        process.program = program(process)
        self.processes.append(process)
        self.note(process, "starts")
        return process

    def crash(self, process: Process) -> None:
        """It does nothing any more; what it has sent is on its way."""
        self.note(process, "CRASHES")
        process.dead = True
        if process.program is not None and not process.running:
            process.program.close()
            process.program = None

    def at(self, process: Process | None, label: str, act: Callable[[], None], delay: int = 0) -> None:
        """Something that happens at some time after ``delay`` steps."""
        self.events.append(Event(process, label, act, self.step + delay))

    def run_until(self, condition: Callable[[], bool], process: Process | None = None) -> None:
        """Let things happen until the condition holds. Raises `Crashed` when ``process`` died meanwhile."""
        self.loop.run_ready()
        while True:
            if self.problem is not None:
                raise SimulationOver(self.problem)
            if process is not None and process.dead:
                raise Crashed
            if condition():
                return
            self._happen()

    def busy(self) -> bool:
        """Whether a program has not ended."""
        return any(p.program is not None for p in self.processes)

    def _happen(self) -> None:
        self.step += 1
        if self.step > STEPS_MAX:
            self.fail("it never ends")
            return
        programs = [p for p in self.processes if p.program is not None and p.ready]
        if self.crash_chance and self.rng.random() < self.crash_chance and len(self._alive()) > 0:
            self.crash(self.rng.choice(self._alive()))
            return
        due = [e for e in self.events if e.not_before <= self.step]
        choices = len(programs) + len(due)
        timer = self.loop.next_timer()
        if timer is not None and (not choices or self.rng.random() < self.timer_chance):
            self.loop.advance()
        elif not choices:
            if not self.events:
                self.fail("nothing can happen any more: everybody waits")
                return
            self.step = min(e.not_before for e in self.events)
        else:
            at = self.rng.randrange(choices)
            if at < len(programs):
                self._resume(programs[at])
            else:
                event = due[at - len(programs)]
                self.events.remove(event)
                if event.process is None or not event.process.dead:
                    event.act()
        self.loop.run_ready()

    def _alive(self) -> list[Process]:
        return [p for p in self.processes if p.program is not None and not p.dead]

    def _resume(self, process: Process) -> None:
        program = process.program
        assert program is not None
        process.running, process.waits_for = True, None
        try:
            process.waits_for = next(program)
        except StopIteration:
            process.program = None
            self.note(process, "ends")
        except Crashed:
            process.program = None
        finally:
            process.running = False
        if process.dead and process.program is not None:
            process.program.close()
            process.program = None


class SimulatedLoop(asyncio.AbstractEventLoop):
    """An event loop whose time moves when the scheduler says so."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timer_count = 0
        self._draining = False
        self._tasks: list[tuple[asyncio.Task[Any], Process | None]] = []
        self.now = 1_000_000.0

    def run_ready(self) -> None:
        """Run callbacks, in order, until there is none."""
        assert not self._draining, "a blocking call from inside a coroutine"
        self._draining = True
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            while self._ready:
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(before)
            self._draining = False

    def next_timer(self) -> float | None:
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def advance(self) -> None:
        """Time moves on to the next timer, which fires."""
        when, _, handle = heapq.heappop(self._timers)
        self.now = max(self.now, when)
        self._ready.append(handle)

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, **options)
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # those of a crashed process are left as they are
        self._tasks.append((task, current_process.get()))
        return task

    def unseen_failures(self) -> list[BaseException]:
        """Failures of tasks that nobody asked for, of processes that did not crash; the tasks are let go of."""
        failed = [t for t, p in self._tasks if t.done() and t._log_traceback and not (p is not None and p.dead)]  # type: ignore[attr-defined]
        self._tasks = []
        return [error for task in failed if (error := task.exception()) is not None]

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "task" not in context and "future" not in context and not isinstance(error, SimulationOver):
            self._scheduler.fail(f"a callback fails: {context['message']}: {error!r}")
