"""Every verb with state or a place in the stream: however often the job dies or is stopped, the output is the same.

Each story is a small pipeline over one or two inputs with null keys, ties, disorder and late rows. What an undisturbed
run publishes is what a run publishes that dies at random batches, and one that is stopped at random batches, each with
random checkpoints; with the state in memory and in an LSM store of tiny files. Once more after its end each
publishes nothing (`tests.support.restarts`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datafusion import col, lit
from datafusion import functions as f

from operators import DataStream, KeyedBatch, KeyedBatchProcess, KeyedProcess, ListState, ValueState
from tests.support.restarts import survive
from tests.support.streams import as_multiset, cut, events

DISORDER_MS = 400
Streams = Mapping[str, DataStream]
Story = Callable[[Streams], Mapping[str, DataStream]]

STORIES: dict[str, Story] = {}


def story(make: Story) -> Story:
    """Under the name of the function."""
    STORIES[make.__name__.replace("_", " ")] = make
    return make


def one(name: str, build: Callable[[DataStream], Any], *, sides: bool = False) -> None:
    """A story of the left input alone: the result, and with ``sides`` the late rows."""

    def made(streams: Streams) -> dict[str, DataStream]:
        result = build(streams["left"])
        return {"out": result, "late": result.late_rows()} if sides else {"out": result}

    STORIES[name] = made


def two(name: str, build: Callable[[DataStream, DataStream], DataStream]) -> None:
    """A story of both inputs."""

    def made(streams: Streams) -> dict[str, DataStream]:
        return {"out": build(streams["left"], streams["right"].with_column_renamed("t", "u"))}

    STORIES[name] = made


def totals() -> list[Any]:
    return [f.count(lit(1)).alias("n"), f.sum(col("v")).alias("total"), f.avg(col("x")).alias("mean")]


def counts(stream: DataStream, name: str = "n") -> DataStream:
    return stream.window("k", f.count(lit(1)).alias(name), 1_000)


def starts(windows: DataStream) -> DataStream:
    return windows.with_column_renamed("window_start_time", "started").drop("window_end_time")


# -- windows

one("tumbling windows", lambda s: s.window("k", totals(), 1_000), sides=True)
one("sliding windows", lambda s: s.window(["k", "j"], totals(), 1_500, 400), sides=True)
one("windows with gaps", lambda s: s.window([], totals(), 300, 1_000), sides=True)
one("windows with lateness", lambda s: s.window("k", totals(), 1_000, allowed_lateness=300), sides=True)
one("windows, early", lambda s: s.window("k", totals(), 2_000, emit_every=500), sides=True)
one("windows of windows", lambda s: starts(s.window("k", totals(), 500)).window([], f.sum(col("n")).alias("n"), 2_000))
one("cumulate windows", lambda s: s.cumulate_window("k", totals(), 500, 2_000), sides=True)
one("session windows", lambda s: s.session_window(["k", "j"], totals(), 300), sides=True)
one("count windows", lambda s: s.count_window("k", totals(), 7))
one("count windows of all rows", lambda s: s.count_window([], totals(), 7))

# -- keyed

for keep in ("first", "last"):
    for emit in ("changelog", "upserts", "final"):
        one(f"deduplicate, {keep}, {emit}", lambda s, k=keep, e=emit: s.deduplicate("k", keep=k, emit=e), sides=True)
one("deduplicate, first, ttl", lambda s: s.deduplicate("s", ttl=900, emit="final"), sides=True)
one("deduplicate, last, ttl", lambda s: s.deduplicate("s", keep="last", ttl=900), sides=True)

BY = (col("v").sort(ascending=False), col("x").sort())
one("top n, changelog", lambda s: s.top_n(3, "k", BY, with_rank="rank"))
one("top n, upserts", lambda s: s.top_n(3, "k", BY, with_rank="rank", emit="upserts"))
one("top n, final", lambda s: s.top_n(3, "k", BY, ties="all", emit="final"))
one("top n of windows", lambda s: s.top_n(2, "k", BY, window=1_000), sides=True)
one("top n after windows", lambda s: s.window("k", totals(), 1_000).top_n(1, "window_start_time", col("n").sort()))

COUNTED = (f.count(lit(1)).alias("n"), f.sum(col("v")).alias("total"))
for emit in ("changelog", "upserts", "final"):
    one(f"aggregate, {emit}", lambda s, e=emit: s.aggregate("k", COUNTED, emit=e))
one("aggregate, every", lambda s: s.aggregate("k", COUNTED, emit_every=700))
one("aggregate, ttl", lambda s: s.aggregate("s", COUNTED, ttl=900, emit="upserts"), sides=True)
one("aggregate of a changelog", lambda s: s.deduplicate("s", keep="last").aggregate("j", COUNTED))
one("final rows", lambda s: s.aggregate("k", COUNTED).final_rows())
one("updates every", lambda s: s.deduplicate("k", keep="last").updates_every(700))

# -- joins

for how in ("inner", "left", "right", "full", "semi", "anti"):
    two(f"interval join, {how}", lambda a, b, h=how: a.interval_join(b, "k", h, before=300, after=100))
    two(f"window join, {how}", lambda a, b, h=how: a.window_join(b, 800, 400, on="k", how=h))
    two(f"join with ttl, {how}", lambda a, b, h=how: a.join(b, "k", h, ttl=300))
two("join, inner", lambda a, b: a.join(b, "k"))
two("join, semi", lambda a, b: a.join(b, "k", "semi"))
two(
    "join by event time",
    lambda a, b: counts(a).join(counts(b, "m").drop("window_end_time"), ["window_start_time", "k"], "full"),
)
two("as-of join", lambda a, b: a.asof_join(b, "k", "left"))
two("as-of join with tolerance", lambda a, b: a.asof_join(b, "k", tolerance=500))
two("broadcast", lambda a, b: a.join_broadcast(b.drop("u", "z"), "k"))
TABLE = pa.table({"k": ["a", "b", None, "b"], "word": ["one", "two", "none", "three"]})
one("lookup join", lambda s: s.lookup_join(TABLE, "k", "left"))


# -- functions, flow


class Streaks(KeyedProcess):
    """Emits the values since the last timer, when it fires."""

    schema = pa.schema([("k", pa.string()), ("at", pa.int64()), ("seen", pa.string())])
    next = ValueState[int](pa.int64())
    seen = ListState[int](pa.int64())

    def process(self, row: Mapping[str, Any], context: Any) -> None:
        context[self.seen].append(row["v"])
        if context[self.next].value is None:
            context[self.next].value = int(row["t"].timestamp() * 1000) + 500
            context.set_timer(context[self.next].value)

    def on_timer(self, time_ms: int, context: Any) -> Any:
        yield {"k": context.key[0], "at": time_ms, "seen": str(list(context[self.seen]))}
        context[self.seen].clear()
        context[self.next].value = None


class Numbers(KeyedBatchProcess):
    """Numbers the rows of each key."""

    schema = pa.schema([("k", pa.string()), ("n", pa.int64())])
    state = pa.schema([("count", pa.int64())])

    def process(self, batch: KeyedBatch) -> None:
        before = np.asarray(batch.state.column("count").fill_null(0))
        order = np.argsort(batch.key_index, kind="stable")
        keys = batch.key_index[order]
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        place = np.arange(len(keys)) - np.repeat(starts, np.diff(np.append(starts, len(keys))))
        number = np.empty(len(keys), dtype=np.int64)
        number[order] = before[keys] + place + 1
        names = batch.keys.column("k").take(pa.array(batch.key_index))
        batch.emit(pa.record_batch([names, pa.array(number)], schema=self.schema))
        counts = before + np.bincount(batch.key_index, minlength=len(before))
        batch.put(pa.record_batch([pa.array(counts)], schema=self.state))


def doubled(batch: pa.RecordBatch) -> pa.RecordBatch:
    return pa.concat_batches([batch, batch])


async def slowly(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch


def odd(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if row["j"] == 0:
        raise ValueError("zero")
    return [row] if row["j"] == 1 else []


one("process, rows", lambda s: s.process("k", Streaks()))
one("process, batches", lambda s: s.process("k", Numbers()))
one("map_batches", lambda s: s.map_batches(doubled).window("k", totals(), 1_000))
one("map_async", lambda s: s.map_async(slowly, capacity=3).window("k", totals(), 1_000))
one("event time assigned anew", lambda s: s.assign_event_time("t", max_disorder=50).window("k", totals(), 1_000))
two("union", lambda a, b: a.select("t", "k").union(b.select(col("u").alias("t"), "k"), a.select("t", "k")))


@story
def windows_of_several_lengths(streams: Streams) -> dict[str, DataStream]:
    short, long = streams["left"].windows("k", totals(), [500, (1_500, 500)])
    return {"out": short, "long": long, "late": long.late_rows()}


@story
def failed_rows(streams: Streams) -> dict[str, DataStream]:
    mapped = streams["left"].flat_map(odd, on_error="skip")
    return {"out": mapped, "failed": mapped.failed_rows()}


@story
def branches(streams: Streams) -> dict[str, DataStream]:
    found = streams["left"].split(low=col("v") < lit(-200), high=col("v") > lit(200))
    return {name: branch.window("k", totals(), 1_000) for name, branch in found.items()}


@story
def branches_of_a_changelog(streams: Streams) -> dict[str, DataStream]:
    newest = streams["left"].deduplicate("s", keep="last")
    return {n: b.aggregate("j", COUNTED) for n, b in newest.split(low=col("v") < lit(0)).items()}


INPUTS = {
    "left": cut(events(5, 400, disorder_ms=700), 5, 30),
    "right": cut(
        events(6, 220, disorder_ms=700, step_ms=90).select(["t", "k", "v", "s"]).rename_columns(["t", "k", "w", "z"]),
        6,
        20,
    ),
}


def published(name: str, seed: int, **incidents: Any) -> dict[str, Any]:
    result = survive(
        STORIES[name],
        INPUTS,
        seed=seed,
        max_disorder=DISORDER_MS,
        crashes=incidents.pop("crashes", 0),
        **incidents,
    )
    return {output: as_multiset(table) for output, table in result.items()}


@functools.cache
def undisturbed(name: str) -> dict[str, Any]:
    found = published(name, 0)
    assert found["out" if "out" in found else "low"], "nothing would be compared"
    return found


@pytest.mark.parametrize("name", STORIES)
def test_deaths_change_nothing(name: str) -> None:
    assert published(name, 1, crashes=3) == undisturbed(name)


@pytest.mark.parametrize("name", STORIES)
def test_stops_change_nothing(name: str) -> None:
    assert published(name, 2, stops=3) == undisturbed(name)


@pytest.mark.parametrize("name", STORIES)
def test_deaths_and_stops_change_nothing_with_the_state_on_disk(name: str, tmp_path: Path) -> None:
    assert published(name, 3, crashes=2, stops=2, directory=tmp_path) == undisturbed(name)
