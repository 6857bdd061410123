"""Plans that are made once and executed over new batches each time."""

from __future__ import annotations

import gc
import threading
import weakref

import pyarrow as pa
import pytest
from datafusion import DataFrame, SessionContext, col, lit, udf
from datafusion import functions as f

from statebackend.prepared import SLICE_ROWS, PreparedPlan, conform

SCHEMA = pa.schema({"k": pa.int64(), "v": pa.float64()})


def batch(*rows: tuple[int, float | None]) -> pa.RecordBatch:
    return pa.record_batch({"k": [k for k, _ in rows], "v": pa.array([v for _, v in rows], pa.float64())})


def values(batches: list[pa.RecordBatch]) -> list[tuple[object, ...]]:
    return [tuple(row.values()) for b in batches for row in b.to_pylist()]


def doubled(_: SessionContext, rows: DataFrame) -> DataFrame:
    return rows.filter(col("v") > lit(1.0)).select(col("k"), (col("v") * lit(2.0)).alias("twice"))


def test_each_execution_sees_the_batches_of_its_own_call() -> None:
    plan = PreparedPlan(SCHEMA, doubled)
    assert values(plan.run([batch((1, 2.0), (2, 0.5))])) == [(1, 4.0)]
    assert values(plan.run([batch((3, 3.0)), batch((4, 4.0))])) == [(3, 6.0), (4, 8.0)]
    assert values(plan.run([])) == []
    assert values(plan.run([batch()])) == []
    assert values(plan.run([batch((5, 5.0))])) == [(5, 10.0)]


def test_aggregates_sorts_and_windows_start_anew_in_every_execution() -> None:
    queries = {
        "group": lambda _, rows: rows.aggregate([col("k")], [f.sum(col("v")).alias("s")]),
        "sort": lambda _, rows: rows.sort(col("v").sort(ascending=False)),
        "distinct": lambda _, rows: rows.select(col("k")).distinct(),
        "window": lambda _, rows: rows.select(col("k"), f.row_number(order_by=[col("v")]).alias("n")),
        "global": lambda _, rows: rows.aggregate([], [f.min(col("v")).alias("low")]),
    }
    for name, build in queries.items():
        plan = PreparedPlan(SCHEMA, build)
        for rows in ([(1, 5.0), (2, 7.0)], [(3, 1.0)], [(9, 2.0), (9, 2.0)], [(1, 5.0), (2, 7.0)]):
            fresh = PreparedPlan(SCHEMA, build).run([batch(*rows)])
            assert sorted(values(plan.run([batch(*rows)]))) == sorted(values(fresh)), name


def test_large_batches_keep_their_rows_and_order() -> None:
    count = 5 * SLICE_ROWS + 17
    big = pa.record_batch({"k": range(count), "v": pa.array([2.0] * count)})
    out = PreparedPlan(SCHEMA, doubled).run([big])
    assert pa.Table.from_batches(out)["k"].to_pylist() == list(range(count))


def test_a_plan_that_would_keep_rows_between_executions_is_refused() -> None:
    def join(_: SessionContext, rows: DataFrame) -> DataFrame:
        return rows.join(rows.select(col("k").alias("j")), left_on="k", right_on="j")

    def top(_: SessionContext, rows: DataFrame) -> DataFrame:
        return rows.sort(col("v").sort()).limit(3)

    for build in (join, top):
        with pytest.raises(ValueError, match="cannot be executed twice"):
            PreparedPlan(SCHEMA, build)


def test_a_plan_of_several_partitions_is_refused() -> None:
    with pytest.raises(ValueError, match="2 partitions"):
        PreparedPlan(SCHEMA, lambda _, rows: rows.union(rows))


def test_a_failure_in_one_execution_does_not_spoil_the_next() -> None:
    plan = PreparedPlan(
        pa.schema({"k": pa.int64()}),
        lambda _, rows: rows.select((lit(12) / col("k")).alias("q")).filter(col("q") > lit(0)),
    )
    with pytest.raises(Exception, match=r"[Dd]ivide by zero"):
        plan.run([pa.record_batch({"k": [3, 0]})])
    assert values(plan.run([pa.record_batch({"k": [3, 4]})])) == [(4,), (3,)]


def test_batches_of_other_columns_are_refused() -> None:
    plan = PreparedPlan(SCHEMA, doubled)
    with pytest.raises(ValueError, match="expected"):
        plan.run([pa.record_batch({"k": [1]})])
    with pytest.raises(TypeError, match="expected"):
        plan.run([pa.record_batch({"k": [1], "v": [1]})])
    assert values(plan.run([batch((1, 2.0))])) == [(1, 4.0)]


def test_conform_changes_nullability_and_metadata_but_no_type() -> None:
    wanted = pa.schema([pa.field("k", pa.int64(), nullable=False), pa.field("v", pa.float64())])
    marked = batch((1, 2.0)).replace_schema_metadata({"origin": "here"})
    assert conform(marked, wanted).schema.equals(wanted, check_metadata=True)
    assert conform(marked, marked.schema) is marked
    with pytest.raises(TypeError, match="expected"):
        conform(marked, pa.schema({"k": pa.int32(), "v": pa.float64()}))


def test_metadata_of_a_batch_is_no_hindrance() -> None:
    fields = [SCHEMA.field(0).with_metadata({"unit": "m"}), SCHEMA.field(1)]
    plan = PreparedPlan(pa.schema(fields, metadata={"origin": "here"}), doubled)
    assert values(plan.run([batch((1, 2.0))])) == [(1, 4.0)]


def test_python_functions_run_inside_the_plan() -> None:
    negated = udf(lambda a: pa.array([-v for v in a.to_pylist()]), [pa.int64()], pa.int64(), "immutable", "negated")
    plan = PreparedPlan(SCHEMA, lambda _, rows: rows.select(negated(col("k")).alias("n")), udfs=[negated])
    assert values(plan.run([batch((1, 2.0), (2, 2.0))])) == [(-1,), (-2,)]


def test_the_batches_of_a_call_are_let_go() -> None:
    plan = PreparedPlan(SCHEMA, doubled)
    rows = batch((1, 2.0))
    kept = weakref.ref(rows)
    plan.run([rows])
    del rows
    gc.collect()
    assert kept() is None


def test_concurrent_callers_have_plans_of_their_own() -> None:
    plan = PreparedPlan(SCHEMA, doubled)
    wrong: list[object] = []

    def work(worker: int) -> None:
        for turn in range(50):
            expected = [(worker, 2.0 * (turn + 2)), (turn, 6.0)]
            if (got := values(plan.run([batch((worker, turn + 2.0), (turn, 3.0))]))) != expected:
                wrong.append((expected, got))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
