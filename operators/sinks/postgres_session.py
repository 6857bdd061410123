"""The client side of `PostgresSink`: one connection, its transactions, and the statements in them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.encoders import CsvEncoder, json_text
from operators.encoders.base import plain
from operators.errors import SchemaError, SinkRefusedError

__all__ = ["DELETED", "PROGRESS", "ConnectionLostError", "PostgresSession", "PostgresTable"]

PROGRESS = "streams_progress"
"""The table that says how far each sink has come: one row for each, which its transactions lock."""

DELETED = "_deleted"
"""The column of rows that says that the row of their key is to be deleted."""

_ORDER = "_order"
_STAGE = "_stage"
_LOCK_S = 5
_IDLE_S = 60
_OPTIONS = {"connect_timeout": 10, "tcp_user_timeout": 30_000, "application_name": "streams"}
_MISSING = "PostgreSQL needs the extra 'postgres': pip install 'datafusion-statebackend[postgres]'"
_PASSING = ("08", "40", "53", "55", "57", "58")
"""Classes of SQLSTATE that have to do with the server and not with what is asked of it."""
_STARTING = ("starting up", "shutting down", "recovery", "too many", "remaining connection slots", "terminating")
_HEX = np.frombuffer(b"".join(b"%02x" % i for i in range(256)), np.uint16)

_TYPES: tuple[tuple[Callable[[pa.DataType], bool], str], ...] = (
    (pa.types.is_boolean, "boolean"),
    (lambda kind: kind in (pa.int8(), pa.int16(), pa.uint8()), "smallint"),
    (lambda kind: kind in (pa.int32(), pa.uint16()), "integer"),
    (lambda kind: kind in (pa.int64(), pa.uint32()) or pa.types.is_duration(kind), "bigint"),
    (pa.types.is_uint64, "numeric(20)"),
    (lambda kind: kind in (pa.float16(), pa.float32()), "real"),
    (pa.types.is_float64, "double precision"),
    (pa.types.is_date, "date"),
    (pa.types.is_time, "time"),
    (pa.types.is_nested, "jsonb"),
    (lambda kind: pa.types.is_timestamp(kind) and kind.tz is not None, "timestamptz"),
    (pa.types.is_timestamp, "timestamp"),
)


class ConnectionLostError(Exception):
    """The server is not there, or has ended the connection or transaction: a new one may do better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresTable:
    """Where rows go. ``sink`` names the row of `PROGRESS`; ``key`` empty: rows are appended."""

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    create: bool
    sink: str

    @property
    def identifier(self) -> str:
        """Its name in SQL."""
        return ".".join(_quoted(part) for part in self.name.split("."))

    @property
    def columns(self) -> str:
        """Its columns in SQL."""
        return ", ".join(_quoted(name) for name in self.schema.names)

    @property
    def definition(self) -> str:
        """The statement that makes it."""
        columns = [f"{_quoted(f.name)} {_sql_type(f.type)}" for f in self.schema]
        if self.key:
            columns.append(f"PRIMARY KEY ({', '.join(_quoted(name) for name in self.key)})")
        return f"CREATE TABLE IF NOT EXISTS {self.identifier} ({', '.join(columns)})"

    @property
    def merge(self) -> tuple[str, str]:
        """The statements that bring what is staged into the table: the newest row of each key counts."""
        keys = ", ".join(_quoted(name) for name in self.key)
        same = " AND ".join(f"t.{_quoted(n)} IS NOT DISTINCT FROM s.{_quoted(n)}" for n in self.key)
        others = [_quoted(name) for name in self.schema.names if name not in self.key]
        update = f"UPDATE SET {', '.join(f'{n} = excluded.{n}' for n in others)}" if others else "NOTHING"
        newest = f"SELECT DISTINCT ON ({keys}) * FROM {_STAGE} ORDER BY {keys}, {_ORDER} DESC"
        delete = f"DELETE FROM {self.identifier} t USING ({newest}) s WHERE s.{DELETED} AND {same}"
        rows = f"SELECT {self.columns} FROM ({newest}) s WHERE NOT s.{DELETED}"
        return delete, f"INSERT INTO {self.identifier} ({self.columns}) {rows} ON CONFLICT ({keys}) DO {update}"


