"""Object stores around another: one tries again, one counts, one checks that creating is conditional.

Each is an `ObjectStore` itself, so they stack: counting inside retrying counts every try, outside it
every call.
"""

# ruff: noqa: D102  (the methods of a store are documented in `ObjectStore`)
from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from statebackend.errors import AtomicCreateError, StorageUnavailableError
from statebackend.objectstore_base import Data, ObjectStore, PutResult, needs_operator

__all__ = ["CountingObjectStore", "CreateCheckingObjectStore", "OperationCount", "RetryPolicy", "RetryingObjectStore"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how patiently a storage call is tried.

    ``attempts_max``: tries in all, the first included (default 5).
    ``delay_s_initial``, ``delay_s_max``: before try n+1 the wait is random between 0 and
    ``min(delay_s_max, delay_s_initial * 2**(n-1))`` seconds (default 0.05 and 2): short waits hide hiccups, long
    ones spare a storage that is overloaded.
    ``timeout_s``: seconds one try may take (default 60); must cover the largest object.
    """

    attempts_max: int = 5
    delay_s_initial: float = 0.05
    delay_s_max: float = 2.0
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.attempts_max < 1:
            raise ValueError(f"attempts_max must be at least 1, not {self.attempts_max}")
        if not 0 <= self.delay_s_initial <= self.delay_s_max:
            raise ValueError(
                f"need 0 <= delay_s_initial <= delay_s_max, not {self.delay_s_initial}, {self.delay_s_max}"
            )
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, not {self.timeout_s}")


class RetryingObjectStore:
    """Tries again after `StorageUnavailableError`, with full jitter; a try that takes too long counts as one.

    Not tried again here: a full disk, and what else an operator has to mend such as a lost permission (a cause that is
    a ``PermissionError``), since they do not pass within seconds and the next checkpoint tries again; every error but
    `StorageUnavailableError`; and **``put_if_absent``**. Its second try could meet the object of the first one and
    call it somebody else's, so it is tried once (within the timeout), and the error goes to the caller, who reads back
    and recognises its own bytes. The other operations may be repeated, and a try that timed out may still take effect
    later: harmless, since no name is ever used again with other bytes.
    """

    def __init__(
        self,
        inner: ObjectStore,
        policy: RetryPolicy | None = None,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._inner = inner
        self._policy = policy or RetryPolicy()
        self._sleep = sleep
        self._rng = rng or random.Random()  # noqa: S311  (jitter, not a secret)

    async def get(self, name: str) -> bytes:
        return await self._retry(f"read {name!r}", lambda: self._inner.get(name))

    async def get_range(self, name: str, start: int, end: int | None = None) -> bytes:
        return await self._retry(f"read {name!r}", lambda: self._inner.get_range(name, start, end))

    async def put(self, name: str, data: Data) -> None:
        await self._retry(f"write {name!r}", lambda: self._inner.put(name, data))

    async def put_if_absent(self, name: str, data: Data) -> PutResult:
        return await self._once(f"create {name!r}", lambda: self._inner.put_if_absent(name, data))

    async def list(self, prefix: str) -> list[str]:
        return await self._retry(f"list {prefix!r}", lambda: self._inner.list(prefix))

    async def delete(self, name: str) -> None:
        await self._retry(f"delete {name!r}", lambda: self._inner.delete(name))

    def describe(self) -> str:
        return self._inner.describe()

    async def _retry(self, action: str, call: Callable[[], Awaitable[_T]]) -> _T:
        policy = self._policy
        for retry in range(policy.attempts_max - 1):
            try:
                return await self._once(action, call)
            except StorageUnavailableError as error:
                if needs_operator(error):
                    raise
            await self._sleep(self._rng.random() * min(policy.delay_s_max, policy.delay_s_initial * 2.0**retry))
        return await self._once(action, call)

    async def _once(self, action: str, call: Callable[[], Awaitable[_T]]) -> _T:
        limit_s = self._policy.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await call()
        except TimeoutError as error:
            raise StorageUnavailableError(
                f"cannot {action} in {self.describe()}: no answer within {limit_s:g} s; it may still take effect"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationCount:
    """What one kind of operation has cost: calls, calls that raised, bytes read and written, seconds waited."""

    requests: int = 0
    errors: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0


class CountingObjectStore:
    """Counts what goes to ``inner``, by operation (the method's name); used from one event loop, read from anywhere."""

    def __init__(self, inner: ObjectStore, clock: Callable[[], float] = time.perf_counter) -> None:
        self._inner = inner
        self._clock = clock
        operations = ("get", "get_range", "put", "put_if_absent", "list", "delete")
        self._counts = dict.fromkeys(operations, OperationCount())

    def snapshot(self) -> Mapping[str, OperationCount]:
        """The counts up to now; the value does not change any more."""
        return self._counts.copy()

    async def get(self, name: str) -> bytes:
        async with self._counted("get"):
            data = await self._inner.get(name)
        self._add("get", bytes_read=len(data))
        return data

    async def get_range(self, name: str, start: int, end: int | None = None) -> bytes:
        async with self._counted("get_range"):
            data = await self._inner.get_range(name, start, end)
        self._add("get_range", bytes_read=len(data))
        return data

    async def put(self, name: str, data: Data) -> None:
        async with self._counted("put"):
            await self._inner.put(name, data)
        self._add("put", bytes_written=memoryview(data).nbytes)

    async def put_if_absent(self, name: str, data: Data) -> PutResult:
        async with self._counted("put_if_absent"):
            result = await self._inner.put_if_absent(name, data)
        self._add("put_if_absent", bytes_written=memoryview(data).nbytes if result is PutResult.CREATED else 0)
        return result

    async def list(self, prefix: str) -> list[str]:
        async with self._counted("list"):
            return await self._inner.list(prefix)

    async def delete(self, name: str) -> None:
        async with self._counted("delete"):
            await self._inner.delete(name)

    def describe(self) -> str:
        return self._inner.describe()

    @asynccontextmanager
    async def _counted(self, operation: str) -> AsyncIterator[None]:
        began, failed = self._clock(), 1
        try:
            yield
            failed = 0
        finally:
            self._add(operation, requests=1, errors=failed, seconds=self._clock() - began)

    def _add(self, operation: str, **more: float) -> None:
        old = self._counts[operation]
        self._counts[operation] = replace(old, **{field: getattr(old, field) + n for field, n in more.items()})


class CreateCheckingObjectStore:
    """Repeats the first successful ``put_if_absent``: a server that ignores the condition accepts it twice.

    Some S3-compatible servers do just that, and two writers would silently overwrite each other. The
    repetition sends the same bytes under the same name, so it does no harm, and costs one request per opening.
    Raises `AtomicCreateError`.
    """

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self._proven = False

    async def get(self, name: str) -> bytes:
        return await self._inner.get(name)

    async def get_range(self, name: str, start: int, end: int | None = None) -> bytes:
        return await self._inner.get_range(name, start, end)

    async def put(self, name: str, data: Data) -> None:
        await self._inner.put(name, data)

    async def put_if_absent(self, name: str, data: Data) -> PutResult:
        result = await self._inner.put_if_absent(name, data)
        if result is PutResult.EXISTS:
            self._proven = True
        elif not self._proven:
            await self._repeat(name, data)
        return result

    async def list(self, prefix: str) -> list[str]:
        return await self._inner.list(prefix)

    async def delete(self, name: str) -> None:
        await self._inner.delete(name)

    def describe(self) -> str:
        return self._inner.describe()

    async def _repeat(self, name: str, data: Data) -> None:
        try:
            again = await self._inner.put_if_absent(name, data)
        except StorageUnavailableError:
            return  # nothing learned; the object was created all the same
        if again is PutResult.CREATED:
            raise AtomicCreateError(
                f"{self.describe()}: the server created {name!r} twice: it ignores If-None-Match, so two writers could "
                "overwrite each other; use another server, or allow_unsafe_create if there is only ever one writer"
            )
        self._proven = True
