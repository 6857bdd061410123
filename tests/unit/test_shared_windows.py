"""Windows of several lengths in one pass equal as many windows on their own, and cost one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datafusion import col, lit
from datafusion import functions as f

from operators import DataStream, StreamContext
from operators.sinks import MemorySink
from operators.testing import StreamHarness
from statebackend import Aggregation
from tests.support.restarts import survive
from tests.support.streams import as_multiset, cut, events, one_shot

DISORDER_MS = 700
LENGTHS = [1_000, (900, 300), (400, 400), (200, 1_000), 4_000]
SCHEMA = pa.schema([("t", pa.timestamp("ms")), ("v", pa.int64())])
N = f.count(lit(1)).alias("n")


def aggregates() -> list[Any]:
    return [N, f.sum(col("v")).alias("total"), f.avg(col("x")).alias("mean")]


def word(size: int | tuple[int, int]) -> str:
    return "-".join(map(str, size)) if isinstance(size, tuple) else str(size)


def shared(streams: Mapping[str, DataStream], **options: Any) -> dict[str, DataStream]:
    found = streams["rows"].windows(["k", "j"], aggregates(), LENGTHS, **options)
    return dict(zip(map(word, LENGTHS), found, strict=True)) | {"late": found[0].late_rows()}


def test_every_kind_equals_one_query_over_all_rows() -> None:
    table = events(3, 1_200, disorder_ms=DISORDER_MS)
    found = survive(shared, {"rows": cut(table, 3)}, crashes=0, max_disorder=DISORDER_MS)
    assert found["late"].num_rows == 0
    for size in LENGTHS:
        length, slide = size if isinstance(size, tuple) else (size, size)
        expected = one_shot(table, length, slide, select="count(1) AS n, sum(v) AS total, avg(x) AS mean")
        assert as_multiset(found[word(size)]) == as_multiset(expected), size


@pytest.mark.parametrize("options", [{}, {"allowed_lateness": 300}, {"emit_every": 700}], ids=str)
def test_every_kind_equals_windows_on_their_own_with_the_same_updates(options: dict[str, int]) -> None:
    """Rows that are too late for some kinds and not for others among them."""
    sizes = [1_000, (1_000, 200), 500]

    def alone(streams: Mapping[str, DataStream]) -> dict[str, DataStream]:
        made = {}
        for size in sizes:
            length, slide = size if isinstance(size, tuple) else (size, size)
            made[word(size)] = streams["rows"].window("k", aggregates(), length, slide, **options)
        return made

    def together(streams: Mapping[str, DataStream]) -> dict[str, DataStream]:
        return dict(zip(map(word, sizes), streams["rows"].windows("k", aggregates(), sizes, **options), strict=True))

    inputs = {"rows": cut(events(4, 800, disorder_ms=DISORDER_MS), 4)}
    expected = survive(alone, inputs, crashes=0, max_disorder=DISORDER_MS - 300)
    found = survive(together, inputs, crashes=0, max_disorder=DISORDER_MS - 300)
    for size in map(word, sizes):
        assert as_multiset(found[size]) == as_multiset(expected[size])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"allowed_lateness": 300}], ids=str)
def test_deaths_and_stops_change_nothing(seed: int, options: dict[str, int], tmp_path: Path) -> None:
    inputs = {"rows": cut(events(seed, 500, disorder_ms=DISORDER_MS + 400), seed, 30)}

    def run(**incidents: Any) -> dict[str, Any]:
        found = survive(lambda s: shared(s, **options), inputs, seed=seed, max_disorder=DISORDER_MS, **incidents)
        return {name: as_multiset(table) for name, table in found.items()}

    undisturbed = run(crashes=0)
    assert run(crashes=3, stops=2, directory=tmp_path if seed == 0 else None) == undisturbed
    assert all(undisturbed[word(size)] for size in LENGTHS)


def test_all_kinds_and_all_aggregates_share_one_pass_and_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    partial = Aggregation.partial

    def counted(self: Aggregation, batches: Any) -> Any:
        passes.append(sum(batch.num_rows for batch in batches))
        return partial(self, batches)

    monkeypatch.setattr(Aggregation, "partial", counted)
    table = events(5, 600)
    context = StreamContext(checkpoint_interval=None)
    stream = context.from_batches(cut(table, 5), table.schema, event_time="t", name="in")
    for windows in stream.windows("k", aggregates(), LENGTHS, name="w"):
        windows.sink(MemorySink())
    context.run()
    assert sum(passes) == table.num_rows
    assert context.explain().count("| state ") == 1


def test_a_row_counts_in_the_windows_for_which_it_is_not_too_late() -> None:
    def build(stream: DataStream) -> dict[str, DataStream]:
        short, long = stream.windows([], N, [10, 100])
        return {"short": short, "long": long, "late": long.late_rows()}

    with StreamHarness(build, SCHEMA, event_time="t") as harness:
        for time in (5, 50, 6, 150, 7):
            harness.push([{"t": time, "v": time}])
        harness.finish()
        assert [row["n"] for row in harness.output("short")] == [1, 1, 1]
        assert [row["n"] for row in harness.output("long")] == [3, 1]
        assert [row["v"] for row in harness.output("late")] == [7]


def test_short_windows_are_not_held_back_by_long_ones() -> None:
    """Not in what follows them either: each kind has an event time of its own."""

    def build(stream: DataStream) -> dict[str, DataStream]:
        short, long = (
            windows.select(col("window_start_time").alias("s"), "n").window([], f.sum(col("n")).alias("n"), 20)
            for windows in stream.windows([], N, [10, 1_000])
        )
        return {"short": short, "long": long}

    with StreamHarness(build, SCHEMA, event_time="t") as harness:
        for time in (5, 15, 40):
            harness.push([{"t": time, "v": 0}])
        assert [row["n"] for row in harness.output("short")] == [2]
        assert harness.output("long") == []


def test_what_cannot_be_is_refused_and_explain_tells_the_kinds() -> None:
    stream = StreamContext().from_batches([], SCHEMA, event_time="t", name="in")
    with pytest.raises(ValueError, match="at least one length"):
        stream.windows([], N, [])
    with pytest.raises(ValueError, match="10 ms is there twice"):
        stream.windows([], N, [10, (10, 10)])
    with pytest.raises(ValueError, match="must be positive"):
        stream.windows([], N, [10, 0])
    short, sliding = stream.windows([], N, [10, (60, 20)])
    assert short.explain().splitlines()[:2] == [
        "10 rows of windows in.windows-10-60: n over 10 ms and 60 ms every 20 ms",
        "  | state in.windows-10-60: one row per group and pane of the last 60 ms of event time",
    ]
    assert sliding.explain().startswith("60-20 rows of ")
