"""Text files as blocks of whole lines, plain or compressed as a whole.

A block begins where the one before it ended, holds about as many bytes as asked for, and ends with a row. Offsets are
those of the text: a compressed file that is begun at an offset is decompressed from its beginning up to there.
Compression is told by the end of the name: ``.gz``, ``.zst``, ``.bz2``, ``.lz4``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any, Protocol

import pyarrow as pa

from operators.errors import BadInputError, SourceChangedError
from operators.sources.files import InputFile

__all__ = ["Block", "TextFile", "open_text", "read_blocks", "text_suffixes"]

_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}

Block = tuple[bytes, int, int]
"""The bytes of some rows, where they begin, and where they end."""


def text_suffixes(*suffixes: str) -> tuple[str, ...]:
    """These, and each with every known compression."""
    return tuple(f"{suffix}{codec}" for suffix in suffixes for codec in ("", *_CODECS))


class TextFile(Protocol):
    """The text of one file."""

    def read(self, start: int, size: int) -> bytes:
        """So many bytes from ``start`` on, fewer only at the end. Starts never go back before the latest one."""

    def ends_at(self, offset: int) -> bool:
        """Whether the text is known to end at an offset up to which it was read."""

    def close(self) -> None:
        """Release it."""


def open_text(fs: Any, file: InputFile) -> TextFile:
    """The text of a file, decompressed if its name says so."""
    codec = next((codec for suffix, codec in _CODECS.items() if file.path.endswith(suffix)), None)
    return _PlainText(fs, file) if codec is None else _CompressedText(fs, file, codec)


def read_blocks(
    fs: Any, file: InputFile, offset: int, block_bytes: int, end_of_rows: Callable[[bytes], int]
) -> Generator[Block, None, None]:
    """The blocks from an offset on.

    ``end_of_rows``: length of the whole rows at the start of a block, 0 if not even one is whole; then more is read.
    """
    with contextlib.closing(open_text(fs, file)) as text:
        while not text.ends_at(offset):
            block = _whole_rows(text, offset, block_bytes, end_of_rows)
            if not block:
                return
            yield block, offset, offset + len(block)
            offset += len(block)


def _whole_rows(text: TextFile, start: int, size: int, end_of_rows: Callable[[bytes], int]) -> bytes:
    while True:
        block = text.read(start, size)
        cut = len(block) if text.ends_at(start + len(block)) else end_of_rows(block)
        if cut or not block:
            return block[:cut]
        size *= 2


class _PlainText:
    """Reads ranges of the file, whose size is known."""

    def __init__(self, fs: Any, file: InputFile) -> None:
        self._fs = fs
        self._file = file

    def read(self, start: int, size: int) -> bytes:
        end = min(self._file.size, start + size)
        try:
            block: bytes = self._fs.cat_file(self._file.path, start=start, end=end) if end > start else b""
        except FileNotFoundError as e:
            raise SourceChangedError(self._file.path, expected=self._file.identity, found="no such file") from e
        except OSError as e:
            raise BadInputError(f"{self._file.path}: cannot be read: {e}") from e
        if len(block) != end - start:
            found = f"{start + len(block)} bytes"
            raise SourceChangedError(self._file.path, expected=self._file.identity, found=found)
        return block

    def ends_at(self, offset: int) -> bool:
        return offset >= self._file.size

    def close(self) -> None:
        """Nothing is open."""


class _CompressedText:
    """Decompresses from the beginning on, and keeps what was read and not yet passed."""

    def __init__(self, fs: Any, file: InputFile, codec: str) -> None:
        self._path = file.path
        self._raw = fs.open(file.path, "rb")
        self._stream = pa.CompressedInputStream(pa.PythonFile(self._raw, mode="r"), codec)
        self._start = 0
        self._kept = b""
        self._ended = False

    def read(self, start: int, size: int) -> bytes:
        while start > self._start + len(self._kept) and not self._ended:
            self._start += len(self._kept)
            self._kept = self._more(min(1 << 20, start - self._start))
        self._kept = self._kept[start - self._start :]
        self._start = start
        parts = [self._kept]
        missing = size - len(self._kept)
        # One byte more than asked for tells whether this is the end.
        while missing >= 0 and not self._ended:
            parts.append(self._more(missing + 1))
            missing -= len(parts[-1])
        self._kept = b"".join(parts)
        return self._kept[:size]

    def ends_at(self, offset: int) -> bool:
        return self._ended and offset >= self._start + len(self._kept)

    def close(self) -> None:
        self._stream.close()
        self._raw.close()

    def _more(self, size: int) -> bytes:
        try:
            data: bytes = self._stream.read(size)
        except OSError as e:
            raise BadInputError(f"{self._path}: cannot be decompressed: {e}") from e
        self._ended = not data
        return data
