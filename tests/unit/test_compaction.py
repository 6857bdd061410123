"""Which files are merged, in which ranges, and that a merge in small pieces changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from statebackend import StoreSettings, TableKind, TableOrder, TableSpec
from statebackend.compaction import plan_compaction, plan_ranges
from statebackend.keys import Hasher
from statebackend.manifest import Manifest, TableState
from statebackend.merge import TableLayout
from statebackend.schema_history import SchemaHistory
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
        tables={"t": TableState(spec=spec, history=SchemaHistory.begin(spec.schema), files=files)},
    )  # type: ignore[arg-type]  # fmt: skip


def test_nothing_is_merged_while_few_flushed_files_are_there() -> None:
    assert plan_compaction(manifest(*(file(str(i), 10) for i in range(3))), SETTINGS) is None


def test_flushed_files_are_merged_with_the_runs_that_are_not_more_than_twice_as_large() -> None:
    small, large = file("small", 80, "r2"), file("large", 1000, "r1")
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


def test_files_that_are_being_merged_are_left_alone_and_newer_ones_of_the_table_need_not_wait() -> None:
    large, flushed = file("large", 1000, "r1"), [file(f"l{i}", 600) for i in range(4)]
    first = plan_compaction(manifest(large, *flushed), SETTINGS)
    assert first is not None
    assert [f.name for f in first.inputs] == ["large", "l0", "l1", "l2", "l3"]
    busy = {f.name for f in first.inputs}
    newer = [file(f"n{i}", 1) for i in range(4)]
    assert plan_compaction(manifest(large, *flushed, *newer[:3]), SETTINGS, busy=busy) is None
    second = plan_compaction(manifest(large, *flushed, *newer), SETTINGS, busy=busy, bytes_max=100)
    assert second is not None
    assert [f.name for f in second.inputs] == ["n0", "n1", "n2", "n3"]
    assert not second.oldest, "older files are still being merged, so tombstones stay"


def test_flushed_files_left_behind_by_a_merge_that_was_given_up_are_merged_with_the_run_after_them() -> None:
    old, run, new = [file(f"o{i}", 1) for i in range(2)], file("r", 500, "r"), [file(f"n{i}", 1) for i in range(2)]
    plan = plan_compaction(manifest(*old, run, *new), SETTINGS)
    assert plan is not None
    assert plan.inputs == (*old, run, *new), "contiguous, else it could never be committed"


def test_beside_a_large_merge_the_most_urgent_small_one_goes_on() -> None:
    crowded = [file(f"l{i}", 1000) for i in range(6)]
    found = manifest(*crowded)
    other = replace(found.tables["t"], files=tuple(file(f"s{i}", 1) for i in range(4)))
    found = replace(found, tables={**found.tables, "u": other})
    plan = plan_compaction(found, SETTINGS)
    assert plan is not None
    assert plan.table == "t"
    plan = plan_compaction(found, SETTINGS, bytes_max=100)
    assert plan is not None
    assert plan.table == "u"
    assert plan_compaction(found, SETTINGS, skipped={"t", "u"}) is None


def flush_and_merge(sizes: Sequence[int], settings: StoreSettings, keys: int | None = None) -> tuple[float, int, float]:
    """Flush files of these sizes and carry out what is due; ``keys``: bytes beyond which rows only supersede others.

    Bytes merged per byte flushed, the largest number of runs, and the largest size of all files over what is alive.
    """
    files: list[SSTableMeta] = []
    merged = runs = flushed = 0
    space = 0.0
    for i, size in enumerate(sizes):
        flushed += size
        files.append(file(f"f{i}", size))
        if (plan := plan_compaction(manifest(*files), settings)) is not None:
            size_out = min(plan.nbytes, keys or plan.nbytes)
            merged += size_out
            at = files.index(plan.inputs[0])
            assert files[at : at + len(plan.inputs)] == list(plan.inputs)
            files[at : at + len(plan.inputs)] = [file(f"r{i}", size_out, f"r{i}")]
        runs = max(runs, len({f.run for f in files if f.run is not None}))
        in_runs = sum(f.size for f in files if f.run is not None)
        space = max(space, in_runs / min(flushed, keys or flushed))
        assert sum(f.level == 0 for f in files) <= settings.l0_files_max
    return merged / flushed, runs, space


SIZES = {
    "equal": [100] * 5000,
    "falling": [10**6 - 150 * i for i in range(5000)],
    "falling fast": [10**7 // (i + 1) + 1 for i in range(5000)],
    "random": [random.Random(1).randrange(1, 10_000) for _ in range(5000)],
    "a few large ones": [10_000 if i % 97 == 0 else 10 for i in range(5000)],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_runs_are_bounded_and_a_row_is_rewritten_a_logarithmic_number_of_times(sizes: list[int]) -> None:
    rewritten, runs, _ = flush_and_merge(sizes, StoreSettings())
    assert runs <= 8
    assert rewritten <= 8
    rewritten, runs, _ = flush_and_merge(sizes, StoreSettings(runs_max=1000))
    assert runs <= 13, "by the sizes alone it is logarithmic"


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_superseded_rows_take_no_more_space_than_what_is_alive(sizes: list[int]) -> None:
    _, _, space = flush_and_merge(sizes, StoreSettings(), keys=sum(sizes) // 20)
    assert space <= 2.0


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
    ranges = plan_ranges(of, [t.index for t in tables], 200 * 33)
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
@pytest.mark.parametrize("bytes_at_once", [1, 600, 10**8])
def test_a_merge_in_small_pieces_and_many_files_keeps_every_row(
    world: World, of: TableSpec, bytes_at_once: int
) -> None:
    settings = StoreSettings(
        block_rows=8, l0_files_max=1, compaction_bytes=bytes_at_once, file_bytes_max=2000, gc_interval_s=None
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
        if bytes_at_once == 1:
            assert len({f.run for f in store.manifest.tables["t"].files}) < len(store.manifest.tables["t"].files)
