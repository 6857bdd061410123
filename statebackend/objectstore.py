"""The storage seam: seven methods over named, immutable-in-practice blobs, and their fsspec implementation.

Everything durable goes through `ObjectStore`. A name is a relative POSIX path ("manifest/0042.manifest").
`FsspecObjectStore` runs the blocking calls of a filesystem on a given executor, never on the event
loop's thread; what differs between filesystems is a small driver (how a put becomes durable, how
create-if-absent is atomic). Retrying and counting wrappers: ``objectstore_wrappers.py``.

Invariants:
* ``put`` and ``put_if_absent`` return only when the object is durable, and nobody ever reads part of one.
* Of all callers that ever create one name with ``put_if_absent``, at most one gets ``CREATED``.
* A filesystem on which that is not known to hold is refused with `AtomicCreateError`.
* Every failure of the storage is a `StateStoreError` that names the object and keeps its cause.
"""

# ruff: noqa: D102  (the methods of a store are documented in `ObjectStore`)
from __future__ import annotations

import asyncio
import errno
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import pyarrow as pa
from fsspec.core import url_to_fs

from statebackend.errors import (
    AtomicCreateError,
    ObjectMissingError,
    StateStoreError,
    StorageFullError,
    StorageUnavailableError,
    StoreClosedError,
)

__all__ = [
    "TEMP_PREFIX",
    "Data",
    "FsspecObjectStore",
    "ObjectStore",
    "PutResult",
    "open_object_store",
]

TEMP_PREFIX = ".tmp-"
"""File names with this prefix are unfinished writes; a crash leaves them behind and no listing shows them."""

Data: TypeAlias = "bytes | memoryview | pa.Buffer"
_T = TypeVar("_T")


class PutResult(Enum):
    """The two expected outcomes of `ObjectStore.put_if_absent`."""

    CREATED = "created"
    EXISTS = "exists"


class ObjectStore(Protocol):
    """Where the bytes are. Any method may raise `StorageUnavailableError` (or `StorageFullError`).

    Such an error says nothing about the effect: a write that raised may have happened, or may still
    happen later (a lost response, a timeout).
    """

    async def get(self, name: str) -> bytes:
        """The whole object. Raises `ObjectMissingError`."""

    async def get_range(self, name: str, start: int, end: int | None = None) -> bytes:
        """Bytes ``[start, end)`` with the meaning of a Python slice.

        A negative ``start`` counts from the end, ``end=None`` is the end. A range beyond the object
        returns what there is: the caller knows the length it expects. Raises `ObjectMissingError`.
        """

    async def put(self, name: str, data: Data) -> None:
        """Create or replace the object; durable when it returns, readers see the old or the new one."""

    async def put_if_absent(self, name: str, data: Data) -> PutResult:
        """Create the object unless there is one; durable when it returns.

        Of any number of racing callers, in any processes, exactly one gets ``CREATED``; ``EXISTS``
        means that a complete, durable object of this name is there. After an error the caller may meet its own
        object as ``EXISTS``: only the caller can recognise its own bytes.
        """

    async def list(self, prefix: str) -> list[str]:
        """All names that start with ``prefix``, sorted; complete with respect to every write that returned before."""

    async def delete(self, name: str) -> None:
        """Remove the object; it is fine if there is none. Deletes become durable in the order they return."""

    def describe(self) -> str:
        """The URL of the store for messages, without credentials."""


def open_object_store(
    url: str | Path,
    executor: Executor,
    *,
    storage_options: Mapping[str, Any] | None = None,
    allow_unsafe_create: bool = False,
) -> FsspecObjectStore:
    """The store at a URL (``file://``, ``memory://``) or a plain local path; nothing is created yet.

    ``executor`` runs the blocking calls and bounds how many run at once; ``storage_options`` go to fsspec.
    Raises `AtomicCreateError` for a filesystem whose create-if-absent is not known to be atomic,
    unless ``allow_unsafe_create``.
    """
    fs, root = url_to_fs(str(url), **(storage_options or {}))
    return FsspecObjectStore(fs, root, executor, allow_unsafe_create=allow_unsafe_create)


class FsspecObjectStore:
    """An `ObjectStore` below ``root`` of an fsspec filesystem; see `open_object_store`."""

    def __init__(self, fs: Any, root: str, executor: Executor, *, allow_unsafe_create: bool = False) -> None:
        self._root = root.rstrip("/")
        self._url = str(fs.unstrip_protocol(root))
        self._driver = _driver(fs, self._root, self._url, allow_unsafe_create)
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
        path = self._path(name, is_object=action != "list")
        try:
            done = asyncio.get_running_loop().run_in_executor(self._executor, call, path, *args)
        except RuntimeError as error:
            raise StoreClosedError(f"cannot {action} {name!r} in {self._url}: the I/O threads are stopped") from error
        try:
            return await done
        except OSError as error:
            raise _translated(error, action, f"{name!r} in {self._url}") from error

    def _path(self, name: str, *, is_object: bool) -> str:
        parts = name.split("/")
        if any(part in (".", "..") or part.startswith(TEMP_PREFIX) for part in parts) or (is_object and not all(parts)):
            raise ValueError(f"object name {name!r}: must be a relative path, without '.', '..' and {TEMP_PREFIX!r}")
        return f"{self._root}/{name}" if name else self._root


