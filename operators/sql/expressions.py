"""Expressions of a query, bound anew: from columns of relations to the columns of a stream.

A query says ``b.price``; a stream has plain columns, each name once. DataFusion's Python binding cannot replace a
column inside an expression, so the expression is taken as protobuf, its columns are exchanged, and it is read again.
Python functions travel by name, and are found in the session that planned the query.

Invariant: of each kind of expression it is known where its parts lie; one that is not known is refused, so that no
column keeps the meaning it had in the query.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from datafusion import Expr, SessionContext

from operators.errors import UnsupportedQueryError
from operators.sql.names import WINDOW_FUNCTIONS
from statebackend import read_wire, write_wire

__all__ = ["CHANGING", "Resolve", "as_expr", "bare", "conjuncts", "mentions", "output_name", "rebound", "shown"]

Resolve: TypeAlias = Callable[[str | None, str], str]
"""The stream's column for a relation and a name."""

_Layout: TypeAlias = Mapping[int, Any]

_EXPR: _Layout = {}
"""Stands for a whole expression within a layout."""

_COLUMN = 1
_AGGREGATE, _SCALAR = 19, 20
_INTERVAL = re.compile(
    r'IntervalMonthDayNano\("IntervalMonthDayNano \{ months: (-?\d+), days: (-?\d+), nanoseconds: (-?\d+) \}"\)'
)
_TEXT = re.compile(r'(?:Large)?Utf8(?:View)?\("([^"]*)"\)')
_NUMBER = re.compile(r"\b(?:U?Int|Float)(?:8|16|32|64)\((-?[\d.e+-]+)\)")

_ONE: _Layout = {1: _EXPR}
_MATCH: _Layout = {2: _EXPR, 3: _EXPR}
# Numbers of DataFusion's LogicalExprNode, and where in each message expressions lie.
_LAYOUTS: dict[int, _Layout] = {
    2: _ONE,  # alias
    3: {},  # literal
    4: _ONE,  # binary: all operands
    6: _ONE,  # is null
    7: _ONE,  # is not null
    8: _ONE,  # not
    9: {1: _EXPR, 3: _EXPR, 4: _EXPR},  # between
    10: {1: _EXPR, 2: {1: _EXPR, 2: _EXPR}, 3: _EXPR},  # case, with pairs of when and then
    11: _ONE,  # cast
    13: _ONE,  # negative
    14: {1: _EXPR, 2: _EXPR},  # in a list
    17: _ONE,  # try_cast
    _AGGREGATE: {2: _EXPR, 3: _EXPR, 4: {1: _EXPR}},  # arguments, filter, order
    _SCALAR: {2: _EXPR},
    **dict.fromkeys(range(25, 31), _ONE),  # is true, is false, is unknown, and their opposites
    **dict.fromkeys(range(31, 34), _MATCH),  # like, ilike, similar to
}
_BINARY, _OPERANDS, _OPERATOR = 4, 1, 3
_FUNCTION_NAME = 1
CHANGING = frozenset(
    {"now", "current_timestamp", "current_date", "current_time", "today", "random", "uuid"}
    | {"input_file_name", "file_row_index"}
)
"""Functions whose value is another one when a row is read again."""


def as_expr(found: Any) -> Expr:
    """An expression as the binding gives it out, wrapped or not."""
    return found if isinstance(found, Expr) else Expr(found)


def bare(expr: Expr) -> Expr:
    """Without its aliases."""
    while expr.variant_name() == "Alias":
        expr = as_expr(expr.to_variant().expr())
    return expr


def shown(expr: Expr) -> str:
    """For messages: as DataFusion shows it, with literals as a query has them."""
    text = bare(expr).canonical_name()
    text = _INTERVAL.sub(lambda m: f"INTERVAL '{_span(*map(int, m.groups()))}'", text)
    text = _TEXT.sub(lambda m: "'" + m[1].replace("'", "''") + "'", text)
    return _NUMBER.sub(r"\1", text)


def _span(months: int, days: int, nanoseconds: int) -> str:
    seconds = f"{nanoseconds / 1e9:.9f}".rstrip("0").rstrip(".")
    parts = [(months, f"{months} months"), (days, f"{days} days"), (nanoseconds, f"{seconds} seconds")]
    return " ".join(text for amount, text in parts if amount) or "0 seconds"


def output_name(expr: Expr) -> tuple[str | None, str]:
    """Relation and name of the column that the expression becomes."""
    if expr.variant_name() == "Column":
        column = expr.to_variant()
        relation = column.relation()
        return (None if relation is None else str(relation)), column.name()
    return None, expr.schema_name()


def conjuncts(expr: Expr) -> Iterator[Expr]:
    """The conditions that it joins by AND, in their order."""
    waiting = [expr]
    while waiting:
        part = waiting.pop()
        if part.variant_name() == "BinaryExpr" and (variant := part.to_variant()).op() == "AND":
            waiting += [as_expr(variant.right()), as_expr(variant.left())]
        else:
            yield part


