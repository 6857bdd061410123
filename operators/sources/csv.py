"""CSV files as a source with a position exact to the byte.

A thread of its own cuts each file into blocks of about ``block_bytes`` that end with a row, and
parses each block into one batch. Where a block ends is a function of where it starts and of the
bytes, so a restored job seeks to its byte and meets the same batches. Types are declared, or
inferred once, from the first MiB of the first file that has rows, and hold for everything after it: a value
that does not fit is an error that names the file, never another type.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Unpack

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from operators.errors import BadInputError, SchemaError
from operators.sources.drift import Drift, Fit
from operators.sources.file_source import FileOptions, FileSource, Rows, Shape
from operators.sources.files import InputFile, InputPath, ends_fingerprint
from operators.sources.text import open_text, read_blocks, text_suffixes

__all__ = ["CsvSource"]

_NEWLINE = 0x0A
_QUOTE = 0x22
_READ_AHEAD = 4
_HEADER_BYTES = 1 << 16
_INFER_BYTES = 1 << 20


class CsvSource(FileSource):
    """The rows of UTF-8 CSV files with a header line, in name order and in the order within each file.

    Args:
        path: a file, a directory (searched to any depth for ``*.csv``, compressed or not), a glob, or a list of files;
            local or any fsspec URL.
        schema: names and types of the columns to read; the header may hold more, in any order.
            Without it all columns are read, with the types that the first MiB suggests (text where
            it holds only nulls), and every file must have the same header unless ``schema_drift`` says otherwise.
        delimiter: one character.
        null_values: unquoted texts that stand for null; Arrow's list (empty, ``NA``, ``null``, ...) by default.
        newlines_in_values: whether quoted values may hold line breaks.
        block_bytes: size of the blocks in bytes; one batch each.
        options: see `FileOptions`. Of a compressed file, what was read before a position is decompressed again.

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
        **options: Unpack[FileOptions],
    ) -> None:
        if block_bytes < 1:
            raise ValueError(f"block_bytes must be at least 1, not {block_bytes}")
        self._null_values = None if null_values is None else list(null_values)
        self._parse = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=newlines_in_values)
        self._block_bytes = block_bytes
        super().__init__(
            "csv",
            path,
            suffixes=text_suffixes(".csv"),
            fingerprint=ends_fingerprint,
            schema=schema,
            depth=_READ_AHEAD,
            **options,
        )

    def _inspect(self, file: InputFile) -> Shape:
        header, start = self._read_header(file)
        if len(set(header)) != len(header):
            raise SchemaError(f"{file.path}: a column is named twice in the header {header}")
        return Shape(None, start=start, details=header)

    def _without_rows(self, shape: Shape) -> pa.Schema | None:
        return pa.schema([(name, pa.string()) for name in shape.details])

    def _fit(self, file: InputFile, shape: Shape) -> tuple[Fit, list[str]]:
        """Types are those of the stream, whatever the file is; only the names must fit."""
        fit, _ = super()._fit(file, shape)
        header, target = shape.details, self._target.names
        if self._drift is Drift.ERROR:
            if (
                not self._selected
                and [name for name in header if name not in self._schema.names[len(target) :]] != target
            ):
                raise SchemaError(f"{file.path} has the header {header}, but {self._first} has {target}")
            if missing := [name for name in target if name not in header]:
                raise SchemaError(f"{file.path}: no column {missing} in the header {header}")
        found = [self._target.field(name) if name in target else pa.field(name, pa.string()) for name in header]
        return fit, fit.fields(pa.schema(found))

    def _read_file(self, file: InputFile, shape: Shape, columns: list[str], offset: int) -> Rows:
        for block, at, end in read_blocks(self._list.fs, file, offset, self._block_bytes, self._end_of_rows):
            yield self._parse_block(file, shape.details, columns, block, at), end

    def _parse_block(
        self, file: InputFile, header: list[str], columns: list[str], block: bytes, at: int
    ) -> pa.RecordBatch:
        schema = pa.schema([self._target.field(name) for name in columns])
        options = self._convert({f.name: f.type for f in schema})
        options.include_columns = columns
        try:
            table = _parse(block, header, self._parse, options)
            return pa.RecordBatch.from_arrays(
                [pa.concat_arrays(c.chunks) if c.num_chunks else pa.array([], c.type) for c in table.columns],
                schema=schema,
            )
        except (pa.ArrowException, ValueError) as e:
            raise BadInputError(f"{file.path}: the rows from byte {at} on cannot be read: {e}") from e

    def _end_of_rows(self, block: bytes) -> int:
        return _end_of_rows(block, quoted=self._parse.newlines_in_values)

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
        with contextlib.closing(open_text(self._list.fs, file)) as opened:
            while True:
                block = opened.read(0, size)
                text = block.lstrip(b"\xef\xbb\xbf\r\n")
                newline = text.find(b"\n")
                if newline >= 0 or opened.ends_at(len(block)):
                    break
                size *= 2
        line = text if newline < 0 else text[:newline]
        if not line.strip():
            raise BadInputError(f"{file.path}: an empty file ({file.size} bytes) where a header line is expected")
        try:
            names = pacsv.read_csv(pa.BufferReader(line + b"\n"), parse_options=self._parse).schema.names
        except pa.ArrowException as e:
            raise BadInputError(f"{file.path}: the header line cannot be read: {e}") from e
        return names, len(block) - len(text) + len(line) + (newline >= 0)

    def _infer(self, file: InputFile, shape: Shape) -> pa.Schema | None:
        """Types of the first MiB of rows, whatever the size of the blocks."""
        for block, at, _ in read_blocks(self._list.fs, file, shape.start, _INFER_BYTES, self._end_of_rows):
            try:
                found = _parse(block, shape.details, self._parse, self._convert({}))
            except pa.ArrowException as e:
                raise BadInputError(f"{file.path}: the rows from byte {at} on cannot be read: {e}") from e
            if found.num_rows:
                types = [pa.string() if pa.types.is_null(f.type) else f.type for f in found.schema]
                return pa.schema(list(zip(shape.details, types, strict=True)))
        return None


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
