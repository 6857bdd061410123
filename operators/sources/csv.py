"""CSV files as a bounded source with a position exact to the byte.

A thread of its own cuts each file into blocks of about ``block_bytes`` that end with a row, and
parses each block into one batch. Where a block ends is a function of where it starts and of the
bytes, so a restored job seeks to its byte and meets the same batches. Types are declared, or
inferred once, from the first MiB of the first file that has rows, and hold for everything after it: a value
that does not fit is an error that names the file, never another type.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from operators.errors import BadInputError, SchemaError, SourceChangedError
from operators.sources.base import SourceBatch
from operators.sources.file_source import FileSource
from operators.sources.files import FileSet, InputFile, InputPath, ends_fingerprint, path_text

__all__ = ["CsvSource"]

_NEWLINE = 0x0A
_QUOTE = 0x22
_READ_AHEAD = 4
_HEADER_BYTES = 1 << 16
_INFER_BYTES = 1 << 20


class CsvSource(FileSource):
    """The rows of UTF-8 CSV files with a header line, in name order and in the order within each file.

    Args:
        path: a file, a directory (searched to any depth for ``*.csv``), a glob, or a list of files;
            local or any fsspec URL. Compressed files are not read.
        schema: names and types of the columns to read; the header may hold more, in any order.
            Without it all columns are read, with the types that the first MiB suggests (text where
            it holds only nulls), and every file must have the same header.
        delimiter: one character.
        null_values: unquoted texts that stand for null; Arrow's list (empty, ``NA``, ``null``, ...) by default.
        newlines_in_values: whether quoted values may hold line breaks.
        block_bytes: size of the blocks in bytes; one batch each.
        storage_options: passed to fsspec.

    Errors as for `ParquetSource`; a file with a header and no row is fine.
    """

    def __init__(
        self,
        path: InputPath,
        schema: pa.Schema | None = None,
        *,
        delimiter: str = ",",
        null_values: Sequence[str] | None = None,
        newlines_in_values: bool = False,
        block_bytes: int = 4 << 20,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if block_bytes < 1:
            raise ValueError(f"block_bytes must be at least 1, not {block_bytes}")
        self._null_values = None if null_values is None else list(null_values)
        self._parse = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=newlines_in_values)
        self._block_bytes = block_bytes
        files = FileSet(path, suffix=".csv", fingerprint=ends_fingerprint, storage_options=storage_options)
        super().__init__("csv", path_text(path), files, depth=_READ_AHEAD)
        headers = [self._read_header(file) for file in self._set.files]
        self._headers = [names for names, _ in headers]
        self._starts = [start for _, start in headers]
        self._schema = self._infer() if schema is None else schema.remove_metadata()
        self._check_headers(exact=schema is None)

    @property
    def total_rows(self) -> None:
        """Unknown without reading everything."""
        return

    def _first_offset(self) -> int:
        return self._starts[0]

    def _read(self, index: int, offset: int, rows: int) -> Generator[SourceBatch, None, None]:
        for i in range(index, len(self._set.files)):
            file = self._set.files[i]
            at = offset if i == index else self._starts[i]
            if at < file.size:
                self._set.verify(i)
            while at < file.size:
                block = self._read_block(file, at, self._block_bytes)
                if at + len(block) == file.size:
                    self._set.verify(i)
                batch = self._parse_block(file, self._headers[i], block, at)
                at += len(block)
                rows += batch.num_rows
                if batch.num_rows:
                    yield SourceBatch(batch, self._set.position(i, at, rows))

    def _read_block(self, file: InputFile, start: int, size: int) -> bytes:
        """Whole rows from ``start`` on: about ``size`` bytes, more only where one row needs it."""
        while True:
            end = min(file.size, start + size)
            block = self._read_range(file, start, end)
            cut = len(block) if end == file.size else _end_of_rows(block, quoted=self._parse.newlines_in_values)
            if cut:
                return block[:cut]
            size *= 2

    def _read_range(self, file: InputFile, start: int, end: int) -> bytes:
        try:
            block: bytes = self._set.fs.cat_file(file.path, start=start, end=end)
        except FileNotFoundError as e:
            raise SourceChangedError(file.path, expected=file.identity, found="no such file") from e
        except OSError as e:
            raise BadInputError(f"{file.path}: cannot be read: {e}") from e
        if len(block) != end - start:
            raise SourceChangedError(file.path, expected=file.identity, found=f"{start + len(block)} bytes")
        return block

    def _parse_block(self, file: InputFile, header: list[str], block: bytes, at: int) -> pa.RecordBatch:
        options = self._convert({f.name: f.type for f in self._schema})
        options.include_columns = self._schema.names
        try:
            table = _parse(block, header, self._parse, options)
            return pa.RecordBatch.from_arrays(
                [pa.concat_arrays(c.chunks) if c.num_chunks else pa.array([], c.type) for c in table.columns],
                schema=self._schema,
            )
        except (pa.ArrowException, ValueError) as e:
            raise BadInputError(f"{file.path}: the rows from byte {at} on cannot be read: {e}") from e

    def _convert(self, types: Mapping[str, pa.DataType]) -> pacsv.ConvertOptions:
        return pacsv.ConvertOptions(
            column_types=types,
            null_values=self._null_values,
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        )

    def _read_header(self, file: InputFile) -> tuple[list[str], int]:
        """Column names, and the byte at which the rows begin."""
        size = _HEADER_BYTES
        while True:
            end = min(size, file.size)
            block = self._read_range(file, 0, end)
            text = block.lstrip(b"\xef\xbb\xbf\r\n")
            start = len(block) - len(text)
            newline = text.find(b"\n")
            if newline < 0 and end < file.size:
                size *= 2
                continue
            line = text if newline < 0 else text[:newline]
            if not line.strip():
                raise BadInputError(f"{file.path}: an empty file ({file.size} bytes) where a header line is expected")
            try:
                names = pacsv.read_csv(pa.BufferReader(line + b"\n"), parse_options=self._parse).schema.names
            except pa.ArrowException as e:
                raise BadInputError(f"{file.path}: the header line cannot be read: {e}") from e
            return names, start + len(line) + (newline >= 0)

    def _infer(self) -> pa.Schema:
        """Types of the first MiB of rows, whatever the size of the blocks."""
        for file, header, start in zip(self._set.files, self._headers, self._starts, strict=True):
            if start == file.size:
                continue
            block = self._read_block(file, start, _INFER_BYTES)
            try:
                found = _parse(block, header, self._parse, self._convert({}))
            except pa.ArrowException as e:
                raise BadInputError(f"{file.path}: the rows from byte {start} on cannot be read: {e}") from e
            if found.num_rows:
                types = [pa.string() if pa.types.is_null(f.type) else f.type for f in found.schema]
                return pa.schema(list(zip(header, types, strict=True)))
        return pa.schema([(name, pa.string()) for name in self._headers[0]])

    def _check_headers(self, *, exact: bool) -> None:
        for file, header in zip(self._set.files, self._headers, strict=True):
            if len(set(header)) != len(header):
                raise SchemaError(f"{file.path}: a column is named twice in the header {header}")
            if exact and header != self._schema.names:
                first = self._set.files[0].path
                raise SchemaError(f"{file.path} has the header {header}, but {first} has {self._schema.names}")
            if missing := [n for n in self._schema.names if n not in header]:
                raise SchemaError(f"{file.path}: no column {missing} in the header {header}")


def _parse(block: bytes, header: list[str], parse: pacsv.ParseOptions, convert: pacsv.ConvertOptions) -> pa.Table:
    # One block of Arrow's reader holds the whole of ours, so that it comes out as one chunk.
    read = pacsv.ReadOptions(column_names=header, use_threads=False, block_size=len(block) + 1)
    return pacsv.read_csv(pa.BufferReader(block), read_options=read, parse_options=parse, convert_options=convert)


def _end_of_rows(block: bytes, *, quoted: bool) -> int:
    """Length of the whole rows at the start of a block, 0 if not even one is whole."""
    if not quoted:
        return block.rfind(b"\n") + 1
    data = np.frombuffer(block, dtype=np.uint8)
    newlines = np.flatnonzero(data == _NEWLINE)
    # A line break ends a row where an even number of quotes came before it.
    outside = newlines[np.searchsorted(np.flatnonzero(data == _QUOTE), newlines) % 2 == 0]
    return int(outside[-1]) + 1 if len(outside) else 0
