"""PostgreSQL, exactly once: rows of a table, and in the same transaction how far the output has come.

Rows wait in the state until their checkpoint is committed. Then one transaction takes the sink's row of the table
`PROGRESS` with a lock, copies the rows above the ordinal that it holds, and raises it. Whoever else publishes the
same output, a process that was only slow or one that came after a crash, waits for that lock and finds the new
ordinal; a commit whose answer was lost is found out about in the same way.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from operators.errors import SchemaError, SinkUnavailableError
from operators.sinks.base import Guarantee, Prepared, SinkContext, conform
from operators.sinks.kept import KeptOutput, in_parts
from operators.sinks.pending import PendingBatch
from operators.sinks.postgres_session import DELETED, PROGRESS, ConnectionLostError, PostgresSession, PostgresTable

__all__ = ["PostgresSink"]

logger = logging.getLogger(__name__)

_PAUSE_S = 0.1
_PAUSE_MAX_S = 2.0
_TRANSACTION_BYTES = 64 << 20
_FORGETS = f"the table {PROGRESS} was emptied, or this is another database"

Split = Callable[[pa.RecordBatch], tuple[pa.RecordBatch, pa.Array]]
"""Rows of a changelog: those that count, and which of them say that their key is no more."""

MakeSession = Callable[[str, PostgresTable], PostgresSession]


class PostgresSink:
    """Appends rows to a table, or with ``key`` keeps the newest row of each key there, exactly once.

    Args:
        table: its name, perhaps with a schema: ``"public.sales"``.
        connection: how to connect, as libpq has it: ``"postgresql://user@host/database"`` or ``"host=... dbname=..."``.
            A password is better left to ``PGPASSWORD`` or a password file; it is never shown or stored in any case.
        key: columns under which the table has one row; it needs a primary key or unique index of them.
        changes: for a changelog, which rows count, and which of those are deletions.
        create: make the table if there is none, with columns of matching types and ``key`` as its primary key.
        timeout_s: how long a publication tries to reach the server before it fails. A failed one comes again with the
            next checkpoint, as often as the job tolerates; its rows wait in the state.
        buffer_bytes: of rows that wait; with more the job stops reading until they are published.
        assume_published: what an `OutputUncertainError` asked for, and only then.
        session: makes the client side; for tests.

    Lists, structs and maps are written as JSON, bytes as they are. Raises on opening: `SinkRefusedError` (columns or
    key do not fit, no access), `SinkUnavailableError`, `OutputUncertainError`.
    """

    guarantee = Guarantee.EXACTLY_ONCE

    def __init__(
        self,
        table: str,
        connection: str,
        key: Sequence[str] = (),
        *,
        changes: Split | None = None,
        create: bool = True,
        timeout_s: float = 60.0,
        buffer_bytes: int = 256 << 20,
        assume_published: int | None = None,
        session: MakeSession = PostgresSession,
    ) -> None:
        if isinstance(key, str):
            raise TypeError(f"key is a list of columns, not the text {key!r}")
        if not table or timeout_s <= 0:
            raise ValueError(f"the table must have a name and timeout_s be positive, not {table!r}, {timeout_s}")
        self._table = table
        self._connection = connection
        self._key = tuple(key)
        self._changes = changes
        self._create = create
        self._timeout_s = timeout_s
        self._buffer_bytes = buffer_bytes
        self._assume_published = assume_published
        self._make_session = session
        self._lock = threading.Lock()
        self._session: PostgresSession | None = None
        self._kept: KeptOutput | None = None

    def describe(self) -> Mapping[str, Any]:
        """The table and its key; a job is restored only with the same ones."""
        return {"kind": "postgres", "table": self._table, "key": list(self._key)}

    def open(self, context: SinkContext, committables: Sequence[Any]) -> None:
        """Connect, look whether table and columns fit, and publish what was committed and not published."""
        self._operator_id = context.operator_id
        self._schema = context.schema.remove_metadata()
        rows = self._schema if self._changes is None else self._changes(_no_rows(self._schema))[0].schema
        if missing := [name for name in self._key if name not in rows.names]:
            raise SchemaError(f"{context.operator_id}: key columns {missing} are not there; there are {rows.names}")
        if DELETED in rows.names:
            raise SchemaError(f"{context.operator_id}: a column cannot be called {DELETED!r}; rename it")
        self._kept_schema = rows.append(pa.field(DELETED, pa.bool_())) if self._changes is not None else rows
        self._kept = KeptOutput(context, self._kept_schema, committables)
        table = PostgresTable(
            name=self._table,
            schema=rows,
            key=self._key,
            create=self._create,
            sink=f"{context.store_id}/{context.operator_id}",
        )
        self._session = self._make_session(self._connection, table)
        self.publish(committables)

    def write(self, batch: pa.RecordBatch) -> None:
        """Keep rows until their checkpoint is committed."""
        batch = conform(self._operator_id, self._schema, batch)
        if self._changes is not None:
            rows, deleted = self._changes(batch)
            batch = pa.RecordBatch.from_arrays([*rows.columns, deleted], schema=self._kept_schema)
        self._opened()[0].write(batch)

    def prepare(self, checkpoint_id: int, *, final: bool) -> Prepared:  # noqa: ARG002 - the last one is no other
        """Name the rows since the last barrier, and those that are not known to be published."""
        return Prepared(self._opened()[0].cut(checkpoint_id))

    def publish(self, committables: Sequence[Any]) -> None:
        """Write what is not in the table yet; retries until ``timeout_s`` is over."""
        kept, session = self._opened()
        deadline, pause = time.monotonic() + self._timeout_s, _PAUSE_S
        with self._lock:
            while True:
                try:
                    return self._publish(kept, session, committables)
                except ConnectionLostError as failure:
                    session.close()
                    if time.monotonic() + pause > deadline:
                        waited = f"{self._timeout_s:.0f} s"
                        raise SinkUnavailableError(
                            f"{self._operator_id}: table {self._table!r} did not take rows for {waited}: {failure}"
                        ) from None
                    logger.warning("%s: connecting again: %s", self._operator_id, failure)
                except BaseException:
                    session.close()
                    raise
                time.sleep(pause)
                pause = min(2 * pause, _PAUSE_MAX_S)

    @property
    def full(self) -> bool:
        """Whether as many rows wait as may."""
        return self._opened()[0].bytes >= self._buffer_bytes

    def close(self) -> None:
        """Let go; what is committed and not published is published when the job is opened again."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _publish(self, kept: KeptOutput, session: PostgresSession, committables: Sequence[Mapping[str, Any]]) -> None:
        session.connect()
        place = f"{self._operator_id}: table {self._table!r}"
        waiting = [batch for committable in committables for batch in kept.batches(committable)]
        parts: list[list[PendingBatch]] = in_parts(waiting, _TRANSACTION_BYTES)
        for part in parts or [[]]:
            # Read anew for each transaction: another process may have gone on.
            found = session.begin()
            marker = kept.resolve(found, self._assume_published, place, _FORGETS)
            rows = [pending.batch for pending in part if pending.ordinal >= marker]
            end = max(marker, part[-1].ordinal + 1) if part else marker
            if rows:
                session.write(rows)
            if end != found:
                session.mark(end)
            session.commit()
            kept.acknowledge(end)

    def _opened(self) -> tuple[KeptOutput, PostgresSession]:
        if self._session is None or self._kept is None:
            raise RuntimeError(f"the sink to the table {self._table!r} is not open")
        return self._kept, self._session


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)
