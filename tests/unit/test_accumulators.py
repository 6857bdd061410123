"""One aggregation as partial, reduce and final plans: keys, layouts, order, declarations, refusals."""

from __future__ import annotations

import datetime as dt
import math
import threading
from collections import defaultdict
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from datafusion import Accumulator, AggregateUDF, Expr, SessionConfig, SessionContext, col, lit, udaf, udf
from datafusion import functions as f

from statebackend import aggregate_trial
from statebackend.accumulators import Aggregation, StateMerger
from statebackend.errors import UnsupportedAggregateError, UnsupportedFormatError
from statebackend.keys import canonicalise

SIMPLE = [
    f.count(lit(1)).alias("n"),
    f.sum(col("v")).alias("total"),
    f.min(col("v")).alias("low"),
    f.max(col("v")).alias("high"),
    f.avg(col("v")).alias("mean"),
]


def rows(**columns: Any) -> pa.RecordBatch:
    return pa.record_batch(columns)


def by_key(batches: Sequence[pa.RecordBatch], *keys: str) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for batch in batches:
        for row in batch.to_pylist():
            key = tuple(row.pop(k) for k in keys)
            assert key not in found, f"key {key} twice"
            found[key] = row
    return found


def test_partial_states_have_one_row_per_key_and_the_documented_columns() -> None:
    batch = rows(k=["a", "b", "a"], v=pa.array([1, 2, 3], pa.int32()))
    aggregation = Aggregation.compile(batch.schema, [col("k")], SIMPLE)
    states = aggregation.partial([batch])
    assert [b.schema for b in states] == [aggregation.merger.state_schema]
    assert aggregation.merger.state_schema.names == [
        *("k", "a0_count", "a1_sum", "a2_min", "a3_max", "a4_count", "a4_sum"),
    ]
    assert list(by_key(states, "k")[("a",)].values()) == [2, 4, 1, 3, 2, 4.0]


def test_variance_state_is_count_mean_and_squared_distances() -> None:
    batch = rows(k=[1, 1, 1], v=[1.0, 2.0, 6.0])
    aggregation = Aggregation.compile(
        batch.schema, [col("k")], [f.stddev(col("v")).alias("s"), f.var_pop(col("v")).alias("p")]
    )
    state = by_key(aggregation.partial([batch]), "k")[(1,)]
    assert (state["a0_count"], state["a0_mean"], state["a0_m2"]) == (3, 3.0, 14.0)
    assert (state["a1_count"], state["a1_mean"], state["a1_m2"]) == (3, 3.0, 14.0)


def test_an_opaque_state_has_columns_by_position() -> None:
    aggregation = Aggregation.compile(
        pa.schema({"k": pa.int64(), "v": pa.string()}), [col("k")], [f.first_value(col("v"), order_by=[col("k")])]
    )
    assert aggregation.merger.state_schema.names == ["k", "a0_s0", "a0_s1", "a0_s2"]


@pytest.mark.parametrize("extra", [[], [f.median(col("v")).alias("middle")]], ids=["simple", "surgery"])
def test_result_types_and_nullability_are_those_of_one_shot(extra: list[Expr]) -> None:
    batch = rows(k=[1, 2, 1], v=pa.array([Decimal("1.25"), None, Decimal("2.50")], pa.decimal128(22, 2)))
    wanted = [*SIMPLE[:4], *extra]
    session = SessionContext(SessionConfig().with_target_partitions(1))
    session.register_record_batches("t", [[batch]])
    expected = session.table("t").aggregate([col("k")], wanted).to_arrow_table()
    aggregation = Aggregation.compile(batch.schema, [col("k")], wanted)
    states = aggregation.merger.reduce([*aggregation.partial([batch]), *aggregation.partial([batch.slice(0, 0)])])
    final = aggregation.merger.final(states)
    assert aggregation.merger.result_schema == expected.schema
    assert by_key(final, "k") == by_key(expected.to_batches(), "k")


