"""Whole histories of stores against dictionaries that share no code with them.

Random writes, deletes, expiries, crashes, checkpoints, collections, savepoints, rollbacks, branches, and readers of
past checkpoints that stay open, over tables of every kind and order whose keys are of one of many types.
"""

from __future__ import annotations

import datetime as dt
import math
import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cache
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
from datafusion import col
from datafusion import functions as f
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from statebackend import (
    Aggregation,
    CheckpointReader,
    StateStore,
    StoreSettings,
    TableKind,
    TableOrder,
    TableSpec,
    open_checkpoint,
)
from statebackend import clone as clone_store
from statebackend.branches import release_parent
from statebackend.maintenance import collect, create_savepoint, drop_savepoint, rollback
from statebackend.verification import verify
from tests.support.places import Places, process
from tests.support.stores import job, merged

BERLIN = ZoneInfo("Europe/Berlin")
MOMENT = dt.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN)
KEY_TYPES: dict[str, tuple[list[pa.DataType], list[list[Any]]]] = {
    "integers": ([pa.int64()], [[None, 0, -1, 1, 2**63 - 1, -(2**63)]]),
    "small integers": ([pa.uint8()], [[None, 0, 1, 255]]),
    "strings": ([pa.string()], [[None, "", "a", "ü", "a\0", "a" * 70]]),
    "large strings": ([pa.large_string()], [[None, "", "a", "b"]]),
    "binary": ([pa.binary()], [[None, b"", b"\0", b"\0\0", b"\xff" * 9]]),
    "floats": ([pa.float64()], [[None, 0.0, -0.0, math.nan, math.inf, -math.inf, 1.5]]),
    "small floats": ([pa.float32()], [[None, 0.0, -0.0, math.nan, 0.5]]),
    "zoned timestamps": (
        [pa.timestamp("us", "Europe/Berlin")],
        [[None, MOMENT, MOMENT.replace(fold=1), MOMENT + dt.timedelta(microseconds=1)]],
    ),
    "dates": ([pa.date32()], [[None, dt.date(1969, 12, 31), dt.date(2024, 2, 29)]]),
    "decimals": ([pa.decimal128(20, 3)], [[None, Decimal("0.000"), Decimal("-0.001"), Decimal("1e16")]]),
    "dictionaries": ([pa.dictionary(pa.int32(), pa.string())], [[None, "", "a", "b"]]),
    "booleans": ([pa.bool_()], [[None, True, False]]),
    "composite": ([pa.string(), pa.int32()], [[None, "", "a"], [None, 0, 7]]),
    "nothing alike": ([pa.float64(), pa.binary()], [[None, -0.0, math.nan], [None, b"", b"x"]]),
}
TIMES = st.integers(-10, 10)


@dataclass(frozen=True, slots=True)
class Model:
    """What tables hold, as plain dictionaries: rows by (key, time), newest write last; the same for every kind."""

    upserts: dict[tuple[Any, int], int] = field(default_factory=dict)
    timeless: dict[Any, int] = field(default_factory=dict)
    rows: tuple[tuple[Any, int, int], ...] = ()
    watermark: int | None = None

    def write(self, rows: list[tuple[Any, int, int]]) -> Model:
        alive = [r for r in rows if self.watermark is None or r[1] >= self.watermark]
        return replace(
            self,
            upserts=self.upserts | {(k, at): v for k, at, v in alive},
            timeless=self.timeless | {k: v for k, _, v in rows},
            rows=self.rows + tuple(alive),
        )

    def delete(self, rows: list[tuple[Any, int]]) -> Model:
        keys = {k for k, _ in rows}
        return replace(
            self,
            upserts={k: v for k, v in self.upserts.items() if k not in set(rows)},
            timeless={k: v for k, v in self.timeless.items() if k not in keys},
        )

    def expire(self, before: int) -> Model:
        mark = before if self.watermark is None else max(before, self.watermark)
        return replace(
            self,
            upserts={k: v for k, v in self.upserts.items() if k[1] >= mark},
            rows=tuple(r for r in self.rows if r[1] >= mark),
            watermark=mark,
        )

    @property
    def states(self) -> dict[tuple[Any, int], tuple[int, int, int]]:
        """Count, sum and greatest of the values by key and time."""
        values: dict[tuple[Any, int], list[int]] = {}
        for key, at, value in self.rows:
            values.setdefault((key, at), []).append(value)
        return {k: (len(v), sum(v), max(v)) for k, v in values.items()}


