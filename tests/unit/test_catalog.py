"""State as tables: what a checkpoint answers when it is asked with SQL, from outside of the job."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from datafusion import col, lit, udaf
from datafusion import functions as f
from datafusion.user_defined import Accumulator

import statebackend
from operators import StreamContext
from operators.sinks import MemorySink
from statebackend import (
    Aggregation,
    CheckpointGoneError,
    CheckpointNotFoundError,
    JobState,
    StateCatalog,
    StateStore,
    StoreSettings,
    TableKind,
    TableOrder,
    TableSpec,
    UnsupportedAggregateError,
    UnsupportedFormatError,
)
from statebackend import format as envelope
from statebackend.cache import BlockReader
from statebackend.cli import main
from statebackend.compaction_tool import compact
from statebackend.maintenance import create_savepoint
from tests.support.stores import job

SETTINGS = StoreSettings(block_rows=64, retained_checkpoints=3, compaction="none", gc_interval_s=None)
ORDERS = TableSpec(
    name="orders.v1:by key",  # what names of tables look like: quoted in SQL
    schema=pa.schema([("id", pa.int64()), ("item", pa.string()), ("price", pa.float64())]),
    key=("id", "item"),
    kind=TableKind.UPSERT,
)
LOG = TableSpec(
    name="checkpoints",  # a table of a job may be called as a system table is
    schema=pa.schema([("at", pa.timestamp("ms", "UTC")), ("text", pa.string())]),
    key=("at",),
    kind=TableKind.APPEND,
    order=TableOrder.TIME,
    time_field="at",
)
ROWS = pa.schema([("window", pa.timestamp("ms", "UTC")), ("key", pa.string()), ("value", pa.float64())])
QUOTED = 'state."orders.v1:by key"'


def aggregation(*aggregates: Any, **options: Any) -> Aggregation:
    return Aggregation.compile(ROWS, [col("window"), col("key")], list(aggregates), **options)


def states(of: Aggregation, name: str = "agg", order: TableOrder = TableOrder.TIME) -> TableSpec:
    return TableSpec(
        name=name,
        schema=of.merger.state_schema,
        key=("window", "key"),
        kind=TableKind.AGGREGATE,
        order=order,
        time_field="window",
        aggregation=of.declaration,
    )


def orders(*rows: tuple[int | None, str | None, float | None]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([dict(zip(ORDERS.schema.names, r, strict=True)) for r in rows], ORDERS.schema)


def write_orders(path: Path, *steps: list[Any]) -> str:
    """One checkpoint for every step; a step is a list of rows to write and of keys to delete."""
    with StateStore.open(path, SETTINGS) as store:
        table = store.table(ORDERS)
        for number, step in enumerate(steps):
            for row in step:
                if len(row) == 3:
                    table.write(orders(row))
                else:
                    table.delete(orders((*row, None)).select(["id", "item"]))
            store.checkpoint(job(number)).result(10)
    return str(path)


def pylist(catalog: StateCatalog, query: str) -> list[dict[str, Any]]:
    return catalog.query(query).read_all().to_pylist()


@pytest.fixture
def url(tmp_path: Path) -> str:
    first = [(1, "a", 1.0), (2, "b", 2.0), (None, None, 3.0), (4, "d", float("nan"))]
    second = [(1, "a", 9.0), (2, "b", 2.0), (3, "c", 3.5), (4, "d", float("nan"))]
    return write_orders(tmp_path / "db", first, second, [(1, "a"), (2, "b", None)])


def test_a_table_shows_its_live_rows_under_a_quoted_name(url: str) -> None:
    with statebackend.open_state(url) as catalog:
        rows = pylist(catalog, f"SELECT id, item FROM {QUOTED} ORDER BY id NULLS FIRST")
        assert rows == [{"id": i, "item": t} for i, t in ((None, None), (2, "b"), (3, "c"), (4, "d"))]
        assert catalog.sql(f"SELECT id FROM {QUOTED} WHERE id > 2").count() == 2
        assert catalog.tables == [ORDERS.name]
        assert int(catalog.checkpoint.checkpoint_id) == 3


def test_an_old_checkpoint_and_a_savepoint_are_tables_too(url: str) -> None:
    create_savepoint(url, "old", checkpoint_id=1)
    with statebackend.open_state(url) as catalog:
        for at in ("1", "'old'"):
            rows = pylist(catalog, f"SELECT price FROM state_at('{ORDERS.name}', {at}) WHERE id = 1")
            assert rows == [{"price": 1.0}]
        joined = (
            f"SELECT n.price FROM {QUOTED} n JOIN state_at('{ORDERS.name}', 2) o ON n.id = o.id WHERE o.price = 3.5"
        )
        assert pylist(catalog, joined) == [{"price": 3.5}]
    with statebackend.open_state(url, savepoint="old", pin=False) as catalog:
        assert catalog.table(ORDERS.name).reader().read_all().num_rows == 4


def test_a_difference_names_what_came_went_and_changed(url: str) -> None:
    with statebackend.open_state(url) as catalog:
        rows = pylist(catalog, f"SELECT * FROM state_diff('{ORDERS.name}', 1, 2) ORDER BY id")
        assert rows == [
            {"id": 1, "item": "a", "old_price": 1.0, "new_price": 9.0, "op": "update"},
            {"id": 3, "item": "c", "old_price": None, "new_price": 3.5, "op": "insert"},
        ]
        rows = pylist(catalog, f"SELECT * FROM state_diff('{ORDERS.name}', 2, 3) ORDER BY id")
        assert rows == [
            {"id": 1, "item": "a", "old_price": 9.0, "new_price": None, "op": "delete"},
            {"id": 2, "item": "b", "old_price": 2.0, "new_price": None, "op": "update"},
        ]
        assert pylist(catalog, f"SELECT * FROM state_diff('{ORDERS.name}', 2, 2)") == []


@pytest.mark.parametrize("seed", range(6))
def test_a_difference_is_the_one_that_plain_python_finds(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    expected: list[dict[Any, Any]] = [{}]
    with StateStore.open(tmp_path / "db", SETTINGS) as store:
        table = store.table(ORDERS)
        for step in range(3):
            ids = rng.integers(0, 400, 300).tolist()
            rows = [(None if i == 7 else i, f"i{i % 3}", float(rng.integers(0, 3))) for i in ids]
            now = dict(expected[-1])
            table.write(orders(*rows))
            now |= {(i, item): price for i, item, price in rows}
            gone = [key for key in now if rng.random() < 0.2]
            table.delete(orders(*((*key, None) for key in gone)).select(["id", "item"]))
            expected.append({key: price for key, price in now.items() if key not in set(gone)})
            store.checkpoint(job(step)).result(10)
    with statebackend.open_state(tmp_path / "db") as catalog:
        for a, b in ((1, 2), (2, 3), (1, 3), (3, 1)):
            old, new = expected[a], expected[b]
            wanted = {
                (
                    *key,
                    old.get(key),
                    new.get(key),
                    "insert" if key not in old else "delete" if key not in new else "update",
                )
                for key in old.keys() | new.keys()
                if (key in old, old.get(key)) != (key in new, new.get(key))
            }
            found = [tuple(r.values()) for r in pylist(catalog, f"SELECT * FROM state_diff('{ORDERS.name}', {a}, {b})")]
            assert len(found) == len(wanted)
            assert set(found) == wanted


def windows(count: int, keys: int = 40) -> pa.RecordBatch:
    at = np.repeat(np.arange(count) * 60_000, keys)
    names = [f"k{i}" for i in range(keys)] * count
    return pa.record_batch([pa.array(at).cast(ROWS.field(0).type), names, np.arange(len(at), dtype=float)], schema=ROWS)


MEDIAN = f.median(col("value")).alias("middle")
MEAN = f.avg(col("value")).alias("mean")


@pytest.mark.parametrize("order", [TableOrder.TIME, TableOrder.HASH])
@pytest.mark.parametrize("aggregate", [MEAN, MEDIAN], ids=["simple", "opaque"])
def test_aggregates_are_finalised_and_raw_states_are_there_on_request(
    tmp_path: Path, aggregate: Any, order: TableOrder
) -> None:
    of = aggregation(f.count(lit(1)).alias("n"), aggregate)
    with StateStore.open(tmp_path / "db", SETTINGS) as store:
        for step in range(2):
            for batch in of.partial([windows(5)]):
                store.table(states(of, order=order)).write(batch)
            store.checkpoint(job(step)).result(10)
    with statebackend.open_state(tmp_path / "db") as catalog:
        found = catalog.table("agg").reader().read_all()
        values = windows(5)["value"].to_pylist()
        assert found.schema.names == ["window", "key", "n", "middle" if aggregate is MEDIAN else "mean"]
        assert found["n"].to_pylist() == [2] * 200
        assert Counter(found.columns[3].to_pylist()) == Counter(values)
        # Several scans at once hold all threads of DataFusion, and finalising goes on all the same.
        union = " UNION ALL ".join(["SELECT key, n FROM state.agg"] * 8)
        assert pylist(catalog, f"SELECT count(*) AS c FROM ({union})") == [{"c": 1600}]
        assert len(pylist(catalog, f"{union} ORDER BY key LIMIT 3")) == 3
        assert pylist(catalog, "SELECT count(*) AS c, sum(a0_count) AS n FROM raw.agg") == [{"c": 400, "n": 400}]
        changed = pylist(catalog, "SELECT old_n, new_n, op, count(*) c FROM state_diff('agg', 1, 2) GROUP BY 1, 2, 3")
        assert changed == [{"old_n": 1, "new_n": 2, "op": "update", "c": 200}]


class Longest(Accumulator):
    def __init__(self) -> None:
        self._most = 0.0

    def state(self) -> list[pa.Scalar]:
        return [pa.scalar(self._most)]

    def update(self, values: pa.Array) -> None:
        self._most = max(self._most, pc.max(values).as_py() or 0.0)

    def merge(self, states: pa.Array) -> None:
        self.update(states[0] if isinstance(states, list) else states)

    def evaluate(self) -> pa.Scalar:
        return pa.scalar(self._most)


def test_functions_of_the_job_are_given_by_the_caller_and_raw_states_need_none(tmp_path: Path) -> None:
    longest = udaf(Longest, [pa.float64()], pa.float64(), [pa.float64()], "volatile", "longest")
    of = aggregation(longest(col("value")).alias("top"), udafs=[longest])
    with StateStore.open(tmp_path / "db", SETTINGS, udafs={"longest": longest}) as store:
        for batch in of.partial([windows(2)]):
            store.table(states(of)).write(batch)
        store.checkpoint(JobState()).result(10)
    with statebackend.open_state(tmp_path / "db", udafs={"longest": longest}) as catalog:
        assert pylist(catalog, "SELECT max(top) AS top FROM state.agg") == [{"top": 79.0}]
    with statebackend.open_state(tmp_path / "db") as catalog:
        with pytest.raises(UnsupportedAggregateError, match="longest"):
            catalog.sql("SELECT * FROM state.agg")
        assert pylist(catalog, "SELECT count(*) AS c FROM raw.agg") == [{"c": 80}]


@pytest.fixture
def blocks_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many blocks every read from the storage took."""
    read: list[int] = []
    original = BlockReader.blocks

    async def counted(self: BlockReader, layout: Any, meta: Any, select: Any) -> Any:
        blocks = await original(self, layout, meta, select)
        read.append(len(blocks))
        return blocks

    monkeypatch.setattr(BlockReader, "blocks", counted)
    return read


