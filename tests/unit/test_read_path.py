"""What reads cost, by counting: requests and bytes, never seconds; and that every way to an answer gives the same."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from statebackend import StateStore, StoreSettings, TableKind, TableOrder, TableSpec, cache, open_kv, sstable
from statebackend.bloom import BloomFilter
from statebackend.errors import CorruptionError
from statebackend.keys import Hasher
from statebackend.points import KEYS_MAX
from statebackend.probe import SortedRows
from statebackend.table_view import TableView
from statebackend.verification import verify
from tests.support.stores import World

SETTINGS = StoreSettings(block_rows=500, l0_files_max=4)
ROWS = TableSpec(
    name="rows", schema=pa.schema([("key", pa.int64()), ("value", pa.string())]), key=("key",), kind=TableKind.UPSERT
)


def batch(keys: Any) -> pa.RecordBatch:
    return pa.record_batch([pa.array(keys, pa.int64()), [f"value {k}" for k in keys]], schema=ROWS.schema)


def keys(*values: int) -> pa.RecordBatch:
    return pa.record_batch({"key": pa.array(values, pa.int64())})


def fill(store: StateStore, count: int = 20_000, files: int = 3) -> None:
    """Every file holds every range of hashes."""
    for part in range(files):
        store.table(ROWS).write(batch(range(part, count, files)))
        store.flush()


def reads(store: StateStore) -> tuple[int, int]:
    """Ranges of files read so far, and their bytes."""
    counted = [c for (operation, _), c in store.metrics().requests.items() if operation == "get_range"]
    return sum(c.requests for c in counted), sum(c.bytes_read for c in counted)


@pytest.mark.parametrize("eager", [True, False], ids=["with the index", "by itself"])
def test_missing_keys_read_no_block(world: World, eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sstable, "_FILTER_BYTES_EAGER", 1 << 16 if eager else 0)
    with world.open(settings=SETTINGS) as store:
        fill(store)
        size = sum(meta.size for meta in store.table(ROWS).files)
    with world.open(settings=SETTINGS) as store:
        table = store.table(ROWS)
        files = len(table.files)
        table.lookup(keys(-1))
        requests, read = reads(store)
        assert requests == (files if eager else 2 * files)  # indexes and filters, once
        assert read < size / 5
        for missing in range(20):
            assert table.lookup(keys(-2 - missing)).hit.to_pylist() == [False]
        found = table.lookup(keys(*range(-3000, -1000)))
        assert found.hit.true_count == 0
        assert table.matches(keys(*range(-40, -20))).batch.num_rows == 0
        # About one key in a hundred seems to be there: a few blocks of 40 in each file.
        assert reads(store)[0] - requests < 60


def test_what_is_in_memory_is_read_without_a_request_and_without_another_thread(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with world.open(settings=SETTINGS) as store:
        fill(store)
        table = store.table(ROWS)
        before = reads(store)

        def never(*_: object) -> None:
            raise AssertionError("a read that is in memory went to the runtime")

        monkeypatch.setattr(store, "read", never)
        assert table.lookup(keys(5)).batch.column("value").to_pylist() == ["value 5"]
        assert table.lookup(keys(*range(-500, 500))).hit.true_count == 500
        assert table.matches(keys(*range(-500, 500))).batch.num_rows == 500
        assert sum(b.num_rows for b in table.scan()) == 20_000
        assert reads(store) == before


def test_one_key_reads_one_block(world: World) -> None:
    with world.open(settings=SETTINGS) as store:
        fill(store, files=1)
    with world.open(settings=SETTINGS) as store:
        table = store.table(ROWS)
        table.lookup(keys(-1))
        before, read = reads(store)
        assert table.lookup(keys(7)).hit.to_pylist() == [True]
        requests, after = reads(store)
        assert requests - before == 1
        assert after - read < 30 * 500
        table.lookup(keys(7))
        assert reads(store)[0] == requests


def test_a_range_of_hashes_reads_its_share(world: World) -> None:
    with world.open(settings=SETTINGS) as store:
        fill(store)
        size = sum(meta.size for meta in store.table(ROWS).files)
    with world.open(settings=SETTINGS) as store:
        table = store.table(ROWS)
        before = reads(store)[1]
        rows = sum(b.num_rows for b in table.scan(hash_range=(0, 1 << 60)))
        assert 0.8 < rows / (20_000 / 16) < 1.2
        assert reads(store)[1] - before < size / 4


def test_filters_share_the_budget_of_the_blocks(world: World) -> None:
    settings = replace(SETTINGS, cache_bytes=60_000)
    with world.open(settings=settings) as store:
        fill(store)
        table = store.table(ROWS)
        for start in range(0, 20_000, 1000):
            assert table.lookup(keys(*range(start, start + 1000))).hit.true_count == 1000
            assert store.reader.cache_bytes <= 60_000
        assert table.lookup(keys(3, -3)).hit.to_pylist() == [True, False]


def test_a_filter_that_would_fill_the_cache_is_left_in_its_file(world: World) -> None:
    settings = replace(SETTINGS, cache_bytes=20_000)
    with world.open(settings=settings) as store:
        fill(store)
        table = store.table(ROWS)
        index = store.read(lambda: store.reader.index(table.files[0]))
        assert index is not None
        assert not store.reader.wants_filter(index)
        assert table.lookup(keys(3, -3)).hit.to_pylist() == [True, False]


def test_without_filters_everything_is_found_too(world: World) -> None:
    with world.open(settings=replace(SETTINGS, filter_bits_per_key=0)) as store:
        fill(store)
        assert store.table(ROWS).lookup(keys(3, -3)).hit.to_pylist() == [True, False]


def test_a_checkpoint_writes_bytes_in_proportion_to_the_change(world: World) -> None:
    with world.open(settings=StoreSettings(block_rows=500, l0_files_max=1000)) as store:
        written = {}
        for count in (100_000, 1_000, 10_000):
            store.table(ROWS).write(batch(range(0, 100_000, 100_000 // count)))
            written[count] = store.flush().bytes_written
        assert written[1_000] < written[100_000] / 50
        assert written[10_000] < written[100_000] / 5


def test_verify_finds_a_filter_that_denies_a_key(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sstable.BloomFilter, "of", lambda hashes, bits: BloomFilter(np.zeros((9, 8), dtype="<u4")))
        with StateStore.open(tmp_path / "store") as store:
            fill(store, 100, files=1)
    (problem,) = verify(str(tmp_path / "store")).problems
    assert "the filter denies a key" in problem


def test_a_damaged_filter_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sstable, "_FILTER_BYTES_EAGER", 0)
    with world.open(settings=SETTINGS) as store:
        fill(store, files=1)
        (meta,) = store.table(ROWS).files
        index = store.reader.index_now(meta)
        assert index is not None
    name = next(n for n in world.files if n.endswith(meta.name))
    data = bytearray(world.files[name].getvalue())
    data[index.filter_offset + index.filter_bytes // 2] ^= 1
    world.files[name].seek(0)
    world.files[name].write(bytes(data))
    with world.open(settings=SETTINGS) as store, pytest.raises(CorruptionError, match=meta.name):
        store.table(ROWS).lookup(keys(1))


KEY_TYPES: dict[str, list[pa.DataType]] = {
    "integer": [pa.int32()],
    "text and flag": [pa.string(), pa.bool_()],
    "large text": [pa.large_string()],
    "dictionary": [pa.dictionary(pa.int32(), pa.string())],
    "bytes": [pa.binary()],
    "float": [pa.float64()],
}


def random_value(rng: random.Random, kind: pa.DataType) -> Any:
    if rng.random() < 0.05:
        return None
    if pa.types.is_boolean(kind):
        return rng.random() < 0.5
    if pa.types.is_floating(kind):
        return rng.choice([0.0, -0.0, float("nan"), float(rng.randrange(100))])
    if pa.types.is_integer(kind):
        return rng.randrange(-100, 100)
    text = rng.choice(["", "key ", "a long common prefix "]) + str(rng.randrange(60))
    return text.encode() if pa.types.is_binary(kind) else text


@pytest.mark.parametrize("bits", [0, 3, 64])
@pytest.mark.parametrize("order", [TableOrder.HASH, TableOrder.TIME, None], ids=["hash", "time", "no time"])
@pytest.mark.parametrize("types", KEY_TYPES.values(), ids=KEY_TYPES)
def test_a_few_keys_are_answered_as_many_are(
    world: World, types: list[pa.DataType], order: TableOrder | None, bits: int
) -> None:
    """Also when keys collide in few bits of hash, and when nothing is in memory at first."""
    rng = random.Random(f"{types}{order}{bits}")
    fields = [pa.field(f"k{i}", kind) for i, kind in enumerate(types)]
    if order is not None:
        fields.insert(1, pa.field("at", pa.timestamp("ms")))
    spec = TableSpec(
        name="t",
        schema=pa.schema([*fields, ("value", pa.int64())]),
        key=tuple(f.name for f in fields),
        kind=TableKind.UPSERT,
        order=order or TableOrder.HASH,
        time_field=None if order is None else "at",
    )

    def random_keys(count: int) -> pa.RecordBatch:
        def column(kind: pa.DataType) -> pa.Array:
            if pa.types.is_timestamp(kind):
                return pa.array([rng.randrange(8) for _ in range(count)]).cast(kind)
            values = [random_value(rng, kind) for _ in range(count)]
            return (
                pa.array(values, pa.string()).dictionary_encode()
                if pa.types.is_dictionary(kind)
                else pa.array(values, kind)
            )

        return pa.record_batch([column(f.type) for f in fields], schema=pa.schema(fields))

    hasher = Hasher(bits)
    settings = StoreSettings(block_rows=7, l0_files_max=3)
    probes = random_keys(40)

    def check(store: StateStore) -> None:
        table = store.table(spec)
        few = [table.lookup(probes.slice(i, n)) for i in range(0, 40, 5) for n in (5,)]
        many = table.lookup(pa.concat_batches([probes, probes]))
        assert [h for part in few for h in part.hit.to_pylist()] == many.hit.to_pylist()[:40]
        assert few[0].batch.schema == many.batch.schema
        answers = [str(r) for part in few for r in part.batch.to_pylist()]
        assert answers == [str(r) for r in many.batch.to_pylist()[:40]]

    with world.open(settings=settings, hasher=hasher) as store:
        table = store.table(spec)
        for step in range(8):
            rows = random_keys(40)
            table.write(
                pa.RecordBatch.from_arrays(
                    [*rows.columns, pa.array(range(step * 40, step * 40 + 40))], schema=spec.schema
                )
            )
            table.delete(random_keys(10))
            if step % 3 == 2:
                store.flush()
            check(store)
        if order is not None:
            table.expire(3)
            check(store)
        store.flush()
    with world.open(settings=settings, hasher=hasher) as store:
        check(store)
        check(store)
    assert len(probes) > KEYS_MAX


def test_keys_in_order_are_found_one_by_one_and_together(tmp_path: Any) -> None:
    rng = random.Random(5)
    names = [b"", b"\0", b"a" * 8, *(b"prefix--" + rng.randbytes(rng.randrange(3)) for _ in range(300))]
    with open_kv(tmp_path / "kv", StoreSettings(block_rows=16)) as kv:
        held = {name: str(i).encode() for i, name in enumerate(names) if i % 3}
        kv.put_many(held)
        kv.flush()
        gone = rng.sample(sorted(held), 50)
        kv.delete_many(gone)
        kv.flush()
        expected = [None if name in gone else held.get(name) for name in names]
        assert [kv.get(name) for name in names] == expected
        assert kv.get_many(names) == expected
    with open_kv(tmp_path / "kv") as kv:
        assert [kv.get(name) for name in names] == expected
        assert kv.get_many(names) == expected


def test_few_wide_rows_among_many_misses_reserve_no_memory_for_the_misses(world: World) -> None:
    """Arrow takes every row to be as wide as the average of those that it takes from."""
    schema = pa.schema([("key", pa.int64()), ("value", pa.binary())])
    wide = TableSpec(name="wide", schema=schema, key=("key",), kind=TableKind.UPSERT)
    pool, before = pa.system_memory_pool(), pa.default_memory_pool()
    with world.open() as store:
        store.table(wide).write(pa.record_batch([[1, 2], [bytes(1 << 20)] * 2], schema=schema))
        pa.set_memory_pool(pool)
        try:
            found = store.table(wide).lookup(pa.record_batch({"key": np.arange(100_000)}))
        finally:
            pa.set_memory_pool(before)
        assert found.hit.true_count == 2
        assert found.batch.column("value")[1].as_py() == bytes(1 << 20)
        assert pool.max_memory() < 1 << 30


@pytest.mark.parametrize("bits", [8, 64])
def test_a_lookup_of_keys_everywhere_holds_a_part_of_the_blocks_at_a_time(
    world: World, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    monkeypatch.setattr(cache, "_HELD_BYTES_MIN", 20_000)
    held: list[int] = []
    read = TableView.blocks

    def counts(self: TableView, *args: Any) -> list[SortedRows]:
        blocks = read(self, *args)
        held.append(sum(b.nbytes for b in blocks))
        return blocks

    monkeypatch.setattr(TableView, "blocks", counts)
    settings = replace(SETTINGS, block_rows=64, cache_bytes=1, compaction="none")
    with world.open(settings=settings, hasher=Hasher(bits)) as store:
        table = store.table(ROWS)
        for start in (0, 4000):
            table.write(batch(range(start, start + 8000)))
            store.flush()
        table.write(batch(range(0, 12_000, 100)))
        everything = keys(*range(-50, 12_050))
        found = table.lookup(everything)
        assert found.hit.to_pylist() == [0 <= k < 12_000 for k in range(-50, 12_050)]
        assert found.batch.slice(50, 12_000).equals(batch(range(12_000)).cast(found.batch.schema))
        matches = table.matches(everything)
        assert matches.batch.equals(batch(range(12_000)))
        assert matches.key_index.to_pylist() == list(range(50, 12_050))
    assert sum(held) > 500_000
    if bits == 64:
        assert max(held) < 40_000, "one block of each file more than was asked for"
