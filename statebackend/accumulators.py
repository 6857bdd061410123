"""DataFusion's accumulators, made durable: one aggregation as partial, reduce and final plans.

``partial`` turns rows into accumulator states, one row per key and call; ``reduce`` merges states
into states; ``final`` merges states into results. Whatever tree of merges lies between, the
result is that of one ``GROUP BY`` over all rows. The job compiles an `Aggregation` from
expressions; a `StateMerger` is rebuilt from its declaration alone, in any process.

How: ``partial`` executes the ``mode=Partial`` node of a plan made once. When every aggregate of
the aggregation has a simple state (see ``state_layout``), ``reduce`` and ``final`` are ordinary
aggregations over the state columns, planned once; otherwise DataFusion's own PartialReduce and
Final run over the states (see ``plan_surgery``).

Invariants:

* Group keys in states are canonical: one NaN, no negative zero, dictionaries decoded. Null is a key.
* States are merged in the order they are given, so ``first_value`` without an order means the first
  of the stream (unless an ``array_agg`` or the like of the same aggregation sorts the rows).
* What cannot work raises `UnsupportedAggregateError` when it is compiled: a trial runs every step.
* All calls are thread-safe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from datafusion import AggregateUDF, DataFrame, ExecutionPlan, Expr, SessionContext, col, functions, lit, udf

from statebackend.aggregate_declaration import Declaration, Output, column_name, key_name
from statebackend.aggregate_expressions import AggregateReader
from statebackend.aggregate_trial import Trial, aggregate_slots, partial_node
from statebackend.errors import UnsupportedAggregateError
from statebackend.keys import canonical_schema, canonicalise
from statebackend.plan_surgery import AggregateMode, StatePlan
from statebackend.prepared import PreparedPlan, new_session
from statebackend.state_layout import SlotState, recast, state_positions

__all__ = ["Aggregation", "StateMerger"]

FINGERPRINT_VERSION = 1


class StateMerger:
    """Merges and finalises the states of one aggregation, known by its declaration alone."""

    def __init__(self, declaration: Declaration, udafs: Mapping[str, AggregateUDF]) -> None:
        self._declaration = declaration
        self._udafs = udafs
        trial = Trial(declaration, tuple(udafs.values()))
        self._slots = trial.slots
        keys = [pa.field(key.name, key.type) for key in declaration.keys]
        fields = [field for slot in self._slots for field in slot.fields]
        results = [trial.results[output.call].with_name(output.name) for output in declaration.outputs]
        self._positions = state_positions(len(keys), self._slots)
        # Tables keep canonical types under our names; the plans need DataFusion's own types.
        theirs = [trial.state.schema.field(at).type for at in self._positions[len(keys) :]]
        self._inner_schema = pa.schema(
            [
                *(pa.field(key_name(i), key.type) for i, key in enumerate(keys)),
                *(field.with_type(kind) for field, kind in zip(fields, theirs, strict=True)),
            ]
        )
        self._key_schema = pa.schema(keys)
        self._state_schema = canonical_schema(pa.schema([*keys, *fields])).remove_metadata()
        self._result_schema = pa.schema([*keys, *results]).remove_metadata()
        for schema, what in ((self._state_schema, "state"), (self._result_schema, "result")):
            if len(set(schema.names)) != len(schema.names):
                raise ValueError(f"{what} columns {schema.names} have duplicate names; give the expressions an alias")
        self._fingerprint = _fingerprint(self._key_schema, self._slots)
        self._merge: _Merge = (
            _PreparedMerge(self._inner_schema, len(keys), self._slots)
            if all(slot.simple for slot in self._slots)
            else _SurgeryMerge(trial, self._inner_schema, self._positions)
        )
        self._check(trial.state)

    @classmethod
    def from_declaration(
        cls, declaration: Mapping[str, Any], udafs: Mapping[str, AggregateUDF] | None = None
    ) -> StateMerger:
        """Rebuild the plans in any process. ``udafs`` are the Python UDAFs of this process, by name.

        Raises `UnsupportedAggregateError` when a function is not known here,
        `UnsupportedFormatError` for a declaration of a newer version, `ValueError` for a malformed one.
        """
        return cls(Declaration.decode(declaration), udafs or {})

    @property
    def fingerprint(self) -> str:
        """Of the state columns and their meaning: states of another fingerprint must not be merged."""
        return self._fingerprint

    @property
    def key_schema(self) -> pa.Schema:
        """The group columns, in canonical types."""
        return self._key_schema

    @property
    def state_schema(self) -> pa.Schema:
        """The group columns and the state columns (see ``state_layout``), in canonical types."""
        return self._state_schema

    @property
    def result_schema(self) -> pa.Schema:
        """The group columns and the finalised aggregates under their output names."""
        return self._result_schema

    def regrouped(self, keys: pa.Schema) -> StateMerger:
        """The same aggregates under other group columns; the state columns keep their names."""
        return StateMerger(replace(self._declaration, keys=keys), self._udafs)

    def declared(self, keys: pa.Schema, results: Collection[str]) -> Mapping[str, Any]:
        """The declaration of the same states under other group columns, with some of the results."""
        outputs = tuple(output for output in self._declaration.outputs if output.name in results)
        return replace(self._declaration, keys=keys, outputs=outputs).encode()

    def reduce(self, states: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        """Merge states in their order: ``state_schema`` in and out, one row per key.

        Raises `ValueError` when a batch has other columns.
        """
        inner = self._to_inner(states)
        return [_relabel(batch.columns, self._state_schema) for batch in self._merge.reduce(inner)] if inner else []

    def final(self, states: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        """Merge and finalise states: ``state_schema`` in (keys may repeat), ``result_schema`` out, one row per key.

        Raises `ValueError` when a batch has other columns.
        """
        inner = self._to_inner(states)
        return [self._to_result(batch) for batch in self._merge.final(inner)] if inner else []

    @property
    def simple(self) -> bool:
        """Whether ordinary aggregations merge every state."""
        return isinstance(self._merge, _PreparedMerge)

    def final_inline(self, states: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        """As `final`, wholly on the caller's thread (see `PreparedPlan.run_inline`); only if it is ``simple``."""
        if not isinstance(self._merge, _PreparedMerge):
            raise ValueError("states that DataFusion's own plans merge cannot be merged on the caller's thread alone")
        inner = self._to_inner(states)
        return [self._to_result(batch) for batch in self._merge.final_inline(inner)] if inner else []

    def adopt(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """States as DataFusion's partial aggregation lays them out, as ``state_schema``."""
        return _relabel([batch.column(at) for at in self._positions], self._state_schema)

    def _to_inner(self, states: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        for batch in states:
            if batch.schema.names != self._state_schema.names:
                raise ValueError(f"state batch has columns {batch.schema.names}, expected {self._state_schema.names}")
        return [_relabel(batch.columns, self._inner_schema) for batch in states if batch.num_rows]

    def _to_result(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        columns, keys = batch.columns, len(self._key_schema)
        results = columns[keys:]
        arrays = [self._output(output, results) for output in self._declaration.outputs]
        return pa.RecordBatch.from_arrays([*columns[:keys], *arrays], schema=self._result_schema)

    def _output(self, output: Output, results: Sequence[pa.Array]) -> pa.Array:
        value = results[output.call]
        if output.nan is not None:
            return _with_nan(value, results[output.nan], self._declaration.calls[output.call].function)
        if output.seen is not None:
            return pc.if_else(pc.equal(results[output.seen], 0), pa.scalar(None, value.type), value)
        return value

    def _check(self, state: pa.RecordBatch) -> None:
        """Run every step once on the trial's states, and on no rows."""
        try:
            states = [self.adopt(state)]
            once = self.reduce(states)
            rows = sum(batch.num_rows for batch in self.final([*self.reduce([*once, *states]), *states]))
            none = [*self._merge.reduce([]), *self._merge.final([])]
        except BaseException as error:  # a panic of DataFusion is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            calls = ", ".join(call.described() for call in self._declaration.calls)
            raise UnsupportedAggregateError(f"the states of {calls} cannot be merged: {error}") from error
        if rows != state.num_rows or any(batch.num_rows for batch in none):
            raise UnsupportedAggregateError(f"a trial merge of {state.num_rows} keys gave {rows} rows, and {none}")


class Aggregation:
    """One aggregation on the job's side: turns rows into states. Made by `compile`."""

    def __init__(self, declaration: Declaration, partial: PreparedPlan, merger: StateMerger) -> None:
        self._declaration = declaration.encode()
        self._partial = partial
        self._merger = merger

    @classmethod
    def compile(
        cls,
        input_schema: pa.Schema,
        group_by: Sequence[Expr],
        aggregates: Sequence[Expr],
        *,
        udafs: Sequence[AggregateUDF] = (),
        relation: str | None = None,
        retractable: bool = False,
    ) -> Aggregation:
        """Compile a ``GROUP BY`` over batches of ``input_schema``.

        ``aggregates`` are single aggregate functions, with alias, filter, order, distinct and null
        treatment as wanted; ``udafs`` the Python UDAFs among them. ``relation`` is the table name
        with which the expressions qualify their columns, if they do (expressions taken from SQL).
        ``retractable``: rows will be taken back (`retract`), which only count, sum and avg allow.

        Raises `UnsupportedAggregateError` for what cannot be kept as state, `ValueError` for no
        keys, no aggregates, duplicate names, or an expression that does not fit ``input_schema``.
        """
        if not group_by or not aggregates:
            raise ValueError("an aggregation needs at least one group key and at least one aggregate")
        session = new_session(2, udafs=udafs)
        empty = pa.RecordBatch.from_arrays([pa.nulls(0, t) for t in input_schema.types], schema=input_schema)
        session.register_record_batches("rows", [[empty]])
        rows = _qualified(session.table("rows"), relation)
        try:
            keys = rows.select(*group_by).schema()
            reader = AggregateReader(session, rows, retractable=retractable)
            outputs = tuple(reader.read(expr) for expr in aggregates)
        except (UnsupportedAggregateError, ValueError):
            raise
        except Exception as error:  # the binding raises bare exceptions
            raise ValueError(f"an expression does not fit the columns {input_schema.names}: {error}") from error
        try:
            canonical = canonical_schema(keys)
        except TypeError as error:
            raise UnsupportedAggregateError(f"group key: {error}") from error
        declaration = Declaration(
            keys=pa.schema([pa.field(key.name, key.type) for key in canonical]),
            columns=reader.columns(),
            calls=reader.calls,
            outputs=outputs,
        )
        merger = StateMerger(declaration, {udaf.name: udaf for udaf in udafs})
        projected = [
            *(_canonical_key(expr, keys.field(i).type).alias(key_name(i)) for i, expr in enumerate(group_by)),
            *(expr.alias(column_name(i)) for i, expr in enumerate(reader.exprs)),
        ]
        shape = rows.select(*projected).schema()
        projection = [_as_planned(expr, field) for expr, field in zip(projected, shape, strict=True)]

        def build(session: SessionContext, rows: DataFrame) -> ExecutionPlan:
            return partial_node(aggregate_slots(session, _qualified(rows, relation).select(*projection), declaration))

        return cls(declaration, PreparedPlan(input_schema, build, two_fragments=True, udafs=udafs), merger)

    @property
    def merger(self) -> StateMerger:
        """Merges the states of this aggregation."""
        return self._merger

    @property
    def declaration(self) -> Mapping[str, Any]:
        """From which `StateMerger.from_declaration` rebuilds ``merger``; msgpack values only."""
        return self._declaration

    def partial(self, batches: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        """Rows to states: ``input_schema`` in, ``state_schema`` out, one row per key of this call.

        A call costs about 0.2 ms plus the work; 100,000 to 300,000 rows per call are best.
        Raises `ValueError` or `TypeError` when a batch has other columns.
        """
        return [self._merger.adopt(batch) for batch in self._partial.run(batches)]

    def retract(self, batches: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        """States that take these rows back when they are merged with those of `partial`.

        For an aggregation compiled with ``retractable``. The states of floats are rounded each time, and a NaN or
        an infinity that was added cannot be subtracted again.
        """
        keys = len(self._merger.key_schema)
        return [
            pa.RecordBatch.from_arrays(
                [*states.columns[:keys], *map(_negated, states.columns[keys:])], schema=states.schema
            )
            for states in self.partial(batches)
        ]


class _Merge(Protocol):
    """Merges states under the plans' own names and types."""

    def reduce(self, states: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]: ...

    def final(self, states: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]: ...


class _PreparedMerge:
    """Ordinary aggregations over the state columns, planned once; nothing is copied."""

    def __init__(self, schema: pa.Schema, keys: int, slots: Sequence[SlotState]) -> None:
        groups = [col(key_name(i)) for i in range(keys)]
        merged = [expr for slot in slots for expr in slot.merged()]
        narrowed = [expr for slot in slots for expr in slot.narrowed()]
        finalised = [slot.finalised() for slot in slots]
        self._reduce = PreparedPlan(schema, lambda _, rows: rows.aggregate(groups, merged).select(*groups, *narrowed))
        self._final = PreparedPlan(schema, lambda _, rows: rows.aggregate(groups, merged).select(*groups, *finalised))

    def reduce(self, states: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        return self._reduce.run(states)

    def final(self, states: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        return self._final.run(states)

    def final_inline(self, states: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        return self._final.run_inline(states)


class _SurgeryMerge:
    """DataFusion's PartialReduce and Final over the states, carried in the bytes of the plan."""

    def __init__(self, trial: Trial, schema: pa.Schema, positions: Sequence[int]) -> None:
        # DataFusion finds state columns by position, in its own order.
        self._to_ours = list(positions)
        self._to_theirs = [self._to_ours.index(at) for at in range(len(schema))]
        theirs = pa.schema([schema.field(at) for at in self._to_theirs])
        self._plan = StatePlan(trial.session, trial.final, theirs)

    def reduce(self, states: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        return [b.select(self._to_ours) for b in self._plan.run(AggregateMode.PARTIAL_REDUCE, self._theirs(states))]

    def final(self, states: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        return self._plan.run(AggregateMode.FINAL, self._theirs(states))

    def _theirs(self, states: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        return [batch.select(self._to_theirs) for batch in states]


def _fingerprint(keys: pa.Schema, slots: Sequence[SlotState]) -> str:
    lines = [f"version {FINGERPRINT_VERSION}", *(f"key {key.name}: {key.type}" for key in keys)]
    for slot in slots:
        lines += slot.described()
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _relabel(columns: Sequence[pa.Array], schema: pa.Schema) -> pa.RecordBatch:
    """These columns under ``schema``, cast where the type differs (canonical type against DataFusion's)."""
    arrays = [recast(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _negated(column: pa.Array) -> pa.Array:
    kind = column.type
    return pc.negate(column.cast(pa.int64())).view(kind) if kind == pa.uint64() else pc.negate(column)


def _with_nan(extremum: pa.Array, nan: pa.Array, function: str) -> pa.Array:
    """A NaN is greater than every number: any makes the maximum, only NaNs make the minimum."""
    if not pc.any(nan).as_py():
        return extremum
    wins = nan if function == "max" else pc.and_(nan, extremum.is_null())
    return pc.if_else(pc.fill_null(wins, False), pa.scalar(float("nan"), extremum.type), extremum)


def _qualified(rows: DataFrame, relation: str | None) -> DataFrame:
    return rows if relation is None else rows.alias(relation)


def _canonical_key(expr: Expr, kind: pa.DataType) -> Expr:
    """The group key in canonical form; only types that may need a change pay for it."""
    canonical = canonical_schema(pa.schema([("k", kind)])).field(0).type
    if canonical == kind and not _has_floats(kind):
        return expr

    def canonical_values(values: pa.Array) -> pa.Array:
        return canonicalise(pa.RecordBatch.from_arrays([values], names=["k"])).column(0)

    return udf(canonical_values, [kind], canonical, "immutable", "canonical_key")(expr)


def _as_planned(expr: Expr, field: pa.Field) -> Expr:
    """The expression with a nullability on which DataFusion's logical and physical plans agree.

    Of ``x IS NOT TRUE`` and its like the one says that it is never null, the other that it may be, and planning fails.
    """
    if field.nullable or not pa.types.is_boolean(field.type):
        return expr
    return functions.nullif(expr, lit(None).cast(pa.bool_())).alias(field.name)


def _has_floats(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_has_floats(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pa.types.is_floating(kind))
