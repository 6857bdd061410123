"""Functions of the user: results, order, errors, and that a crash changes nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from datafusion import column, functions, lit

from operators import SchemaError, StreamContext, UserFunctionError
from operators.sinks import MemorySink
from tests.support.restarts import survive
from tests.support.streams import as_multiset, cut, events, one_shot

TABLE = events(6, 700, disorder_ms=200)
BATCHES = cut(TABLE, 6)
DOUBLED = TABLE.set_column(3, "v", pc.multiply(TABLE["v"], 2))


def double(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.set_column(3, "v", pc.multiply(batch["v"], 2))


async def double_soon(batch: pa.RecordBatch) -> pa.RecordBatch:
    await asyncio.sleep(0.001 * (batch.num_rows % 3))
    return double(batch)


def run(build: Any, batches: Any = None, **read: Any) -> tuple[pa.Table, MemorySink]:
    context = StreamContext(checkpoint_interval=None)
    sink = MemorySink()
    stream = build(context.from_batches(batches or BATCHES, TABLE.schema if batches is None else None, **read))
    stream.sink(sink)
    context.run()
    return sink.table(), sink


@pytest.mark.parametrize("crashes", [0, 3])
@pytest.mark.parametrize("verb", ["map_batches", "map_async"])
def test_a_function_of_batches_applies_to_all_rows_and_keeps_event_time(verb: str, crashes: int) -> None:
    def pipeline(inputs: Any) -> Any:
        stream = inputs["in"].map_batches(double) if verb == "map_batches" else inputs["in"].map_async(double_soon)
        windows = stream.window("k", functions.sum(pa_col("v")).alias("s"), 1000, name="w")
        return {"rows": stream, "windows": windows, "late": windows.late_rows()}

    found = survive(pipeline, {"in": BATCHES}, seed=1, crashes=crashes, max_disorder=200)
    assert as_multiset(found["rows"]) == as_multiset(DOUBLED)
    expected = one_shot(DOUBLED, 1000, 1000, keys=["k"], select="sum(v) AS s")
    assert as_multiset(found["windows"]) == as_multiset(expected)
    assert found["late"].num_rows == 0


def pa_col(name: str) -> Any:
    from datafusion import col

    return col(name)


def test_a_function_may_return_tables_pieces_or_nothing() -> None:
    answers: list[Any] = [None, pa.table({"x": [1, 2]}), [pa.record_batch({"x": [3]}), pa.record_batch({"x": [4]})], []]
    numbers = iter(range(4))
    table, _ = run(lambda s: s.map_batches(lambda _: answers[next(numbers)], pa.schema([("x", pa.int64())])),
                   [pa.record_batch({"i": [i]}) for i in range(4)])  # fmt: skip
    assert table["x"].to_pylist() == [1, 2, 3, 4]


def words(row: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return [{"word": word, "i": row["i"]} for word in row["text"].split()]


WORDS = pa.schema([("word", pa.string()), ("i", pa.int64())])


def test_flat_map_makes_any_number_of_rows_of_each() -> None:
    rows = pa.record_batch({"i": [0, 1, 2], "text": ["to be", "", "or"]})
    table, _ = run(lambda s: s.flat_map(words, WORDS), [rows])
    assert table.to_pylist() == [{"word": "to", "i": 0}, {"word": "be", "i": 0}, {"word": "or", "i": 2}]
    with pytest.raises(SchemaError, match="do not fit the declared columns"):
        run(lambda s: s.flat_map(words, pa.schema([("word", pa.int64())])), [rows])


def test_results_of_asynchronous_calls_keep_their_order_and_run_at_once() -> None:
    running, most = [0], [0]
    first_may_end = asyncio.Event()

    async def slow(batch: pa.RecordBatch) -> pa.RecordBatch:
        running[0] += 1
        most[0] = max(most[0], running[0])
        if batch["i"][0].as_py() == 0:
            await first_may_end.wait()
        elif batch["i"][0].as_py() == 3:
            first_may_end.set()
        running[0] -= 1
        return batch

    batches = [pa.record_batch({"i": [i]}) for i in range(12)]
    table, _ = run(lambda s: s.map_async(slow, capacity=4), batches)
    assert table["i"].to_pylist() == list(range(12))
    assert most[0] >= 2, "the first call ended only after the fourth had begun"


def test_no_more_calls_than_the_capacity_are_under_way() -> None:
    running, most = [0], [0]

    async def counted(batch: pa.RecordBatch) -> pa.RecordBatch:
        running[0] += 1
        most[0] = max(most[0], running[0])
        await asyncio.sleep(0.002)
        running[0] -= 1
        return batch

    run(lambda s: s.map_async(counted, capacity=2), [pa.record_batch({"i": [i]}) for i in range(20)])
    assert most[0] <= 3, "one more begins before the job waits for the oldest"


def fails_on_odd(batch: pa.RecordBatch) -> pa.RecordBatch:
    if batch["i"][0].as_py() % 2:
        raise ValueError("odd")
    return batch


async def fails_soon_on_odd(batch: pa.RecordBatch) -> pa.RecordBatch:
    return fails_on_odd(batch)


def row_fails_on_odd(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if row["i"] % 2:
        raise ValueError("odd")
    return [row]


FAILING: dict[str, Any] = {
    "map_batches": lambda s, **o: s.map_batches(fails_on_odd, name="f", **o),
    "flat_map": lambda s, **o: s.flat_map(row_fails_on_odd, name="f", **o),
    "map_async": lambda s, **o: s.map_async(fails_soon_on_odd, name="f", **o),
}


@pytest.mark.parametrize("verb", FAILING)
def test_a_function_that_raises_names_the_operator_and_the_batch(verb: str) -> None:
    batches = [pa.record_batch({"i": [i]}) for i in range(4)]
    with pytest.raises(UserFunctionError, match="odd") as caught:
        run(FAILING[verb], batches)
    assert caught.value.operator_id == "f"
    assert "batches, batch 2" in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("verb", FAILING)
def test_rows_on_which_a_function_fails_can_be_set_aside(verb: str) -> None:
    context = StreamContext(checkpoint_interval=None)
    stream = FAILING[verb](context.from_batches([pa.record_batch({"i": [i]}) for i in range(6)]), on_error="skip")
    good, bad = MemorySink(), MemorySink()
    stream.sink(good)
    stream.failed_rows().sink(bad)
    context.run()
    assert (good.table()["i"].to_pylist(), bad.table()["i"].to_pylist()) == ([0, 2, 4], [1, 3, 5])


def test_a_call_that_takes_too_long_is_an_error_of_the_function() -> None:
    async def forever(batch: pa.RecordBatch) -> pa.RecordBatch:
        await asyncio.sleep(3600)
        return batch

    with pytest.raises(UserFunctionError, match="TimeoutError"):
        run(lambda s: s.map_async(forever, timeout=0.01), [pa.record_batch({"i": [1]})])


def test_no_thread_is_left_when_a_job_fails_with_calls_under_way() -> None:
    async def forever(batch: pa.RecordBatch) -> pa.RecordBatch:
        await asyncio.sleep(3600)
        return batch

    def broken(batch: pa.RecordBatch) -> pa.RecordBatch:
        raise ValueError("broken")

    before = set(threading.enumerate())
    with pytest.raises(UserFunctionError, match="broken"):
        run(
            lambda s: (s.map_async(forever).sink(MemorySink()), s.map_batches(broken))[1],
            [pa.record_batch({"i": [1]})],
        )
    assert not [t.name for t in set(threading.enumerate()) - before if t.name.startswith("async")]


def test_results_of_other_columns_are_refused() -> None:
    with pytest.raises(SchemaError, match=r"returned columns\nx"):
        run(lambda s: s.map_batches(lambda b: pa.record_batch({"x": [1.5]}), pa.schema([("x", pa.int64())])))
    with pytest.raises(SchemaError, match="returned int"):
        run(lambda s: s.map_batches(lambda b: [1]))  # type: ignore[list-item]
    with pytest.raises(UserFunctionError, match="must return rows"):
        run(lambda s: s.flat_map(dict))
    stream = StreamContext().from_batches(TABLE, event_time="t")
    without = stream.map_batches(double, pa.schema([("v", pa.int64())]))
    with pytest.raises(SchemaError, match="has no column 't' of its type"):
        without.window([], functions.count(lit(1)).alias("n"), 10)
    with pytest.raises(ValueError, match="failed_rows"):
        without.failed_rows()
    with pytest.raises(ValueError, match="capacity"):
        stream.map_async(double_soon, capacity=0)
    with pytest.raises(ValueError, match="timeout"):
        stream.map_async(double_soon, timeout=0)
    assert "map_batches batches.map_batches-double-2: double" in stream.map_batches(double).explain()


def test_unnest_gives_a_row_for_each_element_and_none_for_empty_lists_and_nulls() -> None:
    lists = [[1, None], [], None, [2]]
    for kind in (pa.list_(pa.int64()), pa.large_list(pa.int64())):
        table = pa.table({"l x": pa.array(lists, kind), "t": pa.array(range(4), pa.timestamp("ms"))})
        context = StreamContext(checkpoint_interval=None)
        sink = MemorySink()
        stream = context.from_batches([table, table.slice(0, 0)], event_time="t").unnest("l x")
        assert stream.event_time == "t"
        stream.sink(sink)
        context.run()
        assert sink.table()["l x"].to_pylist() == [1, None, 2]
        assert sink.table()["t"].cast(pa.int64()).to_pylist() == [0, 0, 3]


def test_unnest_needs_a_list_and_rows_that_are_not_corrected() -> None:
    stream = StreamContext().from_batches([TABLE], event_time="t")
    with pytest.raises(SchemaError, match="no list but int64"):
        stream.unnest("v")
    with pytest.raises(SchemaError, match="no column 'w'"):
        stream.unnest("w")
    lists = stream.aggregate("k", functions.array_agg(column("v")).alias("l"))
    with pytest.raises(SchemaError, match="changelog"):
        lists.unnest("l")