@pytest.mark.parametrize("extra", [[], [f.median(col("v")).alias("middle")]], ids=["simple", "surgery"])
def test_no_rows_give_no_states_and_no_results(extra: list[Expr]) -> None:
    batch = rows(k=[1], v=[1.0])
    aggregation = Aggregation.compile(batch.schema, [col("k")], [*SIMPLE, *extra])
    state = aggregation.partial([batch])[0].slice(0, 0)
    assert aggregation.partial([]) == []
    assert sum(b.num_rows for b in aggregation.partial([batch.slice(0, 0)])) == 0
    for states in ([], [state], [state, state]):
        assert sum(b.num_rows for b in aggregation.merger.reduce(states)) == 0
        assert sum(b.num_rows for b in aggregation.merger.final(states)) == 0


def test_a_group_whose_values_are_null_or_filtered_out_stays() -> None:
    batch = rows(k=[1, 1, 2], v=pa.array([None, None, 5.0], pa.float64()))
    where = col("v") > lit(9.0)
    aggregation = Aggregation.compile(
        batch.schema,
        [col("k")],
        [*SIMPLE, f.count(col("v"), filter=where).alias("m"), f.sum(col("v"), filter=where).alias("t")],
    )
    final = by_key(aggregation.merger.final(aggregation.partial([batch])), "k")
    nothing = {"total": None, "low": None, "high": None, "mean": None, "m": 0, "t": None}
    assert final[(1,)] == {"n": 2, **nothing}
    assert final[(2,)] == {"n": 1, "total": 5.0, "low": 5.0, "high": 5.0, "mean": 5.0, "m": 0, "t": None}


# --- keys -----------------------------------------------------------------------------------------

NAN = float("nan")
KEYS: list[pa.Array] = [
    *(pa.array([3, None, -1, 3, 7], t) for t in (pa.int8(), pa.int16(), pa.int32(), pa.int64())),
    *(pa.array([3, None, 1, 3, 7], t) for t in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())),
    *(pa.array([NAN, -0.0, None, 0.0, -NAN, 1.5]).cast(t) for t in (pa.float16(), pa.float32(), pa.float64())),
    *(pa.array(["b", None, "", "b", "longer than a view"]).cast(t) for t in (pa.string(), pa.large_string())),
    pa.array(["b", None, "", "b", "longer than a view"]).cast(pa.string_view()),
    *(pa.array([b"b", None, b"", b"\x00\xff"]).cast(t) for t in (pa.binary(), pa.large_binary(), pa.binary_view())),
    pa.array([b"abcd", None, b"abcd", b"\x00\x00\x00\x00"], pa.binary(4)),
    pa.array([True, None, False, True]),
    pa.array([dt.date(2024, 2, 29), None, dt.date(1969, 7, 20)], pa.date32()),
    pa.array([0, None, 86_400_000, 0], pa.int64()).cast(pa.date64()),
    *(pa.array([1, None, 1, 5], pa.int32()).cast(t) for t in (pa.time32("s"), pa.time32("ms"))),
    *(pa.array([1000, None, 5000], pa.int64()).cast(t) for t in (pa.time64("us"), pa.time64("ns"), pa.duration("ms"))),
    *(pa.array([-1, None, -1, 5], pa.int64()).cast(pa.timestamp(u)) for u in ("s", "ms", "us", "ns")),
    *(pa.array([1, None, 1], pa.int64()).cast(pa.timestamp("us", zone)) for zone in ("UTC", "Asia/Tokyo", "+02:00")),
    *(pa.array([Decimal("1.5"), None, Decimal("-2.25")], t) for t in (pa.decimal128(10, 2), pa.decimal256(50, 2))),
    *(pa.array([Decimal("1.5"), None, Decimal("1.5")], t) for t in (pa.decimal32(5, 2), pa.decimal64(12, 2))),
    pa.array(["b", None, "a", "b"]).dictionary_encode(),
    pa.array([3, None, 1, 3], pa.int64()).dictionary_encode(),
    pa.array([1.0, NAN, -0.0, 0.0, NAN]).dictionary_encode(),
    pa.array([[1, 2], None, [], [1, 2], [None]], pa.list_(pa.int64())),
    pa.array([[0.0, NAN], [-0.0, -NAN], None, []], pa.list_(pa.float64())),
    pa.array([["a"], None, ["a"], ["b", "c"]], pa.large_list(pa.string())),
    pa.array([[1, 2], None, [1, 2]], pa.list_(pa.int32(), 2)),
    pa.array([{"a": 1, "b": "x"}, None, {"a": 1, "b": "x"}, {"a": None, "b": None}]),
    pa.array([{"a": 0.0}, {"a": -0.0}, {"a": NAN}, {"a": NAN}]),
    pa.array([{"a": [0.0]}, {"a": [-0.0]}, {"a": None}]),
    pa.array([{"a": "x"}, {"a": "x"}, None], pa.struct([("a", pa.dictionary(pa.int32(), pa.string()))])),
]  # fmt: skip


