"""An object store that fails on purpose, and a clock that moves on command.

::

    plan = FaultPlan()
    plan.fail("put", "sst/*", nth=2)                 # the second put below sst/ raises, nothing happened
    plan.lose_response("put_if_absent", "manifest/*")  # it happened, the caller sees an error
    hang = plan.hang("put")                          # the call waits until hang.release()
    plan.crash(nth=17)                               # the 17th call of any kind, and every later one, raises
    store = FaultyObjectStore(inner, plan)
    ...
    store.calls                                      # what was called: [Call(1, "list", "manifest/"), ...]

Every rule counts the calls that it matches, from 1, and acts on calls ``nth`` to ``nth + times - 1``. Rules may be
added at any time, from any thread; the first one that acts on a call decides.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import TypeVar

from statebackend.errors import StorageUnavailableError
from statebackend.objectstore import Data, ObjectStore, PutResult

T = TypeVar("T")


class CrashedError(Exception):
    """The process is gone as far as this store is concerned. Not a StateStoreError, so that nobody handles it."""


@dataclass(frozen=True, slots=True)
class Call:
    number: int
    op: str
    name: str


class When(Enum):
    BEFORE = "before the effect"
    AFTER = "after the effect"


@dataclass(slots=True)
class _Rule:
    op: str | None
    name: str | Callable[[str], bool]
    nth: int
    times: float
    when: When
    act: Callable[[Call], Awaitable[None]]
    matched: int = 0

    def acts_on(self, call: Call) -> bool:
        named = fnmatchcase(call.name, self.name) if isinstance(self.name, str) else self.name(call.name)
        if not named or self.op not in (None, call.op):
            return False
        self.matched += 1
        return self.nth <= self.matched < self.nth + self.times


@dataclass
class Hang:
    """Calls that are held up. Usable from any thread."""

    reached: threading.Event = field(default_factory=threading.Event)
    _released: concurrent.futures.Future[BaseException | None] = field(default_factory=concurrent.futures.Future)

    def wait_until_reached(self, timeout_s: float = 10.0) -> None:
        assert self.reached.wait(timeout_s), "the call that should hang was never made"

    def release(self, error: BaseException | None = None) -> None:
        """Let the call go on, or fail with the error."""
        self._released.set_result(error)

    async def __call__(self, call: Call) -> None:
        self.reached.set()
        if error := await asyncio.shield(asyncio.wrap_future(self._released)):
            raise error


class FaultPlan:
    """Which calls fail, and how. ``op`` is a method name or None for any, ``name`` a glob or a predicate."""

    def __init__(self) -> None:
        self._rules: list[_Rule] = []

    def fail(
        self,
        op: str | None = None,
        name: str | Callable[[str], bool] = "*",
        *,
        nth: int = 1,
        times: float = 1,
        error: BaseException | None = None,
    ) -> None:
        """Raise without having done anything (``times=inf`` for ever after)."""
        self._add(op, name, nth, times, When.BEFORE, _raising(error))

    def lose_response(
        self,
        op: str | None = None,
        name: str | Callable[[str], bool] = "*",
        *,
        nth: int = 1,
        times: float = 1,
        error: BaseException | None = None,
    ) -> None:
        """Do it, then raise."""
        self._add(op, name, nth, times, When.AFTER, _raising(error))

    def delay(
        self,
        op: str | None = None,
        name: str | Callable[[str], bool] = "*",
        *,
        seconds: float,
        nth: int = 1,
        times: float = 1,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        when: When = When.BEFORE,
    ) -> None:
        """Sleep first (or afterwards)."""

        async def act(call: Call) -> None:
            await sleep(seconds)

        self._add(op, name, nth, times, when, act)

    def hang(
        self,
        op: str | None = None,
        name: str | Callable[[str], bool] = "*",
        *,
        nth: int = 1,
        times: float = 1,
        when: When = When.BEFORE,
    ) -> Hang:
        """Wait, before or after the effect, until the returned `Hang` is released."""
        hang = Hang()
        self._add(op, name, nth, times, when, hang)
        return hang

    def crash(
        self,
        op: str | None = None,
        name: str | Callable[[str], bool] = "*",
        *,
        nth: int = 1,
        when: When = When.BEFORE,
    ) -> None:
        """End the store's life at this call: it and all later calls raise `CrashedError`."""

        async def act(call: Call) -> None:
            raise CrashedError(f"crashed at call {call.number}: {call.op}({call.name!r}), {when.value}")

        self._add(op, name, nth, 1, when, act)

    def clear(self) -> None:
        """From now on nothing fails (a crashed store stays crashed)."""
        self._rules = []

    def action(self, call: Call) -> tuple[When, Callable[[Call], Awaitable[None]]] | None:
        """Count the call in every rule; what happens to it."""
        acting = [rule for rule in self._rules if rule.acts_on(call)]
        return (acting[0].when, acting[0].act) if acting else None

    def _add(
        self,
        op: str | None,
        name: str | Callable[[str], bool],
        nth: int,
        times: float,
        when: When,
        act: Callable[[Call], Awaitable[None]],
    ) -> None:
        assert op in (None, *OPERATIONS), f"no operation {op!r}"
        self._rules = [*self._rules, _Rule(op, name, nth, times, when, act)]


