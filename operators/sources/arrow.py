"""Arrow IPC files and streams as a source with a position exact to the row.

A file (``ARROW1`` at its beginning) and a stream are told apart by their bytes. Record batches are cut into batches of
``batch_rows``, none of which spans two of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

import pyarrow as pa

from operators.errors import BadInputError
from operators.sources.file_source import FileOptions, FileSource, Rows, Shape
from operators.sources.files import InputFile, InputPath, ends_fingerprint

__all__ = ["ArrowSource"]

_READ_AHEAD = 4
_MAGIC = b"ARROW1"


class ArrowSource(FileSource):
    """The rows of Arrow IPC files and streams, in name order and in the order within each file.

    Args:
        path: a file, a directory (searched to any depth for ``*.arrow``, ``*.arrows``, ``*.ipc`` and ``*.feather``), a
            glob, or a list of files; local or any fsspec URL.
        columns: the columns to read, in this order; all by default.
        schema: the columns to read with their types, instead of ``columns``.
        batch_rows: rows of a batch, at most. It may differ when a job is restored.
        options: see `FileOptions`. Of a stream, what was read before a position is read again, of a file it is passed
            over.

    Errors as for `ParquetSource`.
    """

    def __init__(
        self,
        path: InputPath,
        columns: Sequence[str] | None = None,
        *,
        schema: pa.Schema | None = None,
        batch_rows: int = 65_536,
        **options: Unpack[FileOptions],
    ) -> None:
        if batch_rows < 1:
            raise ValueError(f"batch_rows must be at least 1, not {batch_rows}")
        self._batch_rows = batch_rows
        super().__init__(
            "arrow",
            path,
            suffixes=(".arrow", ".arrows", ".ipc", ".feather"),
            fingerprint=ends_fingerprint,
            schema=schema,
            columns=columns,
            depth=_READ_AHEAD,
            **options,
        )

    def _inspect(self, file: InputFile) -> Shape:
        if not file.size:
            raise BadInputError(f"{file.path}: an empty file (0 bytes) is no Arrow file or stream")
        try:
            with self._opened(file) as (_, schema):
                return Shape(pa.schema([field.remove_metadata() for field in schema]))
        except (OSError, pa.ArrowException) as e:
            raise BadInputError(f"{file.path}: no Arrow file or stream that can be read: {e}") from e

    def _read_file(self, file: InputFile, shape: Shape, columns: list[str], offset: int) -> Rows:  # noqa: ARG002
        at = 0
        with self._opened(file) as (batches, _):
            for whole in batches:
                begin, at = at, at + whole.num_rows
                start = max(offset, begin)
                while start < at:
                    # Cuts are at multiples of batch_rows from the beginning of the record batch.
                    end = min(at, begin + ((start - begin) // self._batch_rows + 1) * self._batch_rows)
                    yield whole.slice(start - begin, end - start).select(columns), end
                    start = end

    @contextlib.contextmanager
    def _opened(self, file: InputFile) -> Iterator[tuple[Iterator[pa.RecordBatch], pa.Schema]]:
        # Never memory-mapped: truncating a mapped file kills the process instead of raising an error.
        with self._list.fs.open(file.path, "rb") as raw:
            is_file = raw.read(len(_MAGIC)) == _MAGIC
            raw.seek(0)
            opened: Any = pa.ipc.open_file(raw) if is_file else pa.ipc.open_stream(raw)
            with opened:
                yield (
                    (opened.get_batch(i) for i in range(opened.num_record_batches)) if is_file else iter(opened),
                    opened.schema,
                )
