"""Which files of a table to merge, and in which pieces: pure functions of the manifest and the indexes.

Flushed files of a time-ordered table mostly expire before they are worth merging. What stays is
merged when more than ``l0_files_max`` flushed files have gathered; sorted runs that are not larger
than what is merged join in, so that runs grow geometrically: at most ``l0_files_max`` flushed files
and O(log n) runs are read for one key, and a row is rewritten O(log n) times.

The merge itself goes through key ranges (`plan_ranges`), each of a bounded number of rows, so that
its memory does not depend on the size of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt

from statebackend.manifest import Manifest, TableState
from statebackend.settings import StoreSettings
from statebackend.sstable import SSTableIndex, SSTableMeta
from statebackend.tables import TableOrder, TableSpec

__all__ = ["CompactionPlan", "KeyRange", "plan_compaction", "plan_ranges"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactionPlan:
    """Merge ``inputs``, contiguous and oldest first, into one run of ``table``.

    ``oldest`` tells that nothing older remains, so that tombstones may go.
    """

    table: str
    timeline: int
    inputs: tuple[SSTableMeta, ...]
    watermark: int | None
    oldest: bool


def plan_compaction(manifest: Manifest, settings: StoreSettings) -> CompactionPlan | None:
    """The most urgent merge, or None when no table has too many flushed files."""
    crowded = [(sum(f.level == 0 for f in s.files), name) for name, s in manifest.tables.items()]
    count, name = max(crowded, default=(0, ""))
    if count <= settings.l0_files_max:
        return None
    state = manifest.tables[name]
    inputs = [f for f in state.files if f.level == 0]
    size = sum(f.size for f in inputs)
    older = _runs(state)
    while older and sum(f.size for f in older[-1]) <= size:
        run = older.pop()
        size += sum(f.size for f in run)
        inputs[:0] = run
    return CompactionPlan(
        table=name,
        timeline=manifest.timeline,
        inputs=tuple(inputs),
        watermark=state.watermark,
        oldest=not older,
    )


def _runs(state: TableState) -> list[list[SSTableMeta]]:
    """Sorted runs, oldest first; the files of one run do not overlap."""
    return [list(files) for run, files in groupby(state.files, key=lambda f: f.run) if run is not None]


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Rows with ``low <= (first order column, second) < high``; None: unbounded."""

    low: tuple[int, int] | None
    high: tuple[int, int] | None

    def select(self, columns: Sequence[npt.NDArray[np.generic]]) -> slice:
        """The rows of a sorted piece that lie in the range, given its order columns."""
        rows = len(columns[0])
        return slice(
            0 if self.low is None else _position(columns, self.low),
            rows if self.high is None else _position(columns, self.high),
        )


def plan_ranges(spec: TableSpec, indexes: Sequence[SSTableIndex], rows_max: int) -> list[KeyRange]:
    """Consecutive ranges that cover everything, each of about ``rows_max`` rows at most.

    Cut where blocks begin, as far as the indexes tell. One key cannot be cut, nor can a range that
    is smaller than a block.
    """
    starts: list[tuple[int, int]] = []
    rows: list[int] = []
    for index in indexes:
        starts.extend(_block_starts(spec, index.entries))
        rows.extend(int(n) for n in index.entries["rows"])
    bounds: list[tuple[int, int]] = []
    gathered = 0
    for start, count in sorted(zip(starts, rows, strict=True)):
        if gathered and gathered + count > rows_max and (not bounds or start > bounds[-1]):
            bounds.append(start)
            gathered = 0
        gathered += count
    edges = [None, *bounds, None]
    return [KeyRange(low, high) for low, high in pairwise(edges)]


def _block_starts(spec: TableSpec, entries: npt.NDArray[np.void]) -> list[tuple[int, int]]:
    """A key at or before the first row of each block; where the block begins, if the index tells."""
    if spec.time_field is None:
        return [(int(e["hash_min"]), 0) for e in entries]
    if spec.order is TableOrder.HASH:
        return [
            (int(e["hash_min"]), int(e["time_min"]) if e["hash_min"] == e["hash_max"] else _LOWEST) for e in entries
        ]
    return [(int(e["time_min"]), int(e["hash_min"]) if e["time_min"] == e["time_max"] else 0) for e in entries]


_LOWEST = -(1 << 63)


def _position(columns: Sequence[npt.NDArray[np.generic]], key: tuple[int, int]) -> int:
    """First row that is not below the key in the lexicographic order of the columns."""
    first = columns[0]
    low = int(np.searchsorted(first, first.dtype.type(key[0]), side="left"))
    if len(columns) == 1:
        return low
    high = int(np.searchsorted(first, first.dtype.type(key[0]), side="right"))
    return low + int(np.searchsorted(columns[1][low:high], columns[1].dtype.type(key[1]), side="left"))
