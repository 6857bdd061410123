"""Join of two streams whose rows match if their keys are equal and their event times are near each other.

A batch of one side is matched with the stored rows of the other as soon as it is there, then stored itself:
so every pair is found once, by the later of its rows. The rows of the other side with the keys of the batch come out
of its table sorted by (key, time); for each row of the batch a bisection gives those near enough.

Without a bound on the distance of event times this is the regular join of two streams: nothing is late and nothing
is ever dropped. With one bound, the rows of one side are dropped.

Invariants:

* Rows behind the watermark are late and join nothing, so what is dropped by the watermark is missed by nobody.
* A row without a partner comes out once: when it can have none (a null in its key, or the watermark is already
  too far), or when the watermark passes its last possible partner.
* The watermark that is handed on lags as far behind as a row can wait whose event time the result has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from operators.graph import Port, StateNote
from operators.pairs import Bools, distinct_keys, matching_ranges, pairs_of, take_rows, time_span
from operators.runtime import BaseOperator, BuildContext, Cursor, Output, user_error
from operators.stateful.join_parts import JoinHow, JoinOutput, JoinSide, PairFilter, TimeDistance
from operators.stateful.join_state import StoredSide
from operators.windows import MAX_WATERMARK, Int64Array

__all__ = ["IntervalJoin", "IntervalJoinNode"]

_PAIRS_AT_ONCE = 1 << 16
"""Pairs that are filtered and emitted in one go: bounds the memory that a frequent key takes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntervalJoinNode:
    """An interval join. Outputs 1 and 2: rows of the left and of the right that came too late.

    ``holdback``: how many milliseconds the event time of the result may lie behind the watermark; None: the result
    has no event time.
    """

    operator_id: str
    inputs: tuple[Port, Port]
    how: JoinHow
    left: JoinSide
    right: JoinSide
    distance: TimeDistance
    output: JoinOutput
    holdback: int | None
    pair_filter: PairFilter | None

    @property
    def output_names(self) -> tuple[str, ...]:
        """The joined rows, and those of either side that came too late."""
        return ("", "late_left", "late_right")

    @property
    def label(self) -> str:
        """For `explain`."""
        pairs = " and ".join(f"{a} = {b}" for a, b in zip(self.left.keys, self.right.keys, strict=True)) or "true"
        near = "" if self.left.time is None else f", {self._interval}"
        where = f" and {self._filter_text}" if self._filter_text else ""
        return f"{self.how} join {self.operator_id}: {pairs}{near}{where}"

    @property
    def state(self) -> tuple[StateNote, ...]:
        """The rows of both sides that wait for partners, and which of them have met one."""
        notes = []
        for index, side in enumerate((self.left, self.right)):
            reach = self.distance.reach(index)
            growth = "every row" if reach is None else f"the rows of the last {reach} ms of event time"
            table = f"{self.operator_id}:{side.name}"
            notes.append(StateNote(table, growth, bounded=reach is not None))
            if side.numbered:
                notes.append(StateNote(f"{table}_met", "a number for each of them with a partner", reach is not None))
        return tuple(notes)

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        return {
            "operator": "interval_join",
            "how": str(self.how),
            "left": list(self.left.keys),
            "right": list(self.right.keys),
            "event_times": [self.left.time, self.right.time],
            "distance": [self.distance.lower, self.distance.upper, self.distance.per_ms],
            "filter": self._filter_text,
        }

    def build(self, context: BuildContext) -> IntervalJoin:
        """The operator, restored."""
        return IntervalJoin(self, context)

    @property
    def _filter_text(self) -> str | None:
        return None if self.pair_filter is None else self.pair_filter.text

    @property
    def _interval(self) -> str:
        low, high = (self._shown(bound) for bound in (self.distance.lower, self.distance.upper))
        return f"{self.left.time} - {self.right.time} from {low} to {high}"

    def _shown(self, bound: int | None) -> str:
        """A bound for people, in milliseconds if it is a whole number of them."""
        if bound is None:
            return "any"
        per_ms = self.distance.per_ms
        if bound % per_ms == 0:
            return f"{bound // per_ms} ms"
        unit = {1_000: "us", 1_000_000: "ns"}[per_ms]
        return f"{bound} {unit}"


class _Input:
    """One side at work: what is stored of it, and what becomes of its rows."""

    def __init__(self, node: IntervalJoinNode, index: int, context: BuildContext, watermark: int | None) -> None:
        self.side = (node.left, node.right)[index]
        self.index = index
        self.late = Output()
        self.alone = node.how.left_alone if index == 0 else node.how.right_alone
        self.once = node.how is JoinHow.SEMI and index == 0
        self.leaves = self.once or (node.how is JoinHow.ANTI and index == 0)  # a row with a partner needs no other
        reach = node.distance.reach(index)
        self.stored = StoredSide(
            self.side,
            context.backend,
            f"{node.operator_id}:{self.side.name}",
            reach=None if reach is None else reach * self.side.per_ms,
            decided=None if watermark is None else self.dead_before(node.distance, watermark),
        )

    def dead_before(self, distance: TimeDistance, watermark: int) -> int | None:
        """Stored rows below this match no row to come; None: all may."""
        if self.side.time is None:
            return None
        return distance.dead_before(watermark, self.index, self.side.per_ms)


