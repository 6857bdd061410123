"""The store against dictionaries that share no code with it: random histories with crashes and reopenings."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from statebackend import StateStore, StoreSettings, TableKind, TableOrder, TableSpec
from statebackend.keys import Hasher
from tests.support.faulty_objectstore import FaultyObjectStore
from tests.support.stores import World, job

KEYS = st.one_of(st.none(), st.sampled_from(["", "a", "b", "ü", "a" * 40]), st.text(max_size=3))
TIMES = st.integers(-20, 20)


def spec(kind: TableKind, order: TableOrder) -> TableSpec:
    return TableSpec(
        name=f"{kind}-{order}",
        schema=pa.schema([("key", pa.string()), ("at", pa.int64()), ("value", pa.int64())]),
        key=("key", "at"),
        kind=kind,
        order=order,
        time_field="at",
    )


UPSERTS = [spec(TableKind.UPSERT, order) for order in (TableOrder.HASH, TableOrder.TIME)]
APPENDS = [spec(TableKind.APPEND, order) for order in (TableOrder.HASH, TableOrder.TIME)]
TTL_UPSERTS, TTL_APPENDS = (
    TableSpec(name=f"ttl-{kind}", schema=UPSERTS[0].schema, key=("key",), kind=kind, ttl_field="at")
    for kind in (TableKind.UPSERT, TableKind.APPEND)
)
TABLES = (*UPSERTS, *APPENDS, TTL_UPSERTS, TTL_APPENDS)
ROWS = st.lists(st.tuples(KEYS, TIMES, st.integers(0, 999)), min_size=1, max_size=8)


class StoreMachine(RuleBasedStateMachine):
    """Every table gets every write; ``live`` is what it must hold now, ``committed`` at the last checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.store: StateStore | None = None
        self.empty()
        self.committed = self.copy()
        self.checkpoint_id = 0
        self.openings = 0

    def empty(self) -> None:
        self.upserts: dict[tuple[str | None, int], int] = {}
        self.appends: list[tuple[str | None, int, int]] = []
        self.newest: dict[str | None, tuple[int, int]] = {}
        self.watermark: int | None = None

    def copy(self) -> tuple[Any, ...]:
        return dict(self.upserts), list(self.appends), dict(self.newest), self.watermark

    @initialize(bits=st.sampled_from([0, 2, 64]), l0=st.integers(1, 4), block=st.sampled_from([1, 3, 64]))
    def begin(self, bits: int, l0: int, block: int) -> None:
        self.hasher = Hasher(bits)
        self.settings = StoreSettings(l0_files_max=l0, block_rows=block, cache_bytes=1 << 12)
        self.reopen()

    @rule()
    def reopen(self) -> None:
        """A crash: whatever was not committed is gone."""
        if self.store is not None:
            self.store.close()
        self.openings += 1
        self.store = StateStore.open(
            "memory://model",
            self.settings,
            objects=FaultyObjectStore(self.world.objects),
            rng=random.Random(self.openings),
            hasher=self.hasher,
        )
        upserts, appends, newest, self.watermark = self.committed
        self.upserts, self.appends, self.newest = dict(upserts), list(appends), dict(newest)
        restored = self.store.restored
        assert (int(restored.checkpoint_id) if restored else 0) == self.checkpoint_id

    @rule(rows=ROWS)
    def write(self, rows: list[tuple[str | None, int, int]]) -> None:
        for table in TABLES:
            self.table(table).write(pa.record_batch(list(zip(*rows, strict=True)), schema=table.schema))
        for key, at, value in rows:
            self.newest[key] = at, value
            if self.alive(at):
                self.upserts[key, at] = value
                self.appends.append((key, at, value))
        self.forget_expired()

    @rule(rows=st.lists(st.tuples(KEYS, TIMES), min_size=1, max_size=5))
    def delete(self, rows: list[tuple[str | None, int]]) -> None:
        for table in UPSERTS:
            keys = pa.record_batch(list(zip(*rows, strict=True)), schema=pa.schema(list(table.schema)[:2]))
            self.table(table).delete(keys)
        self.table(TTL_UPSERTS).delete(pa.record_batch({"key": pa.array([key for key, _ in rows], pa.string())}))
        for row in rows:
            self.upserts.pop(row, None)
            self.newest.pop(row[0], None)

    @rule(before=TIMES)
    def expire(self, before: int) -> None:
        for table in TABLES:
            self.table(table).expire(before)
        self.watermark = before if self.watermark is None else max(before, self.watermark)
        self.forget_expired()

    def forget_expired(self) -> None:
        """Where the time is not in the key, a newest row that is expired takes the older ones with it."""
        self.upserts = {k: v for k, v in self.upserts.items() if self.alive(k[1])}
        self.appends = [r for r in self.appends if self.alive(r[1])]
        self.newest = {k: v for k, v in self.newest.items() if self.alive(v[0])}

    @rule()
    def checkpoint(self) -> None:
        assert self.store is not None
        done = self.store.checkpoint(job(self.checkpoint_id + 1)).result(10)
        self.committed = self.copy()
        self.checkpoint_id = int(done.checkpoint_id)

    @rule(probes=st.lists(st.tuples(KEYS, TIMES), min_size=1, max_size=6))
    def lookup(self, probes: list[tuple[str | None, int]]) -> None:
        for table in UPSERTS:
            keys = pa.record_batch(list(zip(*probes, strict=True)), schema=pa.schema(list(table.schema)[:2]))
            found = self.table(table).lookup(keys)
            assert found.batch.column("value").to_pylist() == [self.upserts.get(p) for p in probes]
            assert found.hit.to_pylist() == [p in self.upserts for p in probes]
        found = self.table(TTL_UPSERTS).lookup(pa.record_batch({"key": pa.array([k for k, _ in probes], pa.string())}))
        assert found.batch.column("value").to_pylist() == [self.newest.get(k, (0, None))[1] for k, _ in probes]
        assert found.hit.to_pylist() == [k in self.newest for k, _ in probes]

    @rule(probes=st.lists(KEYS, min_size=1, max_size=6), start=st.none() | TIMES, end=st.none() | TIMES)
    def match(self, probes: list[str | None], start: int | None, end: int | None) -> None:
        upserts = [(*k, v) for k, v in self.upserts.items()]
        for table, held in (*((t, upserts) for t in UPSERTS), *((t, self.appends) for t in APPENDS)):
            found = self.table(table).matches(pa.record_batch({"key": pa.array(probes, pa.string())}), (start, end))
            alive = [r for r in held if (start is None or r[1] >= start) and (end is None or r[1] < end)]
            expected = [(i, *r) for i, p in enumerate(probes) for r in sorted(alive, key=lambda r: r[1]) if r[0] == p]
            columns = [found.key_index, *found.batch.columns]
            assert list(zip(*(c.to_pylist() for c in columns), strict=True)) == expected

    @rule(cut=st.integers(0, 1 << 64))
    def scan_in_two_halves(self, cut: int) -> None:
        for table in UPSERTS:
            halves = [self.table(table).scan(hash_range=r) for r in ((None, cut), (cut, None))]
            found = [tuple(r.values()) for half in halves for b in half for r in b.to_pylist()]
            assert sorted(found, key=str) == sorted(((*k, v) for k, v in self.upserts.items()), key=str)

    @rule(start=TIMES, end=TIMES)
    def scan_a_range(self, start: int, end: int) -> None:
        for table in UPSERTS:
            expected = {k: v for k, v in self.upserts.items() if start <= k[1] < end}
            assert self.scan(table, (start, end)) == sorted(((*k, v) for k, v in expected.items()), key=str)

    @invariant()
    def tables_hold_what_they_must(self) -> None:
        if self.store is None:
            return
        for table in UPSERTS:
            assert self.scan(table) == sorted(((*k, v) for k, v in self.upserts.items()), key=str)
        assert self.scan(TTL_UPSERTS) == sorted(((k, *v) for k, v in self.newest.items()), key=str)
        for table in (*APPENDS, TTL_APPENDS):
            key_columns = len(table.key)
            found = [tuple(r.values()) for b in self.table(table).scan() for r in b.to_pylist()]
            assert sorted(found, key=str) == sorted(self.appends, key=str)
            for key in {r[:key_columns] for r in found}:
                wanted = [r for r in self.appends if r[:key_columns] == key]
                assert [r for r in found if r[:key_columns] == key] == wanted

    def teardown(self) -> None:
        if self.store is not None:
            self.store.close()
        self.world.close()

    def alive(self, at: int) -> bool:
        return self.watermark is None or at >= self.watermark

    def table(self, of: TableSpec) -> Any:
        assert self.store is not None
        return self.store.table(of)

    def scan(self, of: TableSpec, span: tuple[int | None, int | None] = (None, None)) -> list[Any]:
        return sorted((tuple(r.values()) for b in self.table(of).scan(time_range=span) for r in b.to_pylist()), key=str)


StoreMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestStore = StoreMachine.TestCase
