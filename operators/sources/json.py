"""JSON lines as a source with a position exact to the byte: one object to a line, its keys are the columns.

Each file is cut into blocks of about ``block_bytes`` that end with a line, and each block becomes one batch. Types are
declared, or inferred once from the first MiB of the first file that has rows. A key that an object lacks is null.
"""

from __future__ import annotations

from typing import Unpack

import pyarrow as pa
import pyarrow.json as pajson

from operators.errors import BadInputError, SchemaError
from operators.sources.drift import Drift, extra_columns
from operators.sources.file_source import FileOptions, FileSource, Rows, Shape
from operators.sources.files import InputFile, InputPath, ends_fingerprint
from operators.sources.text import read_blocks, text_suffixes

__all__ = ["JsonSource", "is_read_as_text"]

_READ_AHEAD = 4
_INFER_BYTES = 1 << 20


class JsonSource(FileSource):
    """The rows of files of JSON lines, in name order and in the order within each file.

    Args:
        path: a file, a directory (searched to any depth for ``*.json``, ``*.jsonl`` and ``*.ndjson``, compressed or
            not), a glob, or a list of files; local or any fsspec URL.
        schema: names and types of the columns to read; objects may have more keys. Without it the columns are
            those of the objects in the first MiB (text where all are null), and a key that is not among them is an
            error unless ``schema_drift="ignore_extra"``.
        block_bytes: size of the blocks in bytes; one batch each.
        options: see `FileOptions`. Of a compressed file, what was read before a position is decompressed again.

    A line that is no object, and a value that is not of its column's type, is a `BadInputError` that names file and
    place. Errors of files as for `ParquetSource`; a file without rows is fine.
    """

    def __init__(
        self,
        path: InputPath,
        schema: pa.Schema | None = None,
        *,
        block_bytes: int = 4 << 20,
        **options: Unpack[FileOptions],
    ) -> None:
        if block_bytes < 1:
            raise ValueError(f"block_bytes must be at least 1, not {block_bytes}")
        self._block_bytes = block_bytes
        super().__init__(
            "json",
            path,
            suffixes=text_suffixes(".json", ".jsonl", ".ndjson"),
            fingerprint=ends_fingerprint,
            schema=schema,
            depth=_READ_AHEAD,
            **options,
        )

    def _inspect(self, file: InputFile) -> Shape:  # noqa: ARG002 - only reading tells
        return Shape(None)

    def _infer(self, file: InputFile, shape: Shape) -> pa.Schema | None:
        for block, at, _ in read_blocks(self._list.fs, file, shape.start, _INFER_BYTES, _end_of_lines):
            if block.strip():
                found = self._parse(file, block, at, pajson.ParseOptions()).schema
                return pa.schema([(f.name, pa.string() if pa.types.is_null(f.type) else f.type) for f in found])
        return None

    def _read_file(self, file: InputFile, shape: Shape, columns: list[str], offset: int) -> Rows:  # noqa: ARG002
        strict = not self._selected and self._drift is not Drift.IGNORE_EXTRA
        read_as = [f.with_type(pa.string()) if is_read_as_text(f.type) else f for f in self._target]
        options = pajson.ParseOptions(
            explicit_schema=pa.schema(read_as), unexpected_field_behavior="error" if strict else "ignore"
        )
        for block, at, end in read_blocks(self._list.fs, file, offset, self._block_bytes, _end_of_lines):
            if block.strip():
                table = self._parse(file, block, at, options).select(self._target.names)
                yield table.combine_chunks().to_batches()[0], end

    def _parse(self, file: InputFile, block: bytes, at: int, options: pajson.ParseOptions) -> pa.Table:
        # One block of Arrow's reader holds the whole of ours, so that it comes out as one chunk.
        read = pajson.ReadOptions(use_threads=False, block_size=len(block) + 1)
        try:
            return pajson.read_json(pa.BufferReader(block), read_options=read, parse_options=options)
        except pa.ArrowException as e:
            if "unexpected field" in str(e):  # Arrow does not say which
                found = pajson.read_json(pa.BufferReader(block), read_options=read).schema.names
                extra = [name for name in found if name not in self._target.names]
                raise SchemaError(extra_columns(file.path, extra)) from e
            raise BadInputError(f"{file.path}: the rows from byte {at} on cannot be read: {e}") from e


def is_read_as_text(kind: pa.DataType) -> bool:
    """Whether Arrow's reader does not know the type: such columns are read as text and cast."""
    return bool(pa.types.is_date(kind) or pa.types.is_time(kind))


def _end_of_lines(block: bytes) -> int:
    return block.rfind(b"\n") + 1
