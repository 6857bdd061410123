"""Work divided by ranges of the hash is divided exactly: every row in one range, whatever the number of ranges."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest
from datafusion import col
from datafusion import functions as f

from statebackend import Aggregation, StateStore, StoreSettings, TableKind, TableOrder, TableSpec
from tests.support.stores import World, job

INPUT = pa.schema([("at", pa.int64()), ("key", pa.string()), ("value", pa.int64())])
SETTINGS = StoreSettings(block_rows=32, l0_files_max=3, gc_interval_s=None)
STATES = Aggregation.compile(INPUT, [col("at"), col("key")], [f.sum(col("value")).alias("total")])


def table(kind: TableKind, order: TableOrder) -> TableSpec:
    schema = STATES.merger.state_schema if kind is TableKind.AGGREGATE else INPUT
    declaration = STATES.declaration if kind is TableKind.AGGREGATE else None
    return TableSpec(
        name="t", schema=schema, key=("at", "key"), kind=kind, order=order, time_field="at", aggregation=declaration
    )


def rows(batches: list[pa.RecordBatch]) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(r.values()) for b in batches for r in b.to_pylist())


def filled(store: StateStore, spec: TableSpec, rng: random.Random) -> None:
    """In merged files, flushed files and the MemTable; with repeated, deleted and expired keys."""
    state = store.table(spec)
    for step in range(9):
        keys = [rng.choice([None, "", *(f"k{n}" for n in range(60))]) for _ in range(150)]
        at = [rng.randrange(100) for _ in keys]
        batch = pa.record_batch([at, keys, [rng.randrange(1000) for _ in keys]], schema=INPUT)
        for part in STATES.partial([batch]) if spec.kind is TableKind.AGGREGATE else [batch]:
            state.write(part)
        if spec.kind is TableKind.UPSERT:
            state.delete(batch.slice(0, 5).select(["at", "key"]))
        state.expire(step)
        if step < 8:
            store.checkpoint(job(step)).result(20)


@pytest.mark.parametrize("order", [TableOrder.HASH, TableOrder.TIME])
@pytest.mark.parametrize("kind", list(TableKind))
def test_hash_ranges_divide_every_kind_of_table_exactly(world: World, kind: TableKind, order: TableOrder) -> None:
    spec, rng = table(kind, order), random.Random(7)

    def check(store: StateStore, read: Callable[..., list[pa.RecordBatch]]) -> Counter[tuple[Any, ...]]:
        whole = rows(read())
        assert whole
        for parts in (1, 2, 3, 7, 16):
            cuts = [None, *sorted(rng.randrange(1 << 64) for _ in range(parts - 1)), None]
            pieces = [rows(read(hash_range=between)) for between in pairwise(cuts)]
            assert sum(pieces, Counter()) == whole
        for parts in (2, 64):
            even = [None, *(n * (1 << 64) // parts for n in range(1, parts)), None]
            assert sum((rows(read(hash_range=between)) for between in pairwise(even)), Counter()) == whole
        return whole

    with world.open(settings=SETTINGS) as store:
        filled(store, spec, rng)
        check(store, store.table(spec).scan)
        store.checkpoint(job(99)).result(20)
        before = check(store, store.table(spec).scan)
    with world.open(settings=SETTINGS) as again:
        assert check(again, again.table(spec).scan) == before


@pytest.mark.parametrize("order", [TableOrder.HASH, TableOrder.TIME])
def test_a_key_is_in_the_same_range_whenever_and_wherever_it_is_written(world: World, order: TableOrder) -> None:
    """Else a worker that takes a range over would look for rows of a key that another worker has."""
    spec = table(TableKind.UPSERT, order)
    halves = ((None, 1 << 63), (1 << 63, None))
    where: dict[str, int] = {}
    for seed in range(3):
        with world.open(settings=SETTINGS, seed=seed) as store:
            for at in range(3):
                keys = [f"k{n}" for n in range(50)]
                store.table(spec).write(pa.record_batch([[10 * seed + at] * 50, keys, [seed] * 50], schema=INPUT))
            store.checkpoint(job(seed)).result(20)
            for half, between in enumerate(halves):
                for batch in store.table(spec).scan(["key"], hash_range=between):
                    for key in batch.column("key").to_pylist():
                        assert where.setdefault(key, half) == half
    assert set(where.values()) == {0, 1}
