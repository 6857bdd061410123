"""A bounded set of input files in one order, by name unless it is set, and a position within it.

The set is listed once. Each file has an identity: its size and a fingerprint of its contents (the
footer of a Parquet file, the two ends of a text file), but never its modification time, so a copy
of the input is the same input. A position holds::

    {"file": name, "offset": rows or bytes within it, "rows": rows so far in all files,
     "size": bytes of the file, "check": its fingerprint, "before": 4 bytes for each earlier file}

Invariants:

* `FileSet.resume` accepts a position only if its file and every file before it in the order are
  what they were; files after it may come and go.
* `FileSet.verify` is called before the last rows of a file are handed out, so the torn end of a
  file that is still being written never passes for data.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from operators.errors import BadInputError, SourceChangedError
from operators.sources.base import Position

__all__ = ["FileSet", "Fingerprint", "InputFile", "InputPath", "ReadRange", "ends_fingerprint", "path_text"]

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


class FileSet:
    """The files of one source, listed when it is made."""

    def __init__(
        self, path: InputPath, *, suffix: str, fingerprint: Fingerprint, storage_options: Mapping[str, Any] | None
    ) -> None:
        self._fingerprint = fingerprint
        self.fs, found = _list(path, suffix, dict(storage_options or {}))
        if not found:
            raise BadInputError(f"{path_text(path)}: no *{suffix} file there")
        with ThreadPoolExecutor(min(_LISTING_THREADS, len(found))) as pool:
            identities = pool.map(self._identify, [p for _, p in sorted(found.items())])
            self.files = tuple(
                InputFile(name=name, path=p, size=size, check=check)
                for (name, p), (size, check) in zip(sorted(found.items()), identities, strict=True)
            )
        self._marks = [f.mark for f in self.files]

    @property
    def local(self) -> bool:
        """Whether `InputFile.path` is a path of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def reorder(self, order: Sequence[int]) -> None:
        """Put the files into another order, given as indexes of the present one; before any position is taken."""
        self.files = tuple(self.files[i] for i in order)
        self._marks = [f.mark for f in self.files]

    def position(self, index: int, offset: int, rows: int) -> Position:
        """The position ``offset`` into file ``index``, after ``rows`` rows in all."""
        file = self.files[index]
        return {
            "file": file.name,
            "offset": offset,
            "rows": rows,
            "size": file.size,
            "check": file.check,
            "before": b"".join(self._marks[:index]),
        }

    def resume(self, position: Position) -> tuple[int, int, int]:
        """(file index, offset, rows) of a position; raises `SourceChangedError` naming the file that differs."""
        name, before = position["file"], position["before"]
        expected = f"{position['size']} bytes with fingerprint {position['check']:016x}"
        index = next((i for i, f in enumerate(self.files) if f.name == name), None)
        if index is None:
            raise SourceChangedError(name, expected=expected, found="no such file")
        file = self.files[index]
        if (file.size, file.check) != (position["size"], position["check"]):
            raise SourceChangedError(name, expected=expected, found=file.identity)
        self._compare_finished([before[i : i + 4] for i in range(0, len(before), 4)], index)
        return index, position["offset"], position["rows"]

    def verify(self, index: int) -> None:
        """Raise `SourceChangedError` unless file ``index`` still is what it was when it was listed."""
        file = self.files[index]
        try:
            size, check = self._identify(file.path)
        except BadInputError as e:
            raise SourceChangedError(file.path, expected=file.identity, found=str(e)) from e
        if (size, check) != (file.size, file.check):
            found = f"{size} bytes with fingerprint {check:016x}"
            raise SourceChangedError(file.path, expected=file.identity, found=found)

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

    def _identify(self, path: str) -> tuple[int, int]:
        """Size and fingerprint of the file as it is now."""
        self.fs.invalidate_cache(posixpath.dirname(path))
        try:
            size = int(self.fs.info(path)["size"])
            return size, self._fingerprint(lambda start, end: self.fs.cat_file(path, start=start, end=end), size)
        except FileNotFoundError as e:
            raise BadInputError(f"{path}: no such file") from e
        except (OSError, ValueError) as e:
            raise BadInputError(f"{path}: {e}") from e


def _list(path: InputPath, suffix: str, options: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """The filesystem and the files, by the name that orders them."""
    if not isinstance(path, str | os.PathLike):
        if not path:
            raise ValueError("an empty list of input files")
        texts = [os.fspath(p) for p in path]
        if len(set(texts)) != len(texts):
            raise ValueError(f"a file is named twice among {texts}")
        fs = fsspec.core.url_to_fs(texts[0], **options)[0]
        return fs, {t: _strip(fs, t) for t in texts}
    text = os.fspath(path)
    fs, root = fsspec.core.url_to_fs(text, **options)
    fs.invalidate_cache()
    if fs.isdir(root):
        base = root.rstrip("/")
        names = {posixpath.relpath(p, base): p for p in fs.find(base)}
        return fs, {n: p for n, p in names.items() if n.endswith(suffix) and not _hidden(n)}
    if any(c in text for c in "*?["):
        # Names are relative to the part without wildcards, so that another match renames none.
        base = posixpath.dirname(re.split(r"[*?\[]", root, maxsplit=1)[0]) or "."
        return fs, {posixpath.relpath(p, base): p for p in fs.glob(root) if not fs.isdir(p)}
    return fs, {posixpath.basename(root): root}


def _strip(fs: Any, text: str) -> str:
    other, stripped = fsspec.core.url_to_fs(text)
    if type(other) is not type(fs):
        raise ValueError(f"{text}: all files of one source must lie on the same filesystem")
    return str(stripped)


def _hidden(name: str) -> bool:
    """Files under a component that starts with ``_`` or ``.`` are not (yet) data."""
    return any(part.startswith(("_", ".")) for part in name.split("/"))