def plain(value: Any) -> Any:
    """A hashable form in which equal keys are equal."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else value + 0.0
    if isinstance(value, list):
        return tuple(plain(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, plain(v)) for k, v in value.items())
    return value


@pytest.mark.parametrize("keys", KEYS, ids=lambda keys: str(keys.type))
@pytest.mark.parametrize("extra", [[], [f.median(col("v")).alias("middle")]], ids=["simple", "surgery"])
def test_every_type_can_be_a_key(keys: pa.Array, extra: list[Expr]) -> None:
    batch = pa.record_batch({"k": keys, "w": pa.array([1] * len(keys)), "v": pa.array(range(len(keys)))})
    aggregation = Aggregation.compile(
        batch.schema, [col("k"), col("w")], [f.count(lit(1)).alias("n"), f.sum(col("v")).alias("total"), *extra]
    )
    merger = StateMerger.from_declaration(aggregation.declaration)
    states = [state for at in range(len(keys)) for state in aggregation.partial([batch.slice(at, 1)])]
    states = merger.reduce([*merger.reduce(states), *aggregation.partial([batch])])
    expected: dict[Any, list[int]] = defaultdict(list)
    for key, value in zip(keys.to_pylist(), batch["v"].to_pylist(), strict=True):
        expected[plain(key)] += [value, value]
    final = pa.Table.from_batches(merger.final(states))
    got = {
        plain(key): (n, total)
        for key, n, total in zip(*(final[c].to_pylist() for c in ("k", "n", "total")), strict=True)
    }
    assert got == {key: (len(values), sum(values)) for key, values in expected.items()}
    assert final.num_rows == len(expected)
    # What the states hold is what tables store and hash: canonical already.
    for state in states:
        assert canonicalise(state) is state


def test_keys_may_be_expressions_and_keep_their_names() -> None:
    batch = rows(k=[1, 2, 3, 4], v=[1, 2, 3, 4])
    aggregation = Aggregation.compile(
        batch.schema, [(col("k") % lit(2)).alias("odd"), col("k") > lit(2)], [f.sum(col("v")).alias("s")]
    )
    assert aggregation.merger.key_schema.names[0] == "odd"
    assert sorted(tuple(r.values()) for r in aggregation.merger.final(aggregation.partial([batch]))[0].to_pylist()) == [
        *((0, False, 2), (0, True, 4), (1, False, 1), (1, True, 3)),
    ]


# --- what the aggregates mean -----------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], [f.median(col("k")).alias("middle")]], ids=["simple", "surgery"])
@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_min_and_max_put_nan_above_every_number_in_any_order(kind: pa.DataType, extra: list[Expr]) -> None:
    groups = {
        1: [1.0, NAN, 2.0],
        2: [NAN, 1.0, 2.0],
        3: [NAN, None, NAN],
        4: [None, 3.0, math.inf],
        5: [None],
        6: [-math.inf, NAN],
    }
    keys = [k for k, values in groups.items() for _ in values]
    batch = rows(k=keys, v=pa.array([v for values in groups.values() for v in values], pa.float64()).cast(kind))
    aggregation = Aggregation.compile(batch.schema, [col("k")], [*SIMPLE[2:4], *extra])
    states = [state for at in range(len(keys)) for state in aggregation.partial([batch.slice(at, 1)])]
    for order in (states, states[::-1]):
        merged = aggregation.merger.reduce([*aggregation.merger.reduce(order[:7]), *order[7:]])
        final = by_key(aggregation.merger.final(merged), "k")
        extrema = {k: (plain(row["low"]), plain(row["high"])) for (k,), row in final.items()}
        assert extrema == {
            1: (1.0, "nan"),
            2: (1.0, "nan"),
            3: ("nan", "nan"),
            4: (3.0, math.inf),
            5: (None, None),
            6: (-math.inf, "nan"),
        }


def test_states_are_merged_in_their_order_so_first_and_last_are_of_the_stream() -> None:
    batches = [rows(k=[1, 2], v=[i, 10 + i]) for i in range(20)]
    aggregation = Aggregation.compile(
        batches[0].schema,
        [col("k")],
        [f.first_value(col("v")).alias("a"), f.last_value(col("v")).alias("z"), f.array_agg(col("v")).alias("all")],
    )
    merger = aggregation.merger
    states = [state for batch in batches for state in aggregation.partial([batch])]
    merged = [*merger.reduce(states[:5]), *merger.reduce(states[5:6]), *merger.reduce(states[6:])]
    assert by_key(merger.final(merged), "k") == {
        (1,): {"a": 0, "z": 19, "all": list(range(20))},
        (2,): {"a": 10, "z": 29, "all": list(range(10, 30))},
    }


def test_equal_aggregates_share_one_state() -> None:
    schema = pa.schema({"k": pa.int64(), "v": pa.int64(), "w": pa.int64()})
    aggregation = Aggregation.compile(
        schema,
        [col("k")],
        [f.sum(col("v")).alias("a"), f.sum(col("w")).alias("b"), f.sum(col("v")).alias("c"), f.sum(col("v") + lit(0))],
    )
    assert aggregation.merger.state_schema.names == ["k", "a0_sum", "a1_sum", "a2_sum"]
    final = aggregation.merger.final(aggregation.partial([rows(k=[1, 1], v=[1, 2], w=[10, 20])]))
    assert list(final[0].to_pylist()[0].values()) == [1, 3, 30, 3, 3]


def test_python_functions_of_one_name_are_not_mistaken_for_each_other() -> None:
    def scaled(factor: int) -> Any:
        return udf(
            lambda a: pa.array([v * factor for v in a.to_pylist()]), [pa.int64()], pa.int64(), "stable", "scaled"
        )

    batch = rows(k=[1, 1], v=[1, 2])
    aggregation = Aggregation.compile(
        batch.schema,
        [col("k")],
        [f.sum(scaled(10)(col("v"))).alias("ten"), f.sum(scaled(100)(col("v"))).alias("hundred")],
    )
    final = aggregation.merger.final(aggregation.partial([batch]))
    assert final[0].to_pylist() == [{"k": 1, "ten": 30, "hundred": 300}]


def test_expressions_taken_from_sql_may_be_qualified() -> None:
    batch = rows(k=[1, 1, 2], v=[1, 2, 30])
    session = SessionContext()
    session.register_record_batches("bids", [[batch]])
    plan = session.sql(
        "select k, sum(v) filter (where v > 1) as s, count(*) as n, "
        "approx_percentile_cont(0.5) within group (order by v) as p from bids group by k"
    ).logical_plan()
    aggregate = plan.inputs()[0].to_variant()
    exprs = [
        [e if isinstance(e, Expr) else Expr(e) for e in es]
        for es in (aggregate.group_by_exprs(), aggregate.aggregate_exprs())
    ]
    aggregation = Aggregation.compile(batch.schema, *exprs, relation="bids")
    final = aggregation.merger.final(aggregation.partial([batch]))
    assert sorted(tuple(row.values()) for row in final[0].to_pylist()) == [(1, 2, 2, 1.5), (2, 30, 1, 30.0)]


def test_names_with_quotes_and_capitals_are_kept() -> None:
    batch = pa.record_batch({'The "Key"': ["a", "a"], "Value Of": [1, 2], "select": [3, 4]})
    aggregation = Aggregation.compile(
        batch.schema,
        [col('"The ""Key"""')],
        [f.sum(col('"Value Of"')).alias('Total; drop table "x"'), f.median(col('"select"')).alias("Ünïcode")],
    )
    final = aggregation.merger.final(aggregation.partial([batch]))
    assert final[0].to_pylist() == [{'The "Key"': "a", 'Total; drop table "x"': 3, "Ünïcode": 3.5}]


