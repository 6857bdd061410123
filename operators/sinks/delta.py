"""Delta Lake tables, exactly once by application transaction ids (extra ``delta``).

The rows of a checkpoint are kept in the state until it is committed; then they become one version of the table. That
version carries ``(application, number)``: the application is this sink of this store, the number is the ordinal
after the last batch, which grows and is never used twice. A sink that publishes first looks which number the table
has: what is at or below it has arrived. Of two processes that publish the same number at once one is refused by
the table (a transaction of the same application is a conflict), looks again, and finds it there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.errors import SchemaError
from operators.sinks.base import Guarantee, Prepared, SinkContext, conform
from operators.sinks.kept import KeptOutput

__all__ = ["DeltaSink"]

_MIB = 1 << 20
_ATTEMPTS = 20
_GONE = "__gone"


class DeltaSink:
    """Appends rows to a Delta table, or keeps one row for each key up to date.

    Args:
        path: of the table, local or a URL that `deltalake` knows; made if it does not exist.
        mode: ``"append"``, or ``"upsert"``: a row replaces the earlier one with the same ``key`` (null equals null).
        key: columns, for ``upsert``.
        changes: with ``upsert``: the name of the column that tells what a row of a changelog does
            (`operators.changelog`); it is left out of the table, and rows that are gone are deleted.
        partition_by: columns of a table that is made.
        memory_bytes: how much may wait, in bytes of Arrow memory, before the job stops reading, takes a checkpoint and
            publishes.
        storage_options: passed to `deltalake`. On S3 its commits need conditional puts or a locking provider.

    Every checkpoint that brings rows makes one version, so the interval of checkpoints decides how many small files
    there are. Timestamps are kept in microseconds. Raises on opening: `SchemaError` where the table has other columns
    or cannot hold these.
    """

    guarantee = Guarantee.EXACTLY_ONCE

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: str = "append",
        key: Sequence[str] = (),
        changes: str | None = None,
        partition_by: Sequence[str] = (),
        memory_bytes: int = 64 * _MIB,
        storage_options: Mapping[str, str] | None = None,
    ) -> None:
        if mode not in ("append", "upsert"):
            raise ValueError(f"mode must be 'append' or 'upsert', not {mode!r}")
        if (mode == "upsert") != bool(key):
            raise ValueError("mode='upsert' needs key=, and mode='append' has none")
        if changes is not None and mode == "append":
            raise ValueError("a changelog needs mode='upsert'")
        if isinstance(key, str) or isinstance(partition_by, str):
            raise TypeError("key and partition_by are lists of columns")
        if memory_bytes < 1:
            raise ValueError(f"memory_bytes must be at least 1, not {memory_bytes}")
        self._path = os.fspath(path)
        self._mode = mode
        self._key = list(key)
        self._changes = changes
        self._partition_by = list(partition_by)
        self._memory_bytes = memory_bytes
        self._options = dict(storage_options or {})
        self._context: SinkContext | None = None
        self._publishing = threading.Lock()

    def describe(self) -> Mapping[str, Any]:
        """Table, mode and key; a job is restored only with the same ones."""
        return {"kind": "delta", "path": self._path, "mode": self._mode, "key": self._key}

    def open(self, context: SinkContext, committables: Sequence[Any]) -> None:
        """Make the table, or compare its columns; publish what was committed."""
        self._schema = context.schema.remove_metadata()
        missing = [n for n in (*self._key, *self._partition_by) if n not in self._schema.names]
        if missing or (self._changes is not None and self._changes not in self._schema.names):
            raise SchemaError(f"{context.operator_id}: no column {missing or self._changes} among {self._schema.names}")
        self._columns = _columns_of_table(self._schema, self._changes)
        self._application = f"{context.store_id}/{context.operator_id}"
        self._make_table(context.operator_id)
        self._kept = KeptOutput(context, self._schema, committables)
        self._context = context
        self.publish(committables)

    def write(self, batch: pa.RecordBatch) -> None:
        """Keep the rows until their checkpoint is committed."""
        context = self._opened()
        self._kept.write(conform(context.operator_id, self._schema, batch))

    @property
    def full(self) -> bool:
        """Whether as much waits as may; see `BoundedSink`."""
        return self._context is not None and self._kept.bytes >= self._memory_bytes

    def prepare(self, checkpoint_id: int, *, final: bool) -> Prepared:  # noqa: ARG002 - the last one is no other
        """Name the rows since the last barrier; forget those that have arrived."""
        self._opened()
        return Prepared(self._kept.cut(checkpoint_id))

    def publish(self, committables: Sequence[Any]) -> None:
        """Make a version of each checkpoint's rows that the table does not have yet."""
        self._opened()
        with self._publishing:
            for committable in committables:
                batches = [kept.batch for kept in self._kept.batches(committable)]
                if batches:
                    self._publish(pa.Table.from_batches(batches), committable["end"])
                self._kept.acknowledge(committable["end"])

    def published(self) -> pa.Table:
        """What the table holds."""
        return pa.table(self._table().to_pyarrow_table()).cast(self._columns)

    def close(self) -> None:
        """Let go; what is committed and has not arrived is published when the job is opened again."""
        self._context = None

    def _publish(self, rows: pa.Table, number: int) -> None:
        delta = _deltalake()
        failure: Exception | None = None
        for _ in range(_ATTEMPTS):
            table = self._table()
            known = table.transaction_version(self._application)
            if known is not None and known >= number:
                return
            transaction = delta.Transaction(self._application, number)
            properties = delta.CommitProperties(app_transactions=[transaction])
            try:
                if self._mode == "append":
                    self._append(table, rows, properties)
                else:
                    self._merge(table, rows, properties)
            except delta.exceptions.CommitFailedError as error:  # another version came first, perhaps this very one
                failure = error
            else:
                return
        assert failure is not None
        raise failure

    def _append(self, table: Any, rows: pa.Table, properties: Any) -> None:
        _deltalake().write_deltalake(table, rows.cast(self._columns), mode="append", commit_properties=properties)

    def _merge(self, table: Any, rows: pa.Table, properties: Any) -> None:
        rows = _newest(rows, self._key)
        gone = pa.array(np.zeros(rows.num_rows, dtype=bool))
        if self._changes is not None:
            words = pa.array(["delete", "update-before"])
            gone = pc.is_in(rows.column(self._changes), value_set=words)
            rows = rows.drop_columns(self._changes)
        source = rows.cast(self._columns).append_column(_GONE, gone)
        # In parentheses: IS NOT DISTINCT FROM would take in the AND behind it.
        same = " AND ".join(
            f"(target.{_quoted(name)} IS NOT DISTINCT FROM source.{_quoted(name)})" for name in self._key
        )
        values = {_quoted(name): f"source.{_quoted(name)}" for name in self._columns.names}
        merger = table.merge(source, same, source_alias="source", target_alias="target", commit_properties=properties)
        if self._changes is not None:
            merger = merger.when_matched_delete(predicate=f"source.{_GONE}")
        (
            merger.when_matched_update(updates=values, predicate=f"NOT source.{_GONE}")
            .when_not_matched_insert(updates=values, predicate=f"NOT source.{_GONE}")
            .execute()
        )

    def _make_table(self, operator_id: str) -> None:
        delta = _deltalake()
        try:
            delta.Schema.from_arrow(self._columns)
        except Exception as e:  # the library has no type for it
            raise SchemaError(f"{operator_id}: no Delta table of these columns: {e}\n{self._columns}") from e
        delta.DeltaTable.create(
            self._path,
            self._columns,
            mode="ignore",
            partition_by=self._partition_by or None,
            storage_options=self._options or None,
        )
        found = pa.schema(self._table().schema().to_arrow())
        if found.names != self._columns.names:
            raise SchemaError(
                f"{operator_id}: the Delta table {self._path} has the columns {found.names}, "
                f"the stream {self._columns.names}"
            )

    def _table(self) -> Any:
        return _deltalake().DeltaTable(self._path, storage_options=self._options or None)

    def _opened(self) -> SinkContext:
        if self._context is None:
            raise RuntimeError(f"the Delta sink to {self._path} is not open")
        return self._context


def _deltalake() -> Any:
    """The library; raises `ImportError` with what to install."""
    try:
        import deltalake
        import deltalake.exceptions
    except ImportError as error:
        raise ImportError("Delta Lake needs an extra: pip install 'datafusion-statebackend[delta]'") from error
    return deltalake


def _columns_of_table(schema: pa.Schema, changes: str | None) -> pa.Schema:
    """Without the column of changes, and with what Delta has instead of other units of time."""

    def kind(field: pa.Field) -> pa.DataType:
        return pa.timestamp("us", field.type.tz) if pa.types.is_timestamp(field.type) else field.type

    return pa.schema([pa.field(f.name, kind(f), f.nullable) for f in schema if f.name != changes])


def _newest(rows: pa.Table, key: Sequence[str]) -> pa.Table:
    """The last row of each key."""
    numbered = rows.select(key).append_column("__row", pa.array(np.arange(rows.num_rows)))
    last = numbered.group_by(list(key)).aggregate([("__row", "max")]).column("__row_max")
    return rows.take(last.combine_chunks().sort())


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