@pytest.mark.parametrize("kind", ["aggregate", "append"])
def test_a_predicate_on_the_time_reads_only_the_blocks_that_may_match(
    tmp_path: Path, kind: str, blocks_read: list[int]
) -> None:
    of = aggregation(MEAN)
    with StateStore.open(tmp_path / "db", SETTINGS) as store:
        if kind == "aggregate":
            for batch in of.partial([windows(100)]):
                store.table(states(of, "checkpoints")).write(batch)
        else:
            rows = windows(100)
            store.table(LOG).write(pa.record_batch([rows["window"], rows["key"]], schema=LOG.schema))
        store.checkpoint(JobState()).result(10)
    time = "window" if kind == "aggregate" else "at"
    minute = "TIMESTAMP '1970-01-01T00:{:02}:00Z'"
    first, last = minute.format(10), minute.format(11)
    for predicate, minutes, blocks in (
        (f"{time} >= {first} AND {time} < {last}", 1, 3),
        (f"{time} BETWEEN {first} AND {last} AND {time} IS NOT NULL", 2, 4),
        (f"{time} = {first} OR {time} = {minute.format(40)}", 2, 5),
        (f"{time} < {minute.format(0)}", 0, 0),
    ):
        blocks_read.clear()
        with statebackend.open_state(tmp_path / "db") as catalog:
            query = f"SELECT count(*) AS c FROM state.checkpoints WHERE {predicate}"
            assert pylist(catalog, query) == [{"c": 40 * minutes}]
        assert sum(blocks_read) <= blocks, predicate
    blocks_read.clear()
    with statebackend.open_state(tmp_path / "db") as catalog:
        assert pylist(catalog, "SELECT count(*) AS c FROM state.checkpoints") == [{"c": 4000}]
    assert sum(blocks_read) >= 4000 // 64


