"""What an aggregation is, as plain values: functions, argument types, order, filter, keys.

The declaration is kept in the manifest, and any process rebuilds the merging plans from it
without the job's expressions. The arguments of all aggregates are numbered columns ``c0``,
``c1``, ... of declared types and the group keys are ``k0``, ``k1``, ...; the job alone knows the
expressions behind them.

Invariants:

* Only msgpack values: types are the bytes of an Arrow schema, literals are plain Python values.
* Nothing of it is executed as text: functions are looked up by name among those registered, and
  expressions are built with their API.
* The calls are distinct: equal aggregates under different output names share one state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
from datafusion import Expr, SessionContext, col, lit
from datafusion.common import NullTreatment

from statebackend.errors import UnsupportedAggregateError, UnsupportedFormatError

__all__ = ["AggregateCall", "Argument", "Declaration", "Output", "SortColumn", "column_name", "key_name"]

DECLARATION_FORMAT = 1

PlainValue: TypeAlias = bool | int | float | str | bytes | None


def key_name(index: int) -> str:
    """Name of a group key inside the plans."""
    return f"k{index}"


def column_name(index: int) -> str:
    """Name of an argument column inside the plans."""
    return f"c{index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One argument: an argument column, or (``column`` None) a literal of ``type``."""

    type: pa.DataType
    column: int | None = None
    literal: PlainValue = None

    def expr(self) -> Expr:
        """The argument as an expression over the argument columns."""
        return lit(pa.scalar(self.literal, self.type)) if self.column is None else col(column_name(self.column))


