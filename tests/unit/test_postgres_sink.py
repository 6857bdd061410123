"""The PostgreSQL sink on a real server: rows once, whatever happens at each step; upserts; what does not fit."""

from __future__ import annotations

import datetime as dt
import decimal
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest
from datafusion import col
from datafusion import functions as f

from operators import StreamContext
from operators.errors import OutputUncertainError, SchemaError, SinkRefusedError, SinkUnavailableError
from operators.sinks import BoundedSink, PostgresSink, SinkContext
from operators.sinks.postgres_session import PROGRESS, ConnectionLostError, PostgresSession, PostgresTable
from operators.testing import check_exactly_once
from statebackend import FencedError, JobState, MemoryStateBackend, MemoryStateSpace
from tests.support.postgres import PASSWORD, PostgresServer

SCHEMA = pa.schema([("id", pa.int64()), ("name", pa.string())])
POINTS = [*((step, False) for step in ("connect", "begin", "write", "mark", "commit")), ("commit", True)]
"""Before each step, and after the last one."""


class KilledError(Exception):
    """The process is gone at this step."""


class Faults:
    """Raises at the next call of a step."""

    def __init__(self, step: str, *, after: bool, error: type[Exception] = KilledError) -> None:
        self.step, self.after, self.error = step, after, error
        self.met = 0

    def make(self, connection: str, table: PostgresTable) -> Any:
        return _Faulty(PostgresSession(connection, table), self)


