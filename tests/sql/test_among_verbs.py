"""SQL among verbs: registration, functions, names of operators, kinds of event time."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from datafusion import Accumulator, Expr, Table, col, lit, udaf, udf, udtf
from datafusion import functions as f
from pyarrow.dataset import dataset

from operators import SchemaError, StreamContext, UnsupportedQueryError
from operators.sinks import MemorySink
from tests.sql.running import answered, as_rows, context, streamed, tables


class Spread(Accumulator):
    """The largest value minus the smallest."""

    def __init__(self) -> None:
        self._bounds: list[int] = []

    def state(self) -> list[pa.Scalar]:
        low, high = (self._bounds[0], self._bounds[-1]) if self._bounds else (None, None)
        return [pa.scalar(low, pa.int64()), pa.scalar(high, pa.int64())]

    def update(self, *values: pa.Array) -> None:
        self._bounds = sorted([*self._bounds, *(v for v in values[0].to_pylist() if v is not None)])

    def merge(self, states: list[pa.Array]) -> None:
        for state in states:
            self.update(state)

    def evaluate(self) -> pa.Scalar:
        return pa.scalar(self._bounds[-1] - self._bounds[0] if self._bounds else None, pa.int64())


def test_a_name_is_registered_once_and_a_stream_in_its_own_job() -> None:
    job, other = context(), context()
    stream = job.sql("SELECT n FROM a")
    with pytest.raises(ValueError, match="already"):
        job.register("bid", stream)
    with pytest.raises(ValueError, match="already"):
        job.register("dim", stream)
    with pytest.raises(ValueError, match="another context"):
        other.register("c", stream)


def test_a_source_is_known_by_its_name_until_another_takes_it() -> None:
    job = StreamContext()
    source = job.from_batches([tables()["a"]], event_time="t", max_disorder=400, name="a")
    assert job.sql("SELECT n, k FROM a").schema.names == ["n", "k"]
    job.register("a", source.select("n"))
    with pytest.raises(SchemaError, match="k"):
        job.sql("SELECT n, k FROM a")
    job.from_batches([tables()["b"]], event_time="t", max_disorder=400, name="dim")
    job.register("dim", pa.table({"n": [1]}))
    assert "in a table of 1 rows" in job.sql("SELECT a.n FROM a JOIN dim ON a.n = dim.n").explain()


def test_sql_and_verbs_meet_in_one_job() -> None:
    job = StreamContext()
    job.register("a", job.from_batches([tables()["a"]], event_time="t", max_disorder=400, name="a"))
    positive = job.sql("SELECT n, t, k, v FROM a WHERE v > 0").with_column("w", col("v") + lit(1))
    job.register("Positive Rows", positive)
    counted = job.sql("SELECT k, tumble(t, INTERVAL '5 s') AS at, max(w) AS high FROM \"Positive Rows\" GROUP BY k, 2")
    found = MemorySink()
    counted.filter(col("high") > lit(500)).select("k", "high").sink(found)
    job.run()
    wanted = answered("SELECT k, max(v + 1) AS high FROM a WHERE v > 0 GROUP BY k, win(t, 5) HAVING max(v + 1) > 500")
    assert as_rows(found.table()) == as_rows(wanted)


def test_conditions_and_sums_of_any_length() -> None:
    job = context()
    job.sql(f"SELECT n FROM a WHERE {' AND '.join(f'n <> {i}' for i in range(1100))}")
    job.sql(f"SELECT n FROM a WHERE {' OR '.join(f'n = {i}' for i in range(1100))}")
    job.sql(f"SELECT {' + '.join(['n'] * 1100)} AS m FROM a")


def test_a_python_function_is_called_by_its_name() -> None:
    job = context()
    job.register_udf(udf(lambda values: pc.add(values, 5), [pa.int64()], pa.int64(), "immutable", "plus_five"))
    stream = job.sql("SELECT plus_five(n) AS m FROM a WHERE plus_five(n) < 20")
    found = MemorySink()
    stream.sink(found)
    job.run()
    assert sorted(found.table()["m"].to_pylist()) == list(range(5, 20))


def test_a_python_aggregate_is_called_by_its_name() -> None:
    job = context()
    job.register_udaf(udaf(Spread, [pa.int64()], pa.int64(), [pa.int64(), pa.int64()], "immutable", "spread"))
    found = MemorySink()
    job.sql("SELECT tumble(t, INTERVAL '5 s') AS w, spread(n) + 1 AS s FROM a WHERE v > 0 GROUP BY 1").sink(found)
    job.run()
    wanted = answered("SELECT tumble(t, INTERVAL '5 s') AS w, max(n) - min(n) + 1 AS s FROM a WHERE v > 0 GROUP BY 1")
    assert as_rows(found.table()) == as_rows(wanted)


def test_the_rows_of_a_python_table_function_are_joined_as_a_table() -> None:
    job = context()

    def words(first: Expr, last: Expr) -> Table:
        numbers = range(first.python_value().as_py(), last.python_value().as_py())
        return Table(dataset(pa.table({"number": numbers, "word": [f"w{n}" for n in numbers]})))

    job.register_udtf(udtf(words, "words"))
    found = MemorySink()
    job.sql("SELECT n, f.word FROM a JOIN words(1, 3) AS f ON a.j = f.number WHERE f.word <> 'w2'").sink(found)
    job.run()
    assert as_rows(found.table()) == as_rows(answered("SELECT n, 'w1' AS word FROM a WHERE j = 1"))
    with pytest.raises(UnsupportedQueryError, match="tables alone"):
        job.sql("SELECT * FROM words(1, 3)")
    with pytest.raises(SchemaError, match="Literal"):
        job.sql("SELECT n FROM a JOIN words(a.n, 3) AS f ON a.j = f.number")


def test_a_column_op_of_a_stream_that_corrects_nothing_is_a_column_like_any() -> None:
    job = context()
    job.register("named", job.sql("SELECT n AS op, k FROM a"))
    assert job.sql("SELECT * FROM named").schema.names == ["op", "k"]
    assert job.sql("SELECT op + 1 AS m FROM named").schema.names == ["m"]


def test_a_python_function_cannot_take_the_name_of_a_window() -> None:
    job = context()
    job.register_udf(udf(lambda values: values, [pa.int64()], pa.int64(), "immutable", "tumble"))
    with pytest.raises(SchemaError, match="'tumble'"):
        job.sql("SELECT n FROM a")


def test_a_table_whose_keys_do_not_fit_the_stream_is_refused() -> None:
    job = context()
    job.register("wide", pa.table({"j": [1 << 40], "label": ["far"]}))
    with pytest.raises(SchemaError, match="'wide' holds values beyond int32"):
        job.sql("SELECT n, label FROM a JOIN wide ON a.j = wide.j")


def test_a_subquery_over_a_table_that_fails_is_a_schema_error() -> None:
    with pytest.raises(SchemaError, match="subquery d"):
        context().sql("SELECT a.n FROM a JOIN (SELECT CAST(label AS INT) AS j FROM dim) AS d ON a.j = d.j")


def test_a_changelog_of_verbs_is_one_in_sql() -> None:
    job = context()
    grouped = job.sql("SELECT n, k, t FROM a").aggregate("k", f.count(lit(1)).alias("c"))
    job.register("grouped", grouped)
    stream = job.sql("SELECT k, c + 1 AS more FROM grouped WHERE c > 10")
    assert stream.updates is not None
    assert stream.schema.names == ["op", "k", "more"]


def test_the_same_query_gives_the_same_operators_again() -> None:
    query = "SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a GROUP BY 1, 2"
    assert context().sql(query).explain() == context().sql(query).explain()
    assert as_rows(streamed(query, crashes=4, seed=5)) == as_rows(streamed(query, crashes=0))


def test_operators_are_called_after_the_query_and_numbered_where_they_are_alike() -> None:
    query = "SELECT k, count(*) AS c FROM a WHERE j = 1 GROUP BY k"
    job = context()
    one = job.sql(query, name="first")
    assert "aggregate first-aggregate-k:" in one.explain()
    assert "aggregate second-aggregate-k:" in job.sql(query, name="second").explain()
    with pytest.raises(SchemaError, match="first-aggregate-k"):
        job.sql(query, name="first")
    both = "SELECT w, c FROM (SELECT tumble(t, INTERVAL '5 s') AS w, count(*) AS c FROM a WHERE j = {} GROUP BY 1)"
    explained = job.sql(f"{both.format(0)} UNION ALL {both.format(1)}", name="third").explain()
    assert "third-tumble-5000:" in explained
    assert "third-tumble-5000-2:" in explained


@pytest.mark.parametrize(
    "kind", [pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("ms", "UTC"), pa.timestamp("us", "Europe/Berlin")]
)
def test_windows_over_every_kind_of_event_time(kind: pa.DataType) -> None:
    table = tables()["a"]
    times = table["t"].cast(pa.timestamp("s"), safe=False).cast(kind, safe=False)
    job = StreamContext()
    rows = table.set_column(table.schema.get_field_index("t"), "t", times)
    job.register("a", job.from_batches([rows], event_time="t", max_disorder=timedelta(seconds=2), name="a"))
    sink = MemorySink()
    job.sql("SELECT tumble(t, INTERVAL '5 s') AS w, count(*) AS c, min(t) AS low FROM a GROUP BY 1").sink(sink)
    job.run()
    found = sink.table()
    assert found.schema.field("w").type == pa.timestamp("ms", kind.tz)
    assert found.schema.field("low").type == kind
    assert sum(found["c"].to_pylist()) == table.num_rows
    for start, low in zip(found["w"].cast(pa.int64()).to_pylist(), found["low"].to_pylist(), strict=True):
        assert 0 <= low.timestamp() - start / 1000 < 5 if kind.tz else True


def test_days_are_event_times_too() -> None:
    days = pa.table({"d": pa.array([0, 0, 1, 8], pa.date32()), "v": [1, 2, 3, 4]})
    job = StreamContext()
    job.register("days", job.from_batches([days], event_time="d", name="days"))
    sink = MemorySink()
    job.sql("SELECT tumble(d, INTERVAL '7 days') AS w, sum(v) AS total FROM days GROUP BY 1").sink(sink)
    job.run()
    assert sorted(sink.table()["total"].to_pylist()) == [4, 6]


def test_days_are_no_bound_of_joins_where_clocks_are_changed() -> None:
    rows = pa.table({"t": pa.array([0], pa.timestamp("us", "Europe/Berlin")), "k": [1], "v": [2]})
    job = StreamContext()
    for name in ("o", "r"):
        job.register(name, job.from_batches([rows], event_time="t", name=name))
    near = "SELECT o.k FROM o JOIN r ON o.k = r.k AND r.t BETWEEN o.t - INTERVAL '{}' AND o.t"
    newest = """SELECT o.k, x.v FROM o JOIN LATERAL (SELECT r.v FROM r WHERE r.k = o.k AND r.t <= o.t
        AND r.t >= o.t - INTERVAL '{}' ORDER BY r.t DESC LIMIT 1) AS x ON true"""
    with pytest.raises(SchemaError, match="say it in hours"):
        job.sql(near.format("1 day"))
    with pytest.raises(UnsupportedQueryError, match="LATERAL"):
        job.sql(newest.format("1 day"))
    job.sql(near.format("24 hours"), name="near")
    job.sql(newest.format("24 hours"), name="newest")


def test_a_query_survives_in_the_store_on_disk(tmp_path: Path) -> None:
    query = """SELECT w, k, c FROM (
        SELECT *, row_number() OVER (PARTITION BY w ORDER BY c DESC, k NULLS LAST) AS rn FROM
        (SELECT hop(t, INTERVAL '2 s', INTERVAL '4 s') AS w, k, count(*) AS c FROM a GROUP BY 1, 2)) WHERE rn <= 2"""
    assert as_rows(streamed(query, crashes=3, directory=tmp_path)) == as_rows(streamed(query, crashes=0))