# --- Python aggregates ------------------------------------------------------------------------------


class Product(Accumulator):
    def __init__(self) -> None:
        self._value = 1

    def update(self, *values: pa.Array) -> None:
        for value in values[0].to_pylist():
            self._value *= value

    def merge(self, states: list[pa.Array]) -> None:
        self.update(*states)

    def state(self) -> list[pa.Scalar]:
        return [pa.scalar(self._value)]

    def evaluate(self) -> pa.Scalar:
        return pa.scalar(self._value)


def product() -> AggregateUDF:
    return udaf(Product, pa.int64(), pa.int64(), [pa.int64()], "immutable", name="product")


def test_a_python_aggregate_is_found_by_name_in_the_merging_process() -> None:
    batch = rows(k=[1, 1, 2], v=[2, 3, 5])
    aggregation = Aggregation.compile(
        batch.schema,
        [col("k")],
        [product()(col("v")).alias("p"), f.count(lit(1)).alias("n")],
        udafs=[product()],
    )
    stored = msgpack.packb(aggregation.declaration)
    assert b"cloudpickle" not in stored
    assert b"Product" not in stored
    merger = StateMerger.from_declaration(msgpack.unpackb(stored), {"product": product()})
    assert merger.fingerprint == aggregation.merger.fingerprint
    states = merger.reduce([*aggregation.partial([batch]), *aggregation.partial([batch])])
    assert by_key(merger.final(states), "k") == {(1,): {"p": 36, "n": 4}, (2,): {"p": 25, "n": 2}}
    with pytest.raises(UnsupportedAggregateError, match="'product' is not registered"):
        StateMerger.from_declaration(aggregation.declaration)


