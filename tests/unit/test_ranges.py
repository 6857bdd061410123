"""What is merged range by range is what a merge of everything gives, and costs no copy where nothing overlaps."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from statebackend import ranges
from statebackend.keys import Hasher, canonicalise
from statebackend.merge import TableLayout
from statebackend.ranges import live_rows
from statebackend.tables import TableKind, TableOrder, TableSpec

SCHEMA = pa.schema([("key", pa.string()), ("at", pa.int64()), ("value", pa.int64())])
FORMS = {
    "upsert by hash": {"key": ("key",), "kind": TableKind.UPSERT},
    "upsert with a time": {"key": ("key", "at"), "kind": TableKind.UPSERT, "time_field": "at"},
    "upsert by time": {
        "key": ("key", "at"), "kind": TableKind.UPSERT, "time_field": "at", "order": TableOrder.TIME,
    },
    "upsert by key": {"key": ("key",), "kind": TableKind.UPSERT, "order": TableOrder.KEY},
    "upsert that expires": {"key": ("key",), "kind": TableKind.UPSERT, "ttl_field": "at"},
    "append": {"key": ("key",), "kind": TableKind.APPEND},
    "append by time": {"key": ("key", "at"), "kind": TableKind.APPEND, "time_field": "at", "order": TableOrder.TIME},
}  # fmt: skip


def layout(form: str, bits: int = 64) -> TableLayout:
    return TableLayout.of(TableSpec(name="t", schema=SCHEMA, **FORMS[form]), Hasher(bits), {})


def piece(of: TableLayout, rng: np.random.Generator, rows: int) -> pa.RecordBatch:
    """A sorted piece, with deletions in an upsert table."""
    batch = pa.record_batch(
        [
            pa.array([f"k{i}" for i in rng.integers(0, 60, rows)]),
            pa.array(rng.integers(0, 20, rows)),
            pa.array(rng.integers(0, 1000, rows)),
        ],
        schema=SCHEMA,
    )
    stored = [of.to_stored(canonicalise(batch))]
    if of.spec.kind is TableKind.UPSERT and rows > 4 and of.spec.ttl_field is None:
        stored.append(of.to_stored(canonicalise(batch.slice(0, rows // 4)), tombstone=True))
    return of.merge(stored)


def cut(batch: pa.RecordBatch, rows: int) -> list[pa.RecordBatch]:
    """A file of it: blocks."""
    return [batch.slice(at, rows) for at in range(0, batch.num_rows, rows)]


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "ROWS_MIN", 6)


@pytest.mark.parametrize("bits", [2, 64])
@pytest.mark.parametrize("form", FORMS)
def test_range_by_range_gives_what_one_merge_gives(form: str, bits: int) -> None:
    of = layout(form, bits)
    for seed in range(25):
        rng = np.random.default_rng(seed)
        pieces: list[pa.RecordBatch] = []
        for _ in range(int(rng.integers(1, 5))):
            pieces += cut(piece(of, rng, int(rng.integers(0, 120))), int(rng.integers(3, 40)))
        watermark = None if rng.random() < 0.5 or of.spec.expiry_field is None else int(rng.integers(0, 20))
        expected = of.merge(pieces, watermark=watermark, drop_tombstones=True)
        found = live_rows(of, pieces, watermark)
        assert pa.Table.from_batches(found, of.stored).to_pylist() == expected.to_pylist(), f"seed {seed}"
        assert sum(b.num_rows for b in found) == expected.num_rows


def test_what_one_run_holds_is_not_copied() -> None:
    of = layout("upsert by hash")
    batch = of.to_stored(canonicalise(pa.record_batch(
        [[f"k{i}" for i in range(100)], list(range(100)), list(range(100))], schema=SCHEMA
    )))  # fmt: skip
    blocks = cut(of.merge([batch]), 10)
    found = live_rows(of, blocks, None)
    assert [b.column("value").buffers()[1].address for b in found] == [
        b.column("value").buffers()[1].address for b in blocks
    ]
    assert [b.num_rows for b in found] == [10] * 10


def test_only_ranges_that_a_newer_piece_touches_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    of = layout("upsert by hash")
    batch = of.to_stored(canonicalise(pa.record_batch(
        [[f"k{i}" for i in range(100)], list(range(100)), list(range(100))], schema=SCHEMA
    )))  # fmt: skip
    blocks = cut(of.merge([batch]), 10)
    changed = of.to_stored(canonicalise(pa.record_batch([["k7"], [1], [-1]], schema=SCHEMA)))
    merged: list[int] = []
    merge = TableLayout.merge

    def counting(self: TableLayout, pieces: list[pa.RecordBatch], **options: object) -> pa.RecordBatch:
        merged.append(sum(p.num_rows for p in pieces))
        return merge(self, pieces, **options)

    monkeypatch.setattr(TableLayout, "merge", counting)
    found = pa.Table.from_batches(live_rows(of, [*blocks, changed], None))
    assert len(merged) == 1
    assert merged[0] <= 21  # what was changed and the blocks beside it
    assert found.num_rows == 100
    assert -1 in found["value"].to_pylist()
