"""Takes DataFusion's expressions apart: from what the user wrote to an `AggregateCall`.

datafusion-python does not expose the FILTER and ORDER BY of an aggregate, so the structure is read
from the expression's protobuf form. Each argument, filter and order term becomes a numbered
column of a projection under the aggregation, so that the aggregation itself is the same in the
job and in a process that knows only the declaration.

Invariant: Python functions travel by name, never pickled (the session has inlining off).
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from datafusion import DataFrame, Expr, SessionContext

from statebackend.aggregate_declaration import AggregateCall, Argument, PlainValue, SortColumn, column_name
from statebackend.errors import UnsupportedAggregateError
from statebackend.plan_surgery import read_wire

__all__ = ["ArgumentColumns", "output_name", "parse_aggregate", "without_alias"]

# Numbers of DataFusion's LogicalExprNode, AggregateUDFExprNode and SortExprNode.
_AGGREGATE = 19
_NAME, _ARG, _FILTER, _ORDER, _DISTINCT, _DEFINITION, _NULLS = 1, 2, 3, 4, 5, 6, 7
_SORT_EXPR, _ASCENDING, _NULLS_FIRST = 1, 2, 3
_IGNORE_NULLS = 1


class ArgumentColumns:
    """Numbers the expressions that the aggregates read; equal expressions share a column."""

    def __init__(self, session: SessionContext, rows: DataFrame) -> None:
        self._session = session
        self._rows = rows
        self._numbers: dict[bytes, int] = {}
        self.exprs: list[Expr] = []
        self.types: list[pa.DataType] = []

    def number(self, expr: Expr) -> int:
        """The column of this expression."""
        known = expr.to_bytes(self._session)
        if known not in self._numbers:
            kind = self._rows.select(expr.alias("c")).schema().field(0).type
            self._numbers[known] = len(self.exprs)
            self.exprs.append(expr)
            self.types.append(kind)
        return self._numbers[known]

    def argument(self, expr: Expr) -> Argument:
        """The argument: a literal where it is one, else a column."""
        scalar = self._constant(expr)
        if scalar is not None:
            value = scalar.as_py()
            if value is None or isinstance(value, bool | int | float | str | bytes):
                plain: PlainValue = value
                return Argument(type=scalar.type, literal=plain)
        number = self.number(expr)
        return Argument(type=self.types[number], column=number)

    def schema(self) -> pa.Schema:
        """Of the argument columns."""
        return pa.schema([pa.field(column_name(i), kind) for i, kind in enumerate(self.types)])

    def _constant(self, expr: Expr) -> pa.Scalar | None:
        kind = expr.variant_name()
        if kind == "Literal":
            return expr.python_value()
        if kind in ("Negative", "Cast", "TryCast"):
            operand = Expr(expr.rex_call_operands()[0])
            if operand.variant_name() == "Literal":
                rows = self._session.from_pydict({"_": [0]}, name="constant")
                try:
                    return rows.select(expr.alias("v")).collect_column("v")[0]
                finally:
                    self._session.deregister_table("constant")
        return None


def output_name(expr: Expr) -> str:
    """The alias, or the name DataFusion gives the column."""
    return expr.schema_name()


def without_alias(expr: Expr) -> Expr:
    """The expression under any aliases."""
    while expr.variant_name() == "Alias":
        inner = expr.to_variant().expr()
        expr = inner if isinstance(inner, Expr) else Expr(inner)
    return expr


def parse_aggregate(expr: Expr, session: SessionContext, columns: ArgumentColumns) -> AggregateCall:
    """Read one aggregate expression.

    Raises `UnsupportedAggregateError` when it is not a single aggregate function, or when its
    filter or order cannot be read without the job's Python functions.
    """
    name = output_name(expr)
    bare = without_alias(expr)
    try:
        nodes = read_wire(bare.to_bytes(session))
    except Exception as error:  # the binding raises bare exceptions
        raise UnsupportedAggregateError(f"aggregate {name!r} cannot be read: {error}") from error
    if len(nodes) != 1 or nodes[0][0] != _AGGREGATE or not isinstance(nodes[0][1], bytes):
        raise UnsupportedAggregateError(
            f"{name!r} is not a single aggregate function; aggregate first and combine in a projection after it"
        )
    fields = read_wire(nodes[0][1])
    if unknown := {number for number, _ in fields} - set(range(_NAME, _NULLS + 1)):
        raise UnsupportedAggregateError(f"aggregate {name!r} is encoded with the unknown fields {sorted(unknown)}")
    messages: dict[int, list[bytes]] = {}
    flags: dict[int, int] = {}
    for number, value in fields:
        if isinstance(value, bytes):
            messages.setdefault(number, []).append(value)
        else:
            flags[number] = value
    function = messages[_NAME][0].decode()
    # The argument objects keep the Python functions they call; filter and order do not have that way.
    args = [a if isinstance(a, Expr) else Expr(a) for a in bare.to_variant().args()]
    return AggregateCall(
        function=function,
        args=tuple(columns.argument(arg) for arg in args),
        name=name,
        distinct=bool(flags.get(_DISTINCT, 0)),
        order_by=tuple(_sort_column(data, name, session, columns) for data in messages.get(_ORDER, ())),
        ignore_nulls=flags[_NULLS] == _IGNORE_NULLS if _NULLS in flags else None,
        filter=_optional_column(messages.get(_FILTER, ()), name, session, columns),
    )


def _sort_column(data: bytes, name: str, session: SessionContext, columns: ArgumentColumns) -> SortColumn:
    fields = dict(read_wire(data))
    inner = fields[_SORT_EXPR]
    assert isinstance(inner, bytes)
    return SortColumn(
        column=columns.number(_decode(inner, name, session)),
        ascending=bool(fields.get(_ASCENDING, 0)),
        nulls_first=bool(fields.get(_NULLS_FIRST, 0)),
    )


def _optional_column(data: Sequence[bytes], name: str, session: SessionContext, columns: ArgumentColumns) -> int | None:
    return columns.number(_decode(data[0], name, session)) if data else None


def _decode(data: bytes, name: str, session: SessionContext) -> Expr:
    try:
        return Expr.from_bytes(data, session)
    except Exception as error:  # the binding raises bare exceptions
        raise UnsupportedAggregateError(
            f"the filter or order of aggregate {name!r} cannot be read ({error}); compute it in a column first"
        ) from error