OPERATIONS = ("get", "get_range", "put", "put_if_absent", "list", "delete")


def _raising(error: BaseException | None) -> Callable[[Call], Awaitable[None]]:
    async def act(call: Call) -> None:
        raise error or StorageUnavailableError(f"injected at call {call.number}: {call.op}({call.name!r})")

    return act


class FaultyObjectStore:
    """An `ObjectStore` that does what ``inner`` does, except for what the plan says."""

    def __init__(self, inner: ObjectStore, plan: FaultPlan | None = None) -> None:
        self.inner = inner
        self.plan = plan or FaultPlan()
        self.calls: list[Call] = []
        self.crashed: CrashedError | None = None

    async def get(self, name: str) -> bytes:
        return await self._call("get", name, lambda: self.inner.get(name))

    async def get_range(self, name: str, start: int, end: int | None = None) -> bytes:
        return await self._call("get_range", name, lambda: self.inner.get_range(name, start, end))

    async def put(self, name: str, data: Data) -> None:
        await self._call("put", name, lambda: self.inner.put(name, data))

    async def put_if_absent(self, name: str, data: Data) -> PutResult:
        return await self._call("put_if_absent", name, lambda: self.inner.put_if_absent(name, data))

    async def list(self, prefix: str) -> list[str]:
        return await self._call("list", prefix, lambda: self.inner.list(prefix))

    async def delete(self, name: str) -> None:
        await self._call("delete", name, lambda: self.inner.delete(name))

    def describe(self) -> str:
        return self.inner.describe()

    async def _call(self, op: str, name: str, effect: Callable[[], Awaitable[T]]) -> T:
        self._raise_if_crashed()
        call = Call(len(self.calls) + 1, op, name)
        self.calls.append(call)
        when, act = self.plan.action(call) or (None, None)
        try:
            if act and when is When.BEFORE:
                await act(call)
                self._raise_if_crashed()  # the crash may have come while this call was held up
            result = await effect()
            if act and when is When.AFTER:
                await act(call)
        except CrashedError as error:
            self.crashed = self.crashed or error
            raise
        self._raise_if_crashed()
        return result

    def _raise_if_crashed(self) -> None:
        if self.crashed:
            raise CrashedError(str(self.crashed))


class ManualClock:
    """Time that moves only when told: seconds by calling it, `now_ms` in milliseconds, `sleep` waits for `advance`.

    With ``auto=True`` a sleep moves the clock itself and returns at once; ``slept`` lists all sleeps.
    Usable from any thread and event loop.
    """

    def __init__(self, start_s: float = 1_000_000.0, *, auto: bool = False) -> None:
        self.slept: list[float] = []
        self._now = start_s
        self._auto = auto
        self._lock = threading.Lock()
        self._sleepers: list[tuple[float, concurrent.futures.Future[None]]] = []

    def __call__(self) -> float:
        return self._now

    def now_ms(self) -> int:
        return round(self._now * 1000)

    def advance(self, seconds: float) -> None:
        with self._lock:
            self._now += seconds
            due = sorted((s for s in self._sleepers if s[0] <= self._now), key=lambda s: s[0])
            self._sleepers = [s for s in self._sleepers if s[0] > self._now]
        for _, wakeup in due:
            if wakeup.set_running_or_notify_cancel():
                wakeup.set_result(None)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if self._auto:
            self.advance(seconds)
            await asyncio.sleep(0)
            return
        wakeup: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            self._sleepers.append((self._now + seconds, wakeup))
        await asyncio.wrap_future(wakeup)
