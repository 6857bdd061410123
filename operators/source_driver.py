"""Drives one source: polls, checks what comes, follows event time, and pushes both downstream."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa

from operators.errors import SchemaError
from operators.graph import SourceNode
from operators.runtime import BuildContext, Output
from operators.sources.base import IDLE, Idle, Position, SourceBatch, SplitSource, TrackedSource
from operators.watermark import BadRows, SplitWatermarks
from operators.windows import MAX_WATERMARK

__all__ = ["SourceDriver"]

logger = logging.getLogger(__name__)

_SILENCE_S = 30.0
_WHOLE = frozenset([""])
"""The splits of a source without splits."""


class SourceDriver:
    """One source of a running job.

    ``waiting``: whether the source had nothing when it was polled last.
    """

    def __init__(self, node: SourceNode, context: BuildContext) -> None:
        self.operator_id = node.operator_id
        self.source = node.source
        self._limit = node.limit
        # Asked once: a check against a protocol is slow.
        self._splits = node.source if isinstance(node.source, SplitSource) else None
        self._tracked = node.source if isinstance(node.source, TrackedSource) else None
        self.output = Output()
        self.bad = Output()
        self.dead_letters = Output()
        self.rows_in = 0
        self.waiting = False
        self.position: Any = None if context.job is None else context.job.sources.get(node.operator_id)
        self._clock = context.clock
        self._tell_at = context.clock() + _SILENCE_S
        self._schema = node.schema
        self._cursor = context.cursor
        self._time = None if node.event_time is None else SplitWatermarks(node.event_time, node.schema, context.clock)
        if self._time is not None and context.job is not None:
            prefix = f"{node.operator_id}/"
            found = context.job.watermarks
            splits = {name.removeprefix(prefix): mark for name, mark in found.items() if name.startswith(prefix)}
            merged = found.get(node.operator_id)
            if not splits and merged is not None:
                splits = {"": merged}
            self._time.restore(merged, splits)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The rows, those with a bad event time, and records that could not be decoded."""
        return (self.output, self.bad, self.dead_letters)

    @property
    def watermark(self) -> int | None:
        """How far event time has come."""
        return None if self._time is None else self._time.watermark

    @property
    def timed(self) -> bool:
        """Whether the source has event time."""
        return self._time is not None

    @property
    def max_drift_ms(self) -> int | None:
        """How far it may be ahead of the source furthest behind."""
        return None if self._time is None else self._time.spec.max_drift_ms

    def watermarks(self) -> Mapping[str, int]:
        """What to commit: the watermark, and those of the splits, under the operator id and ``id/split``."""
        if self._time is None:
            return {}
        marks = {} if self._time.watermark is None else {self.operator_id: self._time.watermark}
        if self._splits is not None:
            marks.update({f"{self.operator_id}/{split}": mark for split, mark in self._time.splits.items()})
        return marks

    def open(self) -> None:
        """Seek to the restored position, and announce the restored watermark."""
        self.source.open(self.position)
        if self.watermark is not None:
            self.output.advance(self.watermark)
        self._hold_back()

    def poll(self) -> SourceBatch | Literal[Idle.IDLE] | None:
        """What the source has, unless it rests because it gave enough rows lately."""
        if self._limit is not None and not self._limit.ready():
            return IDLE
        return self.source.poll()

    def push(self, item: SourceBatch | Literal[Idle.IDLE] | None) -> bool:
        """Push what the source gave; False at the end of the input, after the final watermark.

        Raises `BadEventTimeError` and `SchemaError` for input that cannot be used.
        """
        self.waiting = item is IDLE
        if item is None:
            self._finish()
            return False
        if item is IDLE:
            self._settle()
            return True
        batch = item.batch
        cursor = self._cursor
        cursor.source, cursor.position, cursor.batches = self.operator_id, item.position, cursor.batches + 1
        self.rows_in += batch.num_rows
        if self._limit is not None:
            self._limit.took(batch.num_rows)
        if batch.schema is not self._schema and batch.schema != self._schema:
            raise SchemaError(f"{cursor}: expected columns\n{self._schema}\nfound\n{batch.schema}")
        if item.dead_letters is not None:
            self.dead_letters.emit(item.dead_letters)
        self._push(item.split, batch)
        self.position = item.position
        return True

    def committed(self, position: Position) -> None:
        """A checkpoint with this position is committed."""
        if self._tracked is not None:
            self._tracked.committed(position)

    def advance_to(self, watermark: int) -> None:
        """Event time reaches ``watermark`` although no row tells so."""
        if self._time is None:
            raise ValueError(f"{self.operator_id}: the source has no event time")
        if self._time.reach(watermark):
            self._announce()

    def _push(self, split: str, batch: pa.RecordBatch) -> None:
        if self._time is None:
            self.output.emit(batch)
            return
        watermark = self._time.observe(split, batch)
        if isinstance(watermark, BadRows):
            batch = self._set_aside(watermark)
            watermark = self._time.observe(split, batch)
            assert not isinstance(watermark, BadRows)
        self.output.emit(batch)
        if self._time.advance(split, watermark, self._active()):
            self._announce()
        self._hold_back()

    def _set_aside(self, found: BadRows) -> pa.RecordBatch:
        assert self._time is not None
        if (error := found.refused(self._time.spec, self.operator_id, self._cursor.position)) is not None:
            raise error
        self.bad.emit(found.bad)
        return found.good

    def _settle(self) -> None:
        """Nothing came: some splits may have become idle, or all of them."""
        if self._time is None:
            return
        active = self._active()
        if self._time.settle(active):
            self._announce()
        if active == self._time.idle(active):
            self.output.idle()
        self._hold_back()

    def _finish(self) -> None:
        """Nothing more will come: event time ends, for streams without it too."""
        if self._time is None:
            self.output.advance(MAX_WATERMARK)
        elif self._time.reach(MAX_WATERMARK):
            self._announce()
        self.bad.advance(MAX_WATERMARK)
        self.dead_letters.advance(MAX_WATERMARK)

    def _announce(self) -> None:
        assert self.watermark is not None
        self.output.announce(self.watermark)
        self.output.advance(self.watermark)

    def _active(self) -> frozenset[str]:
        return _WHOLE if self._splits is None else self._splits.splits

    def _hold_back(self) -> None:
        if self._time is not None and self._splits is not None:
            self._splits.pause(self._time.ahead(self._active()))
            if self._clock() >= self._tell_at:
                self._tell_of_silence(self._time)

    def _tell_of_silence(self, time: SplitWatermarks) -> None:
        """Say once why no window closes."""
        self._tell_at = math.inf
        if silent := time.silent(self._active()):
            logger.warning(
                "%s: event time waits for %d of %d splits, which have brought no rows yet (%s, ...); with "
                "idle_timeout= it does not wait for such any longer than that",
                self.operator_id, len(silent), len(self._active()), min(silent),
            )  # fmt: skip
