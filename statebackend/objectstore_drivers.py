"""Drivers of `FsspecObjectStore`: how one filesystem reads, writes durably and creates only if absent.

All calls block and take full paths. They raise ``OSError``; what it means to a caller, and what is
tried again, is decided above. None of them tries anything again by itself.

==========  ==========================  ============================================  ==========================
filesystem  create only if absent       durable when                                  tried again by the wrapper
==========  ==========================  ============================================  ==========================
local       hard link of a synced       file and directory are synced                 every ``OSError`` but a full
            temporary file                                                            disk and lost permission
memory      lock of this process        never (it ends with the process)              as local
s3          see ``objectstore_s3.py``
others      fsspec's ``mode="create"``  the filesystem's own promise                  as local
==========  ==========================  ============================================  ==========================

Others are refused unless the user insists. From their sources, gcsfs (``ifGenerationMatch=0``) and adlfs
(``overwrite=False``) create atomically, but that was never run here, so they count among the others.
"""

# ruff: noqa: D102  (the methods of a driver are documented at `FsspecDriver`)
from __future__ import annotations

import errno
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from statebackend.errors import AtomicCreateError
from statebackend.objectstore_base import TEMP_PREFIX, Data

__all__ = ["FsspecDriver", "LocalDriver", "MemoryDriver"]


class FsspecDriver:
    """Any filesystem by fsspec's own calls; ``create`` is only as atomic as its ``mode="create"``.

    ``read`` returns bytes ``[start, end)`` as a Python slice or raises ``FileNotFoundError``; ``write`` and
    ``create`` return when the object is durable, ``create`` with whether it did; ``list`` returns the
    full paths of all files below a directory, none if there is no directory; ``delete`` is fine with a missing file.
    """

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


class MemoryDriver(FsspecDriver):
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


class LocalDriver(FsspecDriver):
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
