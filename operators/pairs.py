"""Which rows of two batches belong together, found by sorting and bisecting, without Python per row.

Rows are pairs of positions in two batches. To find those that match, the rows of one side are sorted by (key, time);
`matching_ranges` bisects them for every row of the other side at once, `pairs_of` spells the ranges out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from operators.rows import group_codes, ranges
from operators.windows import Int64Array

__all__ = [
    "Bools",
    "distinct_keys",
    "key_codes",
    "matching_ranges",
    "null_columns",
    "pairs_of",
    "take_or_null",
    "take_rows",
    "time_span",
]

Bools = npt.NDArray[np.bool_]

_CODES_MAX = 1 << 31
_COMPOSITE_MAX = 1 << 62
_INT64_END = 1 << 63


def take_rows(batch: pa.RecordBatch, rows: Int64Array) -> pa.RecordBatch:
    """These rows in this order; the batch itself if that is all of it as it is."""
    if len(rows) == batch.num_rows and (not len(rows) or bool((rows == np.arange(len(rows))).all())):
        return batch
    return batch.take(pa.array(rows))


def take_or_null(batch: pa.RecordBatch, rows: Int64Array) -> pa.RecordBatch:
    """These rows in this order; a row of nulls for -1."""
    missing = rows < 0
    if not missing.any():
        return take_rows(batch, rows)
    if not batch.num_rows:
        return null_columns(batch.schema, len(rows))
    return batch.take(pa.array(rows, mask=missing))


def null_columns(schema: pa.Schema, rows: int) -> pa.RecordBatch:
    """So many rows of nulls."""
    nullable = pa.schema([field.with_nullable(True) for field in schema])
    return pa.RecordBatch.from_arrays([pa.nulls(rows, field.type) for field in schema], schema=nullable)


def key_codes(columns: Sequence[pa.Array], rows: int) -> Int64Array:
    """A number per row, equal exactly where all columns are equal; -1 where one is null. Without columns all are 0."""
    codes, bound = group_codes(columns, rows)
    if bound > _CODES_MAX:
        _, codes = np.unique(codes, return_inverse=True)
    for column in columns:
        if column.null_count:
            codes = np.where(column.is_null().to_numpy(zero_copy_only=False), -1, codes)
    return codes


def distinct_keys(keys: pa.RecordBatch) -> tuple[Int64Array, pa.RecordBatch]:
    """The number of its key for every row, -1 where a column is null; and the keys, by number."""
    if keys.num_columns == 1:
        encoded = keys.column(0).dictionary_encode()
        codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        return codes, pa.RecordBatch.from_arrays([encoded.dictionary], schema=keys.schema)
    distinct, first, codes = np.unique(key_codes(keys.columns, keys.num_rows), return_index=True, return_inverse=True)
    if len(distinct) and distinct[0] == -1:
        first, codes = first[1:], codes - 1
    return codes, keys.take(pa.array(first))


def matching_ranges(
    codes: Int64Array,
    low: Int64Array | None,
    high: Int64Array | None,
    sorted_codes: Int64Array,
    sorted_times: Int64Array | None,
) -> tuple[Int64Array, Int64Array]:
    """For every row: the first of the sorted rows that match it, and how many there are.

    The sorted rows are ordered by (code, time). Row i matches those of its code with ``low[i] <= time <= high[i]``;
    None is no bound. A row of code -1 matches nothing.
    """
    if sorted_times is None or not len(sorted_times) or (low is None and high is None):
        first = np.searchsorted(sorted_codes, codes)
        last = np.searchsorted(sorted_codes, codes, side="right")
    else:
        places, width, low, high = _time_places(sorted_times, low, high, int(sorted_codes[-1]) + 1)
        composite = sorted_codes * width + places
        # Codes beyond those of the sorted rows need not be told apart; they must not overflow.
        known = np.minimum(codes, sorted_codes[-1] + 1)
        first = np.searchsorted(composite, known * width + (0 if low is None else low))
        last = np.searchsorted(composite, known * width + (width - 1 if high is None else high), side="right")
    counts = np.where(codes < 0, 0, np.maximum(last - first, 0))
    return first.astype(np.int64), counts.astype(np.int64)


def _time_places(
    times: Int64Array, low: Int64Array | None, high: Int64Array | None, codes: int
) -> tuple[Int64Array, int, Int64Array | None, Int64Array | None]:
    """Times and bounds as numbers from 0 to below a width, in the same order, small enough to be put behind a code.

    Places of times are 1 to width - 2, so that a bound before or after all of them has a place of its own.
    """
    least, width = int(times.min()), int(times.max()) - int(times.min()) + 3
    if width * (codes + 2) < _COMPOSITE_MAX:
        most = least + width - 3
        places = times - (least - 1)
        if low is not None:
            low = np.where(low > most, width - 1, np.maximum(low, least) - (least - 1))
        if high is not None:
            high = np.where(high < least, 0, np.minimum(high, most) - (least - 1))
        return places, width, low, high
    ranks = np.unique(times)
    places = np.searchsorted(ranks, times) + 1
    if low is not None:
        low = np.searchsorted(ranks, low) + 1
    if high is not None:
        high = np.searchsorted(ranks, high, side="right")
    return places, len(ranks) + 2, low, high


def time_span(low: Int64Array | None, high: Int64Array | None) -> tuple[int | None, int | None]:
    """The times from the least of ``low`` up to, and without, the one after the greatest of ``high``."""
    start = None if low is None else int(low.min())
    end = None if high is None else int(high.max()) + 1
    return start, None if end == _INT64_END else end


def pairs_of(first: Int64Array, counts: Int64Array, at_once: int) -> Iterator[tuple[Int64Array, Int64Array]]:
    """The pairs (row, sorted row) of all ranges, in order, at most about ``at_once`` of them in one go."""
    total = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = int(total[start - 1]) if start else 0
        if before == int(total[-1]):
            return
        end = max(start + 1, int(np.searchsorted(total, before + at_once, side="right")))
        some = counts[start:end]
        yield np.repeat(np.arange(start, end), some), ranges(first[start:end], some)
        start = end
