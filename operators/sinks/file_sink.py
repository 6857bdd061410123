"""Files, exactly once, in hive-style partitions: Parquet, CSV, JSON lines, Arrow.

Rows wait in the state until there are enough of them or enough time went by; then the next
checkpoint *rolls*: it stages them as files, names the roll in its manifest, and publishes it once it
is committed. `rolls.py` has the steps and their invariants. Between rolls, a row is in the append
table of `pending.py`; with the checkpoint that rolls it leaves the table and enters the manifest
at once, so after any crash it is in exactly one of the two.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pyarrow as pa

from operators.errors import SchemaError
from operators.sinks.base import Guarantee, Prepared, SinkContext, conform
from operators.sinks.commit_log import read_published
from operators.sinks.files import output_files
from operators.sinks.formats import ArrowFormat, CsvFormat, FileFormat, JsonFormat, ParquetFormat
from operators.sinks.partitions import check_partition_columns
from operators.sinks.pending import PendingRows
from operators.sinks.rolls import Rolls

__all__ = ["ArrowSink", "CsvSink", "FileSink", "JsonSink", "ParquetSink"]

_CHUNK_ROWS = 8_192
_MIB = 1 << 20


@dataclass(slots=True)
class _Roll:
    """A roll that is not known to be published; ``batches`` until it is staged."""

    committable: Mapping[str, Any]
    batches: Sequence[pa.RecordBatch] | None


class FileSink:
    """Writes a directory of files that holds every row once, whatever crashes. The base of the file sinks.

    Args:
        path: a directory, local or any fsspec URL; made if it does not exist.
        partition_by: columns (integer, text, bool, date, timestamp, decimal) whose values become
            directories, ``origin=EWR/part-....parquet``, and are left out of the files.
        format: of the files.
        roll_rows: rows that are written out together, at least, once this many wait.
        roll_bytes: the same in bytes of Arrow memory.
        roll_seconds: a row waits this long at most, plus one checkpoint interval.
        memory_bytes: how much may wait, in bytes of Arrow memory, before the job stops reading, takes a checkpoint and
            writes it out; while that is under way, as much again may come.
        existing: what to do with a directory that holds other output: "error", or "append" to add to it.
        clock: monotonic seconds.
        storage_options: passed to fsspec.

    One roll makes one file for each partition that has rows in it. `read_published` reads what was published, and
    `published_rolls` lists it. A reader that knows nothing of them must pass over names that begin with
    ``_``, as Arrow, DataFusion, DuckDB and Spark do. On a filesystem where a copy is
    not atomic (not local, not an object store) it may see a file half-copied.

    Raises on opening: `SinkOccupiedError`, `OutputVanishedError`, `SchemaError` (columns that
    the format or the partitioning cannot hold).
    """

    guarantee = Guarantee.EXACTLY_ONCE

    def __init__(
        self,
        path: str | os.PathLike[str],
        partition_by: Sequence[str] = (),
        *,
        format: FileFormat,  # noqa: A002 - what it is called
        roll_rows: int = 1_000_000,
        roll_bytes: int = 128 * _MIB,
        roll_seconds: float = 60.0,
        memory_bytes: int = 256 * _MIB,
        existing: str = "error",
        clock: Callable[[], float] = time.monotonic,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(partition_by, str):
            raise TypeError(f"partition_by is a list of columns, not the text {partition_by!r}")
        for name, value in {"roll_rows": roll_rows, "roll_bytes": roll_bytes, "memory_bytes": memory_bytes}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if roll_seconds < 0:
            raise ValueError(f"roll_seconds must be at least 0, not {roll_seconds}")
        if existing not in ("error", "append"):
            raise ValueError(f"existing must be 'error' or 'append', not {existing!r}")
        self._path = os.fspath(path)
        self._partition_by = tuple(partition_by)
        self._roll_rows = roll_rows
        self._roll_seconds = roll_seconds
        self._roll_bytes = roll_bytes
        self._memory_bytes = memory_bytes
        self._format = format
        self._storage_options = storage_options
        self._existing = existing
        self._clock = clock
        self._files = output_files(path, storage_options)
        self._context: SinkContext | None = None
        # Job thread only.
        self._chunk: list[pa.RecordBatch] = []
        self._chunk_rows = 0
        self._chunk_bytes: int = 0
        self._oldest: float | None = None
        self._sequence = 0
        # Protected by _lock: rolls by id, oldest first.
        self._lock = threading.Lock()
        self._unpublished: dict[str, _Roll] = {}
        self._staging_lock = threading.Lock()
        self._schema: pa.Schema = pa.schema([])

    def describe(self) -> Mapping[str, Any]:
        """Directory and partitioning; a job is restored only with the same ones."""
        return {"kind": self._format.kind, "path": self._path, "partition_by": list(self._partition_by)}

    def open(self, context: SinkContext, committables: Sequence[Any]) -> None:
        """Claim the directory, publish the restored committables again, delete own orphans, read waiting rows."""
        schema = context.schema.remove_metadata()
        check_partition_columns(context.operator_id, schema, self._partition_by)
        try:
            self._format.check(pa.schema([field for field in schema if field.name not in self._partition_by]))
        except pa.ArrowException as e:
            title = self._format.title
            raise SchemaError(f"{context.operator_id}: {title} cannot hold these columns: {e}\n{schema}") from e
        self._schema = schema
        self._rolls = Rolls(self._files, path=self._path, store_id=context.store_id, operator_id=context.operator_id)
        self._rolls.claim(shared=self._existing == "append")
        self.publish(committables)
        self._rolls.drop_orphans()
        self._pending = PendingRows(context.backend, context.operator_id, schema)
        self._oldest = self._clock() if self._pending.rows else None
        self._chunk, self._chunk_rows, self._chunk_bytes, self._unpublished = [], 0, 0, {}
        self._context = context

    def write(self, batch: pa.RecordBatch) -> None:
        """Take rows; small batches are joined so that a barrier meets few."""
        context = self._opened()
        batch = conform(context.operator_id, self._schema, batch)
        if not batch.num_rows:
            return
        if self._oldest is None:
            self._oldest = self._clock()
        self._chunk.append(batch)
        self._chunk_rows += batch.num_rows
        self._chunk_bytes += batch.nbytes
        if self._chunk_rows >= _CHUNK_ROWS:
            self._keep_chunk()

    @property
    def full(self) -> bool:
        """Whether as much waits as may; see `BoundedSink`."""
        return self._chunk_bytes + self._pending.bytes >= self._memory_bytes

    def prepare(self, checkpoint_id: int, *, final: bool) -> Prepared:
        """Roll if it is time; names everything that is staged, or will be, and not known to be published."""
        context = self._opened()
        self._keep_chunk()
        with self._lock:
            if self._is_due(final=final):
                attempt = quote(context.attempt, safe="")
                roll = f"{checkpoint_id:010d}-{attempt}-{self._sequence}"
                self._sequence += 1
                committable = {"roll": roll, "rows": self._pending.rows}
                self._unpublished[roll] = _Roll(committable, [p.batch for p in self._pending.batches])
                self._pending.drop(self._pending.next_ordinal)
                self._oldest = None
            rolls = list(self._unpublished.values())
            unstaged = any(r.batches is not None for r in rolls)
        return Prepared([r.committable for r in rolls], self._stage if unstaged else None)

    def publish(self, committables: Sequence[Any]) -> None:
        """Make the rolls of a committed checkpoint visible, oldest first."""
        for committable in committables:
            self._rolls.publish(committable["roll"])
            with self._lock:
                self._unpublished.pop(committable["roll"], None)

    def close(self) -> None:
        """Let go of all rows; what is committed is published when the job is opened again."""
        self._context = None
        self._chunk = []
        self._chunk_rows = self._chunk_bytes = 0

    def published(self) -> pa.Table:
        """All rows that were published in the directory; see `read_published`."""
        return read_published(self._path, schema=self._schema, storage_options=self._storage_options).read_all()

    def _opened(self) -> SinkContext:
        if self._context is None:
            raise RuntimeError(f"the {self._format.title} sink to {self._path} is not open")
        return self._context

    def _keep_chunk(self) -> None:
        if self._chunk:
            self._pending.append(self._chunk[0] if len(self._chunk) == 1 else pa.concat_batches(self._chunk))
            self._chunk = []
            self._chunk_rows = self._chunk_bytes = 0

    def _is_due(self, *, final: bool) -> bool:
        if self._oldest is None:
            return False
        waited = self._clock() - self._oldest
        if final or waited >= self._roll_seconds:
            return True
        return self._pending.rows >= self._roll_rows or self._pending.bytes >= min(self._roll_bytes, self._memory_bytes)

    def _stage(self) -> None:
        """Write every roll that is not staged yet; one that failed comes again with the next checkpoint."""
        with self._staging_lock:
            with self._lock:
                waiting = [(id_, r) for id_, r in self._unpublished.items() if r.batches is not None]
            for id_, roll in waiting:
                assert roll.batches is not None
                self._rolls.stage(id_, roll.batches, self._partition_by, self._format)
                roll.batches = None


class ParquetSink(FileSink):
    """Parquet files; ``compression``: none, snappy, gzip, brotli, lz4, zstd. See `FileSink` for everything else."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        partition_by: Sequence[str] = (),
        *,
        compression: str = "zstd",
        **options: Any,
    ) -> None:
        super().__init__(path, partition_by, format=ParquetFormat(compression), **options)


class CsvSink(FileSink):
    """CSV files with a header line; ``compression``: none, gzip, zstd. See `FileSink` for everything else.

    Null is written as nothing, empty text as ``""``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        partition_by: Sequence[str] = (),
        *,
        compression: str = "none",
        delimiter: str = ",",
        **options: Any,
    ) -> None:
        super().__init__(path, partition_by, format=CsvFormat(compression, delimiter), **options)


class JsonSink(FileSink):
    """JSON lines: an object for each row, without its nulls. See `FileSink` for everything else.

    ``compression``: none, gzip, zstd.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        partition_by: Sequence[str] = (),
        *,
        compression: str = "none",
        **options: Any,
    ) -> None:
        super().__init__(path, partition_by, format=JsonFormat(compression), **options)


class ArrowSink(FileSink):
    """Arrow IPC files, ``.arrow``, or with ``stream`` IPC streams, ``.arrows``. See `FileSink` for everything else.

    ``compression``: none, lz4, zstd.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        partition_by: Sequence[str] = (),
        *,
        compression: str = "zstd",
        stream: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(path, partition_by, format=ArrowFormat(compression, stream), **options)