def test_a_python_aggregate_that_cannot_merge_is_refused_by_name() -> None:
    class NoMerge(Product):
        def merge(self, states: list[pa.Array]) -> None:
            raise RuntimeError("cannot merge")

    broken = udaf(NoMerge, pa.int64(), pa.int64(), [pa.int64()], "immutable", name="broken")
    schema = pa.schema({"k": pa.int64(), "v": pa.int64()})
    with pytest.raises(UnsupportedAggregateError, match=r"broken.*cannot merge"):
        Aggregation.compile(schema, [col("k")], [broken(col("v")).alias("p")], udafs=[broken])


# --- declarations, fingerprints, refusals -----------------------------------------------------------


def test_the_fingerprint_of_our_own_layouts_never_changes_by_itself() -> None:
    schema = pa.schema({"k": pa.string(), "v": pa.float64()})
    aggregation = Aggregation.compile(schema, [col("k")], [*SIMPLE, f.stddev(col("v")).alias("s")])
    assert aggregation.merger.fingerprint == "5d70b778d5ca199568c5f7cd2ad3b8f6"


def test_the_fingerprint_tells_other_states_apart_and_ignores_output_names() -> None:
    schema = pa.schema({"k": pa.int64(), "v": pa.float64(), "i": pa.int64()})

    def fingerprint(key: str, *aggregates: Expr) -> str:
        return Aggregation.compile(schema, [col(key)], list(aggregates)).merger.fingerprint

    same = fingerprint("k", f.sum(col("v")).alias("a"))
    assert fingerprint("k", f.sum(col("v")).alias("b")) == same
    others = {
        fingerprint("i", f.sum(col("v"))),
        fingerprint("k", f.sum(col("i"))),
        fingerprint("k", f.avg(col("v"))),
        fingerprint("k", f.median(col("v"))),
        fingerprint("k", f.approx_distinct(col("i"))),
    }
    assert len(others | {same}) == 6