@dataclass(frozen=True, slots=True, kw_only=True)
class SortColumn:
    """One term of an aggregate's ORDER BY."""

    column: int
    ascending: bool
    nulls_first: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregateCall:
    """One aggregate. ``filter`` is the number of a boolean argument column."""

    function: str
    args: tuple[Argument, ...]
    distinct: bool = False
    order_by: tuple[SortColumn, ...] = ()
    ignore_nulls: bool | None = None
    filter: int | None = None

    def expr(self, session: SessionContext) -> Expr:
        """The aggregate over the argument columns.

        Raises `UnsupportedAggregateError` if the function is not registered in the session.
        """
        if self.function not in session.udafs():
            raise UnsupportedAggregateError(
                f"aggregate function {self.function!r} is not registered in this process; "
                "register the Python UDAF of this name to merge its states"
            )
        built = session.udaf(self.function)(*(arg.expr() for arg in self.args))
        if not (self.order_by or self.distinct or self.filter is not None or self.ignore_nulls is not None):
            return built
        builder = built.order_by(
            *(col(column_name(s.column)).sort(ascending=s.ascending, nulls_first=s.nulls_first) for s in self.order_by)
        )
        if self.distinct:
            builder = builder.distinct()
        if self.filter is not None:
            builder = builder.filter(col(column_name(self.filter)))
        if self.ignore_nulls is not None:
            builder = builder.null_treatment(
                NullTreatment.IGNORE_NULLS if self.ignore_nulls else NullTreatment.RESPECT_NULLS
            )
        return builder.build()

    def described(self) -> str:
        """For messages."""
        distinct = "DISTINCT " if self.distinct else ""
        args = ", ".join(repr(a.literal) if a.column is None else str(a.type) for a in self.args)
        return f"{self.function}({distinct}{args})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One result column: the result of a call, and of the calls that tell what it saw.

    ``nan``: whether it saw a NaN. DataFusion's grouped ``min`` and ``max`` forget what they saw
    before a NaN, so their answer depends on the order of the rows. A minimum or maximum of floats is
    therefore taken over the numbers alone, beside a ``bool_or`` of *is NaN*; together they give what
    DataFusion gives without GROUP BY, where a NaN is greater than every number.

    ``seen``: how many values a sum has seen, where rows can be retracted: the sum of none is null, and its
    state alone cannot tell that from zero.
    """

    name: str
    call: int
    nan: int | None = None
    seen: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """A whole aggregation.

    ``keys``: the group columns with their names. ``columns``: types of the argument columns, named
    ``c0``, ``c1``, ... ``calls``: the distinct aggregates, each with a state of its own.
    ``outputs``: the result columns.
    """

    keys: pa.Schema
    columns: pa.Schema
    calls: tuple[AggregateCall, ...]
    outputs: tuple[Output, ...]

    @property
    def placeholders(self) -> pa.Schema:
        """Columns ``k0..`` and ``c0..``: what the aggregates are evaluated over."""
        keys = [pa.field(key_name(i), f.type, f.nullable) for i, f in enumerate(self.keys)]
        return pa.schema([*keys, *self.columns])

    def encode(self) -> dict[str, Any]:
        """As msgpack values."""
        return {
            "format": DECLARATION_FORMAT,
            "keys": self.keys.serialize().to_pybytes(),
            "columns": self.columns.serialize().to_pybytes(),
            "calls": [_encode_call(call) for call in self.calls],
            "outputs": [_encode_output(output) for output in self.outputs],
        }

    @classmethod
    def decode(cls, value: Mapping[str, Any]) -> Declaration:
        """The inverse of `encode`, validated.

        Raises `UnsupportedFormatError` for a newer format, `ValueError` for anything malformed.
        """
        if value.get("format") != DECLARATION_FORMAT:
            raise UnsupportedFormatError(
                f"aggregation declaration has format {value.get('format')!r}, this version reads {DECLARATION_FORMAT}"
            )
        try:
            columns = _read_schema(value["columns"])
            calls = tuple(_decode_call(call, columns) for call in value["calls"])
            outputs = tuple(
                Output(
                    name=str(o["name"]),
                    call=_number(o["call"], len(calls)),
                    nan=None if o["nan"] is None else _number(o["nan"], len(calls)),
                    seen=_number(o["seen"], len(calls)) if "seen" in o else None,
                )
                for o in value["outputs"]
            )
            keys = _read_schema(value["keys"])
        except (KeyError, TypeError, pa.ArrowException, OSError) as error:
            raise ValueError(f"aggregation declaration is malformed: {error!r}") from error
        if columns.names != [column_name(i) for i in range(len(columns))]:
            raise ValueError(f"aggregation declaration has argument columns {columns.names}, expected c0, c1, ...")
        return cls(keys=keys, columns=columns, calls=calls, outputs=outputs)


def _number(value: Any, count: int) -> int:
    if not isinstance(value, int) or not 0 <= value < count:
        raise ValueError(f"aggregation declaration is malformed: number {value!r} of {count}")
    return value


def _read_schema(data: bytes) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(data))


def _type_bytes(kind: pa.DataType) -> bytes:
    data: bytes = pa.schema([pa.field("", kind)]).serialize().to_pybytes()
    return data


def _encode_output(output: Output) -> dict[str, Any]:
    seen = {} if output.seen is None else {"seen": output.seen}
    return {"name": output.name, "call": output.call, "nan": output.nan, **seen}


def _encode_call(call: AggregateCall) -> dict[str, Any]:
    return {
        "function": call.function,
        "args": [
            {"type": _type_bytes(a.type), **({"literal": a.literal} if a.column is None else {"column": a.column})}
            for a in call.args
        ],
        "distinct": call.distinct,
        "order_by": [
            {"column": s.column, "ascending": s.ascending, "nulls_first": s.nulls_first} for s in call.order_by
        ],
        "ignore_nulls": call.ignore_nulls,
        "filter": call.filter,
    }


def _decode_call(value: Mapping[str, Any], columns: pa.Schema) -> AggregateCall:
    args = []
    for arg in value["args"]:
        kind = _read_schema(arg["type"]).field(0).type
        if "column" in arg:
            args.append(Argument(type=kind, column=_number(arg["column"], len(columns))))
        else:
            args.append(Argument(type=kind, literal=arg["literal"]))
    return AggregateCall(
        function=str(value["function"]),
        args=tuple(args),
        distinct=bool(value["distinct"]),
        order_by=tuple(
            SortColumn(
                column=_number(s["column"], len(columns)),
                ascending=bool(s["ascending"]),
                nulls_first=bool(s["nulls_first"]),
            )
            for s in value["order_by"]
        ),
        ignore_nulls=None if value["ignore_nulls"] is None else bool(value["ignore_nulls"]),
        filter=None if value["filter"] is None else _number(value["filter"], len(columns)),
    )
