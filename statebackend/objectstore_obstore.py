"""An `ObjectStore` on obstore: another transport, whose requests run on its own threads outside Python.

Create-if-absent is its native ``put(mode="create")`` (its fsspec wrapper ignores that mode). Nothing is tried
again in here: obstore is told so, since a retry inside could meet its own object.

=================================  ===================================================================
URL                                is
=================================  ===================================================================
``obstore+s3://bucket/prefix``     S3; options as of ``obstore.store.S3Store``. Tried again and not tried
                                   again as in ``objectstore_s3.py``, except that obstore reports a 409
                                   like a 412, as ``EXISTS``: the caller reads back and finds nothing
``obstore+memory://name``          one store of this name in this process
``obstore+file://``                refused: obstore does not sync files, so nothing would be durable
others                             refused unless ``allow_unsafe_create``: never run here
=================================  ===================================================================

obstore's threads are not inherited by a fork, and a call in the forked process would wait for ever: it raises
`StoreClosedError` instead. Start processes with "spawn".
"""

# ruff: noqa: D102  (the methods of a store are documented in `ObjectStore`)
from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import MemoryStore, from_url

from statebackend.errors import AtomicCreateError, StoreClosedError
from statebackend.objectstore_base import TEMP_PREFIX, Data, PutResult, RefusedError, check_name, is_refusal, translated

__all__ = ["ObstoreObjectStore", "open_obstore"]

_T = TypeVar("_T")
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")


def open_obstore(
    url: str, storage_options: Mapping[str, Any], timeout_s: float, allow_unsafe_create: bool = False
) -> ObstoreObjectStore:
    """The store at ``url`` (without the prefix ``obstore+``); see `open_object_store`.

    Raises ``ValueError`` for ``file://`` and `AtomicCreateError` for what was never run here.
    """
    parts = urlsplit(url)
    if parts.scheme == "memory":
        return ObstoreObjectStore(_Memory.named(parts.netloc), parts.path, f"obstore+{url}", timeout_s)
    if parts.scheme == "file":
        raise ValueError(f"obstore+{url}: obstore does not sync files, so nothing would be durable; use {url}")
    if parts.scheme not in ("s3", "s3a") and not allow_unsafe_create:
        raise AtomicCreateError(
            f"obstore+{url}: create-if-absent was never tried there; use obstore+s3, or allow_unsafe_create"
        )
    if not parts.netloc:
        raise ValueError(f"obstore+{url}: names no bucket")
    options = {
        "retry_config": {"max_retries": 0},
        **storage_options,
        "client_options": {"timeout": timedelta(seconds=timeout_s), **storage_options.get("client_options", {})},
    }
    root = f"{parts.scheme}://{parts.netloc}"
    return ObstoreObjectStore(from_url(root, **options), parts.path, f"obstore+{url}", timeout_s)


class _Memory:
    """The in-process stores by name: obstore's own begin empty each time."""

    _named: ClassVar[dict[str, MemoryStore]] = {}

    @classmethod
    def named(cls, name: str) -> MemoryStore:
        return cls._named.setdefault(name, MemoryStore())


class ObstoreObjectStore:
    """An `ObjectStore` below ``root`` of a store of obstore; see `open_obstore`."""

    def __init__(self, store: Any, root: str, url: str, timeout_s: float) -> None:
        self._store = store
        self._root = f"{root.strip('/')}/" if root.strip("/") else ""
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._pid = os.getpid()

    async def get(self, name: str) -> bytes:
        async def read(path: str) -> bytes:
            found = await obstore.get_async(self._store, path)
            return bytes(await found.bytes_async())

        return await self._run("read", name, read)

    async def get_range(self, name: str, start: int, end: int | None = None) -> bytes:
        async def read(path: str) -> bytes:
            with suppress(BaseError):  # an error of many names for a range that begins beyond the object: see its size
                if start >= 0 and end is not None and end > start:
                    return bytes(await obstore.get_range_async(self._store, path, start=start, end=end))
                if start < 0 and end is None:
                    tail = await obstore.get_async(self._store, path, options={"range": {"suffix": -start}})
                    return bytes(await tail.bytes_async())
            return await clipped(path)

        async def clipped(path: str) -> bytes:
            size = (await obstore.head_async(self._store, path))["size"]
            first, last, _ = slice(start, end).indices(size)
            if first >= last:
                return b""
            return bytes(await obstore.get_range_async(self._store, path, start=first, end=last))

        return await self._run("read", name, read)

    async def put(self, name: str, data: Data) -> None:
        content = bytes(memoryview(data))
        await self._run("write", name, lambda path: obstore.put_async(self._store, path, content))

    async def put_if_absent(self, name: str, data: Data) -> PutResult:
        content = bytes(memoryview(data))

        async def create(path: str) -> PutResult:
            try:
                await obstore.put_async(self._store, path, content, mode="create")
            except AlreadyExistsError:
                return PutResult.EXISTS
            return PutResult.CREATED

        return await self._run("create", name, create)

    async def list(self, prefix: str) -> list[str]:
        directory = prefix.rpartition("/")[0]

        async def find(path: str) -> list[str]:
            found = await obstore.list(self._store, prefix=path.rstrip("/") or None).collect_async()
            return [str(meta["path"])[len(self._root) :] for meta in found]

        names = await self._run("list", directory, find)
        return sorted(n for n in names if n.startswith(prefix) and not n.rpartition("/")[2].startswith(TEMP_PREFIX))

    async def delete(self, name: str) -> None:
        async def remove(path: str) -> None:
            try:
                await obstore.delete_async(self._store, path)
            except FileNotFoundError as error:
                if _answer(error)[1] == "NoSuchBucket":
                    raise

        await self._run("delete", name, remove)

    def describe(self) -> str:
        return self._url

    async def _run(self, action: str, name: str, call: Callable[[str], Awaitable[_T]]) -> _T:
        check_name(name, is_object=action != "list")
        if self._pid != os.getpid():
            raise StoreClosedError(
                f"cannot {action} {name!r} in {self._url}: opened in process {self._pid}, and obstore does not survive "
                "a fork: open the store in the process that uses it (for multiprocessing, start with 'spawn')"
            )
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call(f"{self._root}{name}")
        except (OSError, BaseError) as error:
            cause = _failure(error)
            raise translated(cause, action, f"{name!r} in {self._url}") from cause


def _failure(error: Exception) -> OSError:
    """What the error is to the caller, as an ``OSError`` like those of the drivers of fsspec."""
    status, code = _answer(error)
    message = f"{code or type(error).__name__}: " + str(error).partition("\n")[0]  # below it the request is dumped
    failure: OSError
    if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
        failure = FileNotFoundError(errno.ENOENT, message)
    elif isinstance(error, PermissionDeniedError | UnauthenticatedError) or is_refusal(status, code):
        failure = RefusedError(errno.EACCES, message)
    elif isinstance(error, TimeoutError):
        failure = TimeoutError(errno.ETIMEDOUT, message)
    else:
        failure = OSError(errno.EIO, message)
    failure.__cause__ = error
    return failure


def _answer(error: Exception) -> tuple[int, str]:
    """Status and code of the server's answer, which obstore tells in its message only; 0 and "" without one."""
    status, code = _STATUS.search(str(error)), _CODE.search(str(error))
    return int(status[1]) if status else 0, code[1] if code else ""
