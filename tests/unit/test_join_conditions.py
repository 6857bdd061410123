"""What expressions say of a join of streams: keys, bounds on event time, and the rest."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pyarrow as pa
import pytest
from datafusion import Expr, SessionContext, col, lit

from operators import SchemaError, StreamContext
from operators.verbs.join_conditions import join_conditions
from tests.support.streams import as_multiset
from tests.unit.test_joins import HOWS, in_order, interval_sql, query, read, run, same, sides


def duration(count: int, unit: str = "ms") -> Expr:
    return lit(pa.scalar(count, pa.duration(unit)))


def interval(text: str) -> Expr:
    """An interval as SQL writes it."""
    session = SessionContext()
    projection = session.sql(f"SELECT interval '{text}' AS i").logical_plan().to_variant().projections()[0]
    return Expr(Expr(projection).to_variant().expr())


def streams() -> tuple[Any, Any]:
    read_in = read(StreamContext(), sides(1))
    return read_in["left"], read_in["right"]


T, U = col("t"), col("u")
BOUNDS: dict[str, tuple[list[Expr], tuple[int | None, int | None]]] = {
    "between": ([T.between(U - duration(500), U + duration(200))], (-500, 200)),
    "the other way round": ([U.between(T - duration(200), T + duration(500))], (-500, 200)),
    "between the left": ([T.between(U, U + lit(timedelta(seconds=2)))], (0, 2000)),
    "two comparisons": ([(U - duration(500) <= T) & (U + duration(200) >= T)], (-500, 200)),
    "apart": ([U - duration(500) <= T, U + duration(200) >= T], (-500, 200)),
    "strictly": ([U - duration(500) < T, U + duration(200) > T], (-499, 199)),
    "a difference": ([duration(200) >= T - U, duration(500) >= U - T], (-500, 200)),
    "one bound": ([T >= U], (0, None)),
    "the other bound": ([U + interval("1 day 3 seconds") > T], (None, 86_402_999)),
    "equal": ([T == U], (0, 0)),
    "equal after a while": ([U + duration(7) == T], (7, 7)),
    "finer than the columns": ([U + duration(1500, "us") <= T, U + duration(2500, "us") >= T], (2, 2)),
    "the stricter one holds": ([T >= U, T > U, U + duration(9) >= T, U + duration(5) >= T], (1, 5)),
}


@pytest.mark.parametrize("what", BOUNDS)
def test_comparisons_of_event_times_are_bounds(what: str) -> None:
    conditions, expected = BOUNDS[what]
    found = join_conditions("join_on", *streams(), conditions)
    assert found.units(1) == expected
    assert found.rest is None
    assert found.keys.pairs == ()
    assert found.keys.event_times == (what == "equal")


def test_equalities_of_columns_are_keys_and_the_rest_is_a_filter() -> None:
    conditions = [
        (col("left.k") == col("right.k")) & (col("w") > col("v")),
        col("right.j") == col("left.j"),
        col("w") == lit(3),
        col("w") + lit(1) == col("v"),
        ~(col("v") == col("w")),
        (T >= U) | (col("v") == col("w")),
    ]
    found = join_conditions("join_on", *streams(), conditions)
    assert found.keys.pairs == (("k", "k"), ("j", "j"))
    assert (found.lower, found.upper) == (None, None)
    assert found.rest is not None
    text = found.rest.canonical_name()
    assert all(part in text for part in ("w > v", "w = ", "w + ", "NOT v = w", "t >= u OR v = w"))


@pytest.mark.parametrize("how", HOWS)
def test_join_on_equals_the_query_with_the_same_condition(how: str) -> None:
    tables = sides(6)
    conditions = [
        col("left.k") == col("right.k"),
        col("left.j") == col("right.j"),
        T.between(U - duration(500), U + duration(200)),
        (col("v") + col("w")) % lit(2) == lit(1),
    ]
    found = run(tables, lambda s: s["left"].join_on(s["right"], *conditions, how=how))
    near = "t BETWEEN u - INTERVAL 500 MILLISECOND AND u + INTERVAL 200 MILLISECOND AND (v + w) % 2 = 1"
    same(in_order(found, how), query(tables, interval_sql(how, near)))


def test_join_on_without_event_time_and_with_windows_of_both_sides() -> None:
    tables = sides(6)
    same_keys = [col("k") == col("k2"), col("j") == col("j2")]

    def regular(s: Any) -> Any:
        right = s["right"].with_column_renamed("k", "k2").with_column_renamed("j", "j2")
        return s["left"].join_on(right, *same_keys).select("k", "j", "t", "v", "u", "w")

    same(run(tables, regular), query(tables, interval_sql("inner", "true")))

    def windows(s: Any) -> Any:
        left = s["left"].window(["k"], [_count("n")], 1000)
        right = s["right"].window(["k"], [_count("m")], 1000).drop("window_end_time")
        right = right.with_column_renamed("window_start_time", "start").with_column_renamed("k", "k2")
        conditions = col("k") == col("k2"), col("window_start_time") == col("start")
        return left.join_on(right, *conditions, how="left").select("k", "n", "m")

    sql = """SELECT k, n, m FROM (SELECT k, floor(epoch_ms(t) / 1000) AS s, count(*) AS n FROM left_rows GROUP BY ALL)
        LEFT JOIN (SELECT k AS k2, floor(epoch_ms(u) / 1000) AS s2, count(*) AS m FROM right_rows GROUP BY ALL)
        ON k = k2 AND s = s2"""
    assert as_multiset(run(tables, windows)) == as_multiset(query(tables, sql))


def _count(name: str) -> Expr:
    from datafusion import functions

    return functions.count(lit(1)).alias(name)


@pytest.mark.parametrize("zone", ["Europe/Berlin", "UTC", "+02:00", None])
def test_a_day_is_a_bound_where_it_has_24_hours(zone: str | None) -> None:
    context = StreamContext()
    rows = pa.table({"t": pa.array([0], pa.timestamp("us", zone)), "k": [1]})
    left, right = (context.from_batches([rows], event_time="t", name=name) for name in ("left", "right"))
    right = right.select(col("t").alias("u"), "k")
    day = [T >= U, U + interval("1 day") >= T]
    if zone == "Europe/Berlin":
        with pytest.raises(SchemaError, match=r"no fixed length in the time zone.*hours"):
            join_conditions("join_on", left, right, day)
    else:
        assert join_conditions("join_on", left, right, day).units(1) == (0, 86_400_000)
    assert join_conditions("join_on", left, right, [T >= U, U + interval("24 hours") >= T]).units(1) == (0, 86_400_000)


def test_conditions_that_are_no_join_of_streams_are_refused_with_what_to_write_instead() -> None:
    left, right = streams()
    with pytest.raises(SchemaError, match=r'both sides have a column .k.: say col\("left.k"\)'):
        left.join_on(right, col("k") == col("k"))
    with pytest.raises(SchemaError, match=r"no column 'nope'; available columns: t, k, j, v, u, k, j, w"):
        left.join_on(right, col("nope") == col("w"))
    with pytest.raises(SchemaError, match="make a column of each first"):
        left.join_on(right, col("v") + lit(1) == col("w"))
    with pytest.raises(SchemaError, match="needs an equality"):
        left.join_on(right)
    with pytest.raises(SchemaError, match="months have no fixed length"):
        left.join_on(right, U + interval("1 month") >= T)
    with pytest.raises(SchemaError, match=r"how='left' without a bound.*never certain"):
        left.drop("k").join_on(right.drop("j"), col("v") == col("w"), how="left")
    with pytest.raises(ValueError, match="no two event times"):
        left.drop("k", "j").join_on(right, T > U, T < U)
