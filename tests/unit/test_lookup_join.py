"""Every row with what is looked up for its key, in a table or by a function behind a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from operators import SchemaError, StreamContext, UserFunctionError
from operators.sinks import MemorySink
from tests.support.streams import as_multiset
from tests.unit.test_joins import at, query, rows, run

NAMES = pa.table({"k": ["a", "b", "b", None, "unused"], "name": ["A", "B1", "B2", "null", "U"]})


def looked_up(table: pa.Table, lookup: Any, **options: Any) -> pa.Table:
    return run({"left": table}, lambda s: s["left"].lookup_join(lookup, "k", **options))


def expected(table: pa.Table, how: str) -> Any:
    sql = f"SELECT l.*, r.name FROM left_rows l {how} JOIN right_rows r ON l.k = r.k"
    return as_multiset(query({"left": table, "right": NAMES}, sql))


class Directory:
    """Answers out of `NAMES`, and remembers what it was asked."""

    schema = NAMES.schema

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, keys: pa.RecordBatch) -> pa.Table:
        assert keys.schema.names == ["k"]
        asked = keys.column("k").to_pylist()
        self.asked.append(asked)
        return NAMES.filter(pa.array([k in asked for k in NAMES["k"].to_pylist()]))


@pytest.mark.parametrize("how", ["inner", "left"])
def test_a_table_a_file_and_a_function_give_the_same_rows(how: str, tmp_path: Path) -> None:
    table = rows(1, 200, "v")
    parquet.write_table(NAMES, tmp_path / "names.parquet")
    functions: list[Any] = [NAMES, tmp_path / "names.parquet"]
    for lookup in functions:
        assert as_multiset(looked_up(table, lookup, how=how)) == expected(table, how)
    for cache_rows in (0, 2, 1000):
        found = looked_up(table, Directory(), how=how, schema=NAMES.schema, cache_rows=cache_rows)
        assert as_multiset(found) == expected(table, how)


def test_rows_come_out_in_their_order_with_those_that_found_nothing() -> None:
    table = at([1, 2, 3, 4], k=["b", "?", None, "a"], v=[1, 2, 3, 4])
    found = looked_up(table, NAMES, how="left")
    pairs = list(zip(found["v"].to_pylist(), found["name"].to_pylist(), strict=True))
    assert pairs == [(1, "B1"), (1, "B2"), (2, None), (3, None), (4, "A")]


def ask(batches: list[list[str | None]], **options: Any) -> list[list[str]]:
    """What the function is asked while these keys stream by."""
    directory = Directory()
    context = StreamContext(checkpoint_interval=None)
    found = [pa.record_batch({"k": pa.array(keys, pa.string())}) for keys in batches]
    stream = context.from_batches(found, found[0].schema)
    stream.lookup_join(directory, "k", schema=NAMES.schema, **options).sink(MemorySink())
    context.run()
    return directory.asked


def test_a_function_is_asked_once_for_each_key_also_when_it_has_no_row() -> None:
    assert ask([["a", "a", None], ["?", "a"], ["?", "b", "a"], [None]]) == [["a"], ["?"], ["b"]]


def test_answers_are_forgotten_after_the_ttl() -> None:
    now = [0.0]
    directory = Directory()
    context = StreamContext(checkpoint_interval=None, clock=lambda: now[0])

    def batches() -> Any:
        for time in (0.0, 0.9, 1.5, 1.6, 3.0):
            now[0] = time
            yield pa.record_batch({"k": ["a"]})

    stream = context.from_batches(batches, pa.schema([("k", pa.string())]))
    stream.lookup_join(directory, "k", schema=NAMES.schema, cache_ttl=1000).sink(MemorySink())
    context.run()
    assert directory.asked == [["a"]] * 3


def test_the_cache_is_bounded_and_keeps_the_keys_that_are_asked_for_again_and_again() -> None:
    batches: list[list[str | None]] = [["a", f"x{i}"] for i in range(50)]
    asked = ask([*batches, ["x0"]], cache_rows=8)
    assert [keys for keys in asked if "a" in keys] == [["a", "x0"]]
    assert asked[-1] == ["x0"]
    assert ask([["a"], ["a"]], cache_rows=0) == [["a"], ["a"]]


def test_a_function_may_return_more_than_it_was_asked_for() -> None:
    context = StreamContext(checkpoint_interval=None)
    sink = MemorySink()
    found = [pa.record_batch({"k": [key]}) for key in ("a", "b", "a")]
    stream = context.from_batches(found, found[0].schema)
    stream.lookup_join(lambda _: NAMES, "k", schema=NAMES.schema).sink(sink)
    context.run()
    assert sink.table()["name"].to_pylist() == ["A", "B1", "B2", "A"]


def test_many_random_keys_equal_one_query_whatever_the_cache_holds() -> None:
    rng = np.random.default_rng(1)
    table = at(np.arange(2000), k=rng.zipf(1.3, 2000) % 200, v=np.arange(2000))
    right = pa.table({"k": np.repeat(np.arange(0, 200, 3), 2), "name": np.arange(134)})

    def function(keys: pa.RecordBatch) -> pa.Table:
        return right.filter(pa.compute.is_in(right["k"], keys.column("k"))).slice(0)

    sql = "SELECT l.*, r.name FROM left_rows l LEFT JOIN right_rows r ON l.k = r.k"
    for cache_rows in (10, 60, 10_000):
        found = looked_up(table, function, how="left", schema=right.schema, cache_rows=cache_rows)
        assert as_multiset(found) == as_multiset(query({"left": table, "right": right}, sql))


def test_a_function_that_fails_or_returns_something_else_is_named() -> None:
    table = rows(1, 20, "v")

    def explode(keys: pa.RecordBatch) -> pa.Table:
        raise ConnectionError("no route")

    with pytest.raises(UserFunctionError, match="no route") as caught:
        looked_up(table, explode, schema=NAMES.schema, name="names")
    assert caught.value.operator_id == "names"
    with pytest.raises(SchemaError, match=r"(?s)returned columns.*expected"):
        looked_up(table, lambda keys: keys, schema=NAMES.schema)
    with pytest.raises(SchemaError, match="returns a RecordBatch or a Table, not dict"):
        looked_up(table, lambda keys: {}, schema=NAMES.schema)


def test_what_is_no_lookup_is_refused() -> None:
    context = StreamContext()
    table = rows(1, 5, "v")
    stream = context.from_batches(table.to_batches(), table.schema)
    with pytest.raises(ValueError, match="needs schema="):
        stream.lookup_join(Directory(), "k")
    with pytest.raises(ValueError, match="there are inner, left"):
        stream.lookup_join(NAMES, "k", "right")
    with pytest.raises(SchemaError, match="no column 'nope'"):
        stream.lookup_join(NAMES, left_on="k", right_on="nope")
    with pytest.raises(SchemaError, match="needs a key"):
        stream.lookup_join(NAMES)
    with pytest.raises(SchemaError, match=r"both sides have columns \['v'\]"):
        stream.lookup_join(NAMES.rename_columns(["k", "v"]), "k")
    text = stream.lookup_join(Directory(), "k", schema=NAMES.schema, cache_ttl=500).explain()
    assert "k = k in a function, 100000 rows cached for 500 ms" in text
