"""Count windows equal those of a plain loop over the rows in their order."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datafusion import col, functions, lit

from operators import SchemaError, StreamContext
from operators.sinks import MemorySink
from tests.support.restarts import survive
from tests.support.streams import as_multiset, cut, events


def aggregates() -> list[Any]:
    return [
        functions.count(lit(1)).alias("n"),
        functions.sum(col("v")).alias("total"),
        functions.array_agg(col("s")).alias("all"),
    ]


def windows(table: pa.Table, size: int, keys: list[str]) -> Counter[Any]:
    waiting: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    found: Counter[Any] = Counter()

    def settle(key: tuple[Any, ...], rows: list[Any]) -> None:
        values = [r["v"] for r in rows if r["v"] is not None]
        found[(*key, len(rows), sum(values) if values else None, tuple(sorted(r["s"] for r in rows)))] += 1

    for row in table.to_pylist():
        key = tuple(row[k] for k in keys)
        waiting[key].append(row)
        if len(waiting[key]) == size:
            settle(key, waiting.pop(key))
    for key, rows in waiting.items():
        settle(key, rows)
    return found


def shown(table: pa.Table) -> Counter[Any]:
    return Counter((*list(r.values())[:-1], tuple(sorted(r["all"]))) for r in table.to_pylist())


@pytest.mark.parametrize("keys", [["k"], ["k", "j"], []], ids=repr)
@pytest.mark.parametrize("size", [1, 7, 100])
def test_windows_equal_those_of_a_loop_with_and_without_crashes(keys: list[str], size: int, tmp_path: Path) -> None:
    table = events(size, 900)
    batches = cut(table, size, 40)

    def pipeline(inputs: Any) -> Any:
        return {"out": inputs["in"].count_window(keys, aggregates(), size, name="c")}

    expected = windows(table, size, keys)
    assert shown(survive(pipeline, {"in": batches}, crashes=0)["out"]) == expected
    directory = tmp_path if size == 7 else None
    assert shown(survive(pipeline, {"in": batches}, seed=size, directory=directory)["out"]) == expected


def test_a_window_is_emitted_with_its_last_row_and_has_no_event_time() -> None:
    table = pa.table({"k": ["a", "b", "a", "a", "a"], "v": [1, 2, 3, 4, 5]})
    context = StreamContext(checkpoint_interval=None)
    stream = context.from_batches(table.to_batches(max_chunksize=1), table.schema)
    sums = stream.count_window(col("k"), functions.sum(col("v")).alias("s"), 2)
    sink = MemorySink()
    sums.sink(sink)
    context.run()
    assert [b["s"].to_pylist() for b in sink.batches] == [[4], [9], [2]]
    with pytest.raises(SchemaError, match="count windows have no event time"):
        sums.window("k", functions.sum(col("s")).alias("t"), 10)
    assert "GROWS FOR EVER" in sums.explain()


def test_one_large_batch_holds_many_windows_of_one_group() -> None:
    table = pa.table({"k": [0] * 10_000, "v": list(range(10_000))})
    context = StreamContext(checkpoint_interval=None)
    sink = MemorySink()
    counted = functions.count(lit(1)).alias("n")
    context.from_batches(table).count_window("k", [counted, functions.min(col("v")).alias("low")], 3).sink(sink)
    context.run()
    found = sink.table()
    assert as_multiset(found) == Counter({(0, 3, i): 1 for i in range(0, 9999, 3)} | {(0, 1, 9999): 1})


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_a_size_is_a_number_of_rows(size: Any) -> None:
    stream = StreamContext().from_batches(pa.table({"k": [1]}))
    with pytest.raises(ValueError, match="number of rows"):
        stream.count_window("k", functions.count(lit(1)).alias("n"), size)
