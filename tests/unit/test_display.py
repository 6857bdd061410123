"""What a notebook shows of stores, checkpoints, tables and jobs; no name that a user gave becomes part of the page."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datafusion import col, lit
from datafusion import functions as f

import statebackend
from operators import JobProgress, StreamContext
from operators.sinks import MemorySink
from statebackend import JobState, StateStore, StoreSettings, TableKind, TableSpec
from statebackend.inspect import read_store
from statebackend.markup import Markup, card, element, facts, grid
from statebackend.relation import Relation
from tests.support.markup import HOSTILE, parsed, shown, texts

SPEC = TableSpec(
    name=HOSTILE,
    schema=pa.schema([("key", pa.string()), (f"value {HOSTILE}", pa.string())]),
    key=("key",),
    kind=TableKind.UPSERT,
)
JOB = JobState(sources={HOSTILE: {"file": HOSTILE, "row": 7}}, watermarks={HOSTILE: 1_700_000_000_000})


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of one table with a row that means harm."""
    path = tmp_path_factory.mktemp("stores") / "db"
    with StateStore.open(path, StoreSettings(compaction="none", gc_interval_s=None)) as store:
        store.table(SPEC).write(pa.record_batch([[HOSTILE], [HOSTILE]], schema=SPEC.schema))
        store.checkpoint(JOB).result(10)
    return str(path)


# --- what everything is made of


def test_text_is_escaped_and_markup_is_not() -> None:
    assert element("b", "<i>", Markup("<i>x</i>")) == "<b>&lt;i&gt;<i>x</i></b>"
    assert element("b", title='"><script>') == '<b title="&quot;&gt;&lt;script&gt;"></b>'


@pytest.mark.parametrize("wrong", ["", "b><script", "on click", "1"])
def test_what_is_no_name_is_neither_an_element_nor_an_attribute(wrong: str) -> None:
    with pytest.raises(ValueError, match="no name of an element"):
        element(wrong)
    with pytest.raises(ValueError, match="no name of an element"):
        element("b", **{wrong: "x"})


def test_characters_that_no_page_can_hold_are_replaced() -> None:
    assert texts(parsed(element("b", "a\0b\x1bc\ud800d"))) == ["a\ufffdb\ufffdc\ufffdd"]


def test_a_long_text_is_cut_and_numbers_are_grouped() -> None:
    tree = parsed(grid(("text", "number", "none"), [("x" * 10_000, 1_234_567, None)]))
    assert texts(tree) == ["text", "number", "none", "x" * 200 + "…", "1,234,567", "-"]


def test_facts_that_are_none_are_left_out() -> None:
    assert texts(parsed(facts({"a": 1, "b": None, "c": False}))) == ["a", "1", "c", "False"]


def test_a_table_without_rows_says_so() -> None:
    assert texts(parsed(grid(("a",), [], "files"))) == ["files", "none"]


def test_a_card_has_its_title_first() -> None:
    assert texts(parsed(card(HOSTILE, "Thing")))[:2] == [HOSTILE, "Thing"]


# --- the objects of a store


def test_a_store_shows_its_tables_and_says_when_it_is_closed(tmp_path: Path) -> None:
    with StateStore.open(tmp_path / "db") as store:
        assert "none yet" in texts(shown(store))
        store.table(SPEC).write(pa.record_batch([["a", "b"], ["c", "d"]], schema=SPEC.schema))
        before = texts(shown(store))
        store.flush()
        after = texts(shown(store))
    columns = before.index("rows in memory"), before.index(HOSTILE)
    assert columns[0] < columns[1]
    assert before[columns[1] :][:4] == [HOSTILE, "upsert", "2", "0"]
    assert after[after.index(HOSTILE) :][:4] == [HOSTILE, "upsert", "0", "2"]
    assert "StateStore, closed" in texts(shown(store))


def test_a_manifest_shows_who_wrote_it_and_what_it_names(url: str) -> None:
    found = texts(shown(read_store(url).latest))
    assert {"manifest 2", "writer epoch", HOSTILE, "upsert", "1 flushed", "2023-11-14 22:13:20.000"} <= set(found)


def test_a_checkpoint_shows_positions_and_watermarks(url: str) -> None:
    with statebackend.open_checkpoint(url, pin=False) as reader:
        for thing in (reader, reader.checkpoint):
            found = texts(shown(thing))
            assert "positions" in found
            assert any(text.startswith('{"file": "<img src=x') for text in found)
        assert texts(shown(reader.table(HOSTILE)))[:2] == [HOSTILE, "TableSpec"]


def test_a_catalog_shows_the_names_that_sql_knows(url: str) -> None:
    with statebackend.open_state(url, pin=False) as catalog:
        found = texts(shown(catalog))
        name = next(text for text in found if text.startswith("state."))
        assert catalog.query(f"SELECT * FROM {name}").read_all().num_rows == 1


