"""What a query can name: streams, tables and functions, in a session that only plans.

Streams are empty tables there. Two things differ from the streams themselves, which matters to names and signatures
only, since every expression is typed anew over the stream: an event time is a plain timestamp in microseconds, so that
the window functions need one signature; and `op` of a changelog is not seen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import pyarrow as pa
from datafusion import (
    Accumulator,
    AggregateUDF,
    LogicalPlan,
    ScalarUDF,
    SessionConfig,
    SessionContext,
    SQLOptions,
    TableFunction,
    udaf,
    udf,
)

from operators.errors import SchemaError, UnsupportedQueryError
from operators.sql.names import BOUND_FUNCTIONS, WINDOW_FUNCTIONS
from operators.sql.relation import unseen
from operators.stream import DataStream

__all__ = ["RELATION", "planned", "planning_session", "reason_of", "require_read"]

RELATION = b"relation"
"""Key of the metadata of a schema in the session: what it is registered as."""

_TIME = pa.timestamp("us")
_INTERVAL = pa.month_day_nano_interval()

_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|--[^\n]*|/\*.*?\*/""", re.DOTALL)
_IGNORED = re.compile(
    r"\b(?:tablesample|prewhere|connect\s+by|start\s+with|with\s+(?:rollup|cube|totals|ordinality)|partition\s*\("
    r"|settings\s+\w+\s*=|format\s+\w+\s*;?\s*$|for\s+(?:update|share|json|xml)|with\s*\(\s*\w+\s*\))|\*\s*i?like\b",
    re.IGNORECASE,
)
"""What the parser takes and the planner passes over: the query would run without it."""


class _Never(Accumulator):
    """Stands for a column of windows in plans; never evaluated."""

    def state(self) -> list[pa.Scalar]:
        """None."""
        return []

    def update(self, *values: pa.Array) -> None:
        """Nothing."""

    def merge(self, states: list[pa.Array]) -> None:
        """Nothing."""

    def evaluate(self) -> pa.Scalar:
        """Null."""
        return pa.scalar(None, _TIME)


def _never(*_: Any) -> NoReturn:
    raise AssertionError("a window function stands for a window and has no value")


def planning_session(
    streams: Mapping[str, DataStream],
    tables: Mapping[str, pa.Table],
    udfs: Sequence[ScalarUDF],
    udafs: Sequence[AggregateUDF],
    sinks: Mapping[str, pa.Schema] = MappingProxyType({}),
    udtfs: Sequence[TableFunction] = (),
) -> SessionContext:
    """A session in which the query is planned. ``sinks``: what INSERT may name, with its columns."""
    config = SessionConfig().with_information_schema(enabled=True)
    config = config.set("datafusion.sql_parser.map_string_types_to_utf8view", "false")
    session: SessionContext = SessionContext(config).with_python_udf_inlining(enabled=False)
    for name, intervals in WINDOW_FUNCTIONS.items():
        session.register_udf(udf(_never, [_TIME, *[_INTERVAL] * intervals], _TIME, "immutable", name))
    for name in BOUND_FUNCTIONS:
        session.register_udaf(udaf(_Never, [], _TIME, [_TIME], "immutable", name))
    for function in udfs:
        _require_free(function.name)
        session.register_udf(function)
    for aggregate in udafs:
        _require_free(aggregate.name)
        session.register_udaf(aggregate)
    for table_function in udtfs:
        session.register_udtf(table_function)
    for name, stream in streams.items():
        fields = [
            pa.field(f.name, _TIME) if f.name == stream.event_time else f
            for f in stream.schema
            if f.name not in unseen(stream)
        ]
        _register(session, name, pa.schema(fields).empty_table())
    for name, schema in sinks.items():
        _register(session, name, schema.empty_table())
    for name, table in tables.items():
        _register(session, name, table)
    return session


def _require_free(name: str) -> None:
    if name.lower() in (*WINDOW_FUNCTIONS, *BOUND_FUNCTIONS, "date_bin"):
        raise SchemaError(f"sql: a Python function is called {name!r}, which means a window in queries; rename it")


def _register(session: SessionContext, name: str, table: pa.Table) -> None:
    table = table.replace_schema_metadata({RELATION: name})
    batches = table.to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]
    session.register_record_batches('"' + name.replace('"', '""') + '"', [batches])


def require_read(query: str) -> None:
    """Raise `UnsupportedQueryError` for clauses that DataFusion reads and drops."""
    if found := _IGNORED.search(_QUOTED.sub(" ", query)):
        raise UnsupportedQueryError(found[0], "DataFusion reads this clause and does nothing; leave it out")


def reason_of(session: SessionContext, error: Exception) -> str:
    """What DataFusion says, and where a table is not found, which ones there are."""
    reason = str(error).removeprefix("DataFusion error: ")
    if not re.search(r"\btable '[^']*' not found", reason):
        return reason
    names = sorted(session.catalog().schema().names())
    return f"{reason}; there is {', '.join(names) if names else 'no table yet'}"


def planned(session: SessionContext, query: str) -> LogicalPlan:
    """The plan as DataFusion first makes it, before it optimises.

    Raises `SchemaError` for what DataFusion does not understand or does not find, `UnsupportedQueryError` for
    statements other than queries and for clauses that DataFusion reads and drops.
    """
    require_read(query)
    options = SQLOptions().with_allow_ddl(False).with_allow_dml(False).with_allow_statements(False)
    try:
        return session.sql_with_options(query, options).logical_plan()
    except Exception as error:  # the binding raises bare exceptions
        reason = reason_of(session, error)
        if re.search(r"(DDL|DML|Statement) not supported", reason):
            raise UnsupportedQueryError(
                f"the statement ({reason})", "only queries (SELECT, WITH) are streams; end one with a sink verb"
            ) from error
        raise SchemaError(f"sql: {reason}") from error