def rebound(expr: Expr, resolve: Resolve, session: SessionContext) -> Expr:
    """The expression over the stream's columns, without its aliases.

    Raises `UnsupportedQueryError` for a kind of expression that is not known, a subquery, a window function, and a
    function whose value changes from one evaluation to the next, which a restart would show.
    """
    inner = bare(expr)
    data = _encoded(inner, session)
    called = set(_functions(data, shown(inner)))
    if windows := sorted(called & WINDOW_FUNCTIONS.keys()):
        raise UnsupportedQueryError(
            f"{windows[0]}() in {shown(inner)}",
            "a window is said in GROUP BY; of a row, date_bin(size, ts) is its start",
        )
    if changing := sorted(called & CHANGING):
        raise UnsupportedQueryError(
            f"{changing[0]}() in {shown(inner)}",
            "its value would be another one when rows are read again after a restart; use a column of the event",
        )
    return Expr.from_bytes(_rewritten(data, resolve, shown(inner)), session)


def mentions(expr: Expr, session: SessionContext) -> list[tuple[str | None, str]]:
    """The columns in it, as relation and name."""
    found: list[tuple[str | None, str]] = []

    def note(relation: str | None, name: str) -> str:
        found.append((relation, name))
        return name

    _rewritten(_encoded(bare(expr), session), note, shown(expr))
    return found


def _encoded(expr: Expr, session: SessionContext) -> bytes:
    try:
        return expr.to_bytes(session)
    except Exception as error:  # the binding raises bare exceptions
        if "<subquery>" in shown(expr):
            raise UnsupportedQueryError(
                f"the expression {shown(expr)}",
                "a subquery belongs into FROM: join it, with an equality and a bound on event time; LEFT SEMI JOIN is "
                "EXISTS, LEFT ANTI JOIN is NOT EXISTS",
            ) from error
        raise UnsupportedQueryError(
            f"the expression {shown(expr)} ({str(error)[:200]})", "a stream cannot compute this kind of expression"
        ) from error


def _rewritten(data: bytes, resolve: Resolve, text: str) -> bytes:
    fields: list[tuple[int, int | bytes]] = []
    for number, value in read_wire(data):
        if number == _COLUMN and isinstance(value, bytes):
            fields.append((number, _column(value, resolve)))
        elif number in _LAYOUTS and isinstance(value, bytes):
            if number == _BINARY:
                _require_plain_operands(value, text)
            fields.append((number, _parts(value, _LAYOUTS[number], resolve, text)))
        else:
            raise UnsupportedQueryError(f"the expression {text}", "a stream cannot compute this kind of expression")
    return write_wire(fields)


def _require_plain_operands(data: bytes, text: str) -> None:
    """Refuse ``a IS DISTINCT FROM b AND c``, which DataFusion reads as ``a IS DISTINCT FROM (b AND c)``."""
    fields = read_wire(data)
    operators = {value for number, value in fields if number == _OPERATOR}
    if not operators & {b"IsDistinctFrom", b"IsNotDistinctFrom"}:
        return
    _, last = [value for number, value in fields if number == _OPERANDS]
    assert isinstance(last, bytes)
    inner = [value for number, value in read_wire(last) if number == _BINARY and isinstance(value, bytes)]
    if inner and {(_OPERATOR, b"And"), (_OPERATOR, b"Or")} & {*read_wire(inner[0])}:
        raise UnsupportedQueryError(
            f"AND or OR after IS DISTINCT FROM in {text}",
            "DataFusion takes them for a part of the right side; put (… IS DISTINCT FROM …) in parentheses",
        )


def _parts(data: bytes, layout: _Layout, resolve: Resolve, text: str) -> bytes:
    if not any(layout):
        return data
    fields: list[tuple[int, int | bytes]] = []
    for number, value in read_wire(data):
        if number not in layout:
            fields.append((number, value))
        else:
            assert isinstance(value, bytes)
            part = layout[number]
            new = _rewritten(value, resolve, text) if part is _EXPR else _parts(value, part, resolve, text)
            fields.append((number, new))
    return write_wire(fields)


def _column(data: bytes, resolve: Resolve) -> bytes:
    fields = dict(read_wire(data))
    name, relation = fields.get(1, b""), fields.get(2)
    assert isinstance(name, bytes)
    qualifier = None
    if isinstance(relation, bytes):
        inner = dict(read_wire(relation))[1]
        assert isinstance(inner, bytes)
        qualifier = inner.decode()
    return write_wire([(1, resolve(qualifier, name.decode()).encode())])


def _functions(data: bytes, text: str) -> Iterator[str]:
    for number, value in read_wire(data):
        if number == _COLUMN or not isinstance(value, bytes):
            continue
        if number not in _LAYOUTS:
            raise UnsupportedQueryError(f"the expression {text}", "a stream cannot compute this kind of expression")
        if number in (_AGGREGATE, _SCALAR):
            name = dict(read_wire(value))[_FUNCTION_NAME]
            assert isinstance(name, bytes)
            yield name.decode()
        yield from _functions_within(value, _LAYOUTS[number], text)


def _functions_within(data: bytes, layout: _Layout, text: str) -> Iterator[str]:
    if not any(layout):
        return
    for number, value in read_wire(data):
        if number in layout and isinstance(value, bytes):
            part = layout[number]
            yield from _functions(value, text) if part is _EXPR else _functions_within(value, part, text)
