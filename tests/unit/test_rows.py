"""Vectorised helpers against plain loops."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest

from operators.rows import combined, group_codes, ranges, segmented_running_max, stable_order

NAN = float("nan")


def test_codes_are_equal_exactly_where_all_columns_are() -> None:
    columns = [
        pa.array([1.0, NAN, None, -0.0, 0.0, NAN, 1.0]),
        pa.array(["a", "b", None, "c", "c", "b", "x"]).dictionary_encode(),
    ]
    codes, bound = group_codes(columns, 7)
    same = [[bool(a == b) for b in codes] for a in codes]
    pairs = {(i, j) for i in range(7) for j in range(7) if same[i][j] and i < j}
    assert pairs == {(1, 5), (3, 4)}
    assert int(codes.max()) < bound


def test_without_columns_there_is_one_group() -> None:
    codes, bound = group_codes([], 3)
    assert codes.tolist() == [0, 0, 0]
    assert bound == 1


def test_many_columns_do_not_overflow() -> None:
    rng = np.random.default_rng(1)
    columns = [pa.array(rng.integers(0, 1000, 500)) for _ in range(12)]
    codes, bound = group_codes([*columns, *columns], 500)
    assert len(set(codes.tolist())) == len({tuple(c[i].as_py() for c in columns) for i in range(500)})
    assert 0 <= int(codes.min()) <= int(codes.max()) < bound


@pytest.mark.parametrize("bound", [1, 2, 300, 70_000, 1 << 40])
@pytest.mark.parametrize("disorder", [0, 5, 10**12])
def test_rows_are_ordered_by_code_then_value_then_place(bound: int, disorder: int) -> None:
    rng = np.random.default_rng(bound % 97)
    codes = rng.integers(0, bound, 400)
    values = np.arange(400) // 3 - 60 + rng.integers(0, disorder + 1, 400)
    expected = sorted(range(400), key=lambda i: (codes[i], values[i], i))
    assert stable_order(codes, bound, values).tolist() == expected
    assert stable_order(codes[:0], bound, values[:0]).tolist() == []


def test_ranges_and_running_maxima_by_loops() -> None:
    rng = random.Random(0)
    starts = [rng.randrange(50) for _ in range(20)]
    counts = [rng.randrange(4) for _ in range(20)]
    expected = [s + i for s, n in zip(starts, counts, strict=True) for i in range(n)]
    assert ranges(np.array(starts), np.array(counts)).tolist() == expected
    segments = np.sort(np.array([rng.randrange(6) for _ in range(80)]))
    values = np.array([rng.randrange(-40, 40) for _ in range(80)])
    reached = [max(values[j] for j in range(i + 1) if segments[j] == segments[i]) for i in range(80)]
    assert segmented_running_max(segments, values).tolist() == reached


def test_no_batches_are_an_empty_batch() -> None:
    schema = pa.schema([("a", pa.int64())])
    assert combined([], schema).num_rows == 0
    one = pa.record_batch({"a": [1]})
    assert combined([one], schema) is one
    assert combined([one, one], schema)["a"].to_pylist() == [1, 1]