class PostgresSession:
    """Steps of one publication after the other; a test fails at each.

    All raise `ConnectionLostError` if another connection may do better, `SinkRefusedError` if not.
    """

    def __init__(self, connection: str, table: PostgresTable) -> None:
        self._where = connection
        self._table = table
        self._connection: Any = None
        self._encoder = CsvEncoder(_text_schema(table.schema))

    def connect(self) -> None:
        """Unless there is a connection: make one, and what has to be there, and look whether rows would fit."""
        if self._connection is not None:
            return
        driver = _driver()
        with self._told(connecting=True):
            self._connection = driver.connect(self._where, **_OPTIONS)
        self._execute(f"SET lock_timeout = '{_LOCK_S}s'")
        # A process that stands still in a transaction loses it, and with it the lock.
        self._execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_S}s'")
        if not self._exists(PROGRESS):
            self._execute(f"CREATE TABLE IF NOT EXISTS {PROGRESS} (sink text PRIMARY KEY, published bigint NOT NULL)")
        if self._table.create and not self._exists(self._table.identifier):
            self._execute(self._table.definition)
        self._make_stage()
        for statement in self._table.merge if self._table.key else ():
            self._execute(f"EXPLAIN {statement}")
        self._execute(f"EXPLAIN INSERT INTO {self._table.identifier} ({self._table.columns}) {self._nothing()}")
        self.commit()

    def begin(self) -> int | None:
        """Begin a transaction; up to which ordinal rows are in the table, None if it was never said.

        Until the end of the transaction nobody else gets an answer.
        """
        # Makes the row so that it can be locked; -1 stands for none.
        self._execute(f"INSERT INTO {PROGRESS} VALUES (%s, -1) ON CONFLICT (sink) DO NOTHING", self._table.sink)
        found = self._execute(f"SELECT published FROM {PROGRESS} WHERE sink = %s FOR UPDATE", self._table.sink)
        return None if found[0] < 0 else int(found[0])

    def write(self, batches: Sequence[pa.RecordBatch]) -> None:
        """Write rows, in their order, those of one key over each other."""
        table = self._table
        if not table.key:
            self._copy(f"{table.identifier} ({table.columns})", [self._csv(batch) for batch in batches])
            return
        self._execute(f"TRUNCATE {_STAGE}")
        self._copy(f"{_STAGE} ({table.columns}, {DELETED})", [self._csv(batch, staged=True) for batch in batches])
        for statement in table.merge:
            self._execute(statement)

    def mark(self, published: int) -> None:
        """Say in the transaction up to which ordinal rows are in the table."""
        self._execute(f"UPDATE {PROGRESS} SET published = %s WHERE sink = %s", published, self._table.sink)

    def commit(self) -> None:
        """End the transaction. If this fails, the next `begin` tells whether it counts."""
        with self._told():
            self._connection.commit()

    def close(self) -> None:
        """Let go of the connection; what it has not committed is undone."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    def _make_stage(self) -> None:
        if self._table.key:
            self._execute(
                f"CREATE TEMPORARY TABLE {_STAGE} AS SELECT {self._table.columns} FROM {self._table.identifier} LIMIT 0"
            )
            self._execute(f"ALTER TABLE {_STAGE} ADD {DELETED} boolean, ADD {_ORDER} bigserial")

    def _nothing(self) -> str:
        return f"SELECT {self._table.columns} FROM {self._table.identifier} LIMIT 0"

    def _exists(self, name: str) -> bool:
        return self._execute("SELECT to_regclass(%s) IS NOT NULL", name)[0] is True

    def _execute(self, statement: str, *arguments: Any) -> Any:
        """Run a statement; its first row, if it has any."""
        with self._told(), self._connection.cursor() as cursor:
            cursor.execute(statement, arguments or None)
            return cursor.fetchone() if cursor.description else None

    def _copy(self, target: str, texts: Sequence[bytes]) -> None:
        statement = f"COPY {target} FROM STDIN WITH (FORMAT csv)"
        with self._told(), self._connection.cursor() as cursor, cursor.copy(statement) as copy:
            for text in texts:
                copy.write(text)

    def _csv(self, batch: pa.RecordBatch, *, staged: bool = False) -> bytes:
        """The rows as CSV, made by kernels: the data of an array of lines is the text."""
        columns = [_text(column) for column in batch.select(self._table.schema.names).columns]
        rows = pa.RecordBatch.from_arrays(columns, schema=_text_schema(self._table.schema))
        parts: list[Any] = [self._encoder.encode(rows).cast(pa.string())]
        if staged:
            deleted = batch.column(DELETED) if DELETED in batch.schema.names else pa.repeat(False, batch.num_rows)
            parts += [",", deleted.cast(pa.string())]
        lines = pc.binary_join_element_wise(*parts, "\n", "")
        _, offsets, data = lines.buffers()
        ends = np.frombuffer(offsets, np.int32, len(lines) + 1, lines.offset * 4)
        return bytes(memoryview(data)[int(ends[0]) : int(ends[-1])])

    @contextmanager
    def _told(self, *, connecting: bool = False) -> Iterator[None]:
        driver = _driver()
        if self._connection is None and not connecting:
            raise ConnectionLostError("there is no connection")
        try:
            yield
        except driver.Error as error:
            said = str(error).strip()
            state = error.sqlstate or ""
            if connecting:
                passing = "FATAL" not in said or any(words in said for words in _STARTING)
            else:
                passing = state.startswith(_PASSING) or (not state and isinstance(error, driver.OperationalError))
            if passing:
                raise ConnectionLostError(said) from None
            raise SinkRefusedError(f"table {self._table.name!r} takes no rows: {said}") from None


def _driver() -> Any:
    try:
        import psycopg
    except ImportError as error:
        raise ImportError(_MISSING) from error
    return psycopg


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _sql_type(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        return _sql_type(kind.value_type)
    if pa.types.is_decimal(kind):
        return f"numeric({kind.precision}, {kind.scale})"
    if _is_binary(kind):
        return "bytea"
    return next((name for holds, name in _TYPES if holds(kind)), "text")


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _text_schema(schema: pa.Schema) -> pa.Schema:
    """What `_text` makes of columns."""
    fields = []
    for field in schema:
        if field.type == pa.month_day_nano_interval():
            raise SchemaError(f"PostgreSQL: column {field.name!r} of {field.type}: cast it to text first")
        as_text = pa.types.is_nested(field.type) or _is_binary(field.type)
        fields.append(pa.field(field.name, pa.string() if as_text else field.type))
    return pa.schema(fields)


def _text(column: pa.Array) -> pa.Array:
    """Nested values as JSON, bytes as PostgreSQL reads them (hexadecimal); other columns as they are."""
    if pa.types.is_nested(column.type):
        return pc.if_else(column.is_valid(), json_text(column), pa.scalar(None, pa.string()))
    return _hexadecimal(plain(column)) if _is_binary(column.type) else column


def _hexadecimal(column: pa.Array) -> pa.Array:
    filled = pc.fill_null(column, b"")
    _, raw, data = filled.buffers()
    offsets = np.frombuffer(raw, np.int32, len(filled) + 1, filled.offset * 4)
    joined = np.frombuffer(data or b"", np.uint8)[offsets[0] : offsets[-1]]
    ends = pa.py_buffer(2 * (offsets - offsets[0]))
    digits = pa.Array.from_buffers(pa.string(), len(filled), [None, ends, pa.py_buffer(_HEX[joined])])
    text = pc.binary_join_element_wise("\\x", digits, "")
    return pc.if_else(column.is_valid(), text, pa.scalar(None, pa.string()))
