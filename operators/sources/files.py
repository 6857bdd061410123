"""A bounded set of input files in one order, by name unless it is set, and a position within it.

The set is listed once. Each file has an identity: its size and a fingerprint of its contents (the
footer of a Parquet file, the two ends of a text file), but never its modification time, so a copy
of the input is the same input. A position holds::

    {"file": name, "offset": rows or bytes within it, "rows": rows so far in all files,
     "size": bytes of the file, "check": its fingerprint, "before": 4 bytes for each earlier file}

Invariants:

* `FileSet.walk` accepts a position only if its file and every file before it in the order are
  what they were; files after it may come and go.
* `FileList.verify` is called before the last rows of a file are handed out, so the torn end of a
  file that is still being written never passes for data.
"""

from __future__ import annotations

import datetime as dt
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import fsspec
import xxhash

from operators.errors import BadInputError, SourceChangedError
from operators.sources.base import Position

__all__ = [
    "FileList",
    "FileSet",
    "Fingerprint",
    "Found",
    "InputFile",
    "InputPath",
    "ReadRange",
    "ends_fingerprint",
    "path_text",
]

InputPath: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A file, a directory, a glob, or a list of files; each a local path or an fsspec URL."""

ReadRange: TypeAlias = Callable[[int, int], bytes]
"""(start, end) -> the bytes of a file from start up to end."""

Fingerprint: TypeAlias = Callable[[ReadRange, int], int]
"""(reader of a file, its size in bytes) -> 64-bit fingerprint of its contents; ValueError if it has none."""

_END_BYTES = 1 << 16
_LISTING_THREADS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file as it was when the set was listed. ``name`` is its identity within the set."""

    name: str
    path: str
    size: int
    check: int

    @property
    def identity(self) -> str:
        """For messages."""
        return f"{self.size} bytes with fingerprint {self.check:016x}"

    @property
    def mark(self) -> bytes:
        """Four bytes that stand for this file among the finished ones of a position."""
        return xxhash.xxh32_digest(f"{self.name}\0{self.size}\0{self.check}".encode())


def ends_fingerprint(read: ReadRange, size: int) -> int:
    """Fingerprint of the first and the last 64 KiB: what a text file offers without reading it all."""
    if size == 0:
        return 0
    return xxhash.xxh3_64_intdigest(read(0, min(size, _END_BYTES)) + read(max(0, size - _END_BYTES), size))


def path_text(path: InputPath) -> str | list[str]:
    """The path as the user gave it, as text, for `Source.describe`."""
    return os.fspath(path) if isinstance(path, str | os.PathLike) else [os.fspath(p) for p in path]


@dataclass(frozen=True, slots=True)
class Found:
    """One file of a listing; ``time_ns``: when it was last modified, since the epoch, 0 where that is not told."""

    path: str
    size: int
    time_ns: int


class FileList:
    """What is asked of the filesystem: which files there are now, and what identifies each.

    ``directory``: the path is one, also while it is not there yet.
    """

    def __init__(
        self,
        path: InputPath,
        *,
        suffixes: tuple[str, ...],
        fingerprint: Fingerprint,
        storage_options: Mapping[str, Any] | None,
        directory: bool = False,
    ) -> None:
        self._directory = directory
        self.path = path_text(path)
        self.suffixes = suffixes
        self._fingerprint = fingerprint
        self._options = dict(storage_options or {})
        first = path if isinstance(path, str | os.PathLike) else _first(path)
        self.fs, self._root = fsspec.core.url_to_fs(os.fspath(first), **self._options)

    def find(self) -> dict[str, Found]:
        """The files there are now, by the name that orders them."""
        if self._directory:
            self.fs.invalidate_cache()
            return _in_directory(self.fs, self._root, self.suffixes)
        return _list(self.fs, self._root, self.path, self.suffixes)

    def path_of(self, name: str) -> str:
        """The path of a file of a directory, whether it is there or not."""
        return f"{self._root.rstrip('/')}/{name}"

    def identify(self, name: str, found: Found) -> InputFile:
        """The file with its size and fingerprint as they are now; `BadInputError` if it cannot be read."""
        size, check = self.identity(found.path)
        return InputFile(name=name, path=found.path, size=size, check=check)

    def verify(self, file: InputFile) -> None:
        """Raise `SourceChangedError` unless a file still is what it was when it was identified."""
        try:
            size, check = self.identity(file.path)
        except BadInputError as e:
            raise SourceChangedError(file.path, expected=file.identity, found=str(e)) from e
        if (size, check) != (file.size, file.check):
            found = f"{size} bytes with fingerprint {check:016x}"
            raise SourceChangedError(file.path, expected=file.identity, found=found)

    def identity(self, path: str) -> tuple[int, int]:
        """Size and fingerprint of the file as it is now."""
        self.fs.invalidate_cache(posixpath.dirname(path))
        try:
            size = int(self.fs.info(path)["size"])
            return size, self._fingerprint(lambda start, end: self.fs.cat_file(path, start=start, end=end), size)
        except FileNotFoundError as e:
            raise BadInputError(f"{path}: no such file") from e
        except (OSError, ValueError) as e:
            raise BadInputError(f"{path}: {e}") from e


