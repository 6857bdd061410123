"""What all sources over files share: which files, where in them, which columns, and a thread that reads ahead.

A format says how one file is inspected and how its rows are read from an offset on. Everything else is here: the files
are a `FileSet`, listed once, or `FollowedFiles`, a directory that grows; columns are made to fit (``drift.py``),
partitions come from the names of directories (``operators.hive``).

Invariants:

* A file is compared with what it was when it was identified, before its first row is handed out (where that was not
  just now) and, all of it having been read, before its last batch is.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from operators.errors import BadInputError, SchemaError
from operators.hive import partition_columns
from operators.sources.base import IDLE, Idle, Position, SourceBatch
from operators.sources.drift import Drift, Fit, common_schema
from operators.sources.files import FileList, FileSet, Fingerprint, InputFile, InputPath, path_text
from operators.sources.following import Follow, FollowedFiles
from operators.sources.readahead import ReadAhead

__all__ = ["FileOptions", "FileSource", "Rows", "Shape"]

Rows = Generator[tuple[pa.RecordBatch, int], None, None]
"""Batches of one file, each with the offset after it."""

_PARTITION_TYPES = (pa.types.is_primitive, pa.types.is_string, pa.types.is_large_string, pa.types.is_decimal)

_WAIT_S = 0.02
"""How long a poll of a directory that grows may wait for the thread that reads it."""


class FileOptions(TypedDict, total=False):
    """What can be said of every source of files.

    ``follow``: read a directory for ever, every file that appears in it once (`Follow` says in which order and how
    often to look; True: by name, every second). By default the files that are there are read, and that is the end.
    ``partitions``: columns whose values are in the names of directories (``day=2013-01-01/``), as text, or of the types
    of a mapping; they come after the others.
    ``schema_drift``: what to do with a file whose columns differ: ``"error"`` (the default), ``"widen"`` or
    ``"ignore_extra"``, see `operators.sources.drift`.
    ``storage_options``: passed to fsspec.
    """

    follow: bool | Follow
    partitions: Sequence[str] | Mapping[str, pa.DataType]
    schema_drift: str
    storage_options: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Shape:
    """What a format knows of a file before it reads its rows.

    ``schema``: its columns; None where only reading tells. ``start``: the offset of the first row.
    ``rows``: their number, where it is known. ``details``: the format's own.
    """

    schema: pa.Schema | None
    start: int = 0
    rows: int | None = None
    details: Any = None


class FileSource(ABC):
    """A `Source` over files. ``kind`` names the format, ``depth`` is how many batches are read ahead.

    ``schema``: the columns that were asked for, with their types; ``columns``: the same by name. None for those that
    the files have.
    """

    def __init__(
        self,
        kind: str,
        path: InputPath,
        *,
        suffixes: tuple[str, ...],
        fingerprint: Fingerprint,
        schema: pa.Schema | None,
        columns: Sequence[str] | None = None,
        depth: int,
        **options: Unpack[FileOptions],
    ) -> None:
        self._kind = kind
        self._path = path_text(path)
        self._depth = depth
        self._drift = Drift(options.get("schema_drift", "error"))
        self._partitions = _fields(options.get("partitions", ()))
        follow = options.get("follow", False)
        self._follow = Follow() if follow is True else follow or None
        if self._follow is not None and (isinstance(self._path, list) or any(c in self._path for c in "*?[")):
            raise ValueError(f"follow: only a directory can be followed, not {self._path}")
        self._list = FileList(
            path,
            suffixes=suffixes,
            fingerprint=fingerprint,
            storage_options=options.get("storage_options"),
            directory=self._follow is not None,
        )
        if columns is not None and not columns:
            raise ValueError("columns must name at least one column")
        self._shapes: dict[str, Shape] = {}
        self._selected = schema is not None or columns is not None
        self._first = ""
        self._files: FileSet | None = None
        self._followed: FollowedFiles | None = None
        if self._follow is None:
            self._files = FileSet(self._list)
            self._shapes = {file.name: self._inspect(file) for file in self._files.files}
        else:
            self._followed = FollowedFiles(self._list, self._follow)
        inside = self._columns_of_files(columns) if schema is None else schema.remove_metadata()
        self._target = self._without_partitions(inside)
        self._schema = pa.schema([*self._target, *self._partitions])
        for file in () if self._files is None else self._files.files:
            self._fit(file, self._shapes[file.name])
        self._reader: ReadAhead[SourceBatch] | None = None

    @property
    def schema(self) -> pa.Schema:
        """The schema of every batch."""
        return self._schema

    @property
    def total_rows(self) -> int | None:
        """Rows of all files, where their formats tell without reading them."""
        rows = [None] if self._files is None else [shape.rows for shape in self._shapes.values()]
        return None if None in rows else sum(count for count in rows if count is not None)

    def describe(self) -> Mapping[str, Any]:
        """Path and schema, also an inferred one; a job is restored only with the same ones."""
        described = {"kind": self._kind, "path": self._path, "schema": self._schema.to_string()}
        return described if self._follow is None else {**described, "follow": self._follow.order}

    def open(self, position: Position | None) -> None:
        """Start the reading thread at a position (None: the first row)."""
        self.close()
        rows = 0 if position is None else position["rows"]
        walk = iter((self._files or self._followed).walk(position))  # type: ignore[union-attr]
        # A bounded source finds out here whether its input is what it was; one that is followed would wait.
        begun = [next(walk)] if self._followed is None or (position is not None and not position["ended"]) else []
        self._reader = ReadAhead(self._read(begun, walk, rows), depth=self._depth, name=f"{self._kind}-source")

    def poll(self) -> SourceBatch | Literal[Idle.IDLE] | None:
        """The next batch; None at the end, `IDLE` while a directory that is followed has no more."""
        if self._reader is None:
            raise RuntimeError(f"the source over {self._path} is not open")
        if self._followed is not None and not self._reader.wait(_WAIT_S):
            return IDLE
        return self._reader.next()

    def close(self) -> None:
        """Stop the reading thread and close its file."""
        if self._followed is not None:
            self._followed.stop()
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    # -- what a format says

    @abstractmethod
    def _inspect(self, file: InputFile) -> Shape:
        """What can be known of a file without reading its rows; `BadInputError` if it is none of this format."""

    @abstractmethod
    def _read_file(self, file: InputFile, shape: Shape, columns: list[str], offset: int) -> Rows:
        """The rows from an offset on (at least `Shape.start`), of these columns, in the file's own types."""

    def _infer(self, file: InputFile, shape: Shape) -> pa.Schema | None:  # noqa: ARG002 - others read the file
        """The columns of a file; None if it has no rows that tell."""
        return shape.schema

    def _without_rows(self, shape: Shape) -> pa.Schema | None:  # noqa: ARG002 - most formats cannot tell
        """The columns where no file has a row, from what the first one looks like."""
        return None

    # -- columns

    def _columns_of_files(self, columns: Sequence[str] | None) -> pa.Schema:
        if self._followed is not None:
            file = self._followed.peek()
            if file is None:
                raise BadInputError(
                    f"{self._path}: no *{self._list.suffixes[0]} file there yet to take the columns from; pass schema="
                )
            files: Sequence[InputFile] = [file]
            self._shapes = {file.name: self._inspect(file)}
        else:
            assert self._files is not None
            files = self._files.files
        found = ((file.path, self._infer(file, self._shapes[file.name])) for file in files)
        known = []
        for path, schema in found:
            if schema is not None:
                known.append((path, schema))
                if self._drift is not Drift.WIDEN:
                    break
        if not known and (fallback := self._without_rows(self._shapes[files[0].name])) is not None:
            known = [(files[0].path, fallback)]
        if not known:
            raise BadInputError(f"{self._path}: no file there has a row to take the columns from; pass schema=")
        self._first = known[0][0]
        if columns is None:
            return common_schema(known, self._drift)
        common = common_schema(known, self._drift)
        if missing := [name for name in columns if common.get_field_index(name) < 0]:
            raise SchemaError(f"{self._first}: no single column {missing} among {common.names}")
        return pa.schema([common.field(name) for name in columns])

    def _without_partitions(self, schema: pa.Schema) -> pa.Schema:
        """What comes from the files themselves: the directories have the last word."""
        by = {field.name for field in self._partitions}
        return pa.schema([field for field in schema if field.name not in by])

    def _fit(self, file: InputFile, shape: Shape) -> tuple[Fit, list[str]]:
        fit = Fit(file.path, self._target, self._drift, self._selected, self._first)
        return fit, list(self._target.names) if shape.schema is None else fit.fields(
            self._without_partitions(shape.schema)
        )

    # -- reading, in a thread of its own

    def _read(
        self, begun: Sequence[tuple[InputFile, int]], walk: Iterator[tuple[InputFile, int]], rows: int
    ) -> Generator[SourceBatch, None, None]:
        for file, offset in itertools.chain(begun, walk):
            rows = yield from self._read_one(file, offset, rows)

    def _read_one(self, file: InputFile, offset: int, rows: int) -> Generator[SourceBatch, None, int]:
        """The batches of one file; returns the rows so far. One batch is held back until the next one is read."""
        held: tuple[pa.RecordBatch, int] | None = None
        try:
            if self._files is not None:  # else it was identified just now
                self._list.verify(file)
            shape = self._shapes.get(file.name) if self._files is not None else self._inspect(file)
            assert shape is not None
            fit, columns = self._fit(file, shape)
            for batch, end in self._read_file(file, shape, columns, max(offset, shape.start)):
                if not batch.num_rows:
                    continue
                if held is not None:
                    rows += held[0].num_rows
                    yield self._item(file, fit, held, rows, ended=False)
                held = batch, end
            self._list.verify(file)
        except (OSError, pa.ArrowException, BadInputError) as e:
            self._list.verify(file)  # the likelier reason, and the better message
            raise e if isinstance(e, BadInputError) else BadInputError(f"{file.path}: cannot be read: {e}") from e
        if held is not None:
            rows += held[0].num_rows
            yield self._item(file, fit, held, rows, ended=True)
        return rows

    def _item(
        self, file: InputFile, fit: Fit, held: tuple[pa.RecordBatch, int], rows: int, *, ended: bool
    ) -> SourceBatch:
        batch, end = held
        columns = fit.conform(batch)
        columns += partition_columns(file.name, self._partitions, batch.num_rows).values()
        if self._followed is not None:
            position = self._followed.position(file, end, rows, ended=ended)
        else:
            assert self._files is not None
            position = self._files.position(file, end, rows)
        return SourceBatch(pa.RecordBatch.from_arrays(columns, schema=self._schema), position)

    @property
    def _local(self) -> bool:
        """Whether `InputFile.path` is a path of this machine."""
        return isinstance(self._list.fs, LocalFileSystem)


def _fields(partitions: Sequence[str] | Mapping[str, pa.DataType]) -> list[pa.Field]:
    if isinstance(partitions, str):
        raise TypeError(f"partitions is a list of columns, not the text {partitions!r}")
    if not isinstance(partitions, Mapping):
        partitions = dict.fromkeys(partitions, pa.string())
    fields = [pa.field(name, kind) for name, kind in partitions.items()]
    for field in fields:
        if not any(accepts(field.type) for accepts in _PARTITION_TYPES):
            raise SchemaError(f"partitions: {field.name!r} of type {field.type} is in no directory name")
    return fields
