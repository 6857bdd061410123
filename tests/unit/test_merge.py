"""The merge rules, also where keys collide."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from statebackend.keys import Hasher, canonicalise
from statebackend.merge import TableLayout
from statebackend.tables import TableKind, TableOrder, TableSpec

SCHEMA = pa.schema([("key", pa.string()), ("at", pa.int64()), ("value", pa.int64())])


def layout(kind: TableKind, order: TableOrder = TableOrder.HASH, bits: int = 64, *, timed: bool = True) -> TableLayout:
    spec = TableSpec(
        name="t",
        schema=SCHEMA,
        key=("key", "at") if timed else ("key",),
        kind=kind,
        order=order,
        time_field="at" if timed else None,
    )
    return TableLayout.of(spec, Hasher(bits), {})


def piece(
    of: TableLayout, rows: list[tuple[str | None, int | None, int | None]], *, tombstone: bool = False
) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True)) if rows else [[], [], []]
    return of.to_stored(canonicalise(pa.record_batch(columns, schema=SCHEMA)), tombstone=tombstone)


def rows_of(batch: pa.RecordBatch) -> list[tuple[str | None, int, int | None]]:
    return [(r["key"], r["at"], r["value"]) for r in batch.to_pylist()]


@pytest.mark.parametrize("bits", [0, 2, 64])
@pytest.mark.parametrize("order", [TableOrder.HASH, TableOrder.TIME])
def test_the_last_write_of_a_key_wins_whatever_collides(bits: int, order: TableOrder) -> None:
    of = layout(TableKind.UPSERT, order, bits)
    rng = random.Random(bits)
    expected: dict[tuple[str | None, int], int | None] = {}
    pieces = []
    for _ in range(20):
        rows = [(rng.choice(["a", "b", "", None, "ü" * 20]), rng.randrange(3), rng.randrange(1000)) for _ in range(7)]
        pieces.append(piece(of, rows))
        expected.update({(k, t): v for k, t, v in rows})
    merged = of.merge(pieces)
    assert {(k, t): v for k, t, v in rows_of(merged)} == expected
    assert merged.num_rows == len(expected)


@pytest.mark.parametrize("bits", [0, 64])
def test_a_tombstone_hides_older_rows_and_stays_until_nothing_older_exists(bits: int) -> None:
    of = layout(TableKind.UPSERT, bits=bits)
    pieces = [piece(of, [("a", 1, 1), ("b", 1, 2)]), piece(of, [("a", 1, None)], tombstone=True)]
    assert sorted(of.merge(pieces).column("__tombstone").to_pylist()) == [False, True]
    assert rows_of(of.merge(pieces, drop_tombstones=True)) == [("b", 1, 2)]
    again = [*pieces, piece(of, [("a", 1, 9)])]
    assert sorted(rows_of(of.merge(again, drop_tombstones=True))) == [("a", 1, 9), ("b", 1, 2)]


@pytest.mark.parametrize("bits", [0, 1, 64])
def test_an_append_table_keeps_every_row_in_write_order_within_a_key(bits: int) -> None:
    of = layout(TableKind.APPEND, bits=bits, timed=False)
    rng = random.Random(1)
    pieces, written = [], {}
    for i in range(30):
        rows = [(rng.choice("abc"), 0, 10 * i + j) for j in range(3)]
        pieces.append(piece(of, rows))
        for key, _, value in rows:
            written.setdefault(key, []).append(value)
    merged = rows_of(of.merge(pieces))
    for key, values in written.items():
        assert [v for k, _, v in merged if k == key] == values


def test_rows_below_the_watermark_never_remain() -> None:
    of = layout(TableKind.APPEND, TableOrder.TIME)
    merged = of.merge([piece(of, [("a", 1, 1), ("a", 5, 2)]), piece(of, [("b", -3, 3), ("b", 7, 4)])], watermark=5)
    assert rows_of(merged) == [("a", 5, 2), ("b", 7, 4)]


def test_an_expired_winner_hides_older_rows_until_nothing_older_exists() -> None:
    spec = TableSpec(name="t", schema=SCHEMA, key=("key",), kind=TableKind.UPSERT, ttl_field="at")
    of = TableLayout.of(spec, Hasher(), {})
    pieces = [piece(of, [("a", 9, 1), ("b", 1, 1), ("c", 9, 1)]), piece(of, [("a", 1, 2), ("b", 9, 2)])]
    merged = of.merge([*pieces, piece(of, [("c", None, None)], tombstone=True)], watermark=5)
    by_key = {r["key"]: (r["at"], r["value"], r["__tombstone"]) for r in merged.to_pylist()}
    assert by_key == {"a": (None, None, True), "b": (9, 2, False), "c": (None, None, True)}
    assert of.merge([merged], watermark=5).equals(merged)
    assert sorted(rows_of(of.merge(pieces, watermark=5, drop_tombstones=True))) == [("b", 9, 2), ("c", 9, 1)]
    assert of.time_range(merged) == (9, 9)
    assert of.time_max(merged) is None


def test_merging_sorts_by_time_first_or_by_hash_first() -> None:
    rows = [("c", 2, 0), ("a", 1, 0), ("b", 2, 0), ("a", 3, 0)]
    by_time = layout(TableKind.UPSERT, TableOrder.TIME)
    assert [t for _, t, _ in rows_of(by_time.merge([piece(by_time, rows)]))] == [1, 2, 2, 3]
    by_hash = layout(TableKind.UPSERT, TableOrder.HASH)
    hashes = by_hash.merge([piece(by_hash, rows)]).column("__hash").to_pylist()
    assert hashes == sorted(hashes)


def test_merging_in_any_grouping_gives_the_same_rows() -> None:
    of = layout(TableKind.UPSERT, bits=3)
    rng = random.Random(2)
    pieces = [piece(of, [(rng.choice("abcdefgh"), 0, rng.randrange(99)) for _ in range(5)]) for _ in range(9)]
    at_once = of.merge(pieces)
    in_steps = of.merge([of.merge(pieces[:4]), of.merge([of.merge(pieces[4:7]), *pieces[7:]])])
    assert sorted(rows_of(at_once)) == sorted(rows_of(in_steps))
