"""Scripts: where a statement ends, and what it says, as values.

Where it ends is told by the tokens of a lexer (Pygments' for PostgreSQL, which knows quotes, dollar quotes and nested
comments as DataFusion does). What it says is told by DataFusion. `SessionContext.sql` carries a definition out at
once, so such a statement is planned below an EXPLAIN, which plans it and does nothing; the plan below that is what
is read here. What the Python binding does not give out of it is read from its protobuf.

Invariant: every property of a definition is read or refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
from datafusion import Expr, LogicalPlan, SessionContext, SQLOptions, lit
from pygments.lexer import inherit
from pygments.lexers.sql import PostgresLexer
from pygments.token import Comment, Name, Punctuation, String, Whitespace

from operators.errors import SchemaError, UnsupportedQueryError
from operators.sql.catalog import reason_of, require_read
from statebackend import read_wire, write_wire

__all__ = [
    "Copy",
    "CreateTable",
    "CreateView",
    "Describe",
    "Drop",
    "Explain",
    "Insert",
    "Query",
    "SqlLexer",
    "Statement",
    "StatementText",
    "is_complete",
    "plain_name",
    "read_statement",
    "split_script",
    "without_options",
]

# Numbers of DataFusion's LogicalPlanNode, CreateExternalTableNode and the messages in it, and of CastNode.
_CREATE_EXTERNAL = 11
_SCHEMA, _OPTIONS, _CONSTRAINTS, _TEMPORARY, _OR_REPLACE = 4, 8, 12, 14, 15
_CAST, _CAST_EXPR, _CAST_TYPE = 11, 1, 2

_FORMAT = "format."
"""What DataFusion puts before the name of an option that has no dot."""


class SqlLexer(PostgresLexer):  # type: ignore[misc]
    """PostgreSQL's lexer, with backquoted names and strings with backslashes as DataFusion reads them."""

    tokens = {  # noqa: RUF012 - as Pygments has it
        "root": [(r"`[^`]*`", Name), (r"[eE]'(?:\\.|''|[^'\\])*'", String), inherit],
    }


@dataclass(frozen=True, slots=True)
class StatementText:
    """One statement of a script, without what ends it; ``line``: where it begins, from 1."""

    text: str
    line: int


def split_script(script: str) -> list[StatementText]:
    """The statements between the semicolons."""
    return [statement for statement, _ in _pieces(script)]


def is_complete(script: str) -> bool:
    """Whether the last statement is ended by a semicolon; an empty script is."""
    return all(ended for _, ended in _pieces(script))


def _pieces(script: str) -> Iterator[tuple[StatementText, bool]]:
    """Each statement that says something, and whether a semicolon ends it."""
    begin: int | None = None
    for at, kind, value in SqlLexer().get_tokens_unprocessed(script):
        if kind is Punctuation and value == ";":
            if begin is not None:
                yield _piece(script, begin, at), True
            begin = None
        elif begin is None and kind not in Comment and kind not in Whitespace and value.strip():
            begin = at
    if begin is not None:
        yield _piece(script, begin, len(script)), False