@pytest.mark.parametrize("order", [TableOrder.HASH, TableOrder.TIME])
def test_a_predicate_on_the_key_reads_only_the_blocks_of_its_hash(tmp_path: Path, order: TableOrder) -> None:
    of = aggregation(MEAN)
    with StateStore.open(tmp_path / "db", SETTINGS) as store:
        for batch in of.partial([windows(100)]):
            store.table(states(of, order=order)).write(batch)
        store.checkpoint(JobState()).result(10)
    for predicate, rows in (
        ("key = 'k7'", 100),
        ("'k7' = key AND mean >= 0", 100),
        ("key IN ('k7', 'k8')", 200),
        ("key = 'k7' OR (key = 'k8' AND mean < 0)", 100),
        ("key = 'nobody'", 0),
        ("key = 'k7' AND key = 'k8'", 0),
        ("key IS NULL", 0),
    ):
        with statebackend.open_state(tmp_path / "db") as catalog:
            assert pylist(catalog, f"SELECT count(*) AS c FROM state.agg WHERE {predicate}") == [{"c": rows}]
            reads = catalog.reads
        if not rows:
            assert reads.blocks_read == 0  # the filter of the file knows
        elif order is TableOrder.HASH:
            assert 0 < reads.blocks_read <= 6, predicate  # of 64 rows each
            assert reads.read_bytes < reads.stored_bytes / 5
            assert reads.fetched_bytes < reads.stored_bytes / 2  # the index among it
    for predicate in ("key > 'k7'", "key = 'k7' OR mean < 0", "key LIKE 'k7%'", "upper(key) = 'K7'", "key <> 'k7'"):
        with statebackend.open_state(tmp_path / "db") as catalog:
            found = pylist(catalog, f"SELECT key, mean FROM state.agg WHERE {predicate}")
            whole = catalog.context.from_arrow(pa.table(catalog.table("agg")))
            assert len(found) == whole.filter(predicate).count() > 0


def test_files_that_cannot_match_are_not_opened(tmp_path: Path) -> None:
    with StateStore.open(tmp_path / "db", SETTINGS) as store:
        for day in range(5):
            at = pa.array(np.arange(100) * 1000 + day * 86_400_000).cast(LOG.schema.types[0])
            store.table(LOG).write(pa.record_batch([at, ["x"] * 100], schema=LOG.schema))
            store.checkpoint(job(day)).result(10)
    with statebackend.open_state(tmp_path / "db") as catalog:
        day = "at >= TIMESTAMP '1970-01-03T00:00:00Z' AND at < TIMESTAMP '1970-01-04T00:00:00Z'"
        assert pylist(catalog, f"SELECT count(*) AS c FROM state.checkpoints WHERE {day}") == [{"c": 100}]
        reads = catalog.reads
        assert (reads.files, reads.files_read, reads.blocks, reads.blocks_read) == (5, 1, 2, 2)
        assert reads.requests == 2  # the index and the blocks of one file


def test_keys_of_several_columns_and_of_order_key_are_pruned_too(tmp_path: Path) -> None:
    by_key = TableSpec(
        name="kv",
        schema=pa.schema([pa.field("key", pa.binary(), nullable=False), ("value", pa.int64())]),
        key=("key",),
        kind=TableKind.UPSERT,
        order=TableOrder.KEY,
    )
    with StateStore.open(tmp_path / "db", SETTINGS) as store:
        store.table(ORDERS).write(orders(*((i, f"i{i % 7}", float(i)) for i in range(2000)), (None, "i0", -1.0)))
        keys = [b"%08d" % i for i in range(2000)]
        store.table(by_key).write(pa.record_batch([keys, list(range(2000))], schema=by_key.schema))
        store.checkpoint(job(1)).result(10)
    with statebackend.open_state(tmp_path / "db") as catalog:
        between = "key >= arrow_cast('00000700', 'Binary') AND key < arrow_cast('00000710', 'Binary')"
        assert pylist(catalog, f"SELECT count(*) AS c, min(value) AS v FROM state.kv WHERE {between}") == [
            {"c": 10, "v": 700}
        ]
        assert catalog.reads.blocks_read <= 3
    for query, found in (
        (f"SELECT price FROM {QUOTED} WHERE id = 700 AND item = 'i0'", 700.0),
        (f"SELECT price FROM {QUOTED} WHERE id IS NULL AND item = 'i0'", -1.0),
        ("SELECT value FROM state.kv WHERE key = arrow_cast('00000700', 'Binary')", 700),
    ):
        with statebackend.open_state(tmp_path / "db") as catalog:
            [row] = pylist(catalog, query)
            assert list(row.values()) == [found]
            assert catalog.reads.blocks > 20
            assert catalog.reads.blocks_read <= 2


