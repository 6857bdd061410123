"""Compares two outputs of the demo, row by row.

Equal means: the same rows as multisets; counts, extrema and last values exactly; means to 1e-9
relative, since floating-point sums depend on the order of merging. The percentile comes from a
t-digest, which depends on that order too once it has to join neighbours: a value that is not
the same must be within `RANK_TOLERANCE` of the true percentile, or within one row where a group is small,
measured by its rank among the values of its group. (DataFusion documents no bound. Of its 100 centroids
those at this percentile hold about 0.6 % of the values each; of 60 to 200,000 values, in one part
or in thirty, the rank was never off by more than 0.4 %.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from operators.demo.pipeline import EVENT_TIME, KEYS

__all__ = ["RANK", "RANK_TOLERANCE", "RULES", "ColumnResult", "Comparison", "compare"]

RANK_TOLERANCE = 0.01
_RELATIVE = 1e-9
_PERCENTILE = 0.95
_SHOWN = 5

EXACT = "exactly"
FLOAT = "1e-9 relative"
RANK = "exactly or rank"
RULES = {
    "flights": EXACT,
    "mean_delay": FLOAT,
    "max_delay": EXACT,
    "p95_delay": RANK,
    "aircraft": EXACT,
    "last_flight": EXACT,
}
"""How each column of the result is compared."""

_BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnResult:
    """Rows that agree exactly, rows that agree only by the rule of the column, rows that differ."""

    exact: int
    within: int
    differing: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """``columns`` is empty if the keys differ; ``differences``: the first few, as text."""

    rows_found: int
    rows_expected: int
    same_rows: bool
    columns: dict[str, ColumnResult]
    differences: Sequence[str]

    @property
    def equal(self) -> bool:
        """Whether the outputs agree."""
        return self.same_rows and not any(c.differing for c in self.columns.values())

    @property
    def by_rank(self) -> int:
        """Percentiles that differ and are as right as an approximate one can be."""
        return sum(c.within for name, c in self.columns.items() if RULES[name] == RANK)


def compare(found: pa.Table, expected: pa.Table, flights: pa.Table) -> Comparison:
    """Compare two tables of window results; ``flights`` is what they were computed from."""
    left, right = (_in_order(t) for t in (found, expected))
    rows = {"rows_found": left.num_rows, "rows_expected": right.num_rows}
    if not left.select([*KEYS, "window_end_time"]).equals(right.select([*KEYS, "window_end_time"])):
        return Comparison(**rows, same_rows=False, columns={}, differences=_other_rows(left, right))
    columns, differences = {}, []
    for name, rule in RULES.items():
        exact = _same(left[name], right[name])
        within = np.zeros_like(exact)
        if rule == FLOAT:
            within = ~exact & _close(left[name], right[name])
        elif rule == RANK and not exact.all():
            within = ~exact & _is_percentile(left, flights) & _is_percentile(right, flights)
        wrong = np.flatnonzero(~exact & ~within)
        columns[name] = ColumnResult(exact=int(exact.sum()), within=int(within.sum()), differing=len(wrong))
        for i in wrong[:_SHOWN].tolist():
            values = f"{name} is {left[name][i].as_py()!r}, expected {right[name][i].as_py()!r}"
            differences.append(f"{_key(left, i)}: {values}")
    return Comparison(**rows, same_rows=True, columns=columns, differences=differences)


def _in_order(table: pa.Table) -> pa.Table:
    """The same columns and types whatever wrote them, ordered by key."""
    times = {name: table[name].cast(pa.timestamp("ms")) for name in ("window_start_time", "window_end_time")}
    columns = {**times, **{name: table[name] for name in ("origin", "carrier", *RULES)}}
    ordered = pa.table(columns).sort_by([(name, "ascending") for name in (*KEYS, *RULES)])
    return ordered.combine_chunks()


def _other_rows(left: pa.Table, right: pa.Table) -> list[str]:
    """The first rows that are in one table and not, or less often, in the other."""
    lines = []
    for ours, theirs, what in ((left, right, "not expected"), (right, left, "missing")):
        counts = (t.group_by(list(KEYS)).aggregate([([], "count_all")]) for t in (ours, theirs))
        more, fewer = counts
        joined = more.join(fewer, list(KEYS), join_type="left outer", right_suffix="_other")
        surplus = pc.greater(joined["count_all"], pc.fill_null(joined["count_all_other"], 0))
        odd = joined.filter(surplus).sort_by([(name, "ascending") for name in KEYS])
        lines += [f"{_key(odd, i)}: {what}" for i in range(min(_SHOWN, odd.num_rows))]
        if odd.num_rows > _SHOWN:
            lines.append(f"... and {odd.num_rows - _SHOWN:,} more {what}")
    return lines


def _key(table: pa.Table, row: int) -> str:
    start, origin, carrier = (table[name][row].as_py() for name in KEYS)
    return f"{start:%Y-%m-%d %H:%M} {origin} {carrier}"


def _same(left: pa.ChunkedArray, right: pa.ChunkedArray) -> _BoolArray:
    both_null = pc.and_(pc.is_null(left), pc.is_null(right))
    same: _BoolArray = _numpy(pc.or_(both_null, pc.fill_null(pc.equal(left, right), fill_value=False)))
    return same


def _close(left: pa.ChunkedArray, right: pa.ChunkedArray) -> _BoolArray:
    a, b = (pc.fill_null(c, np.nan).to_numpy() for c in (left, right))
    close: _BoolArray = np.abs(a - b) <= _RELATIVE * np.maximum(np.abs(a), np.abs(b))
    return close


def _is_percentile(results: pa.Table, flights: pa.Table) -> _BoolArray:
    """Whether each p95_delay has about the right rank among the delays of its window and group."""
    known = flights.filter(pc.is_valid(flights["dep_delay"]))
    groups = pc.unique(_group(known))
    key = _place(known, EVENT_TIME, groups)
    order = np.argsort(key, kind="stable")
    key, delays = key[order], known["dep_delay"].to_numpy()[order]
    first = np.searchsorted(key, _place(results, "window_start_time", groups))
    sizes = np.searchsorted(key, _place(results, "window_end_time", groups)) - first
    row = np.repeat(np.arange(len(sizes)), sizes)
    inside = delays[np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes - first, sizes)]
    values = pc.fill_null(results["p95_delay"], np.nan).to_numpy()[row]
    below = np.bincount(row[inside < values], minlength=len(sizes))
    upto = np.bincount(row[inside <= values], minlength=len(sizes))
    distance = np.maximum(below - _PERCENTILE * sizes, _PERCENTILE * sizes - upto)
    right: _BoolArray = (sizes > 0) & (distance <= np.maximum(1.0, RANK_TOLERANCE * sizes))
    return right


def _group(table: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(table["origin"], table["carrier"], "/")


def _place(table: pa.Table, time: str, groups: pa.Array) -> npt.NDArray[np.int64]:
    """Group and time as one integer, so that the rows of a window and group lie together."""
    codes = pc.fill_null(pc.index_in(_group(table), value_set=groups).cast(pa.int64()), -1)
    times = table[time].cast(pa.timestamp("ms")).cast(pa.int64())
    places: npt.NDArray[np.int64] = _numpy(pc.add(pc.shift_left(codes, 44), times))
    return places


def _numpy(column: pa.ChunkedArray) -> Any:
    return column.combine_chunks().to_numpy(zero_copy_only=False)