def _piece(script: str, begin: int, end: int) -> StatementText:
    return StatementText(script[begin:end].rstrip(), script.count("\n", 0, begin) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateTable:
    """CREATE EXTERNAL TABLE. ``columns``: as declared, None if none are; ``plan``: for DataFusion to carry out."""

    name: str
    stored_as: str
    location: str
    columns: pa.Schema | None
    partition_by: tuple[str, ...]
    options: Mapping[str, str]
    if_not_exists: bool
    or_replace: bool
    plan: LogicalPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateView:
    """CREATE VIEW."""

    name: str
    or_replace: bool
    plan: LogicalPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """DROP TABLE or DROP VIEW, of which ``what`` is the second word."""

    name: str
    what: str
    if_exists: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Insert:
    """INSERT INTO; ``plan`` has the columns of the target, in its order and of its types."""

    target: str
    plan: LogicalPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """COPY … TO: a sink that is declared where it is written to."""

    location: str
    stored_as: str
    partition_by: tuple[str, ...]
    options: Mapping[str, str]
    plan: LogicalPlan


@dataclass(frozen=True, slots=True)
class Explain:
    """EXPLAIN of a query, an INSERT or a COPY."""

    statement: Query | Insert | Copy


@dataclass(frozen=True, slots=True)
class Describe:
    """DESCRIBE; the schema is that of the table in the session that planned it, with its metadata."""

    schema: pa.Schema


@dataclass(frozen=True, slots=True)
class Query:
    """SELECT and what else gives rows, SHOW TABLES among it."""

    plan: LogicalPlan


Statement: TypeAlias = CreateTable | CreateView | Drop | Insert | Copy | Explain | Describe | Query


def read_statement(session: SessionContext, text: str) -> Statement:
    """What a statement says, planned over the tables of the session; nothing is carried out.

    Raises `SchemaError` for what DataFusion does not understand or find, `UnsupportedQueryError` for statements
    and clauses that are not known over streams.
    """
    require_read(text)
    plan = _planned(session, text)
    variant = plan.to_variant()
    if type(variant).__name__ == "Explain":
        below = _statement(session, plan.inputs()[0])
        if not isinstance(below, Query | Insert | Copy):
            raise UnsupportedQueryError("EXPLAIN of a definition", "explain a SELECT or an INSERT")
        return Explain(below)
    return _statement(session, plan)


def _planned(session: SessionContext, text: str) -> LogicalPlan:
    """The plan of one statement. Queries, INSERT and COPY are not carried out before their rows are asked for."""
    options = SQLOptions().with_allow_ddl(False).with_allow_dml(True).with_allow_statements(False)
    try:
        try:
            return session.sql_with_options(text, options).logical_plan()
        except Exception as error:
            if not re.search(r"(DDL|Statement) not supported", str(error)):
                raise
            return session.sql(f"EXPLAIN {text}").logical_plan().inputs()[0]
    except Exception as error:  # the binding raises bare exceptions
        if "Nested EXPLAIN" in str(error):
            raise UnsupportedQueryError("EXPLAIN of a definition", "explain a SELECT or an INSERT") from error
        raise SchemaError(f"sql: {reason_of(session, error)}") from error


def _statement(session: SessionContext, plan: LogicalPlan) -> Statement:
    kind = _kind(plan)
    if kind == "CreateExternalTable":
        return _create_table(session, plan)
    variant = plan.to_variant()
    match kind:
        case "CreateView":
            if re.match(r"CREATE\s+(OR\s+REPLACE\s+)?TEMPORARY", variant.definition() or ""):
                raise UnsupportedQueryError("TEMPORARY", "a view is forgotten with its script; leave the word out")
            return CreateView(name=plain_name(variant.name()), or_replace=variant.or_replace(), plan=plan.inputs()[0])
        case "DropTable" | "DropView":
            word = kind.removeprefix("Drop").upper()
            return Drop(name=plain_name(variant.name()), what=word, if_exists=variant.if_exists())
        case "DmlStatement":
            operation = str(variant.op()).removeprefix("WriteOp.")
            if operation != "Append":
                raise UnsupportedQueryError(
                    operation.upper(), "a sink takes more rows and keeps the ones it has: INSERT INTO"
                )
            return Insert(target=plain_name(variant.table_name()), plan=plan.inputs()[0])
        case "CopyTo":
            found = re.search(r"FileType: (\w+?)FormatFactory", str(variant.file_type()))
            return Copy(
                location=variant.output_url(),
                stored_as=found[1].upper() if found else "",
                partition_by=tuple(variant.partition_by()),
                options=_options(variant.options()),
                plan=plan.inputs()[0],
            )
        case "DescribeTable":
            return Describe(variant.schema())
        case "Analyze":
            raise UnsupportedQueryError("EXPLAIN ANALYZE", "a stream runs without end; leave ANALYZE out")
        case "CreateMemoryTable":
            raise UnsupportedQueryError(
                "CREATE TABLE", "say CREATE EXTERNAL TABLE … STORED AS … LOCATION, or CREATE VIEW"
            )
        case _ if kind in _NO_STATEMENTS:
            raise UnsupportedQueryError(plan.display(), "definitions are CREATE EXTERNAL TABLE, CREATE VIEW and DROP")
    return Query(plan)


_NO_STATEMENTS = frozenset(
    {
        *("SetVariable", "CreateCatalog", "CreateCatalogSchema", "CreateFunction", "CreateIndex", "DropCatalogSchema"),
        *("DropFunction", "Prepare", "Execute", "Deallocate", "TransactionStart", "TransactionEnd"),
    }
)


def _kind(plan: LogicalPlan) -> str:
    try:
        return type(plan.to_variant()).__name__
    except Exception as error:  # the binding raises bare exceptions
        raise UnsupportedQueryError(plan.display(), "this is not known over streams") from error


def _create_table(session: SessionContext, plan: LogicalPlan) -> CreateTable:
    variant = plan.to_variant()
    fields: dict[int, list[Any]] = {}
    for number, value in read_wire(_node(session, plan)):
        fields.setdefault(number, []).append(value)
    refused = {
        "PRIMARY KEY, UNIQUE or CHECK": any(fields.get(_CONSTRAINTS, [])),
        "DEFAULT": bool(variant.column_defaults()),
        "WITH ORDER": bool(variant.order_exprs()),
        "TEMPORARY": bool(fields.get(_TEMPORARY)),
        "several locations": len(variant.locations()) != 1,
        "CREATE UNBOUNDED": variant.unbounded(),
    }
    for part, found in refused.items():
        if found:
            instead = (
                "say OPTIONS ('mode' 'follow')"
                if part.endswith("UNBOUNDED")
                else "a stream does not keep to it; leave it out"
            )
            raise UnsupportedQueryError(f"{part} of the table {variant.name()}", instead)
    return CreateTable(
        name=plain_name(variant.name()),
        stored_as=variant.file_type().upper(),
        location=variant.locations()[0],
        columns=_columns(session, fields.get(_SCHEMA, [b""])[0], variant.name()),
        partition_by=tuple(variant.table_partition_cols()),
        options=_options(variant.options()),
        if_not_exists=variant.if_not_exists(),
        or_replace=bool(fields.get(_OR_REPLACE)),
        plan=plan,
    )


def _node(session: SessionContext, plan: LogicalPlan) -> bytes:
    node = dict(read_wire(plan.to_bytes(session)))[_CREATE_EXTERNAL]
    assert isinstance(node, bytes)
    return node


def without_options(session: SessionContext, table: CreateTable, names: frozenset[str]) -> LogicalPlan:
    """The plan of the table's definition, for DataFusion to carry out, without options that it does not know."""
    kept: list[tuple[int, int | bytes]] = []
    for number, value in read_wire(_node(session, table.plan)):
        if number == _OPTIONS:
            assert isinstance(value, bytes)
            name = dict(read_wire(value))[1]
            assert isinstance(name, bytes)
            if name.decode().removeprefix(_FORMAT) in names:
                continue
        kept.append((number, value))
    return LogicalPlan.from_bytes(session, write_wire([(_CREATE_EXTERNAL, write_wire(kept))]))


def _columns(session: SessionContext, declared: bytes, table: str) -> pa.Schema | None:
    """Declared columns with their Arrow types: those that a cast to each of them has."""
    null = lit(None).to_bytes(session)
    casts: list[Expr] = []
    for number, column in read_wire(declared):
        if number != 1:
            continue
        assert isinstance(column, bytes)
        field = dict(read_wire(dict(read_wire(column))[1]))  # type: ignore[arg-type]
        name, kind, nullable = field[1], field[2], field.get(3, 0)
        assert isinstance(name, bytes)
        if not nullable:
            raise UnsupportedQueryError(
                f"NOT NULL of {table}.{name.decode()}", "it is not checked; leave it out, and filter with IS NOT NULL"
            )
        cast = write_wire([(_CAST, write_wire([(_CAST_EXPR, null), (_CAST_TYPE, kind)]))])
        casts.append(Expr.from_bytes(cast, session).alias(name.decode()))
    if not casts:
        return None
    return session.read_empty().select(*casts).schema()


def _options(found: Mapping[str, str]) -> Mapping[str, str]:
    return {name.removeprefix(_FORMAT): value for name, value in found.items()}


def plain_name(name: str) -> str:
    """The name of a table; `UnsupportedQueryError` if it has a schema."""
    if "." in name:
        raise UnsupportedQueryError(f"the name {name}", "tables are in no schema; write a name without a dot")
    return name
