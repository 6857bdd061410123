"""Chunks of SSTables in a local directory, below a limit of bytes; shared by any number of processes.

::

    <directory>/<store>/<object>/<number of the chunk>        checksum u64 little-endian, then the bytes
    store    16 hex digits of a hash of what the owner passes as identity
    object   the object's name with "/" as "~"

The files are a cache and nothing else: no file is ever synced, and none is trusted. Which are oldest is told by the
time of their last use, which is the time of the file.

Invariants:

* A file appears complete, by renaming, and its checksum covers its name: what is damaged, torn by a crash, or in
  another's place is not found, and removed.
* No failure of the local disk reaches a caller: what cannot be read is not found; what cannot be written turns the
  cache off, with one warning, until the owner is opened again.
* The bytes of all files stay below the limit but for what each process writes between two looks at the directory,
  1/16 of it. Temporary files that a crash left are removed after an hour.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from statebackend.format import checksum
from statebackend.logs import context
from statebackend.objectstore_base import TEMP_PREFIX

__all__ = ["DiskCache"]

logger = logging.getLogger(__name__)

_CHECKSUM_BYTES = 8
_TEMPORARY_S_MAX = 3600.0


class DiskCache:
    """Chunks by (object's name, number). All calls block, never raise ``OSError``, and may come from any thread.

    ``identity``: what makes the names unique, such as the id of the store. ``bytes_max``: the limit of the directory,
    whoever else uses it.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: str, bytes_max: int) -> None:
        # Constant after construction.
        self._directory = Path(directory)
        self._store = f"{checksum(identity.encode()):016x}"
        self.bytes_max = bytes_max
        self._lock = threading.Lock()
        # State below is protected by _lock.
        self._bytes: int | None = None  # of the directory, as of the last look and what was written since
        self._unseen = 0  # bytes written since the last look
        self.enabled = True

    @property
    def nbytes(self) -> int:
        """Bytes in the directory, as far as this process knows; 0 before its first write."""
        return self._bytes or 0

    def get(self, name: str, number: int) -> bytes | None:
        """The chunk, or None."""
        path = self._path(name, number)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        chunk = data[_CHECKSUM_BYTES:]
        if data[:_CHECKSUM_BYTES] != _digest(name, number, chunk):
            self._remove(path)
            return None
        with suppress(OSError):
            os.utime(path)  # it was used now
        return chunk

    def put(self, name: str, number: int, chunk: bytes | memoryview) -> None:
        """Keep the chunk; the ones that were not used for longest give way."""
        if not self.enabled:
            return
        path = self._path(name, number)
        temporary = self._directory / f"{TEMP_PREFIX}{uuid.uuid4().hex}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("xb") as file:
                    file.write(_digest(name, number, chunk) + chunk)
                temporary.replace(path)
            except FileNotFoundError:
                return  # another process cleared the directory meanwhile: not worth a second try
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
            self._added(len(chunk) + _CHECKSUM_BYTES)
        except OSError as error:
            with self._lock:
                first, self.enabled = self.enabled, False
            if first:
                logger.warning("the disk cache in %s is off: %s", self._directory, error, extra=context(object=name))

    def forget(self, name: str) -> None:
        """Remove all chunks of an object, which was deleted."""
        shutil.rmtree(self._path(name, 0).parent, ignore_errors=True)

    def _path(self, name: str, number: int) -> Path:
        return self._directory / self._store / name.replace("/", "~") / str(number)

    def _added(self, nbytes: int) -> None:
        with self._lock:
            self._unseen += nbytes
            if self._bytes is not None:
                self._bytes += nbytes
                if self._bytes <= self.bytes_max and self._unseen < self.bytes_max // 16:
                    return
            self._unseen = 0
            self._bytes = self._evict()

    def _evict(self) -> int:
        """Look at the whole directory and, if it is too full, remove the oldest down to 7/8; bytes that are there."""
        entries = sorted(self._entries(), key=lambda e: e.used)
        present = sum(e.nbytes for e in entries)
        if present <= self.bytes_max - self.bytes_max // 16:
            return present
        for entry in entries:
            if present <= self.bytes_max - self.bytes_max // 8:
                break
            self._remove(entry.path)
            present -= entry.nbytes
        return present

    def _entries(self) -> Iterator[_Entry]:
        long_ago = time.time() - _TEMPORARY_S_MAX
        for parent, _, files in os.walk(self._directory):
            for file in files:
                path = Path(parent, file)
                try:
                    status = path.stat()
                except OSError:
                    continue  # another process was faster
                if file.startswith(TEMP_PREFIX) and status.st_mtime < long_ago:
                    self._remove(path)
                else:
                    yield _Entry(status.st_mtime_ns, status.st_size, path)

    def _remove(self, path: Path) -> None:
        with suppress(OSError):
            path.unlink()
        with suppress(OSError):
            path.parent.rmdir()  # the last one of its object


@dataclass(frozen=True, slots=True)
class _Entry:
    used: int
    nbytes: int
    path: Path


def _digest(name: str, number: int, chunk: bytes | memoryview) -> bytes:
    return checksum(f"{name} {number} ".encode(), chunk).to_bytes(_CHECKSUM_BYTES, "little")
