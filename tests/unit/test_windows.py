"""Pane arithmetic against plain enumeration of windows."""

from __future__ import annotations

import random
from datetime import timedelta

import numpy as np
import pytest

from operators.windows import MAX_WATERMARK, CumulateSpec, WindowSpec, milliseconds

SHAPES = [(10, 10), (10, 4), (10, 3), (7, 7), (12, 4), (9, 2), (3, 5), (1, 1), (1, 6), (5, 1), (100, 37)]


def windows_holding(time: int, length: int, slide: int) -> list[int]:
    """By enumeration, sharing nothing with the code."""
    nearby = range(-5 * (length + slide), 5 * (length + slide))
    candidates = [(time // slide + i) * slide for i in nearby]
    return [start for start in candidates if start <= time < start + length]


@pytest.mark.parametrize(("length", "slide"), SHAPES)
def test_a_time_lies_in_the_windows_of_its_pane_and_in_no_other(length: int, slide: int) -> None:
    spec = WindowSpec(length=length, slide=slide)
    for time in range(-3 * (length + slide), 3 * (length + slide)):
        expected = windows_holding(time, length, slide)
        pane = spec.pane_of(time)
        if pane is None:
            assert expected == []
            assert spec.has_gaps
        else:
            assert list(spec.windows_of(pane)) == expected
            assert pane <= time
            assert spec.first_end(pane) == expected[0] + length


@pytest.mark.parametrize(("length", "slide"), SHAPES)
@pytest.mark.parametrize("per_ms", [1, 1000])
def test_the_vectorised_panes_are_those_of_single_times(length: int, slide: int, per_ms: int) -> None:
    spec = WindowSpec(length=length, slide=slide)
    rng = np.random.default_rng(length * 100 + slide)
    times = rng.integers(-200 * per_ms, 200 * per_ms, 500)
    inside = spec.inside(times, per_ms)
    expected = [spec.pane_of(int(t) // per_ms) for t in times]
    assert inside.tolist() == [p is not None for p in expected]
    assert spec.pane_starts(times[inside], per_ms).tolist() == [p for p in expected if p is not None]


@pytest.mark.parametrize(("length", "slide"), SHAPES)
def test_between_two_watermarks_fire_the_windows_that_end_there_and_hold_a_live_pane(length: int, slide: int) -> None:
    spec = WindowSpec(length=length, slide=slide)
    rng = random.Random(length * 31 + slide)
    for _ in range(60):
        times = [rng.randrange(-200, 200) for _ in range(rng.randrange(8))]
        panes = {p for p in map(spec.pane_of, times) if p is not None}
        after, upto = sorted(rng.randrange(-300, 300) for _ in range(2))
        windows = {w for t in times for w in windows_holding(t, length, slide)}
        assert spec.firing(panes, after, upto) == sorted(w for w in windows if after < w + length <= upto)
        assert spec.firing(panes, None, upto) == sorted(w for w in windows if w + length <= upto)
        for time, pane in ((t, spec.pane_of(t)) for t in times):
            later = [w + length for w in windows_holding(time, length, slide) if w + length > after]
            if pane is not None:
                assert spec.next_end(pane, after) == min(later, default=None)


@pytest.mark.parametrize(("length", "slide"), SHAPES)
@pytest.mark.parametrize("lateness", [0, 1, 13])
def test_a_time_is_late_once_all_its_windows_are_closed(length: int, slide: int, lateness: int) -> None:
    spec = WindowSpec(length=length, slide=slide, allowed_lateness=lateness)
    for watermark in range(-60, 60, 7):
        closed, fired = spec.closed_before(watermark), spec.fired_before(watermark)
        for time in range(-150, 150):
            ends = [w + length for w in windows_holding(time, length, slide)]
            if ends:
                assert (time < closed) == all(end + lateness <= watermark for end in ends)
                if any(end <= watermark for end in ends):
                    assert time < fired


def test_a_far_jump_of_the_watermark_costs_no_more_than_the_live_panes() -> None:
    spec = WindowSpec(length=1000, slide=1000)
    assert spec.firing([0, 5_000], None, MAX_WATERMARK) == [0, 5_000]
    assert spec.firing([0], 0, 10**15) == [0]


def test_two_panes_a_slide_are_enough_whatever_the_common_divisor() -> None:
    spec = WindowSpec(length=3_600_001, slide=60_000)
    starts = spec.pane_starts(np.arange(0, 600_000, 1, dtype=np.int64))
    assert len(np.unique(starts)) == 20


def test_durations_are_timedeltas_or_whole_milliseconds() -> None:
    assert milliseconds(timedelta(hours=1), "length") == 3_600_000
    assert milliseconds(250, "length") == 250
    with pytest.raises(ValueError, match="length"):
        milliseconds(timedelta(microseconds=1), "length")
    for wrong in (1.5, "1s", True, None):
        with pytest.raises(TypeError, match="length"):
            milliseconds(wrong, "length")  # type: ignore[arg-type]


@pytest.mark.parametrize(("length", "slide", "lateness"), [(0, 1, 0), (1, 0, 0), (-1, 1, 0), (1, 1, -1)])
def test_wrong_lengths_are_refused(length: int, slide: int, lateness: int) -> None:
    with pytest.raises(ValueError, match="window"):
        WindowSpec(length=length, slide=slide, allowed_lateness=lateness)


@pytest.mark.parametrize(("step", "length"), [(5, 20), (3, 3), (1, 7), (10, 40)])
@pytest.mark.parametrize("lateness", [0, 4])
def test_cumulate_windows_by_enumeration(step: int, length: int, lateness: int) -> None:
    spec = CumulateSpec(length=length, step=step, allowed_lateness=lateness)
    rng = random.Random(step * 100 + length)

    def ends_of(time: int) -> list[int]:
        base = time // length * length
        return [e for e in range(base + step, base + length + 1, step) if time < e]

    times = np.arange(-2 * length, 2 * length)
    assert spec.pane_starts(times).tolist() == [t - t % step for t in times.tolist()]
    assert spec.pane_starts(times * 1000 + 999, 1000).tolist() == spec.pane_starts(times).tolist()
    for _ in range(60):
        rows = [rng.randrange(-3 * length, 3 * length) for _ in range(rng.randrange(6))]
        panes = {t - t % step for t in rows}
        after, upto = sorted(rng.randrange(-4 * length, 4 * length) for _ in range(2))
        windows = {e for t in rows for e in ends_of(t)}
        assert spec.firing(panes, after, upto) == sorted(e for e in windows if after < e <= upto)
        assert spec.firing(panes, None, upto) == sorted(e for e in windows if e <= upto)
        for time in rows:
            pane = time - time % step
            assert spec.next_end(pane, after) == min((e for e in ends_of(time) if e > after), default=None)
            assert (time < spec.closed_before(upto)) == all(e + lateness <= upto for e in ends_of(time))
            if any(e <= upto for e in ends_of(time)):
                assert time < spec.fired_before(upto)
    starts, ends = spec.bounds(np.asarray(sorted({e for t in times.tolist() for e in ends_of(t)})))
    assert all(s % length == 0 and s < e <= s + length for s, e in zip(starts.tolist(), ends.tolist(), strict=True))


def test_a_cumulate_window_is_a_whole_number_of_steps() -> None:
    with pytest.raises(ValueError, match="multiple of step"):
        CumulateSpec(length=10, step=4)
    with pytest.raises(ValueError, match="positive"):
        CumulateSpec(length=10, step=0)
    with pytest.raises(ValueError, match="allowed_lateness"):
        CumulateSpec(length=10, step=5, allowed_lateness=-1)