def test_a_sketch_made_with_another_hash_function_has_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = pa.schema({"k": pa.int64(), "v": pa.int64()})
    aggregates = [f.approx_distinct(col("v")).alias("d")]
    before = Aggregation.compile(schema, [col("k")], aggregates).merger.fingerprint
    assert Aggregation.compile(schema, [col("k")], aggregates).merger.fingerprint == before
    # Other values make another state, as another hash of the same values would.
    values = aggregate_trial._values
    monkeypatch.setattr(aggregate_trial, "_values", lambda kind, count: values(kind, count + 1).slice(1))
    assert Aggregation.compile(schema, [col("k")], aggregates).merger.fingerprint != before


def test_a_declaration_is_plain_data_and_is_validated() -> None:
    schema = pa.schema({"k": pa.int64(), "v": pa.float64()})
    good = Aggregation.compile(schema, [col("k")], [f.median(col("v")).alias("m")]).declaration
    assert msgpack.unpackb(msgpack.packb(good)) == good
    with pytest.raises(UnsupportedFormatError, match="format 99"):
        StateMerger.from_declaration({**good, "format": 99})
    call = good["calls"][0]
    malformed: list[dict[str, Any]] = [
        {"calls": [{**call, "args": [{"column": 7, "type": call["args"][0]["type"]}]}]},
        {"calls": [{**call, "filter": "1; drop table"}]},
        {"calls": [{k: v for k, v in call.items() if k != "function"}]},
        {"keys": b"no schema"},
        {"outputs": [{"name": "m", "call": 5, "nan": None}]},
    ]
    for change in malformed:
        with pytest.raises(ValueError, match="malformed"):
            StateMerger.from_declaration({**good, **change})
    with pytest.raises(UnsupportedAggregateError, match="not registered"):
        StateMerger.from_declaration({**good, "calls": [{**call, "function": "median(c0)) --"}]})


@pytest.mark.parametrize(
    ("aggregate", "message"),
    [
        (f.grouping(col("k")), "grouping"),
        (f.sum(col("v")) / f.count(lit(1)), "not a single aggregate"),
        (col("v") + lit(1), "not a single aggregate"),
        (f.bit_xor(col("i"), distinct=True), "bit_xor"),
        (f.min(col("s")), "leave its order undefined"),
        (f.first_value(col("v"), order_by=[col("s")]), "order by its parts"),
    ],
    ids=str,
)
def test_what_cannot_be_kept_as_state_is_refused_by_name_when_compiled(aggregate: Expr, message: str) -> None:
    schema = pa.schema({"k": pa.int64(), "v": pa.float64(), "i": pa.int64(), "s": pa.struct([("a", pa.int64())])})
    with pytest.raises(UnsupportedAggregateError, match=message):
        Aggregation.compile(schema, [col("k")], [aggregate.alias("r")])


def test_aggregates_that_want_their_rows_in_different_orders_are_refused_together() -> None:
    schema = pa.schema({"k": pa.int64(), "v": pa.float64(), "i": pa.int64()})
    by_value, by_number = (f.nth_value(col("v"), 2, order_by=[col(c)]).alias(c) for c in ("v", "i"))
    for alone in (by_value, by_number):
        Aggregation.compile(schema, [col("k")], [alone])
    with pytest.raises(UnsupportedAggregateError, match=r"[Oo]rdering"):
        Aggregation.compile(schema, [col("k")], [by_value, by_number])


def test_ordered_aggregates_of_one_stream_keep_their_own_orders() -> None:
    batch = rows(k=[1] * 6, v=[5.0, 3.0, 4.0, 1.0, 2.0, 0.0], i=[0, 1, 2, 3, 4, 5], s=list("abcdef"))
    aggregation = Aggregation.compile(
        batch.schema,
        [col("k")],
        [
            f.array_agg(col("i"), order_by=[col("v")]).alias("by_value"),
            f.array_agg(col("v"), order_by=[col("i").sort(ascending=False)]).alias("backwards"),
            f.string_agg(col("s"), "", order_by=[col("v")]).alias("text"),
            f.first_value(col("s"), order_by=[col("v")]).alias("lowest"),
        ],
    )
    states = [state for at in range(6) for state in aggregation.partial([batch.slice(at, 1)])]
    merged = aggregation.merger.reduce([*aggregation.merger.reduce(states[:4]), *states[4:]])
    assert by_key(aggregation.merger.final(merged), "k") == {
        (1,): {
            "by_value": [5, 3, 4, 1, 2, 0],
            "backwards": [0.0, 2.0, 1.0, 4.0, 3.0, 5.0],
            "text": "fdebca",
            "lowest": "f",
        }
    }