def _translated(error: OSError, action: str, where: str) -> StateStoreError:
    """The error a caller can act on.

    Lost permission is "unavailable" as well: it passes once an operator has given it back, and until
    then nothing is lost. It is not worth a quick retry, though; see
    `RetryingObjectStore`.
    """
    if isinstance(error, FileNotFoundError) and action == "read":
        return ObjectMissingError(f"no object {where}")
    cause = f"{type(error).__name__}: {error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFullError(f"cannot {action} {where}: no space left or quota exceeded ({cause})")
    return StorageUnavailableError(f"cannot {action} {where}: {cause}")


# --- drivers: blocking, on full paths --------------------------------------------------------------


def _driver(fs: Any, root: str, url: str, allow_unsafe_create: bool) -> _FsspecDriver:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if "file" in protocols:
        return _LocalDriver(fs, root)
    if "memory" in protocols:
        return _MemoryDriver(fs)
    if allow_unsafe_create:
        return _FsspecDriver(fs)
    raise AtomicCreateError(
        f"{url}: create-if-absent of {type(fs).__name__} is not known to be atomic, so two writers could "
        "overwrite each other; use a local or memory URL, or allow_unsafe_create if there is only ever one writer"
    )


class _FsspecDriver:
    """Any filesystem by fsspec's own calls; ``create`` is only as atomic as its ``mode="create"``."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def read(self, path: str, start: int, end: int | None) -> bytes:
        return bytes(self._fs.cat_file(path, start=start, end=end))

    def write(self, path: str, data: Data) -> None:
        self._fs.pipe_file(path, bytes(memoryview(data)))

    def create(self, path: str, data: Data) -> bool:
        try:
            self._fs.pipe_file(path, bytes(memoryview(data)), mode="create")
        except FileExistsError:
            return False
        return True

    def list(self, directory: str) -> list[str]:
        try:  # "raise", since the default hides a directory that cannot be read and so a whole store
            return list(self._fs.find(directory, on_error="raise"))
        except FileNotFoundError:
            return []

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)


class _MemoryDriver(_FsspecDriver):
    """fsspec's in-process store, which checks and then writes: one lock for the process makes that atomic."""

    _lock = threading.Lock()

    def write(self, path: str, data: Data) -> None:
        with self._lock:
            super().write(path, data)

    def create(self, path: str, data: Data) -> bool:
        with self._lock:
            return super().create(path, data)

    def delete(self, path: str) -> None:
        with self._lock:
            super().delete(path)


_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class _LocalDriver(_FsspecDriver):
    """Local files: written aside, synced, then renamed or hard-linked to their name, and the directory synced.

    fsspec's own local calls neither sync nor create atomically, so only plain file calls are used.
    """

    def __init__(self, fs: Any, root: str) -> None:
        super().__init__(fs)
        self._root = Path(root or "/")
        self._anchored: set[Path] = set()

    def read(self, path: str, start: int, end: int | None) -> bytes:
        with Path(path).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            first, last, _ = slice(start, end).indices(size)
            data = b""
            while more := os.pread(file.fileno(), max(last - first - len(data), 0), first + len(data)):
                data = data + more if data else more  # a second round only beyond 2 GiB
            return data

    def write(self, path: str, data: Data) -> None:
        target = Path(path)
        with self._written_aside(target, data) as temporary:
            temporary.replace(target)
        _sync_directory(target.parent)

    def create(self, path: str, data: Data) -> bool:
        target, created = Path(path), True
        with self._written_aside(target, data) as temporary:
            try:
                target.hardlink_to(temporary)
            except FileExistsError:
                created = False
            except OSError as error:
                if error.errno in _NO_HARD_LINKS:
                    raise AtomicCreateError(
                        f"{path}: the filesystem refuses hard links ({error}), without which creating a file only "
                        "if it is absent is not atomic"
                    ) from error
                raise
        # Also when it exists: the winner may have died before its own sync, and the caller builds on what it saw.
        _sync_directory(target.parent)
        return created

    def list(self, directory: str) -> list[str]:
        walk = os.walk(directory, onerror=_raise_unless_missing)  # by default an unreadable directory looks empty
        return [f"{parent}/{file}" for parent, _, files in walk for file in files]

    def delete(self, path: str) -> None:
        target = Path(path)
        with suppress(FileNotFoundError):
            target.unlink()
            _sync_directory(target.parent)

    @contextmanager
    def _written_aside(self, target: Path, data: Data) -> Iterator[Path]:
        """A complete, synced temporary file beside ``target``; gone afterwards whatever happens."""
        self._anchor(target.parent)
        temporary = target.parent / f"{TEMP_PREFIX}{uuid.uuid4().hex}"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            self._anchored.discard(target.parent)  # removed under us: the next attempt makes it again
            raise
        try:
            try:
                rest = memoryview(data).cast("B")
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            yield temporary
        finally:
            with suppress(OSError):  # the error that matters is on its way; listings hide what stays
                temporary.unlink()

    def _anchor(self, directory: Path) -> None:
        """Make the directory and the path to it durable, once; another process may have made it and not synced."""
        if directory in self._anchored:
            return
        missing = [d for d in (directory, *directory.parents) if not d.exists()]
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
        inside = [d for d in (directory, *directory.parents) if d.is_relative_to(self._root) and d != self._root]
        for parent in sorted({d.parent for d in (*missing, *inside)}, reverse=True):
            _sync_directory(parent)
        self._anchored.add(directory)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
