"""Takes DataFusion's expressions apart: from what the user wrote to an `AggregateCall`.

datafusion-python does not expose the FILTER and ORDER BY of an aggregate, so the structure is read
from the expression's protobuf form. Each argument, filter and order term becomes a numbered
column of a projection under the aggregation, so that the aggregation itself is the same in the
job and in a process that knows only the declaration.

Invariant: Python functions travel by name, never pickled (the session has inlining off).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
from datafusion import DataFrame, Expr, SessionContext
from datafusion import functions as f

from statebackend.aggregate_declaration import AggregateCall, Argument, Output, SortColumn, column_name
from statebackend.errors import UnsupportedAggregateError
from statebackend.plan_surgery import read_wire
from statebackend.state_layout import LAYOUTS

__all__ = ["AggregateReader"]

# Numbers of DataFusion's LogicalExprNode, AggregateUDFExprNode and SortExprNode.
_AGGREGATE = 19
_NAME, _ARG, _FILTER, _ORDER, _DISTINCT, _DEFINITION, _NULLS = 1, 2, 3, 4, 5, 6, 7
_SORT_EXPR, _ASCENDING, _NULLS_FIRST = 1, 2, 3
_IGNORE_NULLS = 1

RETRACTABLE = frozenset({"count", "sum", "avg"})
"""Functions whose states are merged by adding, so that rows are taken back by adding their negated states."""

_IDEMPOTENT = ("min", "max", "bool_and", "bool_or", "bit_and", "bit_or")


class AggregateReader:
    """Reads aggregate expressions over ``rows``; numbers the calls and the columns they take.

    ``exprs`` and ``types`` belong to the argument columns. Equal aggregates share a call, and equal
    plain columns an argument column; an expression may hide two Python functions of one name, so
    each has a column of its own.
    """

    def __init__(self, session: SessionContext, rows: DataFrame, *, retractable: bool = False) -> None:
        self._session = session
        self._retractable = retractable
        self._rows = rows
        self._numbers: dict[bytes, int] = {}
        self._calls: dict[AggregateCall, int] = {}
        self._not_nan: dict[int, tuple[int, int]] = {}
        self.exprs: list[Expr] = []
        self.types: list[pa.DataType] = []

    @property
    def calls(self) -> tuple[AggregateCall, ...]:
        """The distinct calls so far."""
        return tuple(self._calls)

    def columns(self) -> pa.Schema:
        """Of the argument columns so far."""
        return pa.schema([pa.field(column_name(i), kind) for i, kind in enumerate(self.types)])

    def read(self, expr: Expr) -> Output:
        """Read one aggregate expression with its alias.

        Raises `UnsupportedAggregateError` when it is not a single aggregate function, when its
        filter or order cannot be read without the job's Python functions, or when DataFusion
        itself answers it differently for the same rows in another order.
        """
        name = expr.schema_name()
        bare = _without_alias(expr)
        messages, flags = _aggregate_fields(bare, name, self._session)
        function = messages[_NAME][0].decode()
        # The argument objects keep the Python functions they call; filter and order do not have that way.
        args = [a if isinstance(a, Expr) else Expr(a) for a in bare.to_variant().args()]
        order = messages.get(_ORDER, ()) if function not in LAYOUTS else ()
        where = messages.get(_FILTER)
        call = AggregateCall(
            function=function,
            args=tuple(self._argument(arg) for arg in args),
            distinct=bool(flags.get(_DISTINCT, 0)) and function not in _IDEMPOTENT,
            order_by=tuple(self._sort_column(term, name) for term in order),
            ignore_nulls=flags[_NULLS] == _IGNORE_NULLS if _NULLS in flags else None,
            filter=None if where is None else self._column(_decode(where[0], name, self._session)),
        )
        _refuse_undefined(call, self.types)
        if self._retractable:
            return self._read_retractable(name, call)
        if function in ("min", "max") and pa.types.is_floating(call.args[0].type):
            number, is_nan = self._nan_apart(args[0])
            flag = replace(call, function="bool_or", args=(Argument(type=pa.bool_(), column=is_nan),))
            call = replace(call, args=(Argument(type=self.types[number], column=number),))
            return Output(name=name, call=self._call(call), nan=self._call(flag))
        return Output(name=name, call=self._call(call))

    def _read_retractable(self, name: str, call: AggregateCall) -> Output:
        """A call whose states can be subtracted, and for a sum how many values it has seen."""
        if call.function not in RETRACTABLE or call.distinct:
            raise UnsupportedAggregateError(
                f"{call.described()}: rows can be taken back from {', '.join(sorted(RETRACTABLE))} "
                "without DISTINCT only; of the other aggregates the state does not tell what remains"
            )
        if call.function == "count":
            return Output(name=name, call=self._call(call))
        kind = call.args[0].type
        if call.function == "avg" and (pa.types.is_decimal(kind) or pa.types.is_duration(kind)):
            # DataFusion divides these in whole numbers, by zero where every row was taken back.
            raise UnsupportedAggregateError(
                f"{call.described()}: an average from which rows can be taken back needs floats or integers; "
                "cast the column"
            )
        if pa.types.is_unsigned_integer(kind):
            raise UnsupportedAggregateError(
                f"{call.described()}: a sum from which rows can be taken back needs a signed type; cast the column"
            )
        seen = None if call.function == "avg" else self._call(replace(call, function="count"))
        return Output(name=name, call=self._call(call), seen=seen)

    def _call(self, call: AggregateCall) -> int:
        return self._calls.setdefault(call, len(self._calls))

    def _column(self, expr: Expr) -> int:
        plain = expr.to_bytes(self._session) if expr.variant_name() == "Column" else None
        if plain is not None and plain in self._numbers:
            return self._numbers[plain]
        self.types.append(self._rows.select(expr.alias("c")).schema().field(0).type)
        self.exprs.append(expr)
        if plain is not None:
            self._numbers[plain] = len(self.exprs) - 1
        return len(self.exprs) - 1

    def _nan_apart(self, expr: Expr) -> tuple[int, int]:
        """Columns with the value unless it is NaN, and with whether it is NaN."""
        base = self._column(expr)
        if base not in self._not_nan:
            nan = f.isnan(expr)
            self._not_nan[base] = self._column(f.when(~nan, expr).end()), self._column(nan)
        return self._not_nan[base]

    def _argument(self, expr: Expr) -> Argument:
        scalar = self._constant(expr)
        if scalar is not None:
            value = scalar.as_py()
            if value is None or isinstance(value, bool | int | float | str | bytes):
                return Argument(type=scalar.type, literal=value)
        number = self._column(expr)
        return Argument(type=self.types[number], column=number)

    def _constant(self, expr: Expr) -> pa.Scalar | None:
        kind = expr.variant_name()
        if kind == "Literal":
            return expr.python_value()
        if kind not in ("Negative", "Cast", "TryCast"):
            return None
        operand = expr.rex_call_operands()[0]
        if (operand if isinstance(operand, Expr) else Expr(operand)).variant_name() != "Literal":
            return None
        self._session.register_record_batches("constant", [[pa.record_batch({"one": [1]})]])
        values = self._session.table("constant").select(expr.alias("value")).to_arrow_table()
        self._session.deregister_table("constant")
        return values.column(0)[0]

    def _sort_column(self, data: bytes, name: str) -> SortColumn:
        fields = dict(read_wire(data))
        inner = fields[_SORT_EXPR]
        assert isinstance(inner, bytes)
        return SortColumn(
            column=self._column(_decode(inner, name, self._session)),
            ascending=bool(fields.get(_ASCENDING, 0)),
            nulls_first=bool(fields.get(_NULLS_FIRST, 0)),
        )


def _without_alias(expr: Expr) -> Expr:
    while expr.variant_name() == "Alias":
        inner = expr.to_variant().expr()
        expr = inner if isinstance(inner, Expr) else Expr(inner)
    return expr


def _aggregate_fields(expr: Expr, name: str, session: SessionContext) -> tuple[dict[int, list[bytes]], dict[int, int]]:
    """The nested messages and the integers of an AggregateUDFExprNode, by field number."""
    try:
        nodes = read_wire(expr.to_bytes(session))
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
    return messages, flags


def _decode(data: bytes, name: str, session: SessionContext) -> Expr:
    try:
        return Expr.from_bytes(data, session)
    except Exception as error:  # the binding raises bare exceptions
        raise UnsupportedAggregateError(
            f"the filter or order of aggregate {name!r} cannot be read ({error}); compute it in a column first"
        ) from error


def _refuse_undefined(call: AggregateCall, types: Sequence[pa.DataType]) -> None:
    """Refuse what DataFusion itself answers differently for the same rows in another order."""
    first = call.args[0].type if call.args else pa.null()
    if call.function in ("min", "max") and pa.types.is_nested(first) and not _is_ordered(first):
        raise UnsupportedAggregateError(
            f"{call.described()}: nulls or NaN inside a value of type {first} leave its order undefined"
        )
    if nested := [types[s.column] for s in call.order_by if pa.types.is_nested(types[s.column])]:
        raise UnsupportedAggregateError(
            f"{call.described()} is ordered by a column of type {nested[0]}: nulls inside leave its order undefined; "
            "order by its parts"
        )
    at_end = any(arg.column is None and arg.literal in (0, 1) for arg in call.args[1:])
    if call.function in ("percentile_cont", "quantile_cont") and pa.types.is_floating(first) and at_end:
        raise UnsupportedAggregateError(
            f"{call.described()}: DataFusion makes a minimum or maximum of it that depends on the order of the rows "
            "when there are NaNs; use min or max"
        )


def _is_ordered(kind: pa.DataType) -> bool:
    """Whether DataFusion orders all values of a type: not structs and floats, nor lists of them."""
    if pa.types.is_struct(kind) or pa.types.is_map(kind) or pa.types.is_floating(kind):
        return False
    return all(_is_ordered(kind.field(i).type) for i in range(kind.num_fields))