def test_a_filter_that_calls_a_python_function_is_refused_with_the_way_out() -> None:
    even = udf(lambda a: a, [pa.int64()], pa.bool_(), "immutable", "even")
    schema = pa.schema({"k": pa.int64(), "v": pa.int64()})
    with pytest.raises(UnsupportedAggregateError, match="compute it in a column first"):
        Aggregation.compile(schema, [col("k")], [f.sum(col("v"), filter=even(col("v"))).alias("r")])


def test_wrong_arguments_are_value_errors() -> None:
    schema = pa.schema({"k": pa.int64(), "v": pa.float64()})
    with pytest.raises(ValueError, match="at least one"):
        Aggregation.compile(schema, [], SIMPLE)
    with pytest.raises(ValueError, match="at least one"):
        Aggregation.compile(schema, [col("k")], [])
    with pytest.raises(ValueError, match="nowhere"):
        Aggregation.compile(schema, [col("nowhere")], SIMPLE)
    with pytest.raises(ValueError, match="duplicate names"):
        Aggregation.compile(schema, [col("k")], [f.sum(col("v")).alias("k")])
    aggregation = Aggregation.compile(schema, [col("k")], SIMPLE)
    with pytest.raises(ValueError, match="expected"):
        aggregation.partial([rows(k=[1], other=[1.0])])
    with pytest.raises(TypeError, match="expected"):
        aggregation.partial([rows(k=[1], v=["text"])])
    with pytest.raises(ValueError, match="expected"):
        aggregation.merger.reduce([rows(k=[1], v=[1.0])])