class _Faulty:
    def __init__(self, inner: PostgresSession, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        real, faults = getattr(self._inner, name), self._faults

        def step(*arguments: Any) -> Any:
            meets = name == faults.step and not faults.met
            faults.met += meets
            if meets and not faults.after:
                raise faults.error(name)
            answer = real(*arguments)
            if meets:
                raise faults.error(name)
            return answer

        return step


class Life:
    """One process: a sink behind a source of numbers, with checkpoints as a job takes them."""

    def __init__(self, space: MemoryStateSpace, sink: PostgresSink, schema: pa.Schema = SCHEMA) -> None:
        self.backend = MemoryStateBackend(space)
        LIVES.append(self)
        restored = self.backend.restored
        self.position = restored.job.sources["in"] if restored else 0
        self.checkpoint_id = restored.checkpoint_id if restored else 0
        self.sink = sink
        committables = restored.job.committables.get("out", ()) if restored else ()
        sink.open(SinkContext("out", schema, self.backend, str(self.backend.store_id), uuid.uuid4().hex), committables)

    def write(self, count: int) -> None:
        ids = range(self.position, self.position + count)
        self.sink.write(pa.RecordBatch.from_pydict({"id": ids, "name": [f"n{i % 5}" for i in ids]}, SCHEMA))
        self.position += count

    def commit(self) -> list[Any]:
        self.checkpoint_id += 1
        committables = list(self.sink.prepare(self.checkpoint_id, final=False).committables)
        state = JobState(sources={"in": self.position}, committables={"out": committables})
        self.backend.checkpoint(state).result(30)
        return committables

    def checkpoint(self) -> None:
        self.sink.publish(self.commit())

    def die(self) -> None:
        self.sink.close()
        self.backend.close()


LIVES: list[Life] = []


@pytest.fixture(autouse=True)
def close_lives() -> Iterator[None]:
    yield
    while LIVES:
        LIVES.pop().die()


def ids(postgres: PostgresServer, table: str) -> list[int]:
    return [row[0] for row in postgres.query(f"SELECT id FROM {table} ORDER BY id")]


def test_values_of_every_type_arrive_as_they_were(postgres: PostgresServer) -> None:
    moment = dt.datetime(2020, 2, 3, 4, 5, 6, 7, tzinfo=dt.UTC)
    columns: dict[str, tuple[pa.DataType, list[Any], list[Any]]] = {
        "i": (pa.int16(), [1, None], [1, None]),
        "u": (pa.uint64(), [2**64 - 1, 0], [2**64 - 1, 0]),
        "d": (pa.float64(), [0.1, float("inf")], [0.1, float("inf")]),
        "b": (pa.bool_(), [True, False], [True, False]),
        'Text "': (pa.string(), ['a"b\n,\\', ""], ['a"b\n,\\', ""]),
        "w": (pa.dictionary(pa.int8(), pa.string()), ["x", None], ["x", None]),
        "raw": (pa.binary(), [b"\x00\xff\\", b""], [b"\x00\xff\\", b""]),
        "n": (pa.decimal128(12, 3), [decimal.Decimal("-1.250"), None], [decimal.Decimal("-1.250"), None]),
        "day": (pa.date32(), [dt.date(1969, 1, 1), None], [dt.date(1969, 1, 1), None]),
        "at": (pa.timestamp("us", "America/New_York"), [moment, None], [moment, None]),
        "local": (pa.timestamp("ms"), [dt.datetime(2020, 1, 1), None], [dt.datetime(2020, 1, 1), None]),  # noqa: DTZ001
        "time": (pa.time64("us"), [dt.time(1, 2, 3, 4), None], [dt.time(1, 2, 3, 4), None]),
        "l": (pa.list_(pa.string()), [["x", None], None], [["x", None], None]),
        "s": (pa.struct([("a", pa.int64())]), [{"a": 1}, None], [{"a": 1}, None]),
    }
    schema = pa.schema([(name, kind) for name, (kind, _, _) in columns.items()])
    batch = pa.RecordBatch.from_arrays([pa.array(v, k) for k, v, _ in columns.values()], schema=schema)
    table = postgres.table()
    life = Life(MemoryStateSpace(), PostgresSink(table, postgres.url), schema)
    life.sink.write(batch)
    life.sink.write(batch.slice(1))
    life.checkpoint()
    found = postgres.query(f"SELECT * FROM {table} ORDER BY i")
    rows = [tuple(read[i] for _, _, read in columns.values()) for i in range(2)]
    # Times come in the zone of the session.
    same = [tuple(bytes(v) if isinstance(v, memoryview) else v for v in row) for row in found]
    assert same == [rows[0], rows[1], rows[1]]


def test_nothing_is_visible_before_the_checkpoint_is_committed_and_once_after(postgres: PostgresServer) -> None:
    table = postgres.table()
    life = Life(MemoryStateSpace(), PostgresSink(table, postgres.url))
    life.write(20)
    committables = life.commit()
    assert ids(postgres, table) == []
    life.sink.publish(committables)
    life.sink.publish(committables)
    assert ids(postgres, table) == list(range(20))


def test_a_crash_between_any_two_steps_neither_loses_nor_repeats_a_row(postgres: PostgresServer) -> None:
    """One job, killed at each point of a publication, and again at the same point of the recovery."""
    table, space, end = postgres.table(), MemoryStateSpace(), 0
    for step, after in POINTS:
        Life(space, PostgresSink(table, postgres.url)).write(10)
        committables = LIVES[-1].commit()
        end += 10
        for kill in range(2):
            faults = Faults(step, after=after)
            if kill:
                with pytest.raises(KilledError):
                    Life(space, PostgresSink(table, postgres.url, session=faults.make))
            else:
                LIVES[-1].sink._session = faults.make(postgres.url, LIVES[-1].sink._session._table)
                with pytest.raises(KilledError):
                    LIVES[-1].sink.publish(committables)
            assert faults.met, f"no {step}"
            LIVES.pop().die()
            if after or step in ("connect", "begin"):
                break
    Life(space, PostgresSink(table, postgres.url))
    assert ids(postgres, table) == list(range(end))


def test_a_connection_that_is_lost_at_any_step_is_made_again(postgres: PostgresServer) -> None:
    table = postgres.table()
    faults = Faults("", after=False, error=ConnectionLostError)
    life = Life(MemoryStateSpace(), PostgresSink(table, postgres.url, session=faults.make))
    for step, after in POINTS:
        faults.step, faults.after, faults.met = step, after, 0
        life.write(10)
        life.checkpoint()
        assert faults.met, step
    assert ids(postgres, table) == list(range(life.position))


def test_a_server_that_is_killed_and_comes_back_is_waited_for(postgres: PostgresServer) -> None:
    table = postgres.table()
    life = Life(MemoryStateSpace(), PostgresSink(table, postgres.url, timeout_s=0.3))
    life.write(10)
    committables = life.commit()
    postgres.kill()
    try:
        with pytest.raises(SinkUnavailableError, match=f"table '{table}' did not take rows"):
            life.sink.publish(committables)
    finally:
        postgres.start()
    life.sink._timeout_s = 30
    life.sink.publish(committables)
    assert ids(postgres, table) == list(range(10))


def test_a_process_that_was_only_slow_finds_its_rows_written_and_changes_nothing(postgres: PostgresServer) -> None:
    table, space = postgres.table(), MemoryStateSpace()
    slow = Life(space, PostgresSink(table, postgres.url))
    slow.write(10)
    committables = slow.commit()
    successor = Life(space, PostgresSink(table, postgres.url))
    slow.sink.publish(committables)
    assert ids(postgres, table) == list(range(10))
    successor.write(10)
    successor.checkpoint()
    with pytest.raises(FencedError, match="another process has gone on with this output, up to number 2"):
        slow.sink.publish(committables)
    assert ids(postgres, table) == list(range(20))


def test_the_newest_row_of_a_key_stays_and_what_a_changelog_deletes_is_deleted(postgres: PostgresServer) -> None:
    table, best = postgres.table(), postgres.table()
    schema = pa.schema([("user", pa.string()), ("points", pa.int64())])
    batches = [
        pa.RecordBatch.from_pydict({"user": ["ada", "bob", "ada", "cyd"], "points": [1, 5, 2, 1]}, schema),
        pa.RecordBatch.from_pydict({"user": ["ada", "bob"], "points": [3, 9]}, schema),
    ]
    count = iter(range(100))
    context = StreamContext(checkpoint_trigger=lambda: next(count) < 100)
    stream = context.from_batches(batches, name="in")
    stream.write_postgres(table, postgres.url, key="user", name="plain")
    small = stream.aggregate("user", f.max(col("points")).alias("best")).filter(col("best") < 6)
    small.write_postgres(best, postgres.url, name="small")
    context.run()
    assert sorted(postgres.query(f"SELECT * FROM {table}")) == [("ada", 3), ("bob", 9), ("cyd", 1)]
    assert sorted(postgres.query(f"SELECT * FROM {best}")) == [("ada", 3), ("cyd", 1)]
    with pytest.raises(SchemaError, match=r"the key of this stream is \['user'\]"):
        small.write_postgres(best, postgres.url, key="best", name="other")


def test_progress_that_is_gone_is_never_guessed_at(postgres: PostgresServer) -> None:
    table, space = postgres.table(), MemoryStateSpace()
    life = Life(space, PostgresSink(table, postgres.url))
    life.write(10)
    life.checkpoint()
    life.write(10)
    life.commit()
    LIVES.pop().die()
    postgres.query(f"DELETE FROM {PROGRESS}")
    with pytest.raises(OutputUncertainError, match=r"number 0 to 2|number 1 to 2"):
        Life(space, PostgresSink(table, postgres.url))
    LIVES.pop().die()
    Life(space, PostgresSink(table, postgres.url, assume_published=1))
    assert ids(postgres, table) == list(range(20))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"table": "nowhere.t"}, 'schema "nowhere" does not exist'),
        ({"create": False}, "does not exist"),
        ({"key": ["name"], "existing": "id bigint, name text"}, "no unique or exclusion constraint"),
        ({"existing": "id bigint"}, 'column "name" .*does not exist'),
    ],
)
def test_what_does_not_fit_is_refused_on_opening(postgres: PostgresServer, given: dict[str, Any], reason: str) -> None:
    table = given.pop("table", None) or postgres.table()
    if existing := given.pop("existing", None):
        postgres.query(f"CREATE TABLE {table} ({existing})")
    with pytest.raises(SinkRefusedError, match=f"table '{table}' takes no rows: .*{reason}"):
        Life(MemoryStateSpace(), PostgresSink(table, postgres.url, **given))


