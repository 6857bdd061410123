"""The index of an SSTable: one entry per block, with its place and the ranges of what it holds.

Its bytes are drawn in ``sstable.py``, which writes and reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from statebackend.merge import HashRange
from statebackend.tables import TableOrder, TableSpec

__all__ = ["ENTRY", "SSTableIndex"]

ENTRY = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u8"),
        ("rows", "<u8"),
        ("memory", "<u8"),
        ("checksum", "<u8"),
        ("hash_min", "<u8"),
        ("hash_max", "<u8"),
        ("time_min", "<i8"),
        ("time_max", "<i8"),
    ]
)
"""DO NOT CHANGE: files hold arrays of this. ``memory``: bytes of the decoded block."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class SSTableIndex:
    """Place and statistics of every block, as one structured array, and where the filter is, if there is one.

    The ranges are arrays of their own, since every lookup bisects them.
    """

    entries: npt.NDArray[np.void]
    filter_offset: int = 0
    filter_bytes: int = 0
    hash_min: npt.NDArray[np.uint64] = field(init=False)
    hash_max: npt.NDArray[np.uint64] = field(init=False)
    time_min: npt.NDArray[np.int64] = field(init=False)
    time_max: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("hash_min", "hash_max", "time_min", "time_max"):
            object.__setattr__(self, name, np.ascontiguousarray(self.entries[name]))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.entries.nbytes * 3 // 2

    def overlapping(self, start: int | None, end: int | None, hash_range: HashRange = (None, None)) -> list[int]:
        """Blocks that may hold times in ``[start, end)`` and hashes in ``hash_range``."""
        keep = self._in_times(start, end)
        low, high = hash_range
        if low is not None:
            keep &= self.hash_max >= low
        if high is not None and high < 1 << 64:
            keep &= self.hash_min < high
        return np.flatnonzero(keep).tolist()

    def overlapping_keys(
        self, spec: TableSpec, low: tuple[int, int] | None, high: tuple[int, int] | None, watermark: int | None
    ) -> list[int]:
        """Blocks that may hold order keys in ``[low, high)`` and rows that are not below the watermark."""
        by_time = spec.order is TableOrder.TIME
        keep = np.ones(len(self.entries), dtype=bool)
        if low is not None:
            keep &= (self.time_max if by_time else self.hash_max) >= low[0]
        if high is not None:
            keep &= (self.time_min if by_time else self.hash_min) <= high[0]
        if watermark is not None and spec.expires_by_row:
            keep &= self.time_max >= watermark
        return np.flatnonzero(keep).tolist()

    def holding(self, hashes: npt.NDArray[np.uint64], start: int | None, end: int | None) -> list[int]:
        """Blocks that may hold one of the sorted ``hashes`` with a time in ``[start, end)``."""
        first = np.searchsorted(hashes, self.hash_min, side="left")
        last = np.searchsorted(hashes, self.hash_max, side="right")
        return np.flatnonzero((last > first) & self._in_times(start, end)).tolist()

    def _in_times(self, start: int | None, end: int | None) -> npt.NDArray[np.bool_]:
        keep = np.ones(len(self.entries), dtype=bool)
        if start is not None:
            keep &= self.time_max >= start
        if end is not None:
            keep &= self.time_min < end
        return keep
