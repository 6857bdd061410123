"""Plans one declared aggregation over a small made-up input, to learn what DataFusion makes of it.

From the declaration alone follow: the state fields of every aggregate (and so its layout), the
result types, and the final node that the merging plans are made of. What DataFusion cannot plan
or execute raises `UnsupportedAggregateError` here, by name, before a single row is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

import pyarrow as pa
from datafusion import AggregateUDF, DataFrame, ExecutionPlan, Expr, SessionContext, col

from statebackend.aggregate_declaration import AggregateCall, Declaration, key_name
from statebackend.errors import UnsupportedAggregateError
from statebackend.plan_surgery import find_node
from statebackend.prepared import new_session
from statebackend.state_layout import SlotState, arrange_state, slot_name

__all__ = ["Trial", "aggregate_slots", "partial_node"]

_TABLE = "trial"


def aggregate_slots(session: SessionContext, rows: DataFrame, declaration: Declaration) -> DataFrame:
    """Every slot's aggregate over the columns ``k0..`` and ``c0..``, named ``a0``, ``a1``, ..."""
    return rows.aggregate(
        [col(key_name(i)) for i in range(len(declaration.keys))],
        [call.expr(session).alias(slot_name(slot)) for slot, call in enumerate(declaration.slot_calls)],
    )


def partial_node(aggregated: DataFrame) -> ExecutionPlan:
    """The node that turns rows into states. Raises `ValueError` when DataFusion planned none."""
    node = find_node(aggregated.execution_plan(), "Partial")
    if node is None:
        raise ValueError("DataFusion plans this aggregation without partial states")
    return node


class Trial:
    """What planning and executing the aggregation over four made-up rows has shown.

    ``slots``: the state layout of each slot. ``results``: the result field of each slot.
    ``state``: the states of the made-up rows, in DataFusion's names. ``final``: the final node.
    """

    slots: list[SlotState]
    results: pa.Schema
    state: pa.RecordBatch
    final: ExecutionPlan

    def __init__(self, declaration: Declaration, udafs: Sequence[AggregateUDF]) -> None:
        self.session = new_session(2, udafs=udafs)
        python = {udaf.name for udaf in udafs}
        keys = len(declaration.keys)
        # Python functions see no nulls here: whether they take them is the user's business.
        nulls = not any(call.function in python for call in declaration.calls)
        sample = pa.RecordBatch.from_arrays(
            [_sample(field.type, nulls=nulls) for field in declaration.placeholders], schema=declaration.placeholders
        )
        self.session.register_record_batches(_TABLE, [[sample], [sample.slice(0, 0)]])
        rows = self.session.table(_TABLE)
        calls = declaration.slot_calls
        fields = [self._state_fields(rows, keys, slot, call) for slot, call in enumerate(calls)]
        try:
            aggregated = aggregate_slots(self.session, rows, declaration)
            results = aggregated.schema()
            self.results = pa.schema([results.field(keys + slot) for slot in range(len(calls))])
            self.state = self._execute(partial_node(aggregated))
            plan = aggregated.execution_plan()
            final = find_node(plan, "FinalPartitioned") or find_node(plan, "Final")
        except Exception as error:  # the binding raises bare exceptions
            raise UnsupportedAggregateError(f"the aggregation cannot be planned: {error}") from error
        expected = [field.type for own in fields for field in own]
        if final is None or self.state.schema.types[keys:] != expected:
            raise UnsupportedAggregateError(f"DataFusion's states are {self.state.schema}, expected {expected}")
        self.final = final
        self.slots = [
            arrange_state(slot, call, self.results.field(slot).type, fields[slot]) for slot, call in enumerate(calls)
        ]

    def _state_fields(self, rows: DataFrame, keys: int, slot: int, call: AggregateCall) -> list[pa.Field]:
        expr: Expr = call.expr(self.session).alias(slot_name(slot))
        try:
            node = partial_node(rows.aggregate([col(key_name(i)) for i in range(keys)], [expr]))
            return list(self._execute(node).schema)[keys:]
        except Exception as error:  # the binding raises bare exceptions
            raise UnsupportedAggregateError(f"{call.described()} cannot be kept as state: {error}") from error

    def _execute(self, node: ExecutionPlan) -> pa.RecordBatch:
        # Partition 0 holds the sample, and its few rows make one batch.
        return next(iter(self.session.execute(node, 0))).to_pyarrow()


def _sample(kind: pa.DataType, *, nulls: bool) -> pa.Array:
    """Four values of a type, the last one null if asked."""
    values = _values(kind, 4)
    if not nulls:
        return values
    return values.take(pa.array([0, 1, 2, None], pa.int64()))


def _values(kind: pa.DataType, count: int) -> pa.Array:
    types = pa.types
    if types.is_dictionary(kind):
        return _values(kind.value_type, count).dictionary_encode().cast(kind)
    if types.is_struct(kind):
        return pa.StructArray.from_arrays([_values(f.type, count) for f in kind], fields=list(kind))
    if types.is_map(kind):
        values = [[(k, v)] for k, v in zip(*(_values(t, count).to_pylist() for t in (kind.key_type, kind.item_type)), strict=True)]
        return pa.array(values, kind)
    if types.is_nested(kind):
        width = kind.list_size if types.is_fixed_size_list(kind) else 1
        items = _values(kind.value_type, count).to_pylist()
        return pa.array([[item] * width for item in items], kind)
    if types.is_fixed_size_binary(kind):
        return pa.array([bytes([i]) * kind.byte_width for i in range(count)], kind)
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return pa.array([bytes([97 + i]) for i in range(count)], kind)
    if types.is_boolean(kind):
        return pa.array([i % 2 == 0 for i in range(count)])
    if types.is_decimal(kind):
        # One digit fits whatever precision and scale.
        return pa.array([Decimal(i).scaleb(-kind.scale) for i in range(count)], kind)
    if types.is_interval(kind):
        return pa.array([pa.MonthDayNano([0, i, 0]) for i in range(count)], kind)
    if types.is_date64(kind):
        return pa.array([i * 86_400_000 for i in range(count)], pa.int64()).cast(kind)
    try:
        return pa.array(range(count), pa.int32() if kind.bit_width == 32 else pa.int64()).cast(kind)
    except (pa.ArrowException, ValueError):
        return pa.nulls(count, kind)