def test_a_refused_password_and_a_missing_database_are_told_at_once_without_the_password(
    postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "secret-that-is-wrong"
    sink = PostgresSink("t", postgres.url.replace(PASSWORD, wrong))
    with pytest.raises(SinkRefusedError, match="password authentication failed") as refused:
        Life(MemoryStateSpace(), sink)
    with pytest.raises(SinkRefusedError, match='database "nothing" does not exist'):
        Life(MemoryStateSpace(), PostgresSink("t", postgres.url.replace("/postgres", "/nothing")))
    told = [str(refused.value), repr(sink), str(sink.describe()), caplog.text]
    assert not [text for text in told if wrong in text or PASSWORD in text]


def test_a_row_that_the_table_does_not_take_ends_the_publication_and_nothing_of_it_stays(
    postgres: PostgresServer,
) -> None:
    table = postgres.table()
    postgres.query(f"CREATE TABLE {table} (id bigint CHECK (id < 15), name text)")
    life = Life(MemoryStateSpace(), PostgresSink(table, postgres.url))
    life.write(20)
    with pytest.raises(SinkRefusedError, match=r"(?s)violates check constraint.*15"):
        life.checkpoint()
    assert ids(postgres, table) == []


def test_wrong_arguments_are_refused_and_a_full_sink_says_so(postgres: PostgresServer) -> None:
    with pytest.raises(TypeError, match="id"):
        PostgresSink("t", "", "id")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout_s"):
        PostgresSink("t", "", timeout_s=0)
    with pytest.raises(SchemaError, match="nope"):
        StreamContext().from_batches([], SCHEMA).write_postgres("t", "", key="nope")
    sink = PostgresSink(postgres.table(), postgres.url, buffer_bytes=500)
    life = Life(MemoryStateSpace(), sink)
    life.write(100)
    assert isinstance(sink, BoundedSink)
    assert sink.full


@pytest.mark.soak
def test_a_pipeline_passes_the_check_at_every_step_of_the_checkpoint(postgres: PostgresServer) -> None:
    batches = [pa.RecordBatch.from_pydict({"id": range(i, i + 5), "name": ["x"] * 5}, SCHEMA) for i in range(0, 30, 5)]
    tables: dict[str, str] = {}
    name: Callable[[Any], str] = lambda place: tables.setdefault(place.name, postgres.table())  # noqa: E731

    def pipeline(context: StreamContext, place: Any) -> None:
        context.from_batches(batches, name="in").write_postgres(name(place), postgres.url, name="out")

    def read(place: Any) -> pa.Table:
        rows = postgres.query(f"SELECT id, name FROM {name(place)}")
        return pa.Table.from_pylist([{"id": i, "name": n} for i, n in rows], SCHEMA)

    report = check_exactly_once(pipeline, read, times_per_step=1)
    assert {"publish", "committed", "prepared"} <= {step for step, _ in report.killed}
