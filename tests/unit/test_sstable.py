"""SSTables: readable by any Arrow reader, pruned by their index, and never trusted without a checksum."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pytest

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
