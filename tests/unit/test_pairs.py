"""Which rows of two batches belong together: the kernels of the joins against plain loops."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from operators.pairs import distinct_keys, key_codes, matching_ranges, pairs_of, take_or_null, take_rows, time_span

SPANS = {"close": 20, "so far apart that code and time do not fit into one integer": 1 << 60}


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("bounds", ["both", "low", "high", "none", "no times"])
@pytest.mark.parametrize("seed", range(3))
def test_ranges_are_the_rows_of_the_same_code_within_the_bounds(span: str, bounds: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 60))
    codes, times = rng.integers(0, 6, count), rng.integers(-SPANS[span], SPANS[span], count)
    order = np.lexsort((times, codes))
    codes, times = codes[order], times[order]
    wanted = rng.integers(-1, 9, 50)
    middle = rng.integers(-SPANS[span], SPANS[span], 50)
    width = rng.integers(-2, SPANS[span], 50)
    low = middle - width if bounds in ("both", "low") else None
    high = middle + width if bounds in ("both", "high") else None
    first, counts = matching_ranges(wanted, low, high, codes, None if bounds == "no times" else times)
    for i, code in enumerate(wanted):
        expected = [
            j
            for j in range(count)
            if code >= 0
            and codes[j] == code
            and (low is None or times[j] >= low[i])
            and (high is None or times[j] <= high[i])
        ]
        assert list(range(first[i], first[i] + counts[i])) == expected


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_pairs_spell_the_ranges_out_in_order_and_in_bounded_pieces(at_once: int) -> None:
    first, counts = np.array([5, 0, 2, 9, 0]), np.array([2, 0, 4, 1, 0])
    pieces = list(pairs_of(first, counts, at_once))
    found = [(int(a), int(b)) for here, there in pieces for a, b in zip(here, there, strict=True)]
    assert found == [(0, 5), (0, 6), (2, 2), (2, 3), (2, 4), (2, 5), (3, 9)]
    assert all(len(here) <= max(at_once, 4) for here, _ in pieces)
    assert not list(pairs_of(first[:0], counts[:0], at_once))


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["b", "a"]])
def test_distinct_keys_number_the_rows_without_nulls(names: list[str]) -> None:
    rng = np.random.default_rng(4)
    batch = pa.record_batch(
        {
            "a": pa.array(rng.integers(0, 4, 50), mask=rng.random(50) < 0.2),
            "b": pa.array([["x", "y", None, "z"][i] for i in rng.integers(0, 4, 50)]),
        }
    ).select(names)
    codes, keys = distinct_keys(batch)
    rows = [tuple(row.values()) for row in batch.to_pylist()]
    numbered = [tuple(row.values()) for row in keys.to_pylist()]
    assert len(set(numbered)) == len(numbered)
    for code, row in zip(codes, rows, strict=True):
        assert (numbered[code] == row) if None not in row else code == -1


def test_key_codes_of_many_columns_stay_small_enough() -> None:
    rng = np.random.default_rng(5)
    columns = [pa.array(rng.permutation(2000)) for _ in range(4)]
    codes = key_codes([*columns, pa.array([None] + [1] * 1999)], 2000)
    assert codes.max() < 1 << 31
    assert codes[0] == -1
    assert len(set(codes.tolist())) == 2000


def test_taking_all_rows_copies_nothing_and_no_row_is_a_row_of_nulls() -> None:
    batch = pa.record_batch({"a": [1, 2, 3]})
    assert take_rows(batch, np.arange(3)) is batch
    assert take_or_null(batch, np.array([2, -1])).column("a").to_pylist() == [3, None]
    assert take_or_null(batch.slice(0, 0), np.array([-1])).column("a").to_pylist() == [None]


def test_a_span_of_times_has_no_end_where_int64_has_none_left() -> None:
    most = (1 << 63) - 1
    assert time_span(np.array([3, 1]), np.array([5, 9])) == (1, 10)
    assert time_span(None, np.array([5, most])) == (None, None)
    assert time_span(np.array([-most - 1]), None) == (-most - 1, None)
