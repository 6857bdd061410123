"""Stateless verbs on micro-batches: consecutive ones become one DataFusion plan, made once.

A `Step` is one verb, kept as the function that applies it to a DataFusion DataFrame, so DataFusion
itself resolves names, coerces types and infers schemas. `StatelessPlan` composes the steps of a
chain and executes the prepared plan for each batch. A chain that only picks, drops and renames
columns needs no plan: it copies references.

What would be wrong batch by batch is refused when the stream is built: window functions, sorts,
limits, aggregates, joins, and functions of the current time, which a prepared plan would freeze.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import pyarrow as pa
from datafusion import DataFrame, Expr, LogicalPlan, SessionContext, col

from operators.errors import SchemaError
from statebackend import PreparedPlan

__all__ = ["Columns", "StatelessPlan", "Step", "column_named", "plain_column", "plan_step"]

Columns: TypeAlias = tuple[tuple[str, str], ...]
"""A pure selection: (column of the input, its name in the output), in order."""

_CURRENT_TIME = re.compile(r"\b(now|current_timestamp|current_date|current_time|today)\(\)")
_TEXT_LITERAL = re.compile(r'(?:Large)?Utf8(?:View)?\("(?:[^"\\]|\\.)*"\)')
_STATELESS = {"Projection", "Filter", "TableScan", "SubqueryAlias", "Unnest"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One stateless verb over rows of ``input_schema``.

    ``label`` is the verb as the user wrote it; ``columns`` is set if it only picks columns. ``mask``: a filter of a
    changelog, whose ``apply`` gives one boolean column, which rows to keep, instead of the rows.
    """

    label: str
    input_schema: pa.Schema
    schema: pa.Schema
    apply: Callable[[DataFrame], DataFrame]
    columns: Columns | None = None
    mask: bool = False


def plan_step(
    label: str, input_schema: pa.Schema, apply: Callable[[DataFrame], DataFrame], columns: Columns | None = None
) -> Step:
    """Check a verb against its input, and infer its schema.

    Raises `SchemaError` that names the verb, what is wrong and the columns there are.
    """
    if columns is not None:
        fields = [input_schema.field(source).with_name(name) for source, name in columns]
        schema = pa.schema(fields)
    else:
        schema = _infer(label, input_schema, apply)
    if duplicates := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise SchemaError(f"{label}: column names {duplicates} appear twice; give one an alias")
    return Step(label=label, input_schema=input_schema, schema=schema, apply=apply, columns=columns)


def _infer(label: str, input_schema: pa.Schema, apply: Callable[[DataFrame], DataFrame]) -> pa.Schema:
    found: list[pa.Schema] = []

    def build(_: SessionContext, frame: DataFrame) -> DataFrame:
        result = apply(frame)
        _check_stateless(label, result)
        found.append(result.schema())
        return result

    try:
        PreparedPlan(input_schema, build)
    except SchemaError:
        raise
    except Exception as error:
        reason = str(error).removeprefix("DataFusion error: ").split("\nValid fields")[0]
        raise SchemaError(f"{label}: {reason}; available columns: {', '.join(input_schema.names)}") from error
    return pa.schema([pa.field(field.name, field.type) for field in found[0]])


def _check_stateless(label: str, frame: DataFrame) -> None:
    plan = frame.logical_plan()
    if found := sorted(_variants(plan) - _STATELESS):
        names = ", ".join(found)
        raise SchemaError(f"{label}: {names} needs all rows at once and a stream comes in batches; use window()")
    text = _TEXT_LITERAL.sub("", plan.display_indent())
    if match := _CURRENT_TIME.search(text):
        raise SchemaError(
            f"{label}: {match[0]} would be evaluated once, when the plan is made; use a column of the event instead"
        )


def _variants(plan: LogicalPlan) -> set[str]:
    found = {type(plan.to_variant()).__name__}
    for child in plan.inputs():
        found |= _variants(child)
    return found


def column_named(name: str) -> Expr:
    """The column of exactly this name; ``col`` alone folds it to lower case."""
    return col('"' + name.replace('"', '""') + '"')


def plain_column(expr: Expr) -> tuple[str, str] | None:
    """(input column, output name) of an expression that is a column, perhaps with an alias; else None."""
    if expr.variant_name() == "Alias":
        alias = expr.to_variant()
        inner = plain_column(Expr(alias.expr()))
        return None if inner is None else (inner[0], alias.alias())
    if expr.variant_name() == "Column":
        name = expr.to_variant().name()
        return name, name
    return None


class StatelessPlan:
    """A chain of steps as one pass over each batch."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.schema = steps[-1].schema
        self.label = " ".join(step.label for step in steps)
        self.plans_made = 0
        self._steps = tuple(steps)
        self._columns = _compose(steps)
        self._plan = None if self._columns is not None else PreparedPlan(steps[0].input_schema, self._build)
        self._sources = [] if self._columns is None else [source for source, _ in self._columns]

    def run(self, batch: pa.RecordBatch) -> list[pa.RecordBatch]:
        """The rows of the batch after all steps; no copy if the chain only picks columns."""
        if self._plan is None:
            picked = [batch.column(name) for name in self._sources]
            return [pa.RecordBatch.from_arrays(picked, schema=self.schema)]
        return [self._conform(result) for result in self._plan.run([batch])]

    def _build(self, _: SessionContext, frame: DataFrame) -> DataFrame:
        self.plans_made += 1
        for step in self._steps:
            frame = step.apply(frame)
        return frame

    def _conform(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if batch.schema.equals(self.schema):
            return batch
        return pa.RecordBatch.from_arrays(batch.columns, schema=self.schema)


def _compose(steps: Sequence[Step]) -> Columns | None:
    """The selection that a chain of pure selections amounts to; None if a step does more."""
    names = {name: name for name in steps[0].input_schema.names}
    result: Columns | None = None
    for step in steps:
        if step.columns is None:
            return None
        result = tuple((names[source], name) for source, name in step.columns)
        names = {name: source for source, name in result}
    return result
