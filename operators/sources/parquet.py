"""Parquet files as a source with a position exact to the row.

A thread of its own reads and decodes ahead of the job. A file is read in *units*: one row group,
or several neighbouring ones that together hold at most ``batch_rows``. Each unit is cut into
batches of ``batch_rows``; a batch never spans two units. Units follow from the footer alone, so
restoring in the middle of a file skips the row groups before it without decoding them and meets
the same boundaries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Unpack

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from operators.errors import BadInputError, SchemaError
from operators.sources.base import Position
from operators.sources.file_source import FileOptions, FileSource, Rows, Shape
from operators.sources.files import FileSet, InputFile, InputPath, ReadRange

__all__ = ["ParquetSource"]

_MAGIC = b"PAR1"
_TAIL_BYTES = 8
_READ_AHEAD = 4


@dataclass(frozen=True, slots=True)
class _Unit:
    """Row groups that are read together: rows ``start`` to ``end`` of their file."""

    groups: tuple[int, ...]
    start: int
    end: int


class ParquetSource(FileSource):
    """The rows of Parquet files, in name order unless ``order_by`` is given, and in the order within each file.

    Args:
        path: a file, a directory (searched to any depth for ``*.parquet``, without what lies under a
            component that starts with ``_`` or ``.``), a glob, or a list of files; local or any
            fsspec URL.
        columns: the columns to read, in this order; all by default.
        schema: the columns to read with their types, instead of ``columns``.
        batch_rows: rows of a batch, at most. It may differ when a job is restored.
        order_by: a column that grows from file to file, whatever their names are: files are read in the order
            of its smallest values. `BadInputError` if the ranges of two files overlap.
        options: see `FileOptions`.

    All files must have the same columns and types unless ``schema_drift`` says otherwise: `SchemaError` names both
    schemas. A file
    that is missing, empty (0 bytes) or no Parquet file is a `BadInputError`, a file that changes a
    `SourceChangedError`; a file without rows is fine.
    """

    def __init__(
        self,
        path: InputPath,
        columns: Sequence[str] | None = None,
        *,
        schema: pa.Schema | None = None,
        batch_rows: int = 65_536,
        order_by: str | None = None,
        **options: Unpack[FileOptions],
    ) -> None:
        if batch_rows < 1:
            raise ValueError(f"batch_rows must be at least 1, not {batch_rows}")
        self._batch_rows = batch_rows
        if order_by is not None and options.get("follow"):
            raise ValueError("order_by: a directory that is followed is read by name or time; see Follow")
        super().__init__(
            "parquet",
            path,
            suffixes=(".parquet",),
            fingerprint=_footer_fingerprint,
            schema=schema,
            columns=columns,
            depth=_READ_AHEAD,
            **options,
        )
        self.order_range: tuple[Any, Any] | None = None
        """Smallest and largest value of ``order_by``; None without it, or if there is no row."""
        if order_by is not None:
            self._order_files(order_by)

    def chains(self, column: str) -> list[list[str]]:
        """The files as few lists in each of which the ranges of a column grow from file to file without overlap.

        Paths or URLs, files without rows left out. More than one list means that the files have to be merged.
        """
        ranges = ((self._range_of(file, column), file.path) for file in self._bounded.files)
        chains: list[tuple[Any, list[str]]] = []
        for (low, high), path in sorted((r, p) for r, p in ranges if r is not None):
            text = path if self._local else str(self._list.fs.unstrip_protocol(path))
            # Of the chains that have ended, the one that ended last, so that there are as few as can be.
            ended = max((i for i, (end, _) in enumerate(chains) if end < low), key=lambda i: chains[i][0], default=None)
            if ended is None:
                chains.append((high, [text]))
            else:
                chains[ended] = (high, [*chains[ended][1], text])
        return [paths for _, paths in chains]

    def position_before(self, position: Position, rows: int) -> Position:
        """So many rows before a position that came with a batch, within that batch."""
        return {**position, "offset": position["offset"] - rows, "rows": position["rows"] - rows}

    def _inspect(self, file: InputFile) -> Shape:
        try:
            with self._open_file(file) as opened:
                schema, metadata = opened.schema_arrow, opened.metadata
                rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except (OSError, pa.ArrowException) as e:
            raise BadInputError(f"{file.path}: not a Parquet file that can be read: {e}") from e
        found = pa.schema([pa.field(f.name, f.type, f.nullable) for f in schema])
        return Shape(found, rows=sum(rows), details=_units(rows, self._batch_rows))

    def _read_file(self, file: InputFile, shape: Shape, columns: list[str], offset: int) -> Rows:
        units = [u for u in shape.details if u.end > offset]
        if not units:
            return
        with self._open_file(file) as opened:
            for unit in units:
                at = unit.start
                for batch in opened.iter_batches(self._batch_rows, row_groups=unit.groups, columns=columns):
                    skip = max(0, offset - at)
                    at += batch.num_rows
                    if at > offset:
                        yield batch.slice(skip), at

    @property
    def _bounded(self) -> FileSet:
        if self._files is None:
            raise ValueError(f"{self._path}: the files of a directory that is followed are not known beforehand")
        return self._files

    def _order_files(self, column: str) -> None:
        """Put the files into the order of the column; those without rows first."""
        files = self._bounded.files
        ranges = [self._range_of(file, column) for file in files]
        order = sorted(range(len(ranges)), key=lambda i: (ranges[i] is not None, ranges[i]))
        with_rows = [i for i in order if ranges[i] is not None]
        for before, after in pairwise(with_rows):
            (low, high), (next_low, _) = ranges[before], ranges[after]  # type: ignore[misc]
            if next_low <= high:
                names = f"{files[before].path} ({low} to {high}) and {files[after].path}"
                raise BadInputError(f"{names} (from {next_low}) overlap in {column!r}, by which they are ordered")
        self._bounded.reorder(order)
        if with_rows:
            self.order_range = (ranges[with_rows[0]][0], ranges[with_rows[-1]][1])  # type: ignore[index]

    def _range_of(self, file: InputFile, column: str) -> tuple[Any, Any] | None:
        """Smallest and largest value of a column in a file: from its footer, or where that does not tell, its rows."""
        try:
            with self._open_file(file) as opened:
                if opened.schema_arrow.get_field_index(column) < 0:
                    raise SchemaError(f"{file.path}: no column {column!r} among {opened.schema_arrow.names}")
                found = _statistics(opened.metadata, column)
                if all(s is not None and s.has_min_max for s in found):
                    return (min(s.min for s in found), max(s.max for s in found)) if found else None
                bounds = pc.min_max(opened.read([column]).column(column)).as_py()
                return None if bounds["min"] is None else (bounds["min"], bounds["max"])
        except (OSError, pa.ArrowException) as e:
            raise BadInputError(f"{file.path}: cannot be read: {e}") from e

    @contextlib.contextmanager
    def _open_file(self, file: InputFile) -> Iterator[pq.ParquetFile]:
        # Never memory-mapped: truncating a mapped file kills the process instead of raising an error.
        if self._local:
            with pq.ParquetFile(file.path) as opened:
                yield opened
        else:
            with self._list.fs.open(file.path, "rb") as raw, pq.ParquetFile(raw, pre_buffer=True) as opened:
                yield opened


def _statistics(metadata: pq.FileMetaData, column: str) -> list[Any]:
    """What the footer says of a column, None where it does not, for each row group with rows."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups if group.num_rows for i in range(group.num_columns)]
    return [chunk.statistics for chunk in chunks if chunk.path_in_schema == column]


def _units(group_rows: Sequence[int], batch_rows: int) -> list[_Unit]:
    units: list[_Unit] = []
    at = 0
    for group, rows in enumerate(group_rows):
        last = units[-1] if units else None
        if last is not None and at + rows - last.start <= batch_rows:
            units[-1] = _Unit((*last.groups, group), last.start, at + rows)
        else:
            units.append(_Unit((group,), at, at + rows))
        at += rows
    return [u for u in units if u.end > u.start]


def _footer_fingerprint(read: ReadRange, size: int) -> int:
    """Fingerprint of the footer, which holds the place, size and statistics of every column chunk."""
    if size == 0:
        raise ValueError("an empty file (0 bytes) is not a Parquet file")
    tail = read(max(0, size - _TAIL_BYTES), size)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length + _TAIL_BYTES > size:
        raise ValueError(f"not a Parquet file: it ends in {tail[-4:]!r} instead of {_MAGIC!r}")
    return xxhash.xxh3_64_intdigest(read(size - _TAIL_BYTES - length, size))