@dataclass
class Place:
    """A store at a URL: the model at its last checkpoint and at every one that can be gone back to."""

    url: str
    retained: list[tuple[int, Model]]
    newest: int = 0
    savepoints: dict[str, Model] = field(default_factory=dict)

    @property
    def committed(self) -> Model:
        return self.retained[-1][1] if self.retained else Model()


def same(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Key values in one form for all that are the same key: one NaN, one zero, moments in UTC."""

    def one(value: Any) -> Any:
        if isinstance(value, float):
            return "nan" if math.isnan(value) else value + 0.0
        return value.astimezone(dt.UTC) if isinstance(value, dt.datetime) else value

    return tuple(one(v) for v in values)


@dataclass(frozen=True)
class Tables:
    """Tables of every kind and order over one type of key."""

    key: tuple[pa.Field, ...]
    aggregation: Aggregation
    specs: tuple[TableSpec, ...]

    def batch(self, rows: list[tuple[Any, ...]], more: tuple[pa.Field, ...]) -> pa.RecordBatch:
        """Rows of (key values, …) as a batch of the key columns and ``more``."""
        fields = (*self.key, *more)
        flat = [(*key, *rest) for key, *rest in rows]
        arrays = [pa.array([row[i] for row in flat], fields[i].type) for i in range(len(fields))]
        return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))


AT, VALUE = pa.field("at", pa.int64()), pa.field("value", pa.int64())


@cache
def tables_of(name: str) -> Tables:
    types, _ = KEY_TYPES[name]
    key = tuple(pa.field(f"k{i}", t) for i, t in enumerate(types))
    names = tuple(k.name for k in key)
    of = Aggregation.compile(
        pa.schema([*key, AT, VALUE]),
        [*(col(n) for n in names), col("at")],
        [f.count(col("value")).alias("n"), f.sum(col("value")).alias("total"), f.max(col("value")).alias("most")],
    )

    def spec(kind: TableKind, order: TableOrder, *, timed: bool = True) -> TableSpec:
        states = kind is TableKind.AGGREGATE
        return TableSpec(
            name=f"{kind}-{order}{'' if timed else '-timeless'}",
            schema=of.merger.state_schema if states else pa.schema([*key, *([AT] if timed else []), VALUE]),
            key=(*names, "at") if timed else names,
            kind=kind,
            order=order,
            time_field="at" if timed else None,
            aggregation=of.declaration if states else None,
        )

    specs = [spec(kind, order) for kind in TableKind for order in (TableOrder.HASH, TableOrder.TIME)]
    specs.append(spec(TableKind.UPSERT, TableOrder.HASH, timed=False))
    if types in ([pa.string()], [pa.binary()]):
        specs.append(spec(TableKind.UPSERT, TableOrder.KEY, timed=False))
    return Tables(key, of, tuple(specs))


class HistoryMachine(RuleBasedStateMachine):
    """One store is open at a time; its branches wait at their places, readers stay open beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.resources = ExitStack()
        self.places = self.resources.enter_context(Places())
        self.resources.enter_context(process(places=self.places))
        self.all = [Place("memory://main", [])]
        self.at = self.all[0]
        self.store: StateStore | None = None
        self.readers: list[tuple[CheckpointReader, Model]] = []
        self.openings = 0

    @initialize(
        key=st.sampled_from(sorted(KEY_TYPES)),
        l0=st.integers(1, 3),
        block=st.sampled_from([1, 3, 64]),
        retained=st.integers(1, 3),
        memory=st.sampled_from([2_000, 1 << 20]),
    )
    def begin(self, key: str, l0: int, block: int, retained: int, memory: int) -> None:
        self.tables, self.values = tables_of(key), KEY_TYPES[key][1]
        self.in_key_order = any(s.order is TableOrder.KEY for s in self.tables.specs)
        self.settings = StoreSettings(
            l0_files_max=l0, block_rows=block, retained_checkpoints=retained, memory_bytes=memory, cache_bytes=1 << 12,
            gc_interval_s=None, io_threads=2, cpu_threads=1,
        )  # fmt: skip
        self.crash()

    @rule()
    def crash(self) -> None:
        """Whatever was not committed is gone."""
        if self.store is not None:
            self.store.close()
        self.openings += 1
        self.store = StateStore.open(self.at.url, self.settings, rng=random.Random(self.openings))
        self.live = self.at.committed
        restored = self.store.restored
        assert (int(restored.checkpoint_id) if restored else 0) == self.at.newest
        assert [int(r.checkpoint_id) for r in self.store.manifest.retained] == [i for i, _ in self.at.retained]

    # --- what a job does ---

    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """Enough to push checkpoints out and to merge their files away, then a collection."""
        assert self.store is not None
        for _ in range(self.settings.retained_checkpoints + 1):
            self.write(data, 2)
            self.checkpoint()
            merged(self.store)
        self.gather_garbage()

    @rule(data=st.data(), size=st.integers(1, 6))
    def write(self, data: st.DataObject, size: int) -> None:
        rows = [(self.key(data), data.draw(TIMES), data.draw(st.integers(-5, 99))) for _ in range(size)]
        batch = self.tables.batch(rows, (AT, VALUE))
        for spec in self.tables.specs:
            if spec.kind is TableKind.AGGREGATE:
                for states in self.tables.aggregation.partial([batch]):
                    self.table(spec).write(states)
            else:
                self.table(spec).write(batch.select(spec.schema.names))
        self.live = self.live.write([(same(key), at, value) for key, at, value in rows])

    @rule(data=st.data(), size=st.integers(1, 4))
    def delete(self, data: st.DataObject, size: int) -> None:
        rows = [(self.key(data), data.draw(TIMES)) for _ in range(size)]
        for spec in self.tables.specs:
            if spec.kind is TableKind.UPSERT:
                self.table(spec).delete(self.tables.batch(rows, (AT,)).select(list(spec.key)))
        self.live = self.live.delete([(same(key), at) for key, at in rows])

    @rule(before=TIMES)
    def expire(self, before: int) -> None:
        for spec in self.tables.specs:
            if spec.time_field:
                self.table(spec).expire(before)
        self.live = self.live.expire(before)

    @rule()
    def checkpoint(self) -> None:
        assert self.store is not None
        done = self.store.checkpoint(job(self.at.newest + 1)).result(20)
        self.at.newest += 1
        assert int(done.checkpoint_id) == self.at.newest
        self.at.retained = [*self.at.retained, (self.at.newest, self.live)][-self.settings.retained_checkpoints :]

    @rule(data=st.data())
    def lookup(self, data: st.DataObject) -> None:
        rows = [(self.key(data), data.draw(TIMES)) for _ in range(4)]
        probes = self.tables.batch(rows, (AT,))
        for spec in self.tables.specs:
            if spec.kind is TableKind.UPSERT:
                found = self.table(spec).lookup(probes.select(list(spec.key)))
                held: dict[Any, int] = self.live.upserts if spec.time_field else self.live.timeless
                wanted = [held.get((same(k), at) if spec.time_field else same(k)) for k, at in rows]
                assert found.batch.column("value").to_pylist() == wanted
                assert found.hit.to_pylist() == [w is not None for w in wanted]

    @rule(start=TIMES, end=TIMES)
    def scan_a_range(self, start: int, end: int) -> None:
        for spec in self.tables.specs:
            if spec.time_field and spec.kind is TableKind.APPEND:
                found = self.table(spec).scan(time_range=(start, end))
                wanted = [r for r in self.live.rows if start <= r[1] < end]
                assert self.seen(found) == sorted(wanted, key=repr)

    # --- what an operator does ---

    @rule()
    def gather_garbage(self) -> None:
        collect(self.at.url)

    @precondition(lambda self: self.at.retained)
    @rule(data=st.data(), name=st.sampled_from(["s", "t"]))
    def save(self, data: st.DataObject, name: str) -> None:
        assume(name not in self.at.savepoints)
        checkpoint_id, model = data.draw(st.sampled_from(self.at.retained))
        create_savepoint(self.at.url, name, checkpoint_id=checkpoint_id)
        self.at.savepoints[name] = model

    @precondition(lambda self: self.at.savepoints)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.at.savepoints)))
        drop_savepoint(self.at.url, name)
        del self.at.savepoints[name]

    @precondition(lambda self: self.at.retained)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        target, model = self.target(data)
        rollback(self.at.url, **target)
        self.at.newest += 1
        self.at.retained = [*self.at.retained, (self.at.newest, model)]
        self.crash()

    @precondition(lambda self: self.at.retained and len(self.all) < 4)
    @rule(data=st.data())
    def branch(self, data: st.DataObject) -> None:
        target, model = self.target(data)
        url = f"memory://branch{len(self.all)}"
        first = clone_store(self.at.url, url, **target)
        self.all.append(Place(url, [(int(first.checkpoint_id), model)], int(first.checkpoint_id)))

    @precondition(lambda self: len(self.all) > 1)
    @rule(data=st.data())
    def go_elsewhere(self, data: st.DataObject) -> None:
        self.at = data.draw(st.sampled_from(self.all))
        self.crash()

    @rule()
    def leave_the_parent(self) -> None:
        release_parent(self.at.url)

    @precondition(lambda self: self.at.retained and len(self.readers) < 3)
    @rule(data=st.data(), pin=st.booleans())
    def read_the_past(self, data: st.DataObject, pin: bool) -> None:
        target, model = self.target(data)
        reader = open_checkpoint(self.at.url, pin=pin, cache_bytes=1, **target)
        self.compare(reader.table, model)
        if pin:
            self.readers.append((reader, model))
        else:
            reader.close()

    @precondition(lambda self: self.readers)
    @rule()
    def stop_reading(self) -> None:
        reader, model = self.readers.pop(0)
        self.compare(reader.table, model)
        reader.close()

    # --- what must hold ---

    @invariant()
    def the_tables_hold_what_they_must(self) -> None:
        if self.store is not None:
            self.compare(lambda name: self.table(next(s for s in self.tables.specs if s.name == name)), self.live)

    def teardown(self) -> None:
        try:
            for reader, model in self.readers:
                self.compare(reader.table, model)
                reader.close()
            for place in self.all if self.store is not None else ():
                self.at = place
                self.crash()
                self.the_tables_hold_what_they_must()
                collect(self.at.url)
                assert verify(self.at.url).problems == ()
        finally:
            for reader, _ in self.readers:
                reader.close()
            if self.store is not None:
                self.store.close()
            self.resources.close()

    def compare(self, table: Any, model: Model) -> None:
        of = self.tables.aggregation.merger
        for spec in self.tables.specs:
            found = table(spec.name).scan()
            if spec.kind is TableKind.AGGREGATE:
                wanted = [(*k, *v) for k, v in model.states.items()]
                assert self.seen(of.final(found)) == sorted(wanted, key=repr), spec.name
            elif spec.kind is TableKind.APPEND:
                assert self.seen(found) == sorted(model.rows, key=repr), spec.name
                in_order = list(self.rows(found))
                for one in {r[:2] for r in in_order}:
                    assert [r for r in in_order if r[:2] == one] == [r for r in model.rows if r[:2] == one], spec.name
            elif spec.time_field:
                assert self.seen(found) == sorted(((*k, v) for k, v in model.upserts.items()), key=repr), spec.name
            else:
                assert self.seen(found) == sorted(model.timeless.items(), key=repr), spec.name

    def seen(self, batches: list[pa.RecordBatch]) -> list[Any]:
        return sorted(self.rows(batches), key=repr)

    def rows(self, batches: list[pa.RecordBatch]) -> Iterator[tuple[Any, ...]]:
        width = len(self.tables.key)
        for batch in batches:
            for row in batch.to_pylist():
                values = tuple(row.values())
                yield (same(values[:width]), *values[width:])

    def key(self, data: st.DataObject) -> tuple[Any, ...]:
        key = tuple(data.draw(st.sampled_from(values)) for values in self.values)
        if self.in_key_order and key == (None,):  # a table in the order of its key has no null key
            return (self.values[0][1],)
        return key

    def target(self, data: st.DataObject) -> tuple[dict[str, Any], Model]:
        """A retained checkpoint or a savepoint, as arguments, and what it holds."""
        names = sorted(self.at.savepoints)
        choice = data.draw(st.sampled_from([*self.at.retained, *names]))
        if isinstance(choice, str):
            return {"savepoint": choice}, self.at.savepoints[choice]
        return {"checkpoint_id": choice[0]}, choice[1]

    def table(self, spec: TableSpec) -> Any:
        assert self.store is not None
        return self.store.table(spec)


HistoryMachine.TestCase.settings = settings(
    max_examples=50,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestHistory = HistoryMachine.TestCase