def test_a_catalog_shows_the_columns_that_sql_knows(tmp_path: Path) -> None:
    ctx = StreamContext(state=tmp_path / "db")
    rows = stream_of(ctx, "rows")
    rows.aggregate(HOSTILE, [f.count(lit(1)).alias("n")], name="totals").sink(MemorySink())
    rows.window([HOSTILE], [f.count(lit(1)).alias("m")], 10_000, name="tens").sink(MemorySink())
    ctx.run()
    with statebackend.open_state(tmp_path / "db", pin=False) as catalog:
        found = texts(shown(catalog))
        for name, columns in (("totals", f"{HOSTILE}, n"), ("tens", f"window_start_time, {HOSTILE}, m")):
            assert found[found.index(f'state."{name}"') + 1] == columns
            assert catalog.sql(f'SELECT * FROM state."{name}"').schema().names == columns.split(", ")


def test_a_store_below_the_working_directory_is_called_as_it_is_seen_from_there(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with statebackend.open_state(url, pin=False) as catalog:
        assert texts(shown(catalog))[0] == f"state of {url}"
        monkeypatch.chdir(Path(url).parent)
        assert texts(shown(catalog))[0] == "state of db"


def test_a_live_catalog_is_shown_before_the_first_checkpoint_and_after_the_end(tmp_path: Path) -> None:
    with StateStore.open(tmp_path / "db") as store, statebackend.open_state(store) as live:
        store.table(SPEC)
        found = texts(shown(live))
        assert "none yet" in found
        assert found[found.index("columns") :].count(f"key, value {HOSTILE}") == 1
    ctx = StreamContext()
    stream_of(ctx, "rows").sink(MemorySink())
    with ctx.register_state() as live:
        ctx.run()
        assert any("has ended" in text for text in texts(shown(live)))


def test_a_table_of_a_catalog_shows_its_first_rows(url: str) -> None:
    with statebackend.open_state(url, pin=False) as catalog:
        assert texts(shown(catalog.table(HOSTILE)))[-2:] == [HOSTILE, HOSTILE]
    many = Relation(pa.schema([("n", pa.int64())]), lambda _: iter([pa.record_batch({"n": list(range(11))})]))
    assert texts(shown(Relation(many.schema, lambda _: iter([])))) == ["no rows", "n int64"]
    found = texts(shown(many))
    assert found[-3:] == ["9", "…", "more than 10 rows"]


def test_a_table_is_shown_whatever_its_types() -> None:
    columns: dict[str, pa.Array] = {
        "ns": pa.array([1, None], pa.timestamp("ns")),  # no time of Python has nanoseconds
        "far": pa.array([2**62, None], pa.timestamp("s")),  # nor such a year
        "bytes": pa.array([b"\xff", None]),
        "list": pa.array([[HOSTILE], None]),
        "empty": pa.array(["", None]),
    }
    batch = pa.record_batch(columns)
    shown(Relation(batch.schema, lambda _: iter([batch])))


def test_a_declaration_shows_the_roles_of_columns() -> None:
    rows = [[cell.text for cell in row.iter("td")] for row in shown(SPEC).iter("tr")]
    assert rows[1:] == [["key", "string", "key"], [f"value {HOSTILE}", "string", None]]


# --- jobs


SCHEMA = pa.schema([("ts", pa.timestamp("ms")), (HOSTILE, pa.string())])


def stream_of(ctx: StreamContext, name: str) -> Any:
    start = datetime(2024, 1, 1)  # noqa: DTZ001  (the column has no zone)
    rows = [{"ts": start + timedelta(seconds=i), HOSTILE: f"{HOSTILE}{i % 2}"} for i in range(20)]
    return ctx.from_batches([pa.RecordBatch.from_pylist(rows, SCHEMA)], event_time="ts", name=name)


def test_a_job_shows_its_graph_and_its_result() -> None:
    ctx = StreamContext(HOSTILE)
    stream_of(ctx, "rows").window([HOSTILE], [f.count(lit(1)).alias("n")], 10_000, name="tens").sink(MemorySink())
    assert {HOSTILE, "StreamContext", "source rows"} <= set(texts(shown(ctx)))
    progress: list[JobProgress] = []
    result = ctx.run(progress.append)
    found = texts(shown(result))
    assert found[found.index("tens") :][:3] == ["tens", "20", "4"]
    assert {"finished", "JobResult", "checkpoints"} <= set(found)
    assert all("JobProgress" in texts(shown(p)) for p in progress)


def test_a_stream_shows_its_columns_and_where_it_comes_from() -> None:
    rows = stream_of(StreamContext(), "rows")
    found = texts(shown(rows.filter(col("ts").is_not_null())))
    assert {"rows", "DataStream", "event time", "ts", "2 columns", HOSTILE, "source rows"} <= set(found)
    newest = rows.deduplicate([HOSTILE], keep="last", name="newest")
    assert {"changelog", "newest"} <= set(texts(shown(newest)))


def test_a_context_without_a_sink_is_shown_too() -> None:
    assert texts(shown(StreamContext("nothing")))[:2] == ["nothing", "StreamContext"]
