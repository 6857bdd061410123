"""A physical plan that is made once and executed again and again over new batches.

Planning a query costs DataFusion about half a millisecond whatever the size of the input;
executing a plan that exists costs a fraction of it. A `PreparedPlan` reads from a Python
subclass of `pyarrow.dataset.Dataset` whose content is replaced before each execution.

Invariants:

* One execution uses one plan at a time: concurrent callers get plans of their own from a pool.
* A plan whose nodes keep something from one execution to the next (joins, TopK, repartitioning)
  is refused when it is built, because it would return stale rows without an error.
* A plan that failed is dropped, never used again.
* The batches of a call are let go when the call returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.dataset as pads
from datafusion import AggregateUDF, DataFrame, ExecutionPlan, ScalarUDF, SessionConfig, SessionContext

__all__ = ["PlanBuilder", "PreparedPlan", "conform", "new_session"]

PlanBuilder: TypeAlias = Callable[[SessionContext, DataFrame], DataFrame | ExecutionPlan]
"""Builds the plan over the input; an `ExecutionPlan` is executed for its partition 0 only."""

BATCH_ROWS = 8192
"""Rows per batch inside DataFusion; larger and smaller ones measured slower."""

SLICE_ROWS = 65_536
"""Input batches above twice this many rows are handed over in slices of it."""

_UNREPEATABLE = ("JoinExec", "TopK", "RepartitionExec", "RecursiveQueryExec", "AnalyzeExec")
_TABLE = "input"


def new_session(
    partitions: int = 1, *, udafs: Sequence[AggregateUDF] = (), udfs: Sequence[ScalarUDF] = ()
) -> SessionContext:
    """A session for plans that are executed repeatedly; with two partitions, for partial states.

    Python functions travel by name only: plan bytes never hold pickled code. Rules that would
    make a plan keep state between executions, or push work into the Python source, are off.
    """
    config = (
        SessionConfig()
        .with_target_partitions(partitions)
        .with_batch_size(BATCH_ROWS)
        .set("datafusion.optimizer.enable_dynamic_filter_pushdown", "false")
        # One row per key from every partial aggregation, however many keys there are.
        .set("datafusion.execution.skip_partial_aggregation_probe_ratio_threshold", "1.1")
    )
    session: SessionContext = SessionContext(config).with_python_udf_inlining(enabled=False)
    # Filtering in the Python source is several times slower than in DataFusion.
    session.remove_optimizer_rule("push_down_filter")
    if partitions > 1:
        # Partial states must be those of the aggregates as they were written: these would turn a
        # lone count(distinct) into two levels of grouping, and make one aggregate out of two.
        session.remove_optimizer_rule("single_distinct_aggregation_to_group_by")
        session.remove_optimizer_rule("common_sub_expression_eliminate")
    for udaf in udafs:
        session.register_udaf(udaf)
    for udf in udfs:
        session.register_udf(udf)
    return session


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The same columns under ``schema``: its names, nullability and metadata; types must be equal."""
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    if batch.schema.types != schema.types:
        raise TypeError(f"batch has columns {batch.schema.types}, expected {schema.types}")
    return pa.RecordBatch.from_arrays(batch.columns, schema=schema)


