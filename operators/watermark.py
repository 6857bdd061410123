"""Event time of a source: what its column means, which values are bad, and the watermark.

The watermark of a source is the largest event time seen, rounded down to a millisecond, minus
``max_disorder``. It says: *from now on only events with a time of at least this are on time*, so a
window ``[s, e)`` fires as soon as the watermark reaches ``e``. It is advanced after a batch has been
processed, so rows of one batch are never late because of each other, and it never moves back.

A source may have several splits. Then each has a watermark of its own, and that of the source is the smallest
(`SplitWatermarks`); a split that has brought no rows for ``idle_timeout`` does not hold it back.

The cost per batch is one null count and a minimum and maximum over an integer view of the column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.errors import BadEventTimeError
from operators.windows import MAX_WATERMARK, Int64Array

__all__ = ["BadEventTime", "BadRows", "EventTimeColumn", "EventTimeSpec", "SplitWatermarks", "WatermarkTracker"]

_INT64_MIN = -(1 << 63)
_PER_MS = {"ms": 1, "us": 1_000, "ns": 1_000_000}
_EARLIEST_MS = -(1 << 53)
"""Times before this (285,000 years ago) are bad: pane arithmetic must not overflow."""


class BadEventTime(StrEnum):
    """What to do with a row whose event time is null or too far in the future."""

    ERROR = "error"
    DROP = "drop"
    DIVERT = "divert"


@dataclass(frozen=True, slots=True, kw_only=True)
class EventTimeSpec:
    """The event time of one source.

    ``max_disorder_ms``: how far behind the largest time seen a row may come and still be on time.
    ``future_limit_ms``: a time further than this ahead of the clock is bad, as it would close every
    window at once; None allows any time.
    ``idle_timeout_ms``: a split without rows for so long, by the wall clock, is waited for no more; None: always.
    ``max_drift_ms``: a split is held back while it is further than this ahead of the one furthest behind; None:
    never.
    """

    column: str
    max_disorder_ms: int = 0
    future_limit_ms: int | None = 86_400_000
    on_bad: BadEventTime = BadEventTime.ERROR
    idle_timeout_ms: int | None = None
    max_drift_ms: int | None = None

    def __post_init__(self) -> None:
        for name in ("idle_timeout", "max_drift"):
            if (value := getattr(self, f"{name}_ms")) is not None and value <= 0:
                raise ValueError(f"{name} ({value} ms) must be positive, or None")
        if self.max_disorder_ms < 0:
            raise ValueError(f"max_disorder ({self.max_disorder_ms} ms) must not be negative")
        if self.future_limit_ms is not None and self.future_limit_ms < 0:
            raise ValueError(f"future_limit ({self.future_limit_ms} ms) must not be negative")

    def describe(self) -> dict[str, Any]:
        """What must agree when a job is restored."""
        return {"column": self.column, "max_disorder_ms": self.max_disorder_ms, "on_bad": str(self.on_bad)}


_EVEN_ZONE = re.compile(r"(?:Etc/)?(?:UTC|GMT|Zulu)|Z|[+-]\d\d:?\d\d", re.IGNORECASE)


class EventTimeColumn:
    """One timestamp or date column as integers, ``per_ms`` of them to the millisecond.

    Raises `TypeError` when built for another type of column.
    """

    def __init__(self, schema: pa.Schema, column: str) -> None:
        self.index = schema.get_field_index(column)
        if self.index < 0:
            raise ValueError(f"event time: no column {column!r}; available: {', '.join(schema.names)}")
        kind = schema.field(self.index).type
        self.name = column
        self.zone: str | None = kind.tz if pa.types.is_timestamp(kind) else None
        self.per_ms = _PER_MS.get(kind.unit, 1) if pa.types.is_timestamp(kind) else 1
        self._view = pa.int64()
        self._times = 1
        if pa.types.is_date32(kind):
            self._view, self._times = pa.int32(), 86_400_000
        elif pa.types.is_timestamp(kind):
            self._times = 1000 if kind.unit == "s" else 1
        elif not pa.types.is_date64(kind):
            raise TypeError(f"event time column {column!r}: expected a timestamp or a date, found {kind}")

    @property
    def has_even_days(self) -> bool:
        """Whether a day has 24 hours; where clocks are changed some have not, and ``t + INTERVAL '1 day'`` heeds it."""
        return self.zone is None or _EVEN_ZONE.fullmatch(self.zone) is not None

    def values(self, batch: pa.RecordBatch) -> Int64Array:
        """The times of a batch without nulls, in ``1/per_ms`` milliseconds; a view where the type allows."""
        raw: Int64Array = batch.column(self.index).view(self._view).to_numpy(zero_copy_only=True)
        if self._times == 1:
            return raw
        return raw.astype(np.int64) * self._times

    def bounds(self, batch: pa.RecordBatch) -> tuple[int, int]:
        """The smallest and the largest time of a batch with rows and without nulls, in ``1/per_ms`` ms."""
        return self.bounds_of(batch.column(self.index))

    def bounds_of(self, column: pa.Array) -> tuple[int, int]:
        """The same for the column alone."""
        raw = column.view(self._view).to_numpy(zero_copy_only=True)
        return int(raw.min()) * self._times, int(raw.max()) * self._times

    def null_count(self, batch: pa.RecordBatch) -> int:
        """How many times are null."""
        return batch.column(self.index).null_count  # type: ignore[no-any-return]

    def bad_mask(self, batch: pa.RecordBatch, latest_ms: int | None) -> Any:
        """Arrow bool, true where the time is null, after ``latest_ms`` or too early to compute with."""
        raw = batch.column(self.index).view(self._view).cast(pa.int64())
        bad = pc.less(raw, self.raw_limit(_EARLIEST_MS))
        if latest_ms is not None:
            bad = pc.or_(bad, pc.greater(raw, self.raw_limit(latest_ms)))
        return pc.fill_null(bad, True)

    def in_bounds(self, low: int, high: int, latest_ms: int | None) -> bool:
        """Whether times between ``low`` and ``high`` are all usable."""
        if low < self.raw_limit(_EARLIEST_MS) * self._times:
            return False
        return latest_ms is None or high <= self.raw_limit(latest_ms) * self._times

    def raw_limit(self, time_ms: int) -> int:
        """A time as an integer of the column, rounded down and clamped to what the column holds."""
        return max(_INT64_MIN, min(MAX_WATERMARK, time_ms * self.per_ms // self._times))


@dataclass(frozen=True, slots=True)
class BadRows:
    """The good and the bad rows of a batch; place, value and fault of the first bad one."""

    good: pa.RecordBatch
    bad: pa.RecordBatch
    first_row: int
    value: str | None
    reason: str

    def refused(self, spec: EventTimeSpec, operator_id: str, position: object) -> BadEventTimeError | None:
        """The error to raise, if bad rows are an error; ``position`` is that after their batch."""
        if spec.on_bad is not BadEventTime.ERROR:
            return None
        return BadEventTimeError(
            operator_id,
            position=position,
            row=self.first_row,
            value=self.value,
            reason=f"column {spec.column!r} {self.reason}",
        )


class WatermarkTracker:
    """Follows the event time of one source.

    ``clock`` gives the wall-clock time in seconds since the epoch.
    """

    def __init__(self, spec: EventTimeSpec, schema: pa.Schema, clock: Callable[[], float]) -> None:
        self.spec = spec
        self.column = EventTimeColumn(schema, spec.column)
        self.watermark: int | None = None
        self._clock = clock

    def restore(self, watermark: int | None) -> None:
        """Go on from a watermark that was committed."""
        self.watermark = watermark

    def observe(self, batch: pa.RecordBatch) -> int | BadRows | None:
        """The watermark that holds once the batch has been processed, or its bad rows, if any.

        None stands for no watermark yet. Changes nothing: call `advance` after the batch.
        """
        if batch.num_rows == 0:
            return self.watermark
        column = self.column
        limit = self.spec.future_limit_ms
        latest = None if limit is None else int(self._clock() * 1000) + limit
        if column.null_count(batch):
            return self._split(batch, latest)
        low, high = column.bounds(batch)
        if not column.in_bounds(low, high, latest):
            return self._split(batch, latest)
        reached = high // column.per_ms - self.spec.max_disorder_ms
        return reached if self.watermark is None else max(reached, self.watermark)

    def advance(self, watermark: int) -> bool:
        """Move forward; False if there is nothing new."""
        if self.watermark is not None and watermark <= self.watermark:
            return False
        self.watermark = watermark
        return True

    def _split(self, batch: pa.RecordBatch, latest_ms: int | None) -> BadRows:
        mask = self.column.bad_mask(batch, latest_ms)
        first = pc.index(mask, True).as_py()
        cell = batch.column(self.column.index).slice(first, 1)
        value = _text(cell[0])
        if value is None:
            reason = "is null"
        elif latest_ms is not None and self.column.bounds_of(cell)[1] > latest_ms * self.column.per_ms:
            reason = f"is more than {self.spec.future_limit_ms} ms ahead of the clock"
        else:
            reason = "is too long ago to compute with"
        return BadRows(batch.filter(pc.invert(mask)), batch.filter(mask), first, value, reason)


class SplitWatermarks:
    """Follows the event time of a source with one or more splits.

    ``watermark`` is the smallest of the splits that are neither idle nor at their end; it never moves back.
    ``clock`` gives the wall-clock time in seconds since the epoch.
    """

    def __init__(self, spec: EventTimeSpec, schema: pa.Schema, clock: Callable[[], float]) -> None:
        self.spec = spec
        self.watermark: int | None = None
        self._schema = schema
        self._clock = clock
        self._opened = clock()
        self._trackers: dict[str, WatermarkTracker] = {}
        self._last_rows: dict[str, float] = {}

    def restore(self, watermark: int | None, splits: Mapping[str, int]) -> None:
        """Go on from what was committed."""
        self.watermark = watermark
        for split, mark in splits.items():
            self._tracker(split).restore(mark)

    @property
    def splits(self) -> Mapping[str, int]:
        """The watermark of every split that has one."""
        return {s: t.watermark for s, t in self._trackers.items() if t.watermark is not None}

    def observe(self, split: str, batch: pa.RecordBatch) -> int | BadRows | None:
        """The watermark of the split once the batch has been processed, or its bad rows; see `WatermarkTracker`."""
        return self._tracker(split).observe(batch)

    def advance(self, split: str, watermark: int | None, active: frozenset[str]) -> bool:
        """The split has brought rows and reached ``watermark``; whether the source's watermark moved.

        ``active``: the splits that may still bring rows.
        """
        self._last_rows[split] = self._clock()
        if watermark is not None:
            self._tracker(split).advance(watermark)
        return self.settle(active)

    def settle(self, active: frozenset[str]) -> bool:
        """Look again at who is idle and who has ended; whether the source's watermark moved."""
        waited_for = active - self.idle(active)
        marks = [self._tracker(split).watermark for split in waited_for]
        known = [mark for mark in marks if mark is not None]
        if not known or len(known) < len(marks):
            return False
        return self.reach(min(known))

    def reach(self, watermark: int) -> bool:
        """Move the source's watermark forward; False if there is nothing new."""
        if self.watermark is not None and watermark <= self.watermark:
            return False
        self.watermark = watermark
        return True

    def idle(self, active: frozenset[str]) -> frozenset[str]:
        """The splits that have brought no rows for the timeout."""
        if self.spec.idle_timeout_ms is None:
            return frozenset()
        before = self._clock() - self.spec.idle_timeout_ms / 1000
        return frozenset(split for split in active if self._last_rows.get(split, self._opened) <= before)

    def silent(self, active: frozenset[str]) -> frozenset[str]:
        """The splits for which event time waits although they have never brought rows, while others have."""
        without = frozenset(s for s in active - self.idle(active) if self._tracker(s).watermark is None)
        return without if len(without) < len(active) else frozenset()

    def ahead(self, active: frozenset[str]) -> frozenset[str]:
        """The splits that are too far ahead of the one furthest behind, by ``max_drift_ms``."""
        if self.spec.max_drift_ms is None or len(active) < 2:
            return frozenset()
        waited_for = active - self.idle(active)
        marks = {s: self._tracker(s).watermark for s in waited_for}
        if any(mark is None for mark in marks.values()):
            # Nobody knows yet how far behind that one is.
            return frozenset(s for s, mark in marks.items() if mark is not None)
        low = min((mark for mark in marks.values() if mark is not None), default=0)
        return frozenset(s for s, mark in marks.items() if mark is not None and mark - low > self.spec.max_drift_ms)

    def _tracker(self, split: str) -> WatermarkTracker:
        if split not in self._trackers:
            self._trackers[split] = WatermarkTracker(self.spec, self._schema, self._clock)
        return self._trackers[split]


def _text(value: pa.Scalar) -> str | None:
    """A time for a message; a number where the calendar has no such date."""
    if not value.is_valid:
        return None
    try:
        return str(value.as_py())
    except (ValueError, OverflowError):
        return f"{value.value} (as a number)"