# --- concurrency and size ---------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], [f.median(col("v")).alias("middle")]], ids=["simple", "surgery"])
def test_calls_from_many_threads_do_not_mix(extra: list[Expr]) -> None:
    schema = pa.schema({"k": pa.int64(), "v": pa.float64()})
    aggregation = Aggregation.compile(schema, [col("k")], [*SIMPLE, *extra])
    failures: list[str] = []

    def work(worker: int) -> None:
        for turn in range(30):
            values = [float(worker), float(turn)]
            states = aggregation.partial([rows(k=[worker, worker], v=values)])
            final = aggregation.merger.final(aggregation.merger.reduce([*states, *states]))
            got = [row for batch in final for row in batch.to_pylist()]
            if [(r["k"], r["n"], r["total"]) for r in got] != [(worker, 4, 2 * sum(values))]:
                failures.append(f"{worker}/{turn}: {got}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_many_keys_still_give_one_state_per_key_and_call() -> None:
    keys = np.arange(300_000)
    batch = rows(k=keys, v=keys.astype(np.float64))
    aggregation = Aggregation.compile(batch.schema, [col("k")], SIMPLE)
    states = aggregation.partial([batch, batch])
    assert sum(b.num_rows for b in states) == len(keys)
    final = pa.Table.from_batches(aggregation.merger.final(states))
    assert (final.num_rows, set(final["n"].unique().to_pylist())) == (len(keys), {2})


def test_a_python_function_is_tried_without_nulls_whatever_the_type_of_its_arguments() -> None:
    seen: list[object] = []

    class Longest(Accumulator):  # type: ignore[misc]
        def __init__(self) -> None:
            self.found = ""

        def update(self, values: pa.Array) -> None:
            seen.extend(values.to_pylist())
            self.found = max([self.found, *values.to_pylist()], key=len)

        def merge(self, states: list[pa.Array]) -> None:
            self.found = max([self.found, *states[0].to_pylist()], key=len)

        def state(self) -> list[pa.Scalar]:
            return [pa.scalar(self.found)]

        def evaluate(self) -> pa.Scalar:
            return pa.scalar(self.found)

    longest = udaf(Longest, [pa.string()], pa.string(), [pa.string()], "stable", "longest")
    schema = pa.schema([("k", pa.int64()), ("s", pa.string())])
    Aggregation.compile(schema, [col("k")], [longest(col("s")).alias("l")], udafs=[longest])
    assert seen
    assert None not in seen


# -- rows that are taken back


RETRACTED = pa.schema([("k", pa.string()), ("v", pa.int64()), ("x", pa.float64()), ("d", pa.decimal128(9, 2))])


def retractable() -> Aggregation:
    aggregates = [
        f.count(lit(1)).alias("n"),
        f.count(col("v")).alias("some"),
        f.sum(col("v")).alias("total"),
        f.sum(col("v"), filter=col("x") > lit(0.0)).alias("positive"),
        f.avg(col("v")).alias("mean"),
        f.sum(col("d")).alias("money"),
    ]
    return Aggregation.compile(RETRACTED, [col("k")], aggregates, retractable=True)


@pytest.mark.parametrize("seed", range(5))
def test_states_of_rows_that_are_taken_back_leave_those_of_the_others(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 300
    values = pa.array(rng.integers(-50, 50, count), mask=rng.random(count) < 0.4)
    money = pa.array([Decimal(int(i)) / 4 for i in rng.integers(-9, 9, count)], pa.decimal128(9, 2))
    keys = pa.array([[None, "a", "b", "c"][i] for i in rng.integers(0, 4, count)])
    rows = pa.record_batch([keys, values, pa.array(rng.normal(size=count)), money], schema=RETRACTED)
    # All of group "c" goes, and of the others most.
    gone = pa.array((rng.random(count) < 0.9) | np.asarray(pc.fill_null(pc.equal(keys, "c"), False)))
    aggregation = retractable()
    states = [*aggregation.partial([rows.slice(0, 100), rows.slice(100)]), *aggregation.retract([rows.filter(gone)])]
    found = pa.Table.from_batches(aggregation.merger.final(aggregation.merger.reduce(states)))
    left = pa.Table.from_batches(aggregation.merger.final(aggregation.partial([rows.filter(pc.invert(gone))])))
    empty = found.filter(pc.equal(found["n"], 0))
    assert empty.to_pylist() == [
        {"k": "c", "n": 0, "some": 0, "total": None, "positive": None, "mean": None, "money": None}
    ]
    by_key = [("k", "ascending")]
    assert found.filter(pc.greater(found["n"], 0)).sort_by(by_key).equals(left.sort_by(by_key))


@pytest.mark.parametrize(
    ("aggregate", "reason"),
    [
        (f.max(col("v")), "count, sum"),
        (f.count(col("v"), distinct=True), "without DISTINCT"),
        (f.avg(col("d")), "floats or integers"),
        (f.sum(col("v").cast(pa.uint64())), "signed"),
    ],
)
def test_what_cannot_take_rows_back_is_refused(aggregate: Expr, reason: str) -> None:
    with pytest.raises(UnsupportedAggregateError, match=reason):
        Aggregation.compile(RETRACTED, [col("k")], [aggregate], retractable=True)


def test_a_retractable_aggregation_is_rebuilt_from_its_declaration() -> None:
    aggregation = retractable()
    rebuilt = StateMerger.from_declaration(aggregation.declaration)
    assert rebuilt.fingerprint == aggregation.merger.fingerprint
    row = pa.record_batch([["a"], [None], [1.0], [None]], schema=RETRACTED)
    assert rebuilt.final(aggregation.partial([row]))[0]["total"].to_pylist() == [None]


def test_the_same_aggregates_under_other_keys_merge_the_same_states() -> None:
    aggregation = retractable()
    row = pa.record_batch([["a"], [5], [1.0], [None]], schema=RETRACTED)
    (states,) = aggregation.partial([row, row])
    numbered = aggregation.merger.regrouped(pa.schema([("number", pa.int64())]))
    renamed = pa.RecordBatch.from_arrays([pa.array([7]), *states.columns[1:]], schema=numbered.state_schema)
    (found,) = numbered.final([renamed, renamed])
    assert found.select(["number", "n", "total"]).to_pylist() == [{"number": 7, "n": 4, "total": 20}]
