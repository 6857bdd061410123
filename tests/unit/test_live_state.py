"""State that is open in this process, asked with SQL while it changes."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datafusion import SessionContext, col, lit
from datafusion import functions as f

import statebackend
from operators import StreamContext
from operators.sinks import MemorySink
from statebackend import (
    Aggregation,
    CheckpointGoneError,
    CheckpointNotFoundError,
    JobState,
    MemoryStateBackend,
    ObjectMissingError,
    StateCatalog,
    StateStore,
    StoreSettings,
    TableKind,
    TableSpec,
)
from tests.support.stores import KV, World, contents, merged, put

SETTINGS = StoreSettings(block_rows=64, l0_files_max=2, retained_checkpoints=1, gc_interval_s=None)
ROWS = pa.schema([("k", pa.int64()), ("v", pa.int64())])
BATCH = 50


def pylist(catalog: StateCatalog, query: str) -> list[dict[str, Any]]:
    return catalog.query(query).read_all().to_pylist()


def values(catalog: StateCatalog) -> dict[str, int]:
    return {row["key"]: row["value"] for row in pylist(catalog, "SELECT * FROM state.kv")}


def collect(store: StateStore) -> None:
    """What the collector of the store does now and then."""
    store._runtime.call(lambda: store._collector.run(store.manifest))


def files(path: Path) -> set[str]:
    return {file.name for file in (path / "sst").iterdir()}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StateStore]:
    with StateStore.open(tmp_path / "db", SETTINGS) as opened:
        yield opened


def test_a_query_sees_rows_that_no_checkpoint_holds_yet(store: StateStore) -> None:
    with statebackend.open_state(store) as catalog:
        assert catalog.tables == []
        put(store, a=1, b=2)
        assert values(catalog) == {"a": 1, "b": 2}
        store.flush()
        put(store, b=3)
        store.table(KV).delete(pa.record_batch({"key": ["a"]}))
        assert values(catalog) == {"b": 3}
        assert pylist(catalog, "SELECT * FROM state_at('kv', 1) ORDER BY key") == [
            {"key": "a", "value": 1},
            {"key": "b", "value": 2},
        ]
        [table] = pylist(catalog, "SELECT rows, files, memory_rows FROM system.tables")
        assert table == {"rows": 2, "files": 1, "memory_rows": 2}


def test_a_query_stays_at_the_moment_at_which_it_was_planned(store: StateStore, tmp_path: Path) -> None:
    with statebackend.open_state(store) as catalog:
        put(store, a=1)
        store.flush()
        put(store, b=2)
        planned = catalog.sql("SELECT key, value FROM state.kv ORDER BY key")
        before = files(tmp_path / "db")
        for step in range(6):  # enough that the file is merged away, and the checkpoint let go of
            put(store, a=10 + step)
            store.flush()
        merged(store)
        collect(store)
        assert before <= files(tmp_path / "db")
        found = pa.Table.from_batches([b.to_pyarrow() for b in planned.execute_stream()])
        assert found.to_pydict() == {"key": ["a", "b"], "value": [1, 2]}
        assert values(catalog) == {"a": 15, "b": 2}


def test_a_query_that_nobody_holds_any_more_keeps_nothing(store: StateStore, tmp_path: Path) -> None:
    with statebackend.open_state(store) as catalog:
        put(store, a=1)
        store.flush()
        before = files(tmp_path / "db")
        planned = catalog.sql("SELECT * FROM state.kv")
        assert {name.rpartition("/")[2] for name in store.reader.in_use()} == before
        del planned
        gc.collect()
        assert store.reader.in_use() == frozenset()
        for step in range(6):
            put(store, a=10 + step)
            store.flush()
        merged(store)
        collect(store)
        assert not before & files(tmp_path / "db")


def test_a_barrier_under_way_neither_holds_up_a_query_nor_shows_in_it(store: StateStore) -> None:
    uploaded = threading.Event()
    with statebackend.open_state(store) as catalog:
        put(store, a=1)
        checkpoint = store.checkpoint(JobState(), [lambda: uploaded.wait(30) or None])
        try:
            put(store, b=2)
            assert values(catalog) == {"a": 1, "b": 2}
            assert pylist(catalog, "SELECT count(*) AS n FROM state.checkpoints") == [{"n": 0}]
        finally:
            uploaded.set()
        checkpoint.result(30)
        assert values(catalog) == {"a": 1, "b": 2}
        assert pylist(catalog, "SELECT count(*) AS n FROM state.checkpoints") == [{"n": 1}]


def test_several_tables_for_other_engines_are_of_one_moment(store: StateStore) -> None:
    other = TableSpec(name="other", schema=KV.schema, key=("key",), kind=KV.kind)
    with statebackend.open_state(store) as catalog:
        put(store, a=1)
        store.table(other).write(pa.record_batch({"key": ["a"], "value": [1]}, schema=KV.schema))
        moment = catalog.moment("kv", "other")
        put(store, a=2)
        store.flush()
        assert [pa.table(relation)["value"].to_pylist() for relation in moment.values()] == [[1], [1]]
        assert pa.table(catalog.table("kv"))["value"].to_pylist() == [2]


def test_files_that_another_process_has_collected_end_the_query_and_a_new_one_goes_on(
    store: StateStore, tmp_path: Path
) -> None:
    with statebackend.open_state(store) as catalog:
        put(store, a=1)
        store.flush()
        old = files(tmp_path / "db")
        answer = catalog.query("SELECT * FROM state.kv")
        for step in range(4):
            put(store, a=10 + step)
            store.flush()
        merged(store)
        for name in old:
            (tmp_path / "db" / "sst" / name).unlink()
        with pytest.raises(CheckpointGoneError, match="ask again"):
            answer.read_all()
        assert values(catalog) == {"a": 13}


def test_a_file_that_is_missing_although_it_is_live_is_damage(store: StateStore, tmp_path: Path) -> None:
    with statebackend.open_state(store) as catalog:
        put(store, a=1)
        store.flush()
        for name in files(tmp_path / "db"):
            (tmp_path / "db" / "sst" / name).unlink()
        with pytest.raises(ObjectMissingError) as told:
            values(catalog)
        assert not isinstance(told.value, CheckpointGoneError)


def test_reading_live_takes_nothing_out_of_the_cache_of_the_store(store: StateStore) -> None:
    put(store, **{f"k{n}": n for n in range(300)})
    store.flush()
    with statebackend.open_state(store) as catalog:
        asked = store.reader.cache.requests
        assert len(values(catalog)) == 300
        assert store.reader.cache.requests == asked
        assert catalog.reads.requests > 0
        assert 0 < catalog.reads.read_bytes <= catalog.reads.stored_bytes


def test_what_no_url_leads_to_is_read_through_the_store() -> None:
    world = World()
    try:
        with world.open() as store, statebackend.open_state(store) as catalog:
            put(store, a=1)
            store.flush()
            put(store, b=2)
            store.reader.cache.clear()
            assert values(catalog) == contents(store)
            with pytest.raises(CheckpointNotFoundError, match="URL"):
                catalog.sql("SELECT * FROM state_at('kv', 1)")
    finally:
        world.close()


def test_state_in_memory_is_read_live_too() -> None:
    backend = MemoryStateBackend()
    with statebackend.open_state(backend) as catalog:
        backend.table(KV).write(pa.record_batch({"key": ["a"], "value": [1]}, schema=KV.schema))
        assert values(catalog) == {"a": 1}
        assert pylist(catalog, "SELECT name, memory_rows FROM system.tables") == [{"name": "kv", "memory_rows": 1}]
        assert pylist(catalog, "SELECT * FROM system.checkpoints") == []
    backend.close()


def test_open_state_says_what_it_takes(store: StateStore) -> None:
    with pytest.raises(TypeError, match="neither a URL nor"):
        statebackend.open_state(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state_at"):
        statebackend.open_state(store, 1)


def test_one_catalog_does_not_hide_another_in_a_session(store: StateStore) -> None:
    session = SessionContext()
    session.from_pydict({"key": ["a"], "label": ["first"]}, name="labels")
    put(store, a=1)
    with statebackend.open_state(store, session=session) as catalog:
        query = "SELECT label, value FROM state.kv JOIN labels USING (key)"
        assert pylist(catalog, query) == [{"label": "first", "value": 1}]
        with pytest.raises(ValueError, match="already"):
            statebackend.open_state(store, session=session)


@pytest.mark.parametrize("aggregate", [f.avg(col("v")), f.median(col("v"))], ids=["simple", "opaque"])
def test_states_in_memory_and_in_files_are_finalised_together(store: StateStore, aggregate: Any) -> None:
    of = Aggregation.compile(ROWS, [col("k")], [f.count(lit(1)).alias("n"), aggregate.alias("middle")])
    spec = TableSpec(
        name="agg",
        schema=of.merger.state_schema,
        key=("k",),
        kind=TableKind.AGGREGATE,
        aggregation=of.declaration,
    )
    with statebackend.open_state(store) as catalog:
        for step in range(3):
            keys = pa.array(range(BATCH))
            for states in of.partial([pa.record_batch([keys, pa.array([step] * BATCH)], schema=ROWS)]):
                store.table(spec).write(states)
            if not step:
                store.flush()
        # Several scans at once hold all threads of DataFusion, and finalising goes on all the same.
        union = " UNION ALL ".join(["SELECT n, middle FROM state.agg"] * 8)
        [row] = pylist(catalog, f"SELECT count(*) AS c, min(n) AS n, max(middle) AS m FROM ({union})")
        assert row == {"c": 8 * BATCH, "n": 3, "m": 1}
        assert pylist(catalog, "SELECT sum(a0_count) AS n FROM raw.agg WHERE k = 7") == [{"n": 3}]
        assert pylist(catalog, "SELECT n FROM state.agg WHERE k = 7") == [{"n": 3}]


# --- a job that runs ---


class Running:
    """A job whose source brings one batch after another until it is told to end."""

    def __init__(self, state: Any, **options: Any) -> None:
        self.ctx = StreamContext(name="job", state=state, handle_signals=False, **options)
        self.enough = threading.Event()
        stream = self.ctx.from_batches(self._batches, ROWS, name="rows")
        for name in ("one", "two"):
            totals = [f.count(lit(1)).alias("n"), f.sum(col("v")).alias("total")]
            stream.aggregate([col("k")], totals, name=name).sink(MemorySink())
        self.results: list[Any] = []

    def _batches(self) -> Iterator[pa.RecordBatch]:
        keys = pa.array(range(BATCH))
        while not self.enough.is_set():
            yield pa.record_batch([keys, keys], schema=ROWS)

    @contextmanager
    def thread(self) -> Iterator[None]:
        thread = threading.Thread(target=lambda: self.results.append(self.ctx.run()))
        thread.start()
        try:
            yield
        finally:
            self.enough.set()
            thread.join(60)


@pytest.mark.parametrize("where", ["store", "memory"])
def test_all_tables_of_a_running_job_are_of_one_batch_boundary(tmp_path: Path, where: str) -> None:
    state = StateStore.open(tmp_path / "db", SETTINGS) if where == "store" else MemoryStateBackend()
    rounds = iter(range(1, 1 << 30))
    running = Running(state, checkpoint_interval=None, checkpoint_trigger=lambda: next(rounds) % 7 == 0)
    seen = []
    with running.ctx.register_state() as catalog, running.thread():
        for _ in range(12):
            [answer] = pylist(
                catalog,
                'SELECT * FROM (SELECT sum(n) AS one, min(n) AS least FROM state."one:groups"), '
                '(SELECT sum(n) AS two, max(n) AS most FROM state."two:groups"), '
                "(SELECT max(position) AS position FROM system.sources)",
            )
            read = json.loads(answer["position"])["rows"] if answer["position"] is not None else 0
            assert answer["one"] == answer["two"] == (read or None)
            assert answer["least"] == answer["most"]
            seen.append(read)
        assert seen == sorted(seen)
        assert len(set(seen)) > 1
    [result] = running.results
    assert result.rows_read >= seen[-1]
    state.close()


def test_state_is_read_by_its_readers_only_while_the_job_runs(tmp_path: Path) -> None:
    running = Running(str(tmp_path / "db"))
    with running.ctx.register_state(timeout_s=0.01) as catalog, pytest.raises(TimeoutError, match="has not begun"):
        catalog.sql('SELECT * FROM state."one:groups"')
    with running.ctx.register_state() as catalog:
        with running.thread():
            assert pylist(catalog, 'SELECT count(*) AS c FROM state."one:groups" WHERE k < 0') == [{"c": 0}]
        with pytest.raises(RuntimeError, match=r"has ended.*open_state"):
            catalog.sql('SELECT * FROM state."one:groups"')
    with statebackend.open_state(tmp_path / "db") as catalog:
        assert pylist(catalog, 'SELECT count(*) AS c FROM state."one:groups"') == [{"c": BATCH}]


def test_a_callback_of_the_job_cannot_ask_for_what_it_is_a_part_of(tmp_path: Path) -> None:
    ctx = StreamContext(name="job", handle_signals=False)
    catalog = ctx.register_state()
    told: list[BaseException] = []

    def ask(_: Any) -> None:
        with pytest.raises(RuntimeError) as error:
            catalog.sql("SELECT 1")
        told.append(error.value)

    batch = pa.record_batch([[1], [1]], schema=ROWS)
    stream = ctx.from_batches([batch], ROWS).aggregate([col("k")], [f.count(lit(1)).alias("n")], name="one")
    stream.sink(MemorySink())
    ctx.run(on_progress=ask)
    assert "another thread" in str(told[0])
    catalog.close()


def test_a_backend_without_snapshots_says_so_to_the_reader_and_not_to_the_job(tmp_path: Path) -> None:
    class Foreign:
        def __init__(self) -> None:
            self._inner = MemoryStateBackend()

        def __getattr__(self, name: str) -> Any:
            if name == "snapshot":
                raise AttributeError(name)
            return getattr(self._inner, name)

    foreign = Foreign()
    running = Running(foreign)
    error = pytest.raises(TypeError, match="cannot be read live")
    with running.ctx.register_state() as catalog, running.thread(), error:
        catalog.sql("SELECT 1")
    assert running.results[0].rows_read > 0
    foreign.close()
