"""Plans one declared aggregation over a small made-up input, to learn what DataFusion makes of it.

From the declaration alone follow: the state fields of every aggregate (and so its layout), the
result types, and the final node that the merging plans are made of. What DataFusion cannot plan
or execute raises `UnsupportedAggregateError` here, by name, before a single row is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

import pyarrow as pa
from datafusion import AggregateUDF, DataFrame, ExecutionPlan, SessionContext, col

from statebackend.aggregate_declaration import AggregateCall, Declaration, key_name
from statebackend.errors import UnsupportedAggregateError
from statebackend.plan_surgery import find_node
from statebackend.prepared import new_session
from statebackend.state_layout import SlotState, arrange_state, positional_type, slot_name

__all__ = ["Trial", "aggregate_slots", "partial_node"]

_TABLE = "trial"


def aggregate_slots(session: SessionContext, rows: DataFrame, declaration: Declaration) -> DataFrame:
    """Every slot's aggregate over the columns ``k0..`` and ``c0..``, named ``a0``, ``a1``, ..."""
    return rows.aggregate(
        [col(key_name(i)) for i in range(len(declaration.keys))],
        [call.expr(session).alias(slot_name(slot)) for slot, call in enumerate(declaration.calls)],
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
    results: list[pa.Field]
    state: pa.RecordBatch
    final: ExecutionPlan

    def __init__(self, declaration: Declaration, udafs: Sequence[AggregateUDF]) -> None:
        self.session = new_session(2, udafs=udafs)
        keys = len(declaration.keys)
        python = {udaf.name for udaf in udafs}
        tables = {nulls: self._made_up_rows(declaration.placeholders, nulls=nulls) for nulls in (False, True)}
        # Python functions see no nulls here: whether they take them is the user's business.
        alone = [
            self._alone(tables[call.function not in python], keys, slot, call)
            for slot, call in enumerate(declaration.calls)
        ]
        try:
            aggregated = aggregate_slots(
                self.session, tables[not any(c.function in python for c in declaration.calls)], declaration
            )
            self.state = self._execute(partial_node(aggregated))
            plan = aggregated.execution_plan()
            final = find_node(plan, "FinalPartitioned") or find_node(plan, "Final")
        except BaseException as error:
            raise _unsupported("the aggregation", error) from error
        expected = [positional_type(kind) for states, _ in alone for kind in states.schema.types]
        if final is None or [positional_type(kind) for kind in self.state.schema.types[keys:]] != expected:
            raise UnsupportedAggregateError(f"DataFusion's states are {self.state.schema}, expected {expected}")
        self.final = final
        self.results = [result for _, result in alone]
        self.slots = [
            arrange_state(slot, call, result.type, states)
            for slot, (call, (states, result)) in enumerate(zip(declaration.calls, alone, strict=True))
        ]

    def _made_up_rows(self, schema: pa.Schema, *, nulls: bool) -> DataFrame:
        rows = pa.RecordBatch.from_arrays([_sample(kind, nulls=nulls) for kind in schema.types], schema=schema)
        name = f"trial_{nulls}"
        self.session.register_record_batches(name, [[rows], [rows.slice(0, 0)]])
        return self.session.table(name)

    def _alone(self, rows: DataFrame, keys: int, slot: int, call: AggregateCall) -> tuple[pa.RecordBatch, pa.Field]:
        """State columns and result field of one slot."""
        expr = call.expr(self.session).alias(slot_name(slot))
        try:
            aggregated = rows.aggregate([col(key_name(i)) for i in range(keys)], [expr])
            states = self._execute(partial_node(aggregated))
            return states.select(range(keys, states.num_columns)), aggregated.schema().field(keys)
        except BaseException as error:
            raise _unsupported(call.described(), error) from error

    def _execute(self, node: ExecutionPlan) -> pa.RecordBatch:
        # Partition 0 holds the rows, and so few of them make one batch.
        return next(iter(self.session.execute(node, 0))).to_pyarrow()


def _unsupported(what: str, error: BaseException) -> BaseException:
    """The error to raise instead. A panic of DataFusion is no ``Exception``, an interrupt is not ours."""
    if isinstance(error, KeyboardInterrupt | SystemExit | UnsupportedAggregateError):
        return error
    return UnsupportedAggregateError(f"{what} cannot be kept as state: {error}")


def _sample(kind: pa.DataType, *, nulls: bool) -> pa.Array:
    """Four values of a type, the last one null if asked.

    DO NOT CHANGE what it gives for a type with nulls: the fingerprint of a sketch is that of its state over them.
    """
    if not nulls and (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return pa.array(["a", "b", "c", "d"], kind)  # with nulls, strings are all null
    values = _values(kind, 4)
    if not nulls:
        return values
    return pa.concat_arrays([values.slice(0, 3), pa.nulls(1, kind)])


def _values(kind: pa.DataType, count: int) -> pa.Array:
    types = pa.types
    if types.is_dictionary(kind):
        return _values(kind.value_type, count).dictionary_encode().cast(kind)
    if types.is_struct(kind):
        return pa.StructArray.from_arrays([_values(f.type, count) for f in kind], fields=list(kind))
    if types.is_map(kind):
        values = [
            [(k, v)]
            for k, v in zip(*(_values(t, count).to_pylist() for t in (kind.key_type, kind.item_type)), strict=True)
        ]
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
