"""A script: definitions, INSERTs and queries, carried out on a job under construction.

Definitions take effect at once, for the statements after them. Every INSERT and COPY becomes part of the one job,
in which all that read a stream share its source; a sink that several INSERTs name gets the rows of all of them. Nothing
runs here: what a query gives is a stream, and only questions about tables and names are answered at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, TypeAlias

import pyarrow as pa
from datafusion import LogicalPlan, ScalarUDF, SessionContext, TableFunction

from operators.changelog import OP
from operators.errors import OperatorError, SchemaError
from operators.graph import Port, derived_id, explain
from operators.sql.catalog import RELATION, planning_session
from operators.sql.definitions import SinkTable, define, sink_of_copy
from operators.sql.planner import plan_stream
from operators.sql.statements import (
    Copy,
    CreateTable,
    CreateView,
    Describe,
    Drop,
    Explain,
    Insert,
    Query,
    StatementText,
    read_statement,
    split_script,
)
from operators.sql.subqueries import SYSTEM_TABLES, reads_tables_only, rows_of, scanned
from operators.stream import DataStream

if TYPE_CHECKING:
    from operators.context import StreamContext

__all__ = ["Answer", "Names", "run_script"]

Answer: TypeAlias = DataStream | pa.Table | str
"""Of a query its rows, as a stream or, of tables alone, as they are; of EXPLAIN a text."""

_SHOWN_CHARACTERS = 60


@dataclass(slots=True)
class Names:
    """What a query of one job can name. ``sources``: streams known by the name of their source, unless another thing
    is registered under it; ``views``: what each view reads; ``definitions``: the statements that made what there is."""

    streams: dict[str, DataStream] = field(default_factory=dict)
    sources: dict[str, DataStream] = field(default_factory=dict)
    tables: dict[str, pa.Table] = field(default_factory=dict)
    sinks: dict[str, SinkTable] = field(default_factory=dict)
    views: dict[str, frozenset[str]] = field(default_factory=dict)
    udfs: dict[str, ScalarUDF] = field(default_factory=dict)
    udtfs: list[TableFunction] = field(default_factory=list)
    definitions: dict[str, str] = field(default_factory=dict)

    @property
    def known_streams(self) -> Mapping[str, DataStream]:
        """Every stream that a query can name."""
        sources = {name: s for name, s in self.sources.items() if name not in self.tables and name not in self.sinks}
        return {**sources, **self.streams}

    def __contains__(self, name: str) -> bool:
        return name in self.known_streams or name in self.tables or name in self.sinks

    def kind(self, name: str) -> str:
        """For people."""
        if name in self.sinks:
            return "sink"
        if name in self.views:
            return "view"
        return "table" if name in self.tables else "stream"

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """What is changed inside stays if nothing is raised."""
        known = [self.streams, self.sources, self.tables, self.sinks, self.views, self.definitions]
        before = [dict(names) for names in known]
        try:
            yield
        except BaseException:
            for names, earlier in zip(known, before, strict=True):
                names.clear()
                names.update(earlier)
            raise

    def forget(self, name: str) -> None:
        """Give the name free; what was made of it stays what it is."""
        for known in (self.streams, self.sources, self.tables, self.sinks, self.views, self.definitions):
            known.pop(name, None)


def run_script(context: StreamContext, names: Names, script: str) -> list[Answer]:
    """Carry out all statements; see `StreamContext.execute`."""
    run = _Run(context, names)
    answers: list[Answer] = []
    for text in split_script(script):
        try:
            with context.graph.all_or_nothing(), names.all_or_nothing():
                answer = run.execute(text.text)
        except OperatorError as error:
            error.add_note(_place(text))
            raise
        except ValueError as error:
            refused = SchemaError(f"sql: {error}")
            refused.add_note(_place(text))
            raise refused from error
        if answer is not None:
            answers.append(answer)
    run.end()
    return answers


def _place(text: StatementText) -> str:
    first = text.text.split("\n", 1)[0]
    shown = first if first == text.text and len(first) <= _SHOWN_CHARACTERS else f"{first[:_SHOWN_CHARACTERS]} …"
    return f"in line {text.line}: {shown}"


class _Run:
    """One script."""

    def __init__(self, context: StreamContext, names: Names) -> None:
        self._context = context
        self._names = names
        self._written: dict[str, tuple[SinkTable, list[DataStream]]] = {}
        self._queries = 0

    def execute(self, text: str) -> Answer | None:
        """One statement; its answer, if it has one."""
        names = self._names
        sinks = {name: sink.columns for name, sink in names.sinks.items()}
        udfs = list(names.udfs.values())
        udafs = self._context.udafs
        session = planning_session(names.known_streams, names.tables, udfs, udafs, sinks, names.udtfs)
        match read_statement(session, text):
            case CreateTable() as table:
                if not (table.if_not_exists and table.name in names):
                    self._define(table.name, table.or_replace, lambda: define(self._context, session, table))
                    names.definitions[table.name] = text
            case CreateView() as view:
                reads = frozenset(scanned(view.plan))
                self._define(view.name, view.or_replace, lambda: self._view(session, view))
                names.views[view.name] = reads
                names.definitions[view.name] = text
            case Drop() as drop:
                if drop.name in names or not drop.if_exists:
                    self._drop(drop.name, drop.what)
            case Insert() | Copy() as write:
                self._write(session, write)
            case Explain(below):
                return self._explained(session, below)
            case Describe(schema):
                return self._described(schema)
            case Query(plan):
                return self._answer(session, plan)
        return None

    def end(self) -> None:
        """Give every sink its rows."""
        for name, (table, streams) in self._written.items():
            _sunk(name, table, streams)

    # -- definitions

    def _define(self, name: str, replace: bool, make: Callable[[], DataStream | pa.Table | SinkTable]) -> None:
        names = self._names
        if name in names:
            if not replace:
                there = f"there is a {names.kind(name)} {name!r} already"
                raise SchemaError(f"sql: {there}; say CREATE OR REPLACE, or DROP it")
            self._drop(name, names.kind(name))
        made = make()
        if isinstance(made, SinkTable):
            names.sinks[name] = made
        elif isinstance(made, DataStream):
            names.streams[name] = made
        else:
            names.tables[name] = made

    def _view(self, session: SessionContext, view: CreateView) -> DataStream | pa.Table:
        if reads_tables_only(view.plan, self._names.tables.keys()):
            return rows_of(session, view.plan, view.name)
        return self._stream(session, view.plan, view.name)

    def _drop(self, name: str, what: str) -> None:
        names = self._names
        if name not in names:
            raise SchemaError(f"sql: there is no {what.lower()} {name!r}")
        if readers := sorted(view for view, read in names.views.items() if name in read and view != name):
            raise SchemaError(f"sql: the view {readers[0]!r} reads {name!r}; drop that first")
        dropped = names.known_streams.get(name)
        names.forget(name)
        if dropped is not None:
            written = [stream for _, streams in self._written.values() for stream in streams]
            self._context.graph.release(dropped.port, [s.port for s in (*names.known_streams.values(), *written)])

    # -- rows

    def _stream(self, session: SessionContext, plan: LogicalPlan, name: str) -> DataStream:
        return plan_stream(plan, session, self._names.known_streams, self._names.tables, derived_id(name))

    def _answer(self, session: SessionContext, plan: LogicalPlan) -> Answer:
        if reads_tables_only(plan, self._names.tables.keys() | SYSTEM_TABLES, constants=True):
            return self._shown(rows_of(session, plan, None), scanned(plan))
        self._queries += 1
        return self._stream(session, plan, f"query-{self._queries}")

    def _shown(self, rows: pa.Table, read: set[str]) -> pa.Table:
        """The rows, or of SHOW TABLES what the names are here."""
        if read != {"information_schema.tables"} or "table_schema" not in rows.column_names:
            return rows
        names = sorted(n for n in {*self._names.known_streams, *self._names.tables, *self._names.sinks})
        return pa.table(
            {"name": pa.array(names, pa.string()), "kind": pa.array(map(self._names.kind, names), pa.string())}
        )

    def _write(self, session: SessionContext, write: Insert | Copy) -> None:
        name, table, stream = self._prepared(session, write)
        self._written.setdefault(name, (table, []))[1].append(stream)

    def _prepared(self, session: SessionContext, write: Insert | Copy) -> tuple[str, SinkTable, DataStream]:
        """The id of a sink, the sink, and rows for it."""
        if isinstance(write, Copy):
            name = derived_id("copy", PurePosixPath(write.location).name)
            stream = self._stream(session, write.plan, name)
            return name, *_fitting(sink_of_copy(session, write, stream.schema), stream)
        if write.target not in self._names.sinks:
            raise SchemaError(
                f"sql: INSERT INTO {write.target}: that is a {self._names.kind(write.target)}; a sink is a table with "
                "OPTIONS ('mode' 'sink')"
            )
        name = derived_id(write.target)
        before = len(self._written[name][1]) if name in self._written else 0
        stream = self._stream(session, write.plan, name if not before else f"{name}-{before + 1}")
        return name, *_fitting(self._names.sinks[write.target], stream)

    # -- for people

    def _explained(self, session: SessionContext, statement: Query | Insert | Copy) -> str:
        """The operators of a statement, of which nothing remains."""
        graph = self._context.graph
        if isinstance(statement, Query):
            if reads_tables_only(statement.plan, self._names.tables.keys() | SYSTEM_TABLES, constants=True):
                return f"answered at once, by DataFusion\n{statement.plan.display_indent()}"
            with graph.undone():
                return self._stream(session, statement.plan, f"query-{self._queries + 1}").explain()
        with graph.undone():
            name, table, stream = self._prepared(session, statement)
            if name in self._written:
                return stream.explain()
            _sunk(name, table, [stream])
            return explain(Port(graph.sinks[-1]))

    def _described(self, schema: pa.Schema) -> pa.Table:
        name = (schema.metadata or {}).get(RELATION, b"").decode()
        stream = self._names.known_streams.get(name)
        found = schema if stream is None else stream.schema
        notes = {} if stream is None else {stream.event_time: "event time", OP: "what happens to the row"}
        rows = [(f.name, str(f.type), notes.get(f.name, "")) for f in found]
        columns = zip(*rows, strict=True) if rows else ([], [], [])
        return pa.table(dict(zip(("column", "type", "note"), (pa.array(c, pa.string()) for c in columns), strict=True)))


def _fitting(table: SinkTable, stream: DataStream) -> tuple[SinkTable, DataStream]:
    """The sink, and the stream as it is written: with the declared types, and final if that is what the sink wants."""
    if table.final and stream.updates is not None:
        stream = stream.final_rows()
    other = {f.name: f.type for f in table.columns if stream.schema.field(f.name).type != f.type}
    return table, stream.cast(other) if other else stream


def _sunk(name: str, table: SinkTable, streams: Sequence[DataStream]) -> None:
    if len(streams) > 1:
        # A sink has no windows: the rows need no event time, which each of the streams might have in another column.
        note = "rows for a sink of several INSERTs have no event time"
        first, *others = (
            DataStream(s.context, s.port, s.schema, event_time=None, time_note=note, updates=s.updates) for s in streams
        )
        streams = [first.union(*others)]
    table.end(streams[0], name)
