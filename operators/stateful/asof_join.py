"""Join of a stream with the versions of a table: every left row with the version that was valid at its event time.

The right stream is the table's history: a row says what holds for its key from its event time on. A left row waits
until the watermark of both sides has passed its time; then the newest version at or before it is known for good, and
it comes out, in the order of event time.

Invariants:

* A left row comes out once, when the watermark passes its time; rows behind the watermark are late.
* A version goes when a newer one is at or before the watermark, since no left row to come is older; that is looked
  for when as many rows were written as remained the last time, so it costs a constant share of the writes, and once
  after a restore. Which versions are still stored never shows in the output.
* Of versions of one key and time the last one written is valid. A version behind the watermark counts for left rows
  that are still to come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from operators.graph import Port, StateNote
from operators.pairs import distinct_keys, key_codes, matching_ranges, take_or_null, time_span
from operators.rows import combined, stable_order
from operators.runtime import BaseOperator, BuildContext, Output
from operators.stateful.join_parts import JoinHow, JoinOutput, JoinSide, TimeDistance
from operators.windows import MAX_WATERMARK, Int64Array
from statebackend import TableKind, TableOrder

__all__ = ["AsofJoin", "AsofJoinNode"]

_PRUNE_ROWS_MIN = 1 << 18
"""Fewer new versions than this are not looked through for those that are not needed any more: a pass that finds
little costs as much as one that finds much (with 64k, a third of the job's time)."""
_PRUNE_ROWS_AT_ONCE = 1 << 20
_HASHES = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AsofJoinNode:
    """An as-of join. Output 1: left rows that came too late.

    ``distance``: left minus right event time, from 0 to the tolerance.
    """

    operator_id: str
    inputs: tuple[Port, Port]
    how: JoinHow
    left: JoinSide
    right: JoinSide
    distance: TimeDistance
    output: JoinOutput

    @property
    def output_names(self) -> tuple[str, ...]:
        """The joined rows, and left rows that came too late."""
        return ("", "late_left")

    @property
    def label(self) -> str:
        """For `explain`."""
        pairs = " and ".join(f"{a} = {b}" for a, b in zip(self.left.keys, self.right.keys, strict=True))
        reach = self.distance.reach(1)
        near = "" if reach is None else f", at most {reach} ms older"
        return f"{self.how} as-of join {self.operator_id}: {pairs}, newest {self.right.time} <= {self.left.time}{near}"

    @property
    def state(self) -> tuple[StateNote, ...]:
        """Left rows that wait for the watermark, and versions."""
        reach = self.distance.reach(1)
        versions = "one version per key and those since the watermark"
        if reach is not None:
            versions = f"of the last {reach} ms of event time: {versions}"
        return (
            StateNote(f"{self.operator_id}:left", "the rows that the watermark has not passed", bounded=True),
            StateNote(f"{self.operator_id}:right", versions, bounded=reach is not None),
        )

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        return {
            "operator": "asof_join",
            "how": str(self.how),
            "left": list(self.left.keys),
            "right": list(self.right.keys),
            "event_times": [self.left.time, self.right.time],
            "tolerance_ms": self.distance.reach(1),
        }

    def build(self, context: BuildContext) -> AsofJoin:
        """The operator, restored."""
        return AsofJoin(self, context)


class AsofJoin(BaseOperator):
    """The operator."""

    def __init__(self, node: AsofJoinNode, context: BuildContext) -> None:
        super().__init__(node.operator_id)
        # Constant after construction.
        self._how = node.how
        self._left, self._right = node.left, node.right
        self._distance = node.distance
        self._columns = node.output
        self._schema = node.output.schema
        left = node.left.table_spec(f"{node.operator_id}:left", TableOrder.TIME)
        right = node.right.table_spec(f"{node.operator_id}:right", TableOrder.HASH, TableKind.UPSERT)
        self._waiting = context.backend.table(left)
        self._versions = context.backend.table(right)
        self.late = Output()
        # State beside the tables: progress, and when to look for versions that are not needed any more.
        self._watermark = context.watermark(node.operator_id)
        self._written = 0
        self._remained: int | None = 0 if context.job is None else None  # None: not known since the restore

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The joined rows, and left rows that came too late."""
        return (self.output, self.late)

    @property
    def watermark(self) -> int | None:
        """The watermark up to which left rows have come out."""
        return self._watermark

    def process(self, batch: pa.RecordBatch, index: int, /) -> None:
        """Store left rows until the watermark passes them, and versions until newer ones replace them."""
        side = self._right if index else self._left
        if index == 0 and (late := side.late(batch, self._watermark)) is not None:
            self.late.emit(batch.filter(pa.array(late)))
            batch = batch.filter(pa.array(~late))
        rows = side.rows(batch)
        hopeless = side.unmatchable(rows)
        if hopeless is not None:
            if index == 0 and self._how.left_alone:
                self._emit(self._columns.left_alone(rows.filter(pa.array(hopeless))))
            rows = rows.filter(pa.array(~hopeless))
        if rows.num_rows:
            (self._versions if index else self._waiting).write(side.to_state(rows))
            self._written += rows.num_rows if index else 0

    def on_watermark(self, watermark: int) -> None:
        """Answer the left rows that it has passed, then drop versions that no row to come can ask for."""
        if self._watermark is None or watermark > self._watermark:
            self._watermark = watermark
            limit = min(watermark * self._left.per_ms, MAX_WATERMARK)
            for state in self._waiting.scan(time_range=(None, limit)):
                self._answer(state)
            self._waiting.expire(limit)
            bound = self._distance.dead_before(watermark, 1, self._right.per_ms)
            if bound is not None:
                self._versions.expire(bound)
            if self._remained is None or self._written >= max(_PRUNE_ROWS_MIN, self._remained):
                self._prune(min(watermark * self._right.per_ms, MAX_WATERMARK - 1))
        if watermark == MAX_WATERMARK:
            self.late.advance(watermark)
        self.output.advance(watermark)

    def _answer(self, state: pa.RecordBatch) -> None:
        times = self._left.state_times(state)
        rows = self._left.from_state(state)
        codes, keys = distinct_keys(self._left.keys_of(rows, self._right.key_columns))
        low, high = self._distance.partners(times, 0, self._left.per_ms, self._right.per_ms)
        found = self._versions.matches(keys, time_span(low, high))
        versions = self._right.state_times(found.batch)
        first, counts = matching_ranges(codes, low, high, found.key_index.to_numpy(), versions)
        newest: Int64Array = np.where(counts > 0, first + counts - 1, -1)
        if not self._how.left_alone:
            kept = newest >= 0
            rows, newest = rows.filter(pa.array(kept)), newest[kept]
        self._emit(self._columns.pairs(rows, take_or_null(self._right.from_state(found.batch), newest)))

    def _prune(self, upto: int) -> None:
        """Delete every version for which there is a newer one at or before ``upto``, some keys at a time."""
        parts = 16 if self._remained is None else 1 + (self._remained + self._written) // _PRUNE_ROWS_AT_ONCE
        bounds = [part * _HASHES // parts for part in range(parts + 1)]
        self._remained = sum(self._prune_keys(upto, part) for part in pairwise(bounds))
        self._written = 0

    def _prune_keys(self, upto: int, hashes: tuple[int, int]) -> int:
        """The same for the keys of these hashes; how many versions remain."""
        key = list(self._versions.spec.key)
        schema = pa.schema([self._versions.spec.schema.field(name) for name in key])
        batch = combined(self._versions.scan(columns=key, hash_range=hashes), schema)
        times = self._right.state_times(batch)
        codes = key_codes([batch.column(name) for name in self._right.key_columns], batch.num_rows)
        order = stable_order(codes, int(codes.max(initial=0)) + 1, times)
        following = order[1:]
        dead = order[:-1][(codes[following] == codes[order[:-1]]) & (times[following] <= upto)]
        if len(dead):
            self._versions.delete(batch.take(pa.array(dead)))
        return int(batch.num_rows - len(dead))

    def _emit(self, columns: list[pa.Array]) -> None:
        self.output.emit(pa.RecordBatch.from_arrays(columns, schema=self._schema))
