"""Which files are merged, in which ranges, and that a merge in small pieces changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from statebackend import StoreSettings, TableKind, TableOrder, TableSpec
from statebackend.compaction import plan_compaction, plan_ranges
from statebackend.keys import Hasher
from statebackend.manifest import Manifest, TableState
from statebackend.merge import TableLayout
from statebackend.sstable import SSTableMeta, encode_sstable
from tests.support.stores import World, job

SETTINGS = StoreSettings(l0_files_max=3)


def file(name: str, size: int, run: str | None = None) -> SSTableMeta:
    return SSTableMeta(
        name=name, level=0 if run is None else 1, run=run, sequence=1, rows=size, size=size, tail_bytes=1,
        tail_checksum=0, hash_min=0, hash_max=1, time_min=None, time_max=None,
    )  # fmt: skip


def manifest(*files: SSTableMeta) -> Manifest:
    spec = TableSpec(name="t", schema=pa.schema([("k", pa.int64())]), key=("k",), kind=TableKind.UPSERT)
    return Manifest(
        number=1, parent_attempt="", store_id="s", writer_epoch=1, writer_id="w", attempt_id="a", created_ms=0,
        tables={"t": TableState(spec=spec, files=files)},
    )  # type: ignore[arg-type]  # fmt: skip


def test_nothing_is_merged_while_few_flushed_files_are_there() -> None:
    assert plan_compaction(manifest(*(file(str(i), 10) for i in range(3))), SETTINGS) is None


def test_flushed_files_are_merged_with_the_runs_that_are_not_larger() -> None:
    small, large = file("small", 30, "r2"), file("large", 1000, "r1")
    flushed = [file(f"l{i}", 10) for i in range(4)]
    plan = plan_compaction(manifest(large, small, *flushed), SETTINGS)
    assert plan is not None
    assert [f.name for f in plan.inputs] == ["small", "l0", "l1", "l2", "l3"]
    assert not plan.oldest
    plan = plan_compaction(manifest(small, *flushed), SETTINGS)
    assert plan is not None
    assert plan.oldest


def test_a_run_of_several_files_joins_as_a_whole_or_not_at_all() -> None:
    run = [file(f"r{i}", 30, "r") for i in range(3)]
    plan = plan_compaction(manifest(*run, *(file(f"l{i}", 10) for i in range(4))), SETTINGS)
    assert plan is not None
    assert [f.name for f in plan.inputs] == ["l0", "l1", "l2", "l3"]


def test_a_row_is_rewritten_a_logarithmic_number_of_times() -> None:
    files: list[SSTableMeta] = []
    written = 0
    for i in range(2000):
        files.append(file(f"f{i}", 1))
        plan = plan_compaction(manifest(*files), SETTINGS)
        if plan is not None:
            size = sum(f.size for f in plan.inputs)
            written += size
            files = [f for f in files if f not in plan.inputs] + [file(f"r{i}", size, f"r{i}")]
        assert len(files) <= 3 + 12
    assert written <= 2000 * 11


def spec(order: TableOrder, *, timed: bool) -> TableSpec:
    return TableSpec(
        name="t",
        schema=pa.schema([("k", pa.int64()), ("at", pa.int64()), ("v", pa.int64())]),
        key=("k", "at") if timed else ("k",),
        kind=TableKind.UPSERT,
        order=order,
        time_field="at" if timed else None,
    )


SPECS = [spec(TableOrder.HASH, timed=False), spec(TableOrder.HASH, timed=True), spec(TableOrder.TIME, timed=True)]


@pytest.mark.parametrize("bits", [2, 64])
@pytest.mark.parametrize("of", SPECS, ids=["hash", "hash-time", "time"])
def test_ranges_cover_every_row_exactly_once_and_are_small(of: TableSpec, bits: int) -> None:
    layout = TableLayout.of(of, Hasher(bits), {})
    rng = np.random.default_rng(0)
    tables = []
    for i in range(5):
        batch = pa.record_batch(
            [rng.integers(0, 500, 400), rng.integers(-3, 3, 400), np.full(400, i)], schema=of.schema
        )
        rows = layout.merge([layout.to_stored(batch)])
        tables.append(encode_sstable(layout, rows, f"f{i}", i, None, settings=StoreSettings(block_rows=16)))
    ranges = plan_ranges(of, [t.index for t in tables], 200)
    assert ranges[0].low is None
    assert ranges[-1].high is None
    assert all(a.high == b.low for a, b in pairwise(ranges))
    for table in tables:
        rows = sum(
            (s := r.select(layout.order_columns(b))).stop - s.start
            for r in ranges
            for n in table.index.overlapping_keys(of, r.low, r.high, None)
            for b in [table.blocks[n]]
        )
        assert rows == table.meta.rows
    if bits == 64:
        assert len(ranges) >= 5


@pytest.mark.parametrize("of", SPECS, ids=["hash", "hash-time", "time"])
@pytest.mark.parametrize("rows_at_once", [1, 20, 10**6])
def test_a_merge_in_small_pieces_and_many_files_keeps_every_row(world: World, of: TableSpec, rows_at_once: int) -> None:
    settings = StoreSettings(
        block_rows=8, l0_files_max=1, compaction_rows=rows_at_once, file_bytes_max=2000, gc_interval_s=None
    )
    rng = random.Random(7)
    expected: dict[tuple[int, ...], int] = {}
    key_of: Callable[[tuple[int, int]], tuple[int, ...]] = (lambda r: r) if of.time_field else (lambda r: r[:1])
    with world.open(settings=settings) as store:
        table = store.table(of)
        for step in range(10):
            rows = [(rng.randrange(40), rng.randrange(-2, 3)) for _ in range(30)]
            table.write(pa.record_batch([*zip(*rows, strict=True), [step] * 30], schema=of.schema))
            expected.update({key_of(r): step for r in rows})
            gone = [rows[0], rows[1]]
            keys = [c for c, _ in zip(zip(*gone, strict=True), of.key, strict=False)]
            table.delete(pa.record_batch([*keys], names=list(of.key)))
            for r in gone:
                expected.pop(key_of(r), None)
            store.checkpoint(job(step)).result(10)
    with world.open(settings=settings) as store:
        found = [r for b in store.table(of).scan() for r in b.to_pylist()]
        assert {tuple(r[k] for k in of.key): r["v"] for r in found} == expected
        assert len(found) == len(expected)
        if rows_at_once == 1:
            assert len({f.run for f in store.manifest.tables["t"].files}) < len(store.manifest.tables["t"].files)
