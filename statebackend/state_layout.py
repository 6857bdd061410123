"""How partial aggregate states lie in columns: our own layouts, and opaque ones.

For the common aggregates the columns, their names and their meaning are ours and have a version,
so a state outlives a change inside DataFusion. Slot number i owns the columns ``a<i>_<part>``:

==================================  ===================  ===============================
aggregate                           parts                merged by
==================================  ===================  ===============================
count                               count                sum
sum                                 sum                  sum
min, max                            min or max           min or max
avg                                 count, sum           sum, sum
bool_and/or, bit_and/or/xor         the function's name  the function
var, var_pop, stddev, stddev_pop    count, mean, m2      Chan's formula (DataFusion's)
anything else, and DISTINCT         s0, s1, ...          DataFusion's PartialReduce
==================================  ===================  ===============================

``mean`` is the arithmetic mean and ``m2`` the sum of squared distances from it. Opaque columns are
DataFusion's own, by position (also the fields of structs inside: it names some of them after
columns of the plan); the fingerprint holds their schema, and for a sketch made of hashes
its state over fixed values, so that another hash function is found out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from datafusion import Expr, col, lit
from datafusion import functions as f

from statebackend.aggregate_declaration import AggregateCall
from statebackend.errors import UnsupportedAggregateError

__all__ = [
    "LAYOUTS",
    "Layout",
    "SlotState",
    "arrange_state",
    "positional_type",
    "recast",
    "slot_and_part",
    "slot_name",
    "state_positions",
]

_HASHING = ("approx_distinct",)

Merge = Callable[[Expr], Expr]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Our own layout of one function. DO NOT CHANGE one without raising its version.

    ``parts``: our part names to the names of DataFusion's state fields.
    ``merges``: the ordinary aggregate that merges each part, or None when PartialReduce does.
    """

    version: int
    parts: Mapping[str, str]
    merges: tuple[Merge, ...] | None


_VARIANCE = Layout(version=1, parts={"count": "count", "mean": "mean", "m2": "m2"}, merges=None)

LAYOUTS: Mapping[str, Layout] = {
    "count": Layout(version=1, parts={"count": "count"}, merges=(f.sum,)),
    "sum": Layout(version=1, parts={"sum": "sum"}, merges=(f.sum,)),
    "min": Layout(version=1, parts={"min": "value"}, merges=(f.min,)),
    "max": Layout(version=1, parts={"max": "value"}, merges=(f.max,)),
    "avg": Layout(version=1, parts={"count": "count", "sum": "sum"}, merges=(f.sum, f.sum)),
    "bool_and": Layout(version=1, parts={"bool_and": "bool_and"}, merges=(f.bool_and,)),
    "bool_or": Layout(version=1, parts={"bool_or": "bool_or"}, merges=(f.bool_or,)),
    "bit_and": Layout(version=1, parts={"bit_and": "bit_and"}, merges=(f.bit_and,)),
    "bit_or": Layout(version=1, parts={"bit_or": "bit_or"}, merges=(f.bit_or,)),
    "bit_xor": Layout(version=1, parts={"bit_xor": "bit_xor"}, merges=(f.bit_xor,)),
    "var": _VARIANCE,
    "var_pop": _VARIANCE,
    "stddev": _VARIANCE,
    "stddev_pop": _VARIANCE,
}


def slot_name(slot: int) -> str:
    """Prefix of a slot's state columns, and the name of its result inside the plans."""
    return f"a{slot}"


