"""Rows by group and in an order of several columns, without a Python object per row.

Columns become *codes*: integers that are ordered as the values are, and equal where they are. With them numpy sorts
and compares. SQL's rules hold: NaN equals NaN and is above every number, -0.0 is 0.0, and nulls come where the term
says.

Codes are comparable within one call only: what is to be compared is put into one array first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from operators.rows import group_codes, integers_of, stable_order
from operators.windows import Int64Array

__all__ = ["Bools", "Groups", "SortTerm", "group_rows", "is_ordered", "is_sortable", "order_codes", "precedes"]

Bools: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class SortTerm:
    """One term of an ORDER BY, over a column."""

    column: str
    ascending: bool = True
    nulls_first: bool = False

    def __str__(self) -> str:
        return self.column + ("" if self.ascending else " desc") + (" nulls first" if self.nulls_first else "")


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows by group: ``order`` lists the rows, group after group; ``starts`` where in it each group begins."""

    order: Int64Array
    starts: Int64Array

    @property
    def firsts(self) -> Int64Array:
        """The first row of every group."""
        return self.order[self.starts]

    @property
    def lasts(self) -> Int64Array:
        """The last row of every group."""
        lasts: Int64Array = self.order[np.append(self.starts[1:], len(self.order)) - 1]
        return lasts

    @property
    def sizes(self) -> Int64Array:
        """The number of rows of every group."""
        sizes: Int64Array = np.diff(np.append(self.starts, len(self.order)))
        return sizes

    @property
    def ids(self) -> Int64Array:
        """For every place in ``order``: the number of its group."""
        return np.repeat(np.arange(len(self.starts)), self.sizes)


def is_sortable(kind: pa.DataType) -> bool:
    """Whether `order_codes` can tell which of two values comes first."""
    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return is_sortable(kind.value_type)
    return not (types.is_nested(kind) or types.is_interval(kind) or isinstance(kind, pa.BaseExtensionType))


def order_codes(batch: pa.RecordBatch, terms: Sequence[SortTerm]) -> list[Int64Array]:
    """The codes of an ORDER BY, most significant first; see `is_sortable` for the types."""
    return [_codes(batch.column(term.column), term) for term in terms]


def group_rows(
    columns: Sequence[pa.Array], rows: int, order: Sequence[Int64Array] = (), groups: Int64Array | None = None
) -> Groups:
    """The rows group after group; within a group by the ``order`` codes, and as they came where those agree.

    Rows are grouped by ``columns``, or by the numbers ``groups``, which are not negative.
    """
    if not rows:
        return Groups(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    if groups is None:
        codes, bound = group_codes(columns, rows)
    else:
        codes, bound = groups, int(groups.max()) + 1
    if is_ordered(order):
        by_order = np.arange(rows)
    else:
        by_order = np.lexsort(tuple(reversed(order)))
        codes = codes[by_order]
    places = stable_order(codes, bound, by_order if len(order) == 0 else np.arange(rows))
    ordered = codes[places]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    return Groups(by_order[places], starts)


def is_ordered(columns: Sequence[Int64Array]) -> bool:
    """Whether the rows already come in the order of these columns."""
    if not columns:
        return True
    first = columns[0]
    if (first[1:] < first[:-1]).any():
        return False
    tied = np.flatnonzero(first[1:] == first[:-1]) if len(columns) > 1 else first[:0]
    for column in columns[1:]:
        if (column[tied + 1] < column[tied]).any():
            return False
        tied = tied[column[tied + 1] == column[tied]]
    return True


def precedes(left: Sequence[Int64Array], right: Sequence[Int64Array]) -> Bools:
    """For every row: whether ``left`` comes strictly before ``right`` in the order of the columns."""
    before = np.zeros(len(left[0]), dtype=bool)
    equal = ~before
    for x, y in zip(left, right, strict=True):
        before |= equal & (x < y)
        equal &= x == y
    return before


def _codes(column: pa.Array, term: SortTerm) -> Int64Array:
    column = _plain(column)
    values = integers_of(column)
    if values is not None:
        return values if term.ascending else ~values
    if pa.types.is_null(column.type):
        return np.zeros(len(column), dtype=np.int64)
    direction = "ascending" if term.ascending else "descending"
    place = "at_start" if term.nulls_first else "at_end"
    ranks = pc.rank(column, sort_keys=[("", direction, place)], tiebreaker="dense")
    codes: Int64Array = ranks.to_numpy().astype(np.int64)
    return codes


def _plain(column: pa.Array) -> pa.Array:
    """Without the encodings that no kernel sorts."""
    types = pa.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    elif types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    if types.is_string_view(column.type):
        return column.cast(pa.string())
    if types.is_binary_view(column.type):
        return column.cast(pa.binary())
    return column.cast(pa.float32()) if types.is_float16(column.type) else column