def test_a_difference_reads_only_what_differs(tmp_path: Path, blocks_read: list[int]) -> None:
    of = aggregation(MEAN)
    with StateStore.open(tmp_path / "db", StoreSettings(block_rows=16384, compaction="none")) as store:
        for first in (0, 10_000):
            rows = windows(10_000)
            late = pc.add(rows["window"].cast(pa.int64()), first * 60_000).cast(ROWS.field(0).type)
            batch = pa.record_batch([late, rows["key"], rows["value"]], schema=ROWS)
            for part in of.partial([batch]):
                store.table(states(of)).write(part)
            store.checkpoint(JobState()).result(10)
    with statebackend.open_state(tmp_path / "db") as catalog:
        assert pylist(catalog, "SELECT count(*) AS c FROM state_diff('agg', 1, 2)") == [{"c": 400_000}]
    # One file of two is new. Reading both checkpoints whole takes three files; blocks at a cut are counted twice here.
    assert sum(blocks_read) < 2 * 400_000 / 16384


def test_a_state_much_larger_than_the_memory_goes_through_a_query_piece_by_piece(tmp_path: Path) -> None:
    budget, rows = 4 << 20, 40_000
    spec = TableSpec(
        name="t", schema=pa.schema([("k", pa.int64()), ("v", pa.binary())]), key=("k",), kind=TableKind.UPSERT
    )
    with StateStore.open(tmp_path / "db", StoreSettings(block_bytes=1 << 17, compaction="none")) as store:
        noise = np.random.default_rng(0).bytes(1000 * rows)  # which no compression makes small
        values = pa.Array.from_buffers(
            pa.binary(),
            rows,
            [None, pa.py_buffer(np.arange(0, 1000 * rows + 1, 1000, dtype=np.int32)), pa.py_buffer(noise)],
        )
        for start in range(0, rows, rows // 4):
            part = slice(start, start + rows // 4)
            store.table(spec).write(pa.record_batch([np.arange(rows)[part], values[part]], schema=spec.schema))
            store.checkpoint(JobState()).result(30)
        del noise, values
    with statebackend.open_state(tmp_path / "db", cache_bytes=1 << 20, memory_bytes=budget) as catalog:
        before, held, seen = pa.total_allocated_bytes(), 0, 0
        for batch in catalog.query("SELECT k, v FROM state.t"):
            held, seen = max(held, pa.total_allocated_bytes() - before), seen + batch.num_rows
            del batch
        assert seen == rows
        assert catalog.reads.read_bytes > 9 * budget
        assert held < budget + (8 << 20)  # a request brings up to 8 MiB
        assert len(pylist(catalog, "SELECT k FROM state.t LIMIT 5")) == 5
    # Sorting gathers everything, and spills.
    with statebackend.open_state(tmp_path / "db", cache_bytes=1 << 20, memory_bytes=20 << 20) as catalog:
        ordered = catalog.sql("SELECT k, v FROM state.t ORDER BY v").execute_stream()
        assert sum(batch.to_pyarrow().num_rows for batch in ordered) == rows


def test_polars_and_pandas_read_a_table_a_query_and_a_frame_as_an_arrow_stream(url: str) -> None:
    query = f"SELECT id, item, price FROM {QUOTED} WHERE id = 3"
    with statebackend.open_state(url) as catalog:
        for stream in (catalog.query(query), catalog.sql(query)):
            assert pl.DataFrame(stream).rows() == [(3, "c", 3.5)]
        assert pl.DataFrame(catalog.table(ORDERS.name)).filter(pl.col("id") == 3).rows() == [(3, "c", 3.5)]
        frame = pa.RecordBatchReader.from_stream(catalog.table(ORDERS.name)).read_pandas()
        assert frame["id"].sum() == 9
        assert frame.shape == (4, 3)


def test_an_arrow_stream_hands_over_the_very_buffers(tmp_path: Path) -> None:
    with StateStore.open(tmp_path / "db", SETTINGS) as store:
        store.table(ORDERS).write(orders(*((i, "a", float(i)) for i in range(1000))))
        store.checkpoint(job(0)).result(10)
    with statebackend.open_state(tmp_path / "db") as catalog:
        relation = catalog.table(ORDERS.name)
        made: list[pa.RecordBatch] = []

        def kept(predicate: Any) -> Iterator[pa.RecordBatch]:
            for batch in relation.open(predicate):
                made.append(batch)
                yield batch

        taken = pl.DataFrame(replace(relation, open=kept))["price"].to_arrow(compat_level=pl.CompatLevel.newest())
        assert len(made) == 1
        assert taken.buffers()[1].address == made[0]["price"].buffers()[1].address


def test_other_engines_read_a_table_as_an_arrow_stream(url: str) -> None:
    with statebackend.open_state(url) as catalog:

        def ask(relation: object, query: str) -> list[Any]:
            with duckdb.connect() as connection:
                connection.register("relation", relation)
                return connection.sql(query).fetchall()

        orders_now = catalog.table(ORDERS.name)
        assert pa.table(orders_now).num_rows == 4
        assert ask(orders_now, "SELECT sum(id) FROM relation") == [(9,)]
        assert ask(catalog.table(ORDERS.name, at=1), "SELECT price FROM relation WHERE id = 1") == [(1.0,)]
        changes = ask(catalog.diff(ORDERS.name, 1, 3), "SELECT op, id FROM relation ORDER BY op")
        assert changes == [("delete", 1), ("insert", 3), ("update", 2)]


def test_the_state_of_a_real_job_is_asked_at_every_checkpoint(tmp_path: Path) -> None:
    began = datetime(2024, 1, 1, tzinfo=UTC)
    times = [began + timedelta(seconds=s) for s in range(100)]
    rows = pa.table({"t": pa.array(times, pa.timestamp("us", "UTC")), "k": [f"k{s % 3}" for s in range(100)]})
    rows = rows.append_column("v", pa.array(range(100)))
    ctx = StreamContext(name="job", state=str(tmp_path / "state"), checkpoint_trigger=lambda: True)
    stream = ctx.from_batches(rows.to_batches(max_chunksize=20), rows.schema, event_time="t", name="rows")
    totals = [f.sum(col("v")).alias("total"), f.count(lit(1)).alias("n")]
    stream.window([col("k")], totals, timedelta(seconds=60), name="per.minute").sink(MemorySink())
    stream.deduplicate("k", name="newest.of.k").sink(MemorySink())
    ctx.run()
    with statebackend.open_state(tmp_path / "state") as catalog:
        owners = {row["name"]: row["operator"] for row in pylist(catalog, "SELECT * FROM system.tables")}
        assert owners["per.minute"] == "per.minute"
        assert any(operator == "newest.of.k" for operator in owners.values())
        kept = [row["checkpoint_id"] for row in pylist(catalog, "SELECT * FROM system.checkpoints")]
        seen = set()
        for checkpoint_id in kept:
            with statebackend.open_state(tmp_path / "state", checkpoint_id, pin=False) as then:
                [source] = pylist(then, "SELECT * FROM system.sources")
            read = json.loads(source["position"])["rows"]
            ended = source["watermark"] == np.iinfo(np.int64).max
            seen.add((read, ended))
            of_open_window = [] if ended else range(0 if read <= 60 else 60, read)
            expected = [[v for v in of_open_window if v % 3 == i] for i in range(3) if of_open_window]
            found = pylist(catalog, f"SELECT * FROM state_at('per.minute', {checkpoint_id}) ORDER BY k")
            minute = began + timedelta(minutes=0 if read <= 60 else 1)
            assert found == [
                {"window_start_time": minute, "k": f"k{i}", "total": sum(values), "n": len(values)}
                for i, values in enumerate(expected)
            ]
        assert seen == {(20, False), (40, False), (60, False), (80, False), (100, False), (100, True)}
        closed = pylist(
            catalog, f"SELECT op, count(*) AS n FROM state_diff('per.minute', {kept[2]}, {kept[3]}) GROUP BY 1"
        )
        assert sorted(row["op"] for row in closed) == ["delete", "insert"]  # minute 0 has closed, minute 1 began
        plans = pylist(catalog, "SELECT operator, plan, tables FROM system.operators WHERE operator = 'per.minute'")
        assert [row["tables"] for row in plans] == [1]


def test_system_tables_tell_what_the_manifests_know(url: str) -> None:
    create_savepoint(url, "old", checkpoint_id=1)
    with statebackend.open_state(url) as catalog:
        found = pylist(catalog, "SELECT checkpoint_id, retained, savepoints, files FROM system.checkpoints")
        assert [(r["checkpoint_id"], r["retained"], r["savepoints"], r["files"]) for r in found] == [
            (1, True, ["old"], 1),
            (2, True, [], 2),
            (3, True, [], 3),
        ]
        [table] = pylist(catalog, "SELECT * FROM system.tables")
        files = pylist(catalog, "SELECT * FROM system.files")
        assert table["key"] == ["id", "item"]
        assert (table["files"], table["rows"], table["bytes"]) == (
            len(files),
            sum(r["rows"] for r in files),
            sum(r["bytes"] for r in files),
        )
        assert pylist(catalog, "SELECT * FROM system.sources") == [
            {"source": "source", "split": None, "position": '{"next": 2}', "watermark": 2}
        ]


def test_system_tables_are_found_under_state_unless_the_job_has_such_a_table(url: str, tmp_path: Path) -> None:
    with statebackend.open_state(url) as catalog:
        assert pylist(catalog, "SELECT count(*) > 10 AS many FROM state.health") == [{"many": True}]
        for name in ("checkpoints", "tables", "files", "compactions", "sources", "operators"):
            assert pylist(catalog, f"SELECT * FROM state.{name}") == pylist(catalog, f"SELECT * FROM system.{name}")
    with StateStore.open(tmp_path / "other", SETTINGS) as store:
        store.table(LOG)
        store.checkpoint(job(1)).result(10)
    with statebackend.open_state(tmp_path / "other") as catalog:
        assert pylist(catalog, "SELECT * FROM state.checkpoints") == []
        assert len(pylist(catalog, "SELECT * FROM system.checkpoints")) == 1


def test_what_checkpoints_and_merges_took_is_told(tmp_path: Path) -> None:
    settings = StoreSettings(block_rows=64, compaction="none", gc_interval_s=None)
    with StateStore.open(tmp_path / "db", settings) as store:
        done = [store.checkpoint(job(0)).result(10)]
        for step in range(10):
            store.table(ORDERS).write(orders((step, "a", 1.0), (step, "b", 1.0)))
            done.append(store.checkpoint(job(step)).result(10))
    with statebackend.open_state(tmp_path / "db") as catalog:
        told = pylist(catalog, "SELECT checkpoint_id, written_rows, written_bytes, duration_ms FROM state.checkpoints")
        for row, checkpoint in zip(told, done[-len(told) :], strict=True):
            assert row["checkpoint_id"] == checkpoint.checkpoint_id
            assert row["written_rows"] == 2
            assert row["written_bytes"] == checkpoint.bytes_written
            assert 0 <= row["duration_ms"] <= checkpoint.duration_s * 1000 + 1
        [due] = pylist(catalog, "SELECT * FROM state.compactions")
        assert (due["table"], due["state"], due["run"], due["files"], due["rows"]) == (ORDERS.name, "due", None, 10, 20)
        assert {"statebackend_table_l0_files"} <= {row["name"] for row in pylist(catalog, "SELECT * FROM state.health")}
    assert main(["compact", str(tmp_path / "db"), "--all"]) == 0
    with statebackend.open_state(tmp_path / "db") as catalog:
        [done_] = pylist(catalog, "SELECT * FROM state.compactions")
        assert (done_["state"], done_["files"], done_["rows"]) == ("done", 1, 20)
        [table] = pylist(catalog, "SELECT flushed_files, sorted_runs FROM state.tables")
        assert table == {"flushed_files": 10, "sorted_runs": 0}  # the checkpoint as it was made


def test_operators_and_splits_are_told_with_what_they_cost(tmp_path: Path) -> None:
    state = JobState(
        sources={"s": {"turn": 1, "splits": {"p0": {"rows": 3}, "p1": {"rows": 4}}}, "t": {"next": 1}},
        watermarks={"s": 5, "s/p0": 5, "s/p1": 9, "sum": 5},
        plan={"s": {}, "t": {}, "sum": {"operator": "aggregate"}},
    )
    spec = TableSpec(name="sum:groups", schema=ORDERS.schema, key=ORDERS.key, kind=TableKind.UPSERT)
    with StateStore.open(tmp_path / "db", SETTINGS) as store:
        for _ in range(2):
            store.table(spec).write(orders((1, "a", 1.0)))
            store.checkpoint(state).result(10)
    with statebackend.open_state(tmp_path / "db") as catalog:
        assert pylist(catalog, "SELECT * FROM state.sources") == [
            {"source": "s", "split": None, "position": json.dumps(state.sources["s"], sort_keys=True), "watermark": 5},
            {"source": "s", "split": "p0", "position": '{"rows": 3}', "watermark": 5},
            {"source": "s", "split": "p1", "position": '{"rows": 4}', "watermark": 9},
            {"source": "t", "split": None, "position": '{"next": 1}', "watermark": None},
        ]
        [operator] = pylist(catalog, "SELECT * FROM state.operators")
        assert operator["operator"] == "sum"
        cost = [operator[name] for name in ("rows", "files", "read_amplification", "scan_requests", "lookup_requests")]
        assert cost == [2, 2, 2, 4, 4]


def test_a_checkpoint_that_is_kept_no_longer_is_gone_and_one_that_never_was_is_not_found(tmp_path: Path) -> None:
    url = write_orders(tmp_path / "db", *([(1, "a", float(step))] for step in range(5)))
    create_savepoint(url, "old", checkpoint_id=3)
    with statebackend.open_state(url) as catalog:
        with pytest.raises(CheckpointGoneError, match="checkpoint 1"):
            catalog.sql(f"SELECT * FROM state_at('{ORDERS.name}', 1)")
        with pytest.raises(CheckpointGoneError, match="checkpoint 2"):
            catalog.sql(f"SELECT * FROM state_diff('{ORDERS.name}', 2, 4)")
        for never in ("77", "0", "-1", "'nope'"):
            with pytest.raises(CheckpointNotFoundError) as told:
                catalog.sql(f"SELECT * FROM state_at('{ORDERS.name}', {never})")
            assert not isinstance(told.value, CheckpointGoneError)
    with pytest.raises(CheckpointNotFoundError):
        statebackend.open_state(url, 77)
    with pytest.raises(CheckpointNotFoundError, match=r"no state store"):
        statebackend.open_state(tmp_path / "nothing", pin=False)


def test_one_query_asks_every_checkpoint_that_is_kept(tmp_path: Path) -> None:
    with StateStore.open(tmp_path / "db", replace(SETTINGS, retained_checkpoints=12)) as store:
        for step in range(1, 13):
            store.table(ORDERS).write(orders((1, "a", float(step))))
            store.checkpoint(job(step)).result(10)
    with statebackend.open_state(tmp_path / "db") as catalog:
        every = " UNION ALL ".join(f"SELECT price FROM state_at('{ORDERS.name}', {step})" for step in range(1, 13))
        assert pylist(catalog, f"SELECT count(*) AS c, sum(price) AS s FROM ({every})") == [{"c": 12, "s": 78.0}]


def test_a_savepoint_keeps_a_checkpoint_that_is_asked_for_by_its_id(tmp_path: Path) -> None:
    with StateStore.open(tmp_path / "db", SETTINGS) as store:
        for step in range(6):
            store.table(ORDERS).write(orders((1, "a", float(step))))
            store.checkpoint(job(step)).result(10)
            if step == 0:
                create_savepoint(str(tmp_path / "db"), "first")
    with statebackend.open_state(tmp_path / "db") as catalog:
        assert pylist(catalog, f"SELECT price FROM state_at('{ORDERS.name}', 1)") == [{"price": 0.0}]


def test_files_that_are_collected_while_a_query_runs_end_it_with_the_error_of_the_store(tmp_path: Path) -> None:
    url = write_orders(tmp_path / "db", [(1, "a", 1.0)])
    with statebackend.open_state(url, pin=False) as catalog:
        answer = catalog.query(f"SELECT * FROM {QUOTED}")
        write_orders(tmp_path / "db", *([(1, "a", float(step))] for step in range(5)))
        for file in (tmp_path / "db" / "sst").glob("w1-*"):
            file.unlink()
        with pytest.raises(CheckpointGoneError, match=r"open a newer one"):
            answer.read_all()


@pytest.mark.parametrize(
    "name", ["x' OR '1'='1", 'x"; DROP TABLE t; --', "../../etc/passwd", "nope", "x', 1) --", "state.orders"]
)
def test_a_name_is_looked_up_and_never_executed(url: str, name: str) -> None:
    with statebackend.open_state(url) as catalog:
        with pytest.raises(KeyError, match="no table"):
            catalog.table(name)
        quoted = name.replace("'", "''")
        for call in (f"state_at('{quoted}', 1)", f"state_diff('{quoted}', 1, 2)"):
            with pytest.raises(ValueError, match="no table"):
                catalog.sql(f"SELECT * FROM {call}")
        with pytest.raises(ValueError, match=r"not found.*tables are"):
            catalog.sql('SELECT * FROM state."' + name.replace('"', '""') + '"')


def test_the_only_table_of_an_operator_goes_by_its_name(tmp_path: Path) -> None:
    state = replace(job(0), plan={"orders_agg": {}, "join": {}, "join:left": {}})
    with StateStore.open(tmp_path / "db", SETTINGS) as store:
        for step in range(2):
            for number, name in enumerate(("orders_agg:groups", "join:one", "join:two")):
                store.table(replace(ORDERS, name=name)).write(orders((number, "a", float(step))))
            store.checkpoint(state).result(10)
    with statebackend.open_state(tmp_path / "db") as catalog:
        for source in ("state.orders_agg", "raw.orders_agg", "state_at('orders_agg', 2)"):
            assert pylist(catalog, f"SELECT id, price FROM {source}") == [{"id": 0, "price": 1.0}]
        assert pylist(catalog, "SELECT op FROM state_diff('orders_agg', 1, 2)") == [{"op": "update"}]
        assert pa.table(catalog.table("orders_agg")).num_rows == 1
        assert catalog.tables == ["join:one", "join:two", "orders_agg:groups"]
        with pytest.raises(ValueError, match=r"not found.*tables are"):  # which of its two?
            catalog.sql("SELECT * FROM state.join")


ODD_NAMES = ['a "b"', "o'clock", "a.b.c", "two words", 'x"; DROP TABLE t; --', "ünïcode 表", "SELECT", "checkpoints"]


def test_tables_of_any_name_are_asked_by_their_quoted_names(tmp_path: Path) -> None:
    with StateStore.open(tmp_path / "db", SETTINGS) as store, statebackend.open_state(store) as live:
        for step in range(2):
            for number, name in enumerate(ODD_NAMES):
                table = store.table(replace(ORDERS, name=name))
                table.write(orders((number, "a", float(step))))
            store.checkpoint(job(step)).result(10)
        with statebackend.open_state(tmp_path / "db") as committed:
            for number, name in enumerate(ODD_NAMES):
                quoted, text = '"' + name.replace('"', '""') + '"', "'" + name.replace("'", "''") + "'"
                for catalog in (live, committed):
                    for source in (f"state.{quoted}", f"raw.{quoted}", f"state_at({text}, 2)"):
                        assert pylist(catalog, f"SELECT id, price FROM {source}") == [{"id": number, "price": 1.0}]
                    changed = pylist(catalog, f"SELECT id, old_price, op FROM state_diff({text}, 1, 2)")
                    assert changed == [{"id": number, "old_price": 0.0, "op": "update"}]


def test_queries_only_read(url: str, tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    with statebackend.open_state(url) as catalog:
        for query in (
            "CREATE TABLE x AS SELECT 1",
            f"COPY (SELECT 1) TO '{target}'",
            f"CREATE EXTERNAL TABLE x STORED AS CSV LOCATION '{target}'",
            f"INSERT INTO {QUOTED} VALUES (1, 'a', 2.0)",
            "SET datafusion.execution.batch_size = 1",
            f"SELECT * FROM '{__file__}'",
        ):
            with pytest.raises(ValueError, match=r"."):
                catalog.sql(query)
    assert not target.exists()


@pytest.mark.parametrize(
    "call",
    [
        "state_at('t')",
        "state_at(1, 1)",
        "state_at('t', 1.5)",
        "state_at('t', true)",
        "state_diff('t', 1)",
        "state_at()",
    ],
)
def test_wrong_arguments_of_a_table_function_say_how_it_is_used(url: str, call: str) -> None:
    with statebackend.open_state(url) as catalog, pytest.raises(ValueError, match="'TABLE', CHECKPOINT"):
        catalog.sql(f"SELECT * FROM {call}")


def test_rows_without_identity_have_no_difference(tmp_path: Path) -> None:
    with StateStore.open(tmp_path / "db", SETTINGS) as store:
        for step in range(2):
            store.table(LOG).write(pa.record_batch([pa.array([step]).cast(LOG.schema.types[0]), ["x"]], LOG.schema))
            store.checkpoint(job(step)).result(10)
    with statebackend.open_state(tmp_path / "db") as catalog:
        with pytest.raises(ValueError, match="identity"):
            catalog.sql("SELECT * FROM state_diff('checkpoints', 1, 2)")
        assert len(pylist(catalog, "SELECT * FROM state.checkpoints")) == 2
        assert len(pylist(catalog, "SELECT * FROM system.checkpoints")) == 2


def test_a_manifest_of_a_newer_version_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = max((Path(url) / "manifest").iterdir())
    value = envelope.decode(envelope.ObjectKind.MANIFEST, newest.read_bytes(), newest.name)
    with monkeypatch.context() as later:
        later.setitem(envelope._VERSIONS, envelope.ObjectKind.MANIFEST, 99)
        newest.write_bytes(envelope.encode(envelope.ObjectKind.MANIFEST, value))
    with pytest.raises(UnsupportedFormatError, match="99"):
        statebackend.open_state(url, pin=False)


def test_reading_without_a_pin_writes_nothing(url: str) -> None:
    def everything() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in Path(url).rglob("*") if p.is_file()}

    before = everything()
    with statebackend.open_state(url, pin=False) as catalog:
        pylist(catalog, f"SELECT * FROM state_diff('{ORDERS.name}', 1, 3)")
        pylist(catalog, "SELECT * FROM system.checkpoints")
    assert everything() == before


def test_the_command_line_answers_in_three_formats(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    query = f"SELECT id, item, price FROM {QUOTED} WHERE id >= 3 ORDER BY id"
    assert main(["sql", url, query, "--format", "csv"]) == 0
    assert capsys.readouterr().out == "id,item,price\n3,c,3.5\n4,d,nan\n"
    assert main(["sql", url, query, "--format", "json", "--no-pin"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"id": 3, "item": "c", "price": 3.5}, {"id": 4, "item": "d", "price": "nan"}]
    assert main(["sql", url, query, "--checkpoint", "2", "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert "3.5" in out
    assert "the first 1 rows" in out
    assert main(["sql", url]) == 0
    assert ORDERS.name in capsys.readouterr().out
    assert main(["sql", url, f"{query.partition(' ORDER')[0]} AND item = 'c'", "--format", "csv", "--stats"]) == 0
    out = capsys.readouterr()
    assert out.out == "id,item,price\n3,c,3.5\n"
    assert re.fullmatch(
        r"read \d blocks? \(.*\) in \d of 3 files \(.*\); \d requests to the storage brought .*\n", out.err
    )


def test_the_command_line_says_in_one_line_what_is_wrong(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for query, code in (
        ("SELECT * FROM state.nope", 2),
        ("SELEC", 2),
        ("DROP TABLE x", 2),
        (f"SELECT * FROM state_at('{ORDERS.name}', 77)", 1),
    ):
        assert main(["sql", url, query]) == code
        out = capsys.readouterr()
        assert out.out == ""
        assert out.err.strip()
        assert "Traceback" not in out.err
    assert main(["sql", f"{url}-nope", "SELECT 1", "--no-pin"]) == 1


def test_groups_and_sessions_are_shown_with_their_results(tmp_path: Path) -> None:
    start = datetime(2024, 1, 1, tzinfo=UTC)
    rows = [{"window": start + timedelta(seconds=20 * i), "key": "ab"[i % 2], "value": float(i)} for i in range(10)]
    batch = pa.RecordBatch.from_pylist(rows, ROWS)
    functions = [f.avg(col("value")).alias("mean"), f.median(col("value")).alias("middle")]
    ctx = StreamContext(state=str(tmp_path / "state"))
    stream = ctx.from_batches([batch.slice(0, 6), batch.slice(6)], event_time="window", max_disorder=3_600_000)
    stream.aggregate("key", functions, name="totals").sink(MemorySink())
    stream.aggregate("key", functions, ttl=timedelta(days=1), name="recent").sink(MemorySink())
    stream.aggregate([], functions[:1], name="all").sink(MemorySink())
    counts = stream.aggregate("key", f.count(lit(1)).alias("n"), name="counts")
    counts.aggregate("n", f.count(lit(1)).alias("keys"), name="of_counts").sink(MemorySink())
    stream.session_window(["key"], functions, 30_000, name="sessions").sink(MemorySink())
    job = ctx.job(lambda progress: job.stop())  # after the first batch: its groups and sessions are all there
    job.run()
    expected = [{"key": "a", "mean": 2.0, "middle": 2.0}, {"key": "b", "mean": 3.0, "middle": 3.0}]
    with statebackend.open_state(tmp_path / "state") as catalog:
        for table in ("totals:groups", "recent:groups"):
            assert pylist(catalog, f'SELECT * FROM state."{table}" ORDER BY "key"') == expected
        assert pylist(catalog, 'SELECT mean FROM state."all:groups"') == [{"mean": 2.5}]
        assert pylist(catalog, 'SELECT * FROM state."of_counts:groups"') == [{"n": 3, "keys": 2}]
        sessions = pylist(catalog, 'SELECT "key", mean, middle FROM state."sessions:sessions" ORDER BY mean')
        assert sessions == [{"key": "ab"[i % 2], "mean": float(i), "middle": float(i)} for i in range(6)]
        raw = catalog.query('SELECT * FROM raw."totals:groups"').read_all()
        assert raw.num_rows == 2
        assert "mean" not in raw.schema.names
        assert pylist(catalog, "SELECT * FROM state_diff('totals:groups', 1, 1)") == []


def test_only_states_can_be_shown_as_results() -> None:
    of = aggregation(f.count(lit(1)).alias("n"))
    whole = states(of)
    with pytest.raises(ValueError, match="rows of kind 'append' are no states of an aggregation"):
        replace(whole, kind=TableKind.APPEND)
    with pytest.raises(ValueError, match="kind 'aggregate' needs the declaration of an aggregation"):
        replace(whole, aggregation=None)


def test_whole_states_are_replaced_and_not_merged(tmp_path: Path) -> None:
    of = aggregation(f.count(lit(1)).alias("n"))
    whole = replace(states(of), kind=TableKind.UPSERT)
    row = pa.record_batch([[datetime(2024, 1, 1, tzinfo=UTC)], ["a"], [1.0]], schema=ROWS)
    (one,), (three,) = of.partial([row]), of.partial([pa.concat_batches([row] * 3)])
    with StateStore.open(tmp_path / "db", SETTINGS) as store:
        table = store.table(whole)
        table.write(one)
        store.checkpoint(JobState()).result(10)
        table.write(one)
        table.write(three)
        assert table.scan()[0].to_pylist() == three.to_pylist()
        store.checkpoint(JobState()).result(10)
        assert table.lookup(three.select(["window", "key"])).batch.to_pylist() == three.to_pylist()
    compact(str(tmp_path / "db"), everything=True, settings=SETTINGS)
    with statebackend.open_state(tmp_path / "db") as catalog:
        assert pylist(catalog, "SELECT n FROM state.agg") == [{"n": 3}]
        assert catalog.query("SELECT * FROM raw.agg").read_all().to_pylist() == three.to_pylist()


def test_two_stores_that_name_their_files_alike_are_compared_by_what_is_in_them(tmp_path: Path) -> None:
    spec = TableSpec(name="t", schema=pa.schema([("k", pa.int64()), ("v", pa.int64())]), key=("k",),
                     kind=TableKind.UPSERT)  # fmt: skip
    place = {"main": tmp_path / "main", "branch": tmp_path / "branch"}

    def put(name: str, value: int) -> set[str]:
        with StateStore.open(place[name], StoreSettings(compaction="none")) as store:
            store.table(spec).write(pa.record_batch({"k": [1], "v": [value]}))
            store.checkpoint(JobState()).result(10)
            return {file for file in store.manifest.files if file.startswith("sst/")}

    put("main", 0)
    statebackend.clone(place["main"], place["branch"])
    assert put("main", 1) & put("branch", 2), "both call it the same"
    with statebackend.open_state(place["main"]) as catalog:
        catalog.attach("branch", place["branch"])
        assert pylist(catalog, "SELECT * FROM state_diff('t', 2, 'branch')") == [
            {"k": 1, "old_v": 1, "new_v": 2, "op": "update"}
        ]
        assert pylist(catalog, "SELECT v FROM branch.t") == [{"v": 2}]
