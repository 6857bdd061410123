"""Object stores around another: one tries again, one checks that creating is conditional.

Each is an `ObjectStore` itself, so they stack, as does the counting one (``objectstore_counting.py``): inside
retrying it counts every try, outside it every call.
"""

# ruff: noqa: D102  (the methods of a store are documented in `ObjectStore`)
from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from statebackend.errors import AtomicCreateError, StorageUnavailableError
from statebackend.logs import context
from statebackend.objectstore_base import Data, ObjectStore, PutResult, needs_operator

__all__ = ["CreateCheckingObjectStore", "RetryPolicy", "RetryingObjectStore"]

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


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
        self.retries = 0

    async def get(self, name: str) -> bytes:
        return await self._retry("read", name, lambda: self._inner.get(name))

    async def get_range(self, name: str, start: int, end: int | None = None) -> bytes:
        return await self._retry("read", name, lambda: self._inner.get_range(name, start, end))

    async def put(self, name: str, data: Data) -> None:
        await self._retry("write", name, lambda: self._inner.put(name, data))

    async def put_if_absent(self, name: str, data: Data) -> PutResult:
        return await self._once("create", name, lambda: self._inner.put_if_absent(name, data))

    async def list(self, prefix: str) -> list[str]:
        return await self._retry("list", prefix, lambda: self._inner.list(prefix))

    async def delete(self, name: str) -> None:
        await self._retry("delete", name, lambda: self._inner.delete(name))

    def describe(self) -> str:
        return self._inner.describe()

    async def _retry(self, action: str, name: str, call: Callable[[], Awaitable[_T]]) -> _T:
        policy = self._policy
        for retry in range(policy.attempts_max - 1):
            try:
                return await self._once(action, name, call)
            except StorageUnavailableError as error:
                if needs_operator(error):
                    raise
                logger.info(
                    "try %d of %d failed: %s", retry + 1, policy.attempts_max, error, extra=context(object=name)
                )
            self.retries += 1
            await self._sleep(self._rng.random() * min(policy.delay_s_max, policy.delay_s_initial * 2.0**retry))
        return await self._once(action, name, call)

    async def _once(self, action: str, name: str, call: Callable[[], Awaitable[_T]]) -> _T:
        limit_s = self._policy.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await call()
        except TimeoutError as error:
            raise StorageUnavailableError(
                f"cannot {action} {name!r} in {self.describe()}: no answer within {limit_s:g} s; "
                "it may still take effect"
            ) from error


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
