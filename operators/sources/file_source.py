"""What all bounded sources over files share: a schema, a place in the files, a thread that reads ahead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from typing import Any

import pyarrow as pa

from operators.sources.base import Position, SourceBatch
from operators.sources.files import FileSet
from operators.sources.readahead import ReadAhead

__all__ = ["FileSource"]


class FileSource(ABC):
    """A `Source` over a `FileSet`. ``kind`` names the format, ``depth`` is how many batches are read ahead."""

    def __init__(self, kind: str, path: str | list[str], files: FileSet, *, depth: int) -> None:
        self._kind = kind
        self._path = path
        self._set = files
        self._depth = depth
        self._schema: pa.Schema = pa.schema([])
        self._reader: ReadAhead[SourceBatch] | None = None

    @property
    def schema(self) -> pa.Schema:
        """The schema of every batch."""
        return self._schema

    def describe(self) -> Mapping[str, Any]:
        """Path and schema, also an inferred one; a job is restored only with the same ones."""
        return {"kind": self._kind, "path": self._path, "schema": self._schema.to_string()}

    def open(self, position: Position | None) -> None:
        """Start the reading thread at a position (None: the first row)."""
        self.close()
        index, offset, rows = (0, self._first_offset(), 0) if position is None else self._set.resume(position)
        self._reader = ReadAhead(self._read(index, offset, rows), depth=self._depth, name=f"{self._kind}-source")

    def poll(self) -> SourceBatch | None:
        """The next batch, None at the end."""
        if self._reader is None:
            raise RuntimeError(f"the source over {self._path} is not open")
        return self._reader.next()

    def close(self) -> None:
        """Stop the reading thread and close its file."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _first_offset(self) -> int:
        """Where the rows of the first file begin."""
        return 0

    @abstractmethod
    def _read(self, index: int, offset: int, rows: int) -> Generator[SourceBatch, None, None]:
        """The batches from a place in file ``index`` on, ``rows`` rows having been read before."""