def slot_and_part(column: str) -> tuple[int, str]:
    """The slot of a state column and the part that it holds, from its name. Raises ``ValueError`` for another one."""
    match = re.fullmatch(r"a(\d+)_(\w+)", column)
    if match is None:
        raise ValueError(f"{column!r} is no column of the states of an aggregation")
    return int(match[1]), match[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """The state columns of one slot.

    ``fields`` are ours, in our order; ``source`` the position of each among DataFusion's fields of
    the slot. ``layout`` is None for an opaque state. ``sketch`` is the digest of the state over
    fixed values, for functions that keep hashes.
    """

    slot: int
    call: AggregateCall
    result: pa.DataType
    fields: tuple[pa.Field, ...]
    source: tuple[int, ...]
    layout: Layout | None
    sketch: str

    @property
    def simple(self) -> bool:
        """Whether ordinary aggregates merge this state and an expression finalises it."""
        if self.layout is None or self.layout.merges is None:
            return False
        # An average of decimals or durations is rounded in a way that belongs to DataFusion.
        return self.call.function != "avg" or self.result == self.fields[1].type == pa.float64()

    def merged(self) -> list[Expr]:
        """One aggregate per state column, named like the column (simple states only)."""
        assert self.layout is not None
        assert self.layout.merges is not None
        return [
            merge(_column(field)).alias(field.name)
            for merge, field in zip(self.layout.merges, self.fields, strict=True)
        ]

    def narrowed(self) -> list[Expr]:
        """Merged state columns, back in the types of the state."""
        return [_column(field).cast(field.type).alias(field.name) for field in self.fields]

    def finalised(self) -> Expr:
        """The result, over merged state columns (simple states only)."""
        if self.call.function == "avg":
            count, total = (_column(field) for field in self.fields)
            value = total / f.nullif(count.cast(pa.float64()), lit(0.0))
        else:
            value = _column(self.fields[0]).cast(self.result)
        return value.alias(slot_name(self.slot))

    def described(self) -> list[str]:
        """What must agree for stored states to be merged: part of the fingerprint."""
        kind = f"opaque {self.call.function}" if self.layout is None else f"own {self.layout.version}"
        return [kind, *(f"{field.name}: {field.type}" for field in self.fields), *filter(None, [self.sketch])]


def arrange_state(slot: int, call: AggregateCall, result: pa.DataType, states: pa.RecordBatch) -> SlotState:
    """Choose the layout for DataFusion's states of one aggregate, given those over the fixed values.

    Raises `UnsupportedAggregateError` when DataFusion's fields are not those our layout expects.
    """
    layout = None if call.distinct else LAYOUTS.get(call.function)
    name, fields = slot_name(slot), list(states.schema)
    sketch = ""
    if call.function in _HASHING:
        values = sorted(repr(row) for row in zip(*(column.to_pylist() for column in states.columns), strict=True))
        sketch = hashlib.sha256("".join(values).encode()).hexdigest()
    if layout is None:
        renamed = tuple(
            pa.field(f"{name}_s{i}", positional_type(field.type), field.nullable) for i, field in enumerate(fields)
        )
        source = tuple(range(len(fields)))
    else:
        positions = {field.name: i for i, field in enumerate(fields)}
        try:
            source = tuple(positions[f"{name}[{theirs}]"] for theirs in layout.parts.values())
        except KeyError as error:
            raise UnsupportedAggregateError(
                f"{call.described()}: DataFusion's state has the fields {sorted(positions)}, expected {error}"
            ) from error
        if len(source) != len(fields):
            raise UnsupportedAggregateError(
                f"{call.described()}: DataFusion's state has the fields {sorted(positions)}, "
                f"expected {list(layout.parts.values())}"
            )
        renamed = tuple(
            pa.field(f"{name}_{ours}", fields[at].type, fields[at].nullable)
            for ours, at in zip(layout.parts, source, strict=True)
        )
    return SlotState(slot=slot, call=call, result=result, fields=renamed, source=source, layout=layout, sketch=sketch)


def state_positions(keys: int, slots: Sequence[SlotState]) -> list[int]:
    """For every column of our states, its position among the columns of DataFusion's."""
    positions = list(range(keys))
    for slot in slots:
        start = len(positions)
        positions += [start + at for at in slot.source]
    return positions


def positional_type(kind: pa.DataType) -> pa.DataType:
    """The type with the fields of its structs named by position."""
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f"s{i}", positional_type(f.type), f.nullable) for i, f in enumerate(kind)])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(positional_type(kind.value_type)))
    return kind


def recast(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The array in a type of the same structure: struct fields by position, values cast where they differ."""
    if array.type == kind:
        return array
    types = pa.types
    if types.is_struct(array.type) and types.is_struct(kind):
        children = [recast(array.field(i), f.type) for i, f in enumerate(kind)]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())
    if types.is_list(array.type) and types.is_list(kind):
        values = recast(array.values, kind.value_type)
        return pa.Array.from_buffers(kind, len(array), array.buffers()[:2], offset=array.offset, children=[values])
    return array.cast(kind)


def _column(field: pa.Field) -> Expr:
    return col(f'"{field.name}"')
