"""The graph of a job as a picture: every operator once, no box on another, edges between the right ones."""

from __future__ import annotations

import random
from datetime import timedelta
from itertools import combinations
from typing import Any
from xml.etree import ElementTree as ET

import pyarrow as pa
import pytest
from datafusion import col, lit
from datafusion import functions as f

from operators import DataStream, StreamContext
from operators.sinks import MemorySink
from tests.support.markup import parsed

SCHEMA = pa.schema([("ts", pa.timestamp("ms")), ("k", pa.string()), ("v", pa.float64())])
SVG = "{http://www.w3.org/2000/svg}"


def source(ctx: StreamContext, name: str) -> DataStream:
    return ctx.from_batches([pa.RecordBatch.from_pylist([], SCHEMA)], event_time="ts", name=name)


def drawn(thing: Any) -> ET.Element:
    svg = parsed(thing.explain()._repr_svg_())[0]
    assert svg.tag == f"{SVG}svg"
    return svg


def boxes(svg: ET.Element) -> list[tuple[list[str], tuple[float, float, float, float]]]:
    """The lines of every box, and its left, top, right and bottom."""
    found = []
    for group in svg.iter(f"{SVG}g"):
        x, y, width, height = (float(group.find(f"{SVG}rect").get(n)) for n in ("x", "y", "width", "height"))  # type: ignore[union-attr, arg-type]
        found.append(([text.text or "" for text in group.iter(f"{SVG}text")], (x, y, x + width, y + height)))
    return found


def titles(svg: ET.Element) -> list[str]:
    return [lines[0] for lines, _ in boxes(svg)]


def edges(svg: ET.Element) -> list[tuple[str, str]]:
    """For every edge, the first lines of the boxes at its ends."""
    places = boxes(svg)

    def at(x: float, y: float, edge: int) -> str:
        return next(lines[0] for lines, p in places if p[0] <= x <= p[2] and abs(p[edge] - y) < 0.2)

    found = []
    for path in svg.iter(f"{SVG}path"):
        words = (path.get("d") or "").replace("M", "").split()
        start, end = (tuple(map(float, word.split(","))) for word in (words[0], words[-1]))
        found.append((at(*start, 3), at(*end, 1)))
    return found


def a_job() -> StreamContext:
    ctx = StreamContext()
    left, right = source(ctx, "left"), source(ctx, "right")
    kept = left.filter(col("v") > lit(0.0)).with_column("w", col("v") * lit(2.0))
    window = kept.window(["k"], [f.count(lit(1)).alias("n")], timedelta(seconds=10), name="tens")
    window.sink(MemorySink(), name="out")
    window.late_rows().sink(MemorySink(), name="late")
    renamed = right.with_column_renamed("ts", "ts2").with_column_renamed("v", "v2")
    within = timedelta(seconds=5)
    kept.interval_join(renamed, "k", "left", before=within, after=within, name="pairs").sink(
        MemorySink(), name="joined"
    )
    right.aggregate("k", f.sum(col("v")).alias("total"), name="totals").sink(MemorySink(), name="sums")
    return ctx


def test_every_operator_has_a_box_and_stateless_verbs_in_a_row_share_one() -> None:
    svg = drawn(a_job())
    found = sorted(title.split(":")[0] for title in titles(svg))
    assert found == sorted(
        [
            "source left",
            "source right",
            "filter(v > Float64(0))",
            "window tens",
            "sink out (at least once)",
            "sink late (at least once)",
            "with_column_renamed(ts, ts2)",
            "left join pairs",
            "sink joined (at least once)",
            "aggregate totals",
            "sink sums (at least once)",
        ]
    )
    assert ["with_column_renamed(ts, ts2)", "with_column_renamed(v, v2)"] in [lines for lines, _ in boxes(svg)]


def test_edges_lead_from_inputs_to_those_who_read_them() -> None:
    found = {(a.split(":")[0], b.split(":")[0]) for a, b in edges(drawn(a_job()))}
    assert found == {
        ("source left", "filter(v > Float64(0))"),
        ("filter(v > Float64(0))", "window tens"),
        ("filter(v > Float64(0))", "left join pairs"),
        ("window tens", "sink out (at least once)"),
        ("window tens", "sink late (at least once)"),
        ("source right", "with_column_renamed(ts, ts2)"),
        ("with_column_renamed(ts, ts2)", "left join pairs"),
        ("left join pairs", "sink joined (at least once)"),
        ("source right", "aggregate totals"),
        ("aggregate totals", "sink sums (at least once)"),
    }


def test_state_that_grows_for_ever_says_so_and_side_outputs_have_their_name() -> None:
    svg = drawn(a_job())
    found = ET.tostring(svg, encoding="unicode")
    assert found.count("grows for ever") == 1
    assert [text.text for text in svg.findall(f"{SVG}text")] == ["late rows"]


def test_a_stream_is_drawn_up_to_itself_and_a_side_output_has_a_box() -> None:
    window = source(StreamContext(), "rows").window(["k"], [f.count(lit(1)).alias("n")], 1000, name="w")
    assert [t.split(":")[0] for t in titles(drawn(window))] == ["source rows", "window w"]
    assert [t.split(":")[0] for t in titles(drawn(window.late_rows()))] == ["source rows", "window w", "late rows"]


@pytest.mark.parametrize("seed", range(20))
def test_no_box_lies_on_another_and_all_lie_within_the_picture(seed: int) -> None:
    svg = drawn(random_job(random.Random(seed)))
    places = [place for _, place in boxes(svg)]
    for (left, top, right, bottom), (x, y, x2, y2) in combinations(places, 2):
        assert right <= x or x2 <= left or bottom <= y or y2 <= top
    x, y, width, height = map(float, (svg.get("viewBox") or "").split())
    assert all(x <= a and y <= b and c <= x + width and d <= y + height for a, b, c, d in places)
    for above, below in edges(svg):
        assert above != below


def random_job(rng: random.Random) -> StreamContext:
    """Streams that are filtered, split and united at random."""
    ctx = StreamContext()
    streams = [source(ctx, f"source{i}") for i in range(rng.randint(1, 4))]
    for step in range(rng.randint(1, 12)):
        one, other = rng.choice(streams), rng.choice(streams)
        if rng.random() < 0.5:
            streams.append(one.filter(col("v") > lit(float(step))))
        else:
            streams.append(one.union(other, name=f"union{step}"))
    for number, stream in enumerate(streams):
        stream.sink(MemorySink(), name=f"sink{number}")
    return ctx


def test_the_text_stays_what_print_shows() -> None:
    ctx = a_job()
    explained = ctx.explain()
    assert explained == str(explained) == repr(explained)
    assert explained.splitlines()[0] == "sink out (at least once)"
    assert StreamContext().explain() == ""
    assert StreamContext().explain()._repr_svg_() is None


def test_a_long_label_is_cut_and_is_whole_in_the_tooltip() -> None:
    ctx = StreamContext()
    condition = col("k") == lit("x" * 30)
    for number in range(20):
        condition = condition | (col("k") == lit(f"{'x' * 30}{number}"))
    svg = drawn(source(ctx, "rows").filter(condition))
    lines, (left, _, right, _) = boxes(svg)[-1]
    assert len(lines) == 4
    assert lines[-1].endswith("…")
    assert right - left < 600
    assert f"{'x' * 30}19" in "".join(title.text or "" for title in svg.iter(f"{SVG}title"))
