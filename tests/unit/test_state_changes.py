"""An aggregate table is opened for other aggregates: states that stay, states that start from nothing, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datafusion import Expr, col, lit
from datafusion import functions as f

from statebackend import (
    Aggregation,
    JobState,
    MemoryStateBackend,
    MemoryStateSpace,
    SchemaChanges,
    SchemaMismatchError,
    StateBackend,
    StateStore,
    TableKind,
    TableSpec,
    open_checkpoint,
    open_state,
)

SMALL = pa.schema([("k", pa.int32()), ("v", pa.int32()), ("x", pa.float32())])
WIDE = pa.schema([("k", pa.int64()), ("v", pa.int64()), ("x", pa.float64())])
OLD = [f.count(lit(1)).alias("n"), f.min(col("v")).alias("low"), f.max(col("x")).alias("high")]
ADDED = [
    f.count(lit(1)).alias("n2"), f.count(col("v")).alias("values"), f.sum(col("v")).alias("total"),
    f.avg(col("v")).alias("mean"), f.max(col("v")).alias("top"), f.stddev(col("x")).alias("spread"),
    f.bool_or(col("v") > lit(1)).alias("some"), f.bit_xor(col("v")).alias("bits"),
]  # fmt: skip

Open = Callable[[], StateBackend]


@pytest.fixture(params=["memory", "lsm"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    space = MemoryStateSpace()
    return (lambda: MemoryStateBackend(space)) if request.param == "memory" else (lambda: StateStore.open(tmp_path))


def compiled(schema: pa.Schema, aggregates: Sequence[Expr]) -> Aggregation:
    return Aggregation.compile(schema, [col("k")], aggregates)


def spec_of(aggregation: Aggregation, kind: TableKind = TableKind.AGGREGATE, **changes: Any) -> TableSpec:
    return TableSpec(
        name="groups", schema=aggregation.merger.state_schema, key=("k",), kind=kind,
        aggregation=aggregation.declaration, changes=SchemaChanges(**changes) if changes else None,
    )  # fmt: skip


def write(
    open_: Open, schema: pa.Schema, aggregates: Sequence[Expr], rows: Sequence[tuple[Any, ...]], **changes: Any
) -> list[dict[str, Any]]:
    """Write rows under this aggregation, commit, and read all results."""
    aggregation = compiled(schema, aggregates)
    backend = open_()
    try:
        table = backend.table(spec_of(aggregation, **changes))
        batch = pa.record_batch([list(column) for column in zip(*rows, strict=True)], schema=schema)
        for states in aggregation.partial([batch]):
            table.write(states)
        backend.checkpoint(JobState()).result()
        partial = table.spec.kind is TableKind.AGGREGATE
        results = aggregation.merger.final(table.scan(merged=not partial))
        return sorted((row for batch in results for row in batch.to_pylist()), key=lambda row: row["k"])
    finally:
        backend.close()


def test_results_that_are_added_start_from_nothing_and_those_that_stay_go_on(reopen: Open) -> None:
    write(reopen, SMALL, OLD, [(1, 5, 1.0), (2, 7, 2.0)])
    added = write(reopen, SMALL, [ADDED[2], *OLD, *ADDED[:2], *ADDED[3:]], [(1, 3, 4.0), (3, 1, 1.0), (3, 2, 2.0)])
    assert [row["k"] for row in added] == [1, 2, 3]
    assert [(row["n"], row["low"], row["high"]) for row in added] == [(2, 3, 4.0), (1, 7, 2.0), (2, 1, 2.0)]
    assert [row["n2"] for row in added] == [2, 1, 2], "it is the same aggregate as one that was there"
    names = ["values", "total", "mean", "top", "some", "bits"]
    assert [[row[name] for name in names] for row in added] == [
        [1, 3, 3.0, 3, True, 3],
        [0, None, None, None, None, None],
        [2, 3, 1.5, 2, True, 3],
    ]
    assert [row["spread"] for row in added] == [None, None, pytest.approx(0.5**0.5)]


def test_states_of_wider_arguments_and_keys_go_on(reopen: Open) -> None:
    write(reopen, SMALL, [*OLD, f.sum(col("v")).alias("total")], [(1, 5, 1.5), (2, 7, 2.0)])
    rows = write(reopen, WIDE, [*OLD, f.sum(col("v")).alias("total")], [(1, 2**40, 1.0), (2**35, 1, 0.1)])
    assert [tuple(row.values()) for row in rows] == [
        (1, 2, 5, 1.5, 2**40 + 5),
        (2, 1, 7, 2.0, 7),
        (2**35, 1, 1, 0.1, 1),
    ]


def test_results_go_when_they_are_named_and_get_other_names(reopen: Open) -> None:
    write(reopen, SMALL, OLD, [(1, 5, 1.0)])
    fewer = [f.max(col("x")).alias("highest")]
    with pytest.raises(SchemaMismatchError, match=r"results \['n', 'low', 'high'\] are missing.*dropped=\["):
        write(reopen, SMALL, fewer, [(1, 6, 2.0)])
    changes: dict[str, Any] = {"renamed": {"highest": "high"}, "dropped": ["n", "low"]}
    assert write(reopen, SMALL, fewer, [(1, 6, 0.5)], **changes) == [{"k": 1, "highest": 1.0}]
    again = [*fewer, f.count(lit(1)).alias("n")]
    assert write(reopen, SMALL, again, [(1, 6, 0.5)]) == [{"k": 1, "highest": 1.0, "n": 1}], "it begins anew"


REFUSED = {
    "another function": ([f.max(col("v")).alias("low")], r"'low' was min\(int32\) and is max\(int32\)"),
    "narrower": ([f.min(col("v").cast(pa.int16())).alias("low")], r"'low' was min\(int32\) and is min\(int16\)"),
    "a sketch": ([OLD[1], f.approx_distinct(col("v")).alias("d")], "'d' cannot be added"),
    "a distinct count": ([OLD[1], f.count(col("v"), distinct=True).alias("d")], "'d' cannot be added"),
    "a filter": ([f.min(col("v"), filter=col("v") > lit(3)).alias("low")], "whose states are others"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_states_that_would_be_read_as_others_are_refused_and_the_table_stays(reopen: Open, case: str) -> None:
    aggregates, reason = REFUSED[case]
    write(reopen, SMALL, [OLD[1]], [(1, 5, 1.0)])
    with pytest.raises(SchemaMismatchError, match=reason):
        write(reopen, SMALL, aggregates, [(1, 2, 2.0)])
    assert write(reopen, SMALL, [OLD[1]], [(1, 6, 1.0)]) == [{"k": 1, "low": 5}]


def test_whole_states_go_on_as_partial_ones_do(reopen: Open) -> None:
    low, high, total = OLD[1], f.max(col("v")).alias("high"), f.sum(col("v")).alias("total")
    write(reopen, SMALL, [low, high], [(1, 5, 1.0), (2, 7, 2.0)], kind=TableKind.UPSERT)
    with pytest.raises(SchemaMismatchError, match=r"'low' was min\(int32\) and is max\(int32\)"):
        write(reopen, SMALL, [high.alias("low")], [(1, 2, 2.0)], kind=TableKind.UPSERT, dropped=["high"])
    rows = write(reopen, SMALL, [high, total, low], [(2, 1, 2.0)], kind=TableKind.UPSERT)
    assert rows == [{"k": 1, "high": 5, "total": None, "low": 5}, {"k": 2, "high": 1, "total": 1, "low": 1}]
    backend = reopen()
    with pytest.raises(SchemaMismatchError, match="have other meanings"):
        backend.table(replace(spec_of(compiled(SMALL, [low])), kind=TableKind.UPSERT, aggregation=None))
    backend.close()


def test_a_group_by_other_keys_is_refused(reopen: Open) -> None:
    write(reopen, SMALL, OLD, [(1, 5, 1.0)])
    other = Aggregation.compile(SMALL, [col("k"), col("v")], OLD)
    backend = reopen()
    with pytest.raises(SchemaMismatchError, match="key"):
        backend.table(
            TableSpec(
                name="groups", schema=other.merger.state_schema, key=("k", "v"), kind=TableKind.AGGREGATE,
                aggregation=other.declaration,
            )
        )  # fmt: skip
    backend.close()


def test_checkpoints_of_before_and_after_are_read_and_compared(tmp_path: Path) -> None:
    write(lambda: StateStore.open(tmp_path), SMALL, OLD, [(1, 5, 1.0), (2, 7, 2.0)])
    write(lambda: StateStore.open(tmp_path), SMALL, [*OLD, ADDED[2]], [(1, 3, 4.0)])
    with open_checkpoint(tmp_path, 1) as before, open_checkpoint(tmp_path) as after:
        assert before.table("groups").spec.schema.names == ["k", "a0_count", "a1_min", "a2_max", "a3_bool_or"]
        assert after.table("groups").spec.schema.names[-1] == "a4_sum"
    with open_state(tmp_path) as catalog:
        assert catalog.sql("SELECT k, n, total FROM state.groups ORDER BY k").to_pylist() == [
            {"k": 1, "n": 2, "total": 3},
            {"k": 2, "n": 1, "total": None},
        ]
        assert catalog.sql("SELECT k, old_n, new_n, new_total, op FROM state_diff('groups', 1, 2)").to_pylist() == [
            {"k": 1, "old_n": 1, "new_n": 2, "new_total": 3, "op": "update"}
        ]


def test_states_behind_no_result_go_on_and_are_never_begun_anew(tmp_path: Path) -> None:
    """As an operator keeps them that shows some of its results only."""
    groups = pa.schema([("k", pa.int32())])
    newest, rows = f.max(col("v")).alias("newest"), f.count(lit(1)).alias("rows")

    def spec(aggregates: Sequence[Expr], *shown: str) -> tuple[Aggregation, TableSpec]:
        aggregation = compiled(SMALL, aggregates)
        declared = aggregation.merger.declared(groups, shown)
        return aggregation, TableSpec(
            name="t", schema=aggregation.merger.state_schema, key=("k",), kind=TableKind.UPSERT, aggregation=declared
        )

    def read(aggregates: Sequence[Expr], *shown: str) -> list[dict[str, Any]]:
        aggregation, wanted = spec(aggregates, *shown)
        with StateStore.open(tmp_path) as store:
            results = aggregation.merger.final(store.table(wanted).scan())
            store.checkpoint(JobState()).result()
            return [row for batch in results for row in batch.to_pylist()]

    aggregation, first = spec([newest, OLD[1], rows], "low")
    with StateStore.open(tmp_path) as store:
        for states in aggregation.partial([pa.record_batch([[1, 1], [5, 7], [0.0, 1.0]], schema=SMALL)]):
            store.table(first).write(states)
        store.checkpoint(JobState()).result()
    assert read([newest, OLD[1], rows], "low") == [{"k": 1, "newest": 7, "low": 5, "rows": 2}]
    more = [newest, rows, f.sum(col("v")).alias("total"), OLD[1]]
    assert read(more, "low", "total") == [{"k": 1, "newest": 7, "rows": 2, "total": None, "low": 5}]
    with pytest.raises(SchemaMismatchError, match="kept beside the results and was not before"):
        read([*more, f.avg(col("v")).alias("hidden")], "low", "total")