class FileSet:
    """The files of one source, listed when it is made."""

    def __init__(self, files: FileList) -> None:
        self._list = files
        found = sorted(files.find().items())
        if not found:
            raise BadInputError(f"{files.path}: no *{files.suffixes[0]} file there")
        with ThreadPoolExecutor(min(_LISTING_THREADS, len(found))) as pool:
            self.files = tuple(pool.map(lambda item: files.identify(*item), found))
        self._arrange()

    def reorder(self, order: Sequence[int]) -> None:
        """Put the files into another order, given as indexes of the present one; before any position is taken."""
        self.files = tuple(self.files[i] for i in order)
        self._arrange()

    def walk(self, position: Position | None) -> Iterator[tuple[InputFile, int]]:
        """The files from a position on, with where to begin in each (0: at the beginning).

        Raises `SourceChangedError` naming the file that is not what it was.
        """
        index, offset = (0, 0) if position is None else self._resume(position)
        for i in range(index, len(self.files)):
            yield self.files[i], offset if i == index else 0

    def position(self, file: InputFile, offset: int, rows: int) -> Position:
        """The position ``offset`` into a file, after ``rows`` rows in all."""
        index = self._index[file.name]
        return {
            "file": file.name,
            "offset": offset,
            "rows": rows,
            "size": file.size,
            "check": file.check,
            "before": b"".join(self._marks[:index]),
        }

    def _arrange(self) -> None:
        self._marks = [f.mark for f in self.files]
        self._index = {f.name: i for i, f in enumerate(self.files)}

    def _resume(self, position: Position) -> tuple[int, int]:
        name, before = position["file"], position["before"]
        expected = f"{position['size']} bytes with fingerprint {position['check']:016x}"
        index = self._index.get(name)
        if index is None:
            raise SourceChangedError(name, expected=expected, found="no such file")
        file = self.files[index]
        if (file.size, file.check) != (position["size"], position["check"]):
            raise SourceChangedError(name, expected=expected, found=file.identity)
        self._compare_finished([before[i : i + 4] for i in range(0, len(before), 4)], index)
        return index, position["offset"]

    def _compare_finished(self, expected: list[bytes], index: int) -> None:
        found = self._marks[:index]
        if expected == found:
            return
        at = next(
            (i for i, (e, f) in enumerate(zip(expected, found, strict=False)) if e != f), min(len(expected), index)
        )
        counts = f"{len(expected)} finished files before {self.files[index].name!r}"
        if len(found) > len(expected):
            raise SourceChangedError(self.files[at].name, expected=counts, found=f"{len(found)}; this one is new")
        if len(found) < len(expected):
            raise SourceChangedError(
                f"the file before {self.files[at].name!r} in order", expected=counts, found="it vanished"
            )
        raise SourceChangedError(self.files[at].name, expected="the file that was read", found=self.files[at].identity)


def modification_ns(info: Mapping[str, Any]) -> int:
    """When a file was last modified, in ns since the epoch, as its filesystem tells; 0 if it does not."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, str):
            value = dt.datetime.fromisoformat(value)
        if isinstance(value, dt.datetime):
            value = (value if value.tzinfo else value.replace(tzinfo=dt.UTC)).timestamp()
        if isinstance(value, int | float):
            return int(value * 1e9)
    return 0


def _list(fs: Any, root: str, path: str | list[str], suffixes: tuple[str, ...]) -> dict[str, Found]:
    """The files, by the name that orders them."""
    if isinstance(path, list):
        return {text: Found(_strip(fs, text), 0, 0) for text in path}
    fs.invalidate_cache()
    if fs.isdir(root):
        return _in_directory(fs, root, suffixes)
    if any(c in path for c in "*?["):
        # Names are relative to the part without wildcards, so that another match renames none.
        base = posixpath.dirname(re.split(r"[*?\[]", root, maxsplit=1)[0]) or "."
        infos = fs.glob(root, detail=True)
        return {posixpath.relpath(p, base): _found(p, i) for p, i in infos.items() if i["type"] != "directory"}
    return {posixpath.basename(root): Found(root, 0, 0)}


def _in_directory(fs: Any, root: str, suffixes: tuple[str, ...]) -> dict[str, Found]:
    base = root.rstrip("/")
    infos = fs.find(base, detail=True)
    names = {posixpath.relpath(p, base): _found(p, info) for p, info in infos.items()}
    return {name: found for name, found in names.items() if name.endswith(suffixes) and not _hidden(name)}


def _found(path: str, info: Mapping[str, Any]) -> Found:
    return Found(path, int(info.get("size") or 0), modification_ns(info))


def _first(paths: Sequence[str | os.PathLike[str]]) -> str | os.PathLike[str]:
    if not paths:
        raise ValueError("an empty list of input files")
    texts = [os.fspath(p) for p in paths]
    if len(set(texts)) != len(texts):
        raise ValueError(f"a file is named twice among {texts}")
    return paths[0]


def _strip(fs: Any, text: str) -> str:
    other, stripped = fsspec.core.url_to_fs(text)
    if type(other) is not type(fs):
        raise ValueError(f"{text}: all files of one source must lie on the same filesystem")
    return str(stripped)


def _hidden(name: str) -> bool:
    """Files under a component that starts with ``_`` or ``.`` are not (yet) data."""
    return any(part.startswith(("_", ".")) for part in name.split("/"))