class PreparedPlan:
    """One query over batches of ``schema``, planned once per concurrent caller.

    ``build`` receives a session and the input as a DataFrame and returns the query. With
    ``two_fragments`` the session plans for two partitions over an input of two fragments, the
    second always empty: an aggregation is then planned as partial and final, without a
    repartitioning of its input (``build`` picks the node it wants).

    Raises `ValueError` when the plan cannot be executed twice (it holds a join, TopK or
    repartitioning) or has more than one partition.
    """

    def __init__(
        self,
        schema: pa.Schema,
        build: PlanBuilder,
        *,
        two_fragments: bool = False,
        udafs: Sequence[AggregateUDF] = (),
        udfs: Sequence[ScalarUDF] = (),
    ) -> None:
        self._schema = schema.remove_metadata()
        self._names = schema.names
        self._build = build
        self._two_fragments = two_fragments
        self._udafs = tuple(udafs)
        self._udfs = tuple(udfs)
        # list.append and list.pop are atomic, so the pool needs no lock.
        self._pool: list[_Instance] = [self._new_instance()]

    @property
    def schema(self) -> pa.Schema:
        """Schema of the batches that `run` takes."""
        return self._schema

    def run(self, batches: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        """Execute over these batches. No rows in may give no batches out.

        Raises `ValueError` or `TypeError` when a batch has other columns than ``schema``.
        """
        for batch in batches:
            if batch.schema.names != self._names:
                raise ValueError(f"batch has columns {batch.schema.names}, expected {self._names}")
        conformed = [conform(batch, self._schema) for batch in batches if batch.num_rows]
        try:
            instance = self._pool.pop()
        except IndexError:
            instance = self._new_instance()
        result = instance.run(conformed)
        self._pool.append(instance)
        return result

    def run_inline(self, batches: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        """As `run`, wholly on the caller's thread; planned anew, some 0.5 ms each time.

        `run` needs a free thread of DataFusion, which there may not be when DataFusion itself waits for the caller.
        Raises ``ValueError`` for a query that is no DataFrame.
        """
        session = new_session(1, udafs=self._udafs, udfs=self._udfs)
        source = _Source(self._schema, 1)
        source.batches = [conform(batch, self._schema) for batch in batches if batch.num_rows]
        session.register_table(_TABLE, source)
        built = self._build(session, session.table(_TABLE))
        if not isinstance(built, DataFrame):
            raise ValueError("only a query can be planned anew, not a part of a plan")
        collected: list[pa.RecordBatch] = built.collect()
        return collected

    def _new_instance(self) -> _Instance:
        session = new_session(2 if self._two_fragments else 1, udafs=self._udafs, udfs=self._udfs)
        source = _Source(self._schema, 2 if self._two_fragments else 1)
        session.register_table(_TABLE, source)
        built = self._build(session, session.table(_TABLE))
        if isinstance(built, DataFrame):
            plan = built.execution_plan()
            if plan.partition_count != 1:
                raise ValueError(f"the plan has {plan.partition_count} partitions, not one:\n{plan.display_indent()}")
        else:
            plan = built
        text = plan.display_indent()
        if found := [name for name in _UNREPEATABLE if name in text]:
            raise ValueError(f"a plan with {', '.join(found)} cannot be executed twice:\n{text}")
        return _Instance(session, plan, source)


class _Instance:
    """A plan with the source it reads; used by one caller at a time."""

    __slots__ = ("_plan", "_session", "_source")

    def __init__(self, session: SessionContext, plan: ExecutionPlan, source: _Source) -> None:
        self._session = session
        self._plan = plan
        self._source = source

    def run(self, batches: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
        self._source.batches = batches
        try:
            return [batch.to_pyarrow() for batch in self._session.execute(self._plan, 0)]
        finally:
            self._source.batches = []


class _Source(pads.Dataset):  # type: ignore[misc]
    """What DataFusion sees: a dataset of ``fragments`` fragments, all but the first empty."""

    def __init__(self, schema: pa.Schema, fragments: int) -> None:
        self._schema = schema
        self._fragments = fragments
        self.batches: list[pa.RecordBatch] = []

    @property
    def schema(self) -> pa.Schema:
        return self._schema

    def scanner(self, columns: list[str] | None = None, filter: Any = None, **_: Any) -> _Scan:  # noqa: A002
        return _Scan(self, columns, filter, empty=False)

    def get_fragments(self, filter: Any = None) -> Iterator[_Fragment]:  # noqa: A002, ARG002
        return iter([_Fragment(self, empty=i > 0) for i in range(self._fragments)])


class _Fragment:
    def __init__(self, source: _Source, *, empty: bool) -> None:
        self._source = source
        self._empty = empty

    def scanner(
        self,
        schema: pa.Schema | None = None,  # noqa: ARG002
        columns: list[str] | None = None,
        filter: Any = None,  # noqa: A002
        **_: Any,
    ) -> _Scan:
        return _Scan(self._source, columns, filter, empty=self._empty)


class _Scan:
    def __init__(self, source: _Source, columns: list[str] | None, predicate: Any, *, empty: bool) -> None:
        self._source = source
        self._columns = columns
        self._predicate = predicate
        self._empty = empty

    @property
    def projected_schema(self) -> pa.Schema:
        schema = self._source.schema
        return schema if self._columns is None else pa.schema([schema.field(name) for name in self._columns])

    def to_batches(self) -> Iterator[pa.RecordBatch]:
        for batch in () if self._empty else self._source.batches:
            # Filter before the selection: a filtered column need not be a selected one.
            rows = batch if self._predicate is None else batch.filter(self._predicate)
            rows = rows if self._columns is None else rows.select(self._columns)
            if rows.num_rows <= 2 * SLICE_ROWS:
                yield rows
            else:
                for start in range(0, rows.num_rows, SLICE_ROWS):
                    yield rows.slice(start, SLICE_ROWS)
