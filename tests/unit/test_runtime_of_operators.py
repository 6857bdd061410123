"""Event time at an operator with several inputs, and the order in which sources are polled."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from operators.job import _round
from operators.runtime import BaseOperator, Edge, Inputs, Output


class Recorder(BaseOperator):
    """Remembers what it is told."""

    def __init__(self) -> None:
        super().__init__("recorder")
        self.seen: list[object] = []

    def process(self, batch: pa.RecordBatch, index: int, /) -> None:
        self.seen.append((index, batch.num_rows))

    def announce(self, watermark: int) -> None:
        self.seen.append(f"announced {watermark}")

    def on_watermark(self, watermark: int) -> None:
        self.seen.append(watermark)


def joined(count: int) -> tuple[Recorder, list[Output]]:
    operator = Recorder()
    inputs = Inputs(operator, count)
    return operator, [Output(targets=[Edge(inputs, index)]) for index in range(count)]


def test_an_operator_is_told_which_input_a_batch_comes_from() -> None:
    operator, (left, right) = joined(2)
    right.emit(pa.record_batch({"a": [1, 2]}))
    left.emit(pa.record_batch({"a": [1]}))
    assert operator.seen == [(1, 2), (0, 1)]
    assert operator.rows_in == 3


def test_event_time_is_that_of_the_input_furthest_behind() -> None:
    operator, (left, right) = joined(2)
    left.advance(100)
    assert operator.seen == []
    right.advance(10)
    right.advance(20)
    left.advance(200)
    right.advance(300)
    assert operator.seen == [10, 20, 200]


def test_a_watermark_is_announced_only_if_it_will_come() -> None:
    operator, (left, right) = joined(2)
    left.announce(100)
    left.advance(100)
    right.announce(50)
    right.advance(50)
    left.announce(120)
    left.advance(120)
    assert operator.seen == ["announced 50", 50]


def test_a_watermark_that_comes_again_after_a_restore_changes_nothing() -> None:
    operator, (only,) = joined(1)
    only.advance(5)
    only.advance(5)
    assert operator.seen == [5]


def test_an_idle_input_does_not_hold_event_time_back_until_it_moves_again() -> None:
    operator, (left, right) = joined(2)
    left.advance(100)
    right.idle()
    assert operator.seen == [100]
    left.advance(150)
    right.advance(120)
    left.advance(200)
    right.advance(180)
    assert operator.seen == [100, 150, 180]


def test_an_operator_is_idle_when_all_its_inputs_are() -> None:
    operator, (left, right) = joined(2)
    below = Recorder()
    operator.output.targets.append(Edge(Inputs(below, 1), 0))
    told = []
    below.on_idle = lambda: told.append("idle")  # type: ignore[method-assign]
    left.idle()
    assert told == []
    right.idle()
    assert told == ["idle"]


@dataclass
class Driver:
    timed: bool
    watermark: int | None = None
    waiting: bool = False
    max_drift_ms: int | None = None


def test_the_source_furthest_behind_in_event_time_is_polled_next() -> None:
    a, b, c, untimed = Driver(True, 5), Driver(True, 3), Driver(True, None), Driver(False)
    assert _round([a, b, c, untimed]) == [c, untimed]  # type: ignore[arg-type,comparison-overlap]
    c.watermark = 3
    assert _round([a, b, c, untimed]) == [b, untimed]  # type: ignore[arg-type,comparison-overlap]
    assert _round([untimed, Driver(False)]) == [untimed, Driver(False)]  # type: ignore[arg-type,comparison-overlap]


def test_a_source_that_has_nothing_does_not_keep_the_others_waiting_but_they_stay_near() -> None:
    slow, fast = Driver(True, 5, waiting=True), Driver(True, 100)
    assert _round([slow, fast]) == [slow, fast]  # type: ignore[arg-type,comparison-overlap]
    fast.max_drift_ms = 50
    assert _round([slow, fast]) == [slow]  # type: ignore[arg-type,comparison-overlap]
    slow.watermark = 60
    assert _round([slow, fast]) == [slow, fast]  # type: ignore[arg-type,comparison-overlap]
