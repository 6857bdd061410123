"""SSTables: readable by any Arrow reader, pruned by their index, and never trusted without a checksum."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pytest

from statebackend import sstable
from statebackend.errors import CorruptionError, ObjectMissingError
from statebackend.keys import Hasher
from statebackend.merge import TableLayout
from statebackend.settings import StoreSettings
from statebackend.sstable import EncodedSSTable, encode_sstable, read_blocks, read_index
from statebackend.tables import TableKind, TableOrder, TableSpec
from tests.support.stores import World

T = TypeVar("T")
SPEC = TableSpec(
    name="t",
    schema=pa.schema([("at", pa.timestamp("ms")), ("key", pa.int64()), ("text", pa.string())]),
    key=("at", "key"),
    kind=TableKind.APPEND,
    order=TableOrder.TIME,
    time_field="at",
)
LAYOUT = TableLayout.of(SPEC, Hasher(), {})


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def encoded(rows: int = 1000, *, compression: str | None = "lz4") -> EncodedSSTable:
    batch = pa.record_batch(
        [pa.array(np.arange(rows) // 10).cast(pa.timestamp("ms")), np.arange(rows), [f"row {i}" for i in range(rows)]],
        schema=SPEC.schema,
    )
    settings = StoreSettings(block_rows=64, compression=compression)
    return encode_sstable(LAYOUT, LAYOUT.merge([LAYOUT.to_stored(batch)]), "sst/x.arrow", 7, None, settings=settings)


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000])
def test_all_blocks_come_back_and_any_arrow_reader_opens_the_file(world: World, rows: int, compression: str) -> None:
    table = encoded(rows, compression=compression)
    run(world.objects.put(table.meta.name, table.data))
    index, _ = run(read_index(world.objects, table.meta))
    blocks = run(read_blocks(world.objects, table.meta, index, range(len(index.entries)), LAYOUT))
    plain = pa.ipc.open_file(pa.py_buffer(bytes(table.data))).read_all()
    assert pa.Table.from_batches(blocks).equals(plain)
    assert plain.num_rows == rows == table.meta.rows


def test_a_time_range_reads_only_the_blocks_that_overlap_it(world: World) -> None:
    index = encoded().index
    assert index.overlapping(None, None) == list(range(16))
    assert index.overlapping(50, 53) == [7, 8]
    assert index.overlapping(1000, None) == []


def test_hashes_select_blocks(world: World) -> None:
    table = encoded()
    hashes = np.sort(table.blocks[3].column("__hash").to_numpy()[:5])
    assert 3 in table.index.holding(hashes, None, None)
    assert table.index.holding(hashes, 1000, None) == []


def test_every_damaged_byte_is_found_before_anything_is_decoded(world: World) -> None:
    table = encoded(200)
    name, original = table.meta.name, bytes(table.data)
    first = int(table.index.entries[0]["offset"])

    def read_all() -> None:
        index, _ = run(read_index(world.objects, table.meta))
        run(read_blocks(world.objects, table.meta, index, range(len(index.entries)), LAYOUT))

    for at in range(first, len(original), 37):
        damaged = bytearray(original)
        damaged[at] ^= 0x10
        run(world.objects.put(name, bytes(damaged)))
        with pytest.raises(CorruptionError, match=name):
            read_all()
    for size in (0, 10, len(original) // 2, len(original) - 1):
        run(world.objects.put(name, original[:size]))
        with pytest.raises(CorruptionError, match=name):
            read_all()


def test_a_missing_file_is_named(world: World) -> None:
    with pytest.raises(ObjectMissingError, match=r"sst/gone\.arrow"):
        run(read_index(world.objects, dataclasses.replace(encoded(1).meta, name="sst/gone.arrow")))


def test_the_same_rows_give_the_same_bytes() -> None:
    assert encoded().data == encoded().data


def wide(sizes: list[int], *, compression: str | None = None, block_bytes: int = 10_000) -> EncodedSSTable:
    """Rows of so many bytes that do not compress."""
    rng = np.random.default_rng(3)
    texts = [rng.integers(32, 127, size, dtype=np.uint8).tobytes().decode() for size in sizes]
    at = pa.array(np.arange(len(sizes))).cast(pa.timestamp("ms"))
    batch = LAYOUT.to_stored(pa.record_batch([at, np.arange(len(sizes)), texts], schema=SPEC.schema))
    settings = StoreSettings(block_bytes=block_bytes, compression=compression)
    return encode_sstable(LAYOUT, LAYOUT.merge([batch]), "sst/wide.arrow", 1, None, settings=settings)


def test_wide_rows_make_blocks_of_few_rows() -> None:
    table = wide([1000] * 500)
    assert max(b.nbytes for b in table.blocks) <= 10_000
    assert [b.num_rows for b in table.blocks[:-1]] == [9] * (len(table.blocks) - 1)
    assert wide([10] * 500).blocks[0].num_rows > 200


def test_a_few_rows_that_are_much_wider_than_the_average_make_no_large_block() -> None:
    table = wide([10] * 400 + [9000] * 40 + [50_000])
    assert all(b.nbytes <= 20_000 or b.num_rows == 1 for b in table.blocks)
    assert len(table.blocks) < 80, "the narrow rows still lie together"
    assert sum(b.num_rows for b in table.blocks) == table.meta.rows


def test_rows_whose_bytes_are_shared_are_not_cut_to_single_ones() -> None:
    schema = pa.schema([("key", pa.int64()), ("texts", pa.list_(pa.string_view()))])
    layout = TableLayout.of(TableSpec(name="v", schema=schema, key=("key",), kind=TableKind.APPEND), Hasher(), {})
    rows = pa.record_batch([np.arange(40), [["x" * 1000]] * 40], schema=schema)
    settings = StoreSettings(block_bytes=10_000)
    table = encode_sstable(layout, layout.merge([layout.to_stored(rows)]), "sst/v", 1, None, settings=settings)
    assert len(table.blocks) < 10


def test_the_index_tells_how_large_a_block_is_in_memory(world: World) -> None:
    table = wide([1000] * 50, compression="zstd")
    run(world.objects.put(table.meta.name, table.data))
    index, _ = run(read_index(world.objects, table.meta))
    blocks = run(read_blocks(world.objects, table.meta, index, range(len(index.entries)), LAYOUT))
    assert index.entries["memory"].tolist() == [b.nbytes for b in table.blocks]
    assert all(abs(b.nbytes - m) <= 64 for b, m in zip(blocks, index.entries["memory"].tolist(), strict=True))


@pytest.mark.parametrize("compression", [None, "lz4"])
def test_a_block_that_was_read_holds_no_memory_of_its_neighbours(world: World, compression: str | None) -> None:
    """Arrow does not copy what was not compressed, or would not shrink."""
    table = wide([1000] * 500, compression=compression)
    fetched: list[bytearray] = []

    class Fetching:
        async def get_range(self, _: str, start: int, end: int) -> bytearray:
            fetched.append(bytearray(table.data[start:end]))
            return fetched[-1]

    everything = range(len(table.blocks))
    blocks = run(read_blocks(Fetching(), table.meta, table.index, everything, LAYOUT))  # type: ignore[arg-type]
    assert pa.Table.from_batches(blocks).num_rows == 500
    for data in fetched:
        data.clear()  # raises BufferError while any block refers to it


def test_neighbours_are_read_together_but_not_a_large_file_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sstable, "READ_BYTES", 50_000)
    table = wide([1000] * 500)
    run(world.objects.put(table.meta.name, table.data))
    sizes = []

    class Counting:
        async def get_range(self, name: str, start: int, end: int) -> bytes:
            sizes.append(end - start)
            return await world.objects.get_range(name, start, end)

    everything = range(len(table.blocks))
    blocks = run(read_blocks(Counting(), table.meta, table.index, everything, LAYOUT))  # type: ignore[arg-type]
    assert pa.Table.from_batches(blocks).num_rows == 500
    assert max(sizes) <= 50_000
    assert len(sizes) <= 2 * sum(sizes) // 50_000 + 1
