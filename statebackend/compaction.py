"""Which files of a table to merge, and in which pieces: pure functions of the manifest and the indexes.

Flushed files of a time-ordered table mostly expire before they are worth merging. What stays is
merged when more than ``l0_files_max`` flushed files have gathered. Sorted runs join in, newest first,
while they are not larger than twice (`_GROWTH`) what is merged, or while more than ``runs_max`` runs would
remain. So every run is more than twice as large as the one after it was when it was written:

* one key is looked for in at most ``l0_files_max`` flushed files and ``runs_max`` runs,
* a row is rewritten O(log n) times while fewer than ``runs_max`` runs are there,
* superseded rows and tombstones take less space than what is alive does: all newer runs together are
  smaller than the oldest, or it joins.

Merges that go on beside each other (``busy`` names their inputs) take different files; files of a table
that are newer than those of a merge under way may be merged meanwhile, so that a large merge keeps
nobody waiting. `merge_all` is the plan of an operator who wants the least space.

The merge itself goes through key ranges (`plan_ranges`), each of a bounded number of rows, so that
its memory does not depend on the size of the table.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt

from statebackend.manifest import Manifest, TableState
from statebackend.settings import StoreSettings
from statebackend.sstable import SSTableMeta
from statebackend.sstable_index import SSTableIndex
from statebackend.tables import TableOrder, TableSpec

__all__ = [
    "CompactionBacklog",
    "CompactionPlan",
    "KeyRange",
    "backlog",
    "merge_all",
    "plan_compaction",
    "plan_ranges",
    "plans_due",
]

_GROWTH = 2
"""How many times larger than what is merged a run may be and still join. With 1, flushes of falling
sizes would leave a run each; with more, rows are rewritten more often."""


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

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs in the storage."""
        return sum(f.size for f in self.inputs)


@dataclass(frozen=True, slots=True)
class CompactionBacklog:
    """Work that is due: tables with too many flushed files, and those files with their bytes."""

    tables: int = 0
    files: int = 0
    nbytes: int = 0


def plan_compaction(
    manifest: Manifest,
    settings: StoreSettings,
    *,
    busy: Collection[str] = (),
    skipped: Collection[str] = (),
    bytes_max: int | None = None,
) -> CompactionPlan | None:
    """The most urgent merge, or None when no table has too many flushed files.

    ``busy``: names of files that are being merged; ``skipped``: tables to leave alone; ``bytes_max``: take a
    merge of no more bytes than this.
    """
    stretches = {n: _idle_stretch(state, busy) for n, state in manifest.tables.items() if n not in skipped}
    crowded = sorted(((_flushed(stretch), name) for name, stretch in stretches.items()), reverse=True)
    for count, name in crowded:
        if count <= settings.l0_files_max:
            return None
        plan = _plan(manifest, name, settings, stretches[name])
        if bytes_max is None or plan.nbytes <= bytes_max:
            return plan
    return None


def plans_due(manifest: Manifest, settings: StoreSettings, busy: Collection[str] = ()) -> list[CompactionPlan]:
    """For every table with too many flushed files, what would be merged next; ``busy`` as in `plan_compaction`."""
    stretches = {name: _idle_stretch(state, busy) for name, state in sorted(manifest.tables.items())}
    return [
        _plan(manifest, name, settings, stretch)
        for name, stretch in stretches.items()
        if _flushed(stretch) > settings.l0_files_max
    ]


def merge_all(manifest: Manifest, table: str) -> CompactionPlan | None:
    """Everything of the table into one run, or None when it is one run already."""
    state = manifest.tables.get(table)
    if state is None or not state.files or {f.run for f in state.files} == {state.files[0].run} != {None}:
        return None
    return _merge(manifest, table, state.files, oldest=True)


def backlog(manifest: Manifest, settings: StoreSettings) -> CompactionBacklog:
    """What is due in this manifest."""
    flushed = [[f for f in state.files if f.level == 0] for state in manifest.tables.values()]
    due = [files for files in flushed if len(files) > settings.l0_files_max]
    return CompactionBacklog(len(due), sum(map(len, due)), sum(f.size for files in due for f in files))


_Segment = tuple[SSTableMeta, ...]
"""One flushed file, or the files of one sorted run, which do not overlap."""


def _plan(manifest: Manifest, table: str, settings: StoreSettings, stretch: list[_Segment]) -> CompactionPlan:
    # Up to the oldest flushed file everything is merged. A run may lie between flushed files: those older
    # than it were being merged when it was made, and that merge was given up.
    flushed = max(i for i, segment in enumerate(stretch) if segment[0].run is None) + 1
    inputs = [f for segment in reversed(stretch[:flushed]) for f in segment]
    size = sum(f.size for f in inputs)
    files = manifest.tables[table].files
    runs = len({f.run for f in files[: files.index(inputs[0])] if f.run is not None})
    for run in stretch[flushed:]:
        bytes_of_run = sum(f.size for f in run)
        if bytes_of_run > _GROWTH * size and runs < settings.runs_max:
            break
        inputs[:0] = run
        size += bytes_of_run
        runs -= 1
    return _merge(manifest, table, inputs, oldest=inputs[0] is files[0])


def _merge(manifest: Manifest, table: str, inputs: Sequence[SSTableMeta], *, oldest: bool) -> CompactionPlan:
    return CompactionPlan(
        table=table,
        timeline=manifest.timeline,
        inputs=tuple(inputs),
        watermark=manifest.tables[table].watermark,
        oldest=oldest,
    )


def _flushed(segments: Sequence[_Segment]) -> int:
    return sum(segment[0].run is None for segment in segments)


def _idle_stretch(state: TableState, busy: Collection[str]) -> list[_Segment]:
    """Neighbours that nobody is merging, newest first, from the newest such flushed file on."""
    segments = [tuple(segment) for _, segment in groupby(state.files, key=lambda f: f.run or f.name)]
    stretch: list[_Segment] = []
    for segment in reversed(segments):
        idle = not any(f.name in busy for f in segment)
        if stretch and not idle:
            break
        if idle and (stretch or segment[0].run is None):
            stretch.append(segment)
    return stretch


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


def plan_ranges(spec: TableSpec, indexes: Sequence[SSTableIndex], bytes_max: int) -> list[KeyRange]:
    """Consecutive ranges that cover everything, each of blocks of about ``bytes_max`` bytes in memory at most.

    Cut where blocks begin, as far as the indexes tell. One key cannot be cut, nor can a range that
    is smaller than a block.
    """
    starts: list[tuple[int, int]] = []
    sizes: list[int] = []
    for index in indexes:
        starts.extend(_block_starts(spec, index.entries))
        sizes.extend(index.entries["memory"].tolist())
    bounds: list[tuple[int, int]] = []
    gathered = 0
    for start, size in sorted(zip(starts, sizes, strict=True)):
        if gathered and gathered + size > bytes_max and (not bounds or start > bounds[-1]):
            bounds.append(start)
            gathered = 0
        gathered += size
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
