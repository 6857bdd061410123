"""The few things that a file sink asks of a filesystem, and what each of them guarantees.

Names are relative to the sink's directory, with ``/`` between components. Two implementations: the
local one, which syncs files and directories, and one for any other fsspec filesystem, where an
object is durable and visible as a whole once it is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

__all__ = ["FsspecOutputFiles", "LocalOutputFiles", "OutputFiles", "output_files"]


class OutputFiles(Protocol):
    """A directory that a sink writes to."""

    def write(self, name: str, content: Callable[[BinaryIO], None]) -> None:
        """Create or overwrite a file, and its directories; may leave a torn file when it fails.

        Its bytes are durable on return, its name once `sync` or `replace` returned for its directory.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Create or overwrite a small file, whole or not at all where the filesystem can; durable on return."""

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, None if there is none."""

    def open(self, name: str) -> BinaryIO:
        """A file, for reading; FileNotFoundError if there is none."""

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""

    def move(self, source: str, target: str) -> None:
        """Move a file to its place; FileNotFoundError if it is not there. Local: atomic, durable after `sync`."""

    def sync(self, directories: Iterable[str]) -> None:
        """Make the names in these directories durable."""

    def names(self, directory: str) -> list[str]:
        """Names of the files and directories right in this one; none if it does not exist."""

    def remove_tree(self, directory: str) -> None:
        """Delete a directory and everything in it; fine if it does not exist."""


def output_files(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> OutputFiles:
    """The directory at a local path or fsspec URL."""
    fs, root = fsspec.core.url_to_fs(os.fspath(path), **dict(storage_options or {}))
    return LocalOutputFiles(Path(root)) if isinstance(fs, LocalFileSystem) else FsspecOutputFiles(fs, root)


class LocalOutputFiles:
    """A directory of this machine."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def write(self, name: str, content: Callable[[BinaryIO], None]) -> None:
        """See `OutputFiles`; syncs the file."""
        path = self._path(name)
        _make_directory(path.parent)
        with path.open("wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, name: str, data: bytes) -> None:
        """See `OutputFiles`; a synced temporary file, renamed, its directory synced."""
        temporary = f"{name}.{uuid.uuid4().hex}.tmp"
        try:
            self.write(temporary, lambda file: _write_all(file, data))
            self._path(temporary).replace(self._path(name))
        except BaseException:
            self._path(temporary).unlink(missing_ok=True)
            raise
        _sync_directory(self._path(name).parent)

    def read(self, name: str) -> bytes | None:
        """See `OutputFiles`."""
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None

    def open(self, name: str) -> BinaryIO:
        """See `OutputFiles`."""
        return self._path(name).open("rb")

    def exists(self, name: str) -> bool:
        """See `OutputFiles`."""
        return self._path(name).is_file()

    def move(self, source: str, target: str) -> None:
        """See `OutputFiles`; one rename."""
        _make_directory(self._path(target).parent)
        self._path(source).replace(self._path(target))

    def sync(self, directories: Iterable[str]) -> None:
        """See `OutputFiles`."""
        for directory in sorted(set(directories)):
            _sync_directory(self._path(directory))

    def names(self, directory: str) -> list[str]:
        """See `OutputFiles`."""
        try:
            return sorted(p.name for p in self._path(directory).iterdir())
        except FileNotFoundError:
            return []

    def remove_tree(self, directory: str) -> None:
        """See `OutputFiles`."""
        path = self._path(directory)
        while path.exists():
            try:
                shutil.rmtree(path)
            except FileNotFoundError:
                continue  # another process deletes the same files
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise  # else one that has stalled, and does not know it yet, has written there meanwhile

    def _path(self, name: str) -> Path:
        return self._root / name


class FsspecOutputFiles:
    """A directory of any fsspec filesystem."""

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")

    def write(self, name: str, content: Callable[[BinaryIO], None]) -> None:
        """See `OutputFiles`."""
        path = self._path(name)
        self._fs.makedirs(posixpath.dirname(path), exist_ok=True)
        with self._fs.open(path, "wb") as file:
            content(file)

    def replace(self, name: str, data: bytes) -> None:
        """See `OutputFiles`."""
        path = self._path(name)
        self._fs.makedirs(posixpath.dirname(path), exist_ok=True)
        self._fs.pipe_file(path, data)

    def read(self, name: str) -> bytes | None:
        """See `OutputFiles`."""
        try:
            data: bytes = self._fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        return data

    def open(self, name: str) -> BinaryIO:
        """See `OutputFiles`."""
        opened: BinaryIO = self._fs.open(self._path(name), "rb")
        return opened

    def exists(self, name: str) -> bool:
        """See `OutputFiles`."""
        self._fs.invalidate_cache()
        return bool(self._fs.isfile(self._path(name)))

    def move(self, source: str, target: str) -> None:
        """See `OutputFiles`; a copy and a deletion."""
        path = self._path(target)
        self._fs.makedirs(posixpath.dirname(path), exist_ok=True)
        self._fs.cp_file(self._path(source), path)
        with contextlib.suppress(FileNotFoundError):  # another process published the same file
            self._fs.rm_file(self._path(source))

    def sync(self, directories: Iterable[str]) -> None:
        """See `OutputFiles`; nothing to do."""

    def names(self, directory: str) -> list[str]:
        """See `OutputFiles`."""
        self._fs.invalidate_cache()
        path = self._path(directory)
        try:
            found = self._fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(posixpath.basename(p.rstrip("/")) for p in found if p.rstrip("/") != path)

    def remove_tree(self, directory: str) -> None:
        """See `OutputFiles`."""
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(directory), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root


def _write_all(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _make_directory(path: Path) -> None:
    """Create a directory durably: each new one is synced into its parent."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir(exist_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