class IntervalJoin(BaseOperator):
    """The operator."""

    def __init__(self, node: IntervalJoinNode, context: BuildContext) -> None:
        super().__init__(node.operator_id)
        # Constant after construction.
        self._how = node.how
        self._distance = node.distance
        self._columns = node.output
        self._schema = node.output.schema
        self._filter = node.pair_filter
        self._cursor: Cursor = context.cursor
        self._timed = node.left.time is not None
        self._holdback = node.holdback
        # State beside the tables.
        self._watermark = context.watermark(node.operator_id)
        self._inputs = tuple(_Input(node, index, context, self._watermark) for index in (0, 1))

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The joined rows, and those of either side that came too late."""
        return (self.output, self._inputs[0].late, self._inputs[1].late)

    @property
    def watermark(self) -> int | None:
        """The watermark up to which rows without a partner have come out."""
        return self._watermark

    # -- batches

    def process(self, batch: pa.RecordBatch, index: int, /) -> None:
        """Match the rows with the stored ones of the other side, and store them."""
        mine, other = self._inputs[index], self._inputs[1 - index]
        batch = self._on_time(mine, batch)
        if batch.num_rows == 0:
            return
        rows = mine.side.rows(batch)
        times = mine.side.times(rows) if self._timed else None
        met = self._match(mine, other, rows, times)
        self._keep(mine, rows, times, met)

    def _on_time(self, mine: _Input, batch: pa.RecordBatch) -> pa.RecordBatch:
        late = mine.side.late(batch, self._watermark)
        if late is None:
            return batch
        mine.late.emit(batch.filter(pa.array(late)))
        return batch.filter(pa.array(~late))

    def _match(self, mine: _Input, other: _Input, rows: pa.RecordBatch, times: Int64Array | None) -> Bools:
        """Find and emit the pairs; returns which rows met a partner."""
        met: Bools = np.zeros(rows.num_rows, dtype=bool)
        codes, keys = distinct_keys(mine.side.keys_of(rows, other.side.key_columns))
        if not keys.num_rows:
            return met
        low = high = None
        if times is not None:
            low, high = self._distance.partners(times, mine.index, mine.side.per_ms, other.side.per_ms)
        found = other.stored.table.matches(keys, time_span(low, high))
        if not found.batch.num_rows:
            return met
        found_times = other.side.state_times(found.batch) if times is not None else None
        first, counts = matching_ranges(codes, low, high, found.key_index.to_numpy(), found_times)
        if mine.leaves and self._filter is None:
            return counts > 0
        partners = other.side.from_state(found.batch)
        for here, there in pairs_of(first, counts, _PAIRS_AT_ONCE):
            here, there = self._filtered(mine.index, rows, here, partners, there)
            if not len(here):
                continue
            met[here] = True
            if other.stored.flags is not None:
                state = found.batch
                fresh = other.stored.flags.mark(other.stored.numbers(state)[there], other.stored.times(state)[there])
                if other.once:
                    self._emit(self._columns.left_alone(take_rows(partners, there[fresh])))
            if self._how.pairs:
                pair = take_rows(rows, here), take_rows(partners, there)
                self._emit(self._columns.pairs(*(pair if mine.index == 0 else pair[::-1])))
        return met

    def _filtered(
        self, index: int, rows: pa.RecordBatch, here: Int64Array, partners: pa.RecordBatch, there: Int64Array
    ) -> tuple[Int64Array, Int64Array]:
        if self._filter is None:
            return here, there
        sides = (rows, here, partners, there) if index == 0 else (partners, there, rows, here)
        try:
            held = self._filter.holding(*sides)
        except Exception as error:
            raise user_error(self.operator_id, self._cursor, error) from error
        return here[held], there[held]

    def _keep(self, mine: _Input, rows: pa.RecordBatch, times: Int64Array | None, met: Bools) -> None:
        """Store what may still meet a partner, and emit what is decided now."""
        if mine.once and met.any():
            self._emit(self._columns.left_alone(rows.filter(pa.array(met))))
        hopeless = mine.side.unmatchable(rows)
        if self._watermark is not None and times is not None:
            bound = mine.dead_before(self._distance, self._watermark)
            if bound is not None and int(times.min()) < bound:
                dead = times < bound
                hopeless = dead if hopeless is None else hopeless | dead
        if hopeless is not None and mine.alone:
            self._emit_alone(mine, rows.filter(pa.array(hopeless & ~met)))
        leaving = met if mine.leaves and met.any() else None
        if hopeless is not None:
            leaving = hopeless if leaving is None else leaving | hopeless
        if leaving is None:
            mine.stored.write(rows, times, met)
        elif not leaving.all():
            kept = ~leaving
            mine.stored.write(rows.filter(pa.array(kept)), None if times is None else times[kept], met[kept])

    # -- event time

    def on_watermark(self, watermark: int) -> None:
        """Emit rows whose last possible partner has been passed, and drop what can match no more."""
        if self._watermark is None or watermark > self._watermark:
            self._watermark = watermark
            for mine in self._inputs:
                bound = mine.dead_before(self._distance, watermark)
                if bound is None:
                    continue
                if mine.alone:
                    complete = min(watermark * mine.side.per_ms, MAX_WATERMARK)
                    self._emit_alone(mine, mine.stored.due(bound, complete))
                mine.stored.expire(bound)
        if watermark == MAX_WATERMARK:
            for output in self.outputs:
                output.advance(watermark)
        elif self._holdback is not None:
            self.output.advance(watermark - self._holdback)

    def drain(self) -> None:
        """Nothing is held back; let dead rows go, so that the checkpoint does not write them."""
        if self._watermark is not None:
            for mine in self._inputs:
                bound = mine.dead_before(self._distance, self._watermark)
                if bound is not None:
                    mine.stored.expire(bound, now=True)

    # -- output

    def _emit_alone(self, mine: _Input, rows: pa.RecordBatch) -> None:
        if rows.num_rows:
            alone = self._columns.left_alone if mine.index == 0 else self._columns.right_alone
            self._emit(alone(rows))

    def _emit(self, columns: list[pa.Array]) -> None:
        self.output.emit(pa.RecordBatch.from_arrays(columns, schema=self._schema))
