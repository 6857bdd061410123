"""Opening an object store by URL, and the `ObjectStore` on fsspec.

`FsspecObjectStore` runs the blocking calls of a filesystem on a given executor, never on the event
loop's thread; what differs between filesystems (how a put becomes durable, how create-if-absent is
atomic, what a failure means) is a small driver: ``objectstore_drivers.py``, ``objectstore_s3.py``.

====================  =========================  ==================================
URL                   transport                  needs
====================  =========================  ==================================
path, ``file://``     plain file calls
``memory://``         fsspec
``s3://``             fsspec's s3fs              extra ``s3``
``obstore+s3://``     obstore                    extra ``obstore``
``obstore+memory://`` obstore                    extra ``obstore``
others of fsspec      fsspec                     ``allow_unsafe_create``
====================  =========================  ==================================

Invariants:
* A filesystem whose create-if-absent is not known to be atomic is refused with `AtomicCreateError`; an S3 server is
  asked once per opening whether it honours the condition, see `CreateCheckingObjectStore`.
* ``timeout_s`` bounds every blocking call, so that a server that stalls cannot keep the threads of the executor.
"""

# ruff: noqa: D102  (the methods of a store are documented in `ObjectStore`)
from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from statebackend.errors import AtomicCreateError, StoreClosedError
from statebackend.objectstore_base import TEMP_PREFIX, Data, ObjectStore, PutResult, check_name, check_url, translated
from statebackend.objectstore_drivers import FsspecDriver, LocalDriver, MemoryDriver
from statebackend.objectstore_wrappers import CreateCheckingObjectStore

__all__ = ["TEMP_PREFIX", "Data", "FsspecObjectStore", "ObjectStore", "PutResult", "open_object_store"]

_T = TypeVar("_T")
_OBSTORE = "obstore+"


def open_object_store(
    url: str | Path,
    executor: Executor,
    *,
    storage_options: Mapping[str, Any] | None = None,
    allow_unsafe_create: bool = False,
    timeout_s: float = 30.0,
) -> ObjectStore:
    """The store at a URL of the table above, or at a plain local path; nothing is created yet.

    ``executor`` runs the blocking calls and bounds how many run at once; ``storage_options`` (credentials, endpoint)
    go to fsspec or obstore; ``timeout_s``: seconds one call to a remote store may take.

    Raises `AtomicCreateError` for a filesystem whose create-if-absent is not known to be atomic, unless
    ``allow_unsafe_create``; ``ValueError`` for a URL that holds a password; ``ImportError`` that names the missing
    extra.
    """
    url = str(url)
    check_url(url)
    if url.startswith(_OBSTORE):
        return _open_obstore(url, dict(storage_options or {}), allow_unsafe_create, timeout_s)
    if url.startswith(("s3://", "s3a://")):
        return _open_s3(url, executor, dict(storage_options or {}), allow_unsafe_create, timeout_s)
    fs, root = url_to_fs(url, **(storage_options or {}))
    return FsspecObjectStore(fs, root, executor, allow_unsafe_create=allow_unsafe_create)


def _open_s3(
    url: str, executor: Executor, storage_options: dict[str, Any], allow_unsafe_create: bool, timeout_s: float
) -> ObjectStore:
    try:
        from statebackend.objectstore_s3 import S3Driver, s3_options

        fs, root = url_to_fs(url, **s3_options(storage_options, timeout_s))
    except ImportError as error:
        raise ImportError(f"{url}: needs the extra 's3' (s3fs): {error}") from error
    if not root.strip("/"):
        raise ValueError(f"{url}: names no bucket")
    store = FsspecObjectStore(fs, root, executor, driver=S3Driver(fs, timeout_s))
    return store if allow_unsafe_create else CreateCheckingObjectStore(store)


def _open_obstore(
    url: str, storage_options: dict[str, Any], allow_unsafe_create: bool, timeout_s: float
) -> ObjectStore:
    try:
        from statebackend.objectstore_obstore import open_obstore
    except ImportError as error:
        raise ImportError(f"{url}: needs the extra 'obstore': {error}") from error
    store = open_obstore(url.removeprefix(_OBSTORE), storage_options, timeout_s, allow_unsafe_create)
    return store if allow_unsafe_create else CreateCheckingObjectStore(store)


class FsspecObjectStore:
    """An `ObjectStore` below ``root`` of an fsspec filesystem; see `open_object_store`."""

    def __init__(
        self,
        fs: Any,
        root: str,
        executor: Executor,
        *,
        allow_unsafe_create: bool = False,
        driver: FsspecDriver | None = None,
    ) -> None:
        self._root = root.rstrip("/")
        self._url = str(fs.unstrip_protocol(root))
        self._driver = driver or _driver(fs, self._root, self._url, allow_unsafe_create)
        self._executor = executor

    async def get(self, name: str) -> bytes:
        return await self._run("read", name, self._driver.read, 0, None)

    async def get_range(self, name: str, start: int, end: int | None = None) -> bytes:
        return await self._run("read", name, self._driver.read, start, end)

    async def put(self, name: str, data: Data) -> None:
        await self._run("write", name, self._driver.write, data)

    async def put_if_absent(self, name: str, data: Data) -> PutResult:
        created = await self._run("create", name, self._driver.create, data)
        return PutResult.CREATED if created else PutResult.EXISTS

    async def list(self, prefix: str) -> list[str]:
        directory = prefix.rpartition("/")[0]
        paths = await self._run("list", directory, self._driver.list)
        names = (path[len(self._root) + 1 :] for path in paths)
        return sorted(n for n in names if n.startswith(prefix) and not n.rpartition("/")[2].startswith(TEMP_PREFIX))

    async def delete(self, name: str) -> None:
        await self._run("delete", name, self._driver.delete)

    def describe(self) -> str:
        return self._url

    async def _run(self, action: str, name: str, call: Callable[..., _T], *args: Any) -> _T:
        check_name(name, is_object=action != "list")
        path = f"{self._root}/{name}" if name else self._root
        try:
            done = asyncio.get_running_loop().run_in_executor(self._executor, call, path, *args)
        except RuntimeError as error:
            raise StoreClosedError(f"cannot {action} {name!r} in {self._url}: the I/O threads are stopped") from error
        try:
            return await done
        except OSError as error:
            raise translated(error, action, f"{name!r} in {self._url}") from error


def _driver(fs: Any, root: str, url: str, allow_unsafe_create: bool) -> FsspecDriver:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if "file" in protocols:
        return LocalDriver(fs, root)
    if "memory" in protocols:
        return MemoryDriver(fs)
    if allow_unsafe_create:
        return FsspecDriver(fs)
    raise AtomicCreateError(
        f"{url}: create-if-absent of {type(fs).__name__} is not known to be atomic, so two writers could "
        "overwrite each other; use a local, memory or S3 URL, or allow_unsafe_create if there is only ever one writer"
    )
