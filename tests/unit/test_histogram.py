"""Latencies in fixed buckets, against the sorted list of the same values."""

from __future__ import annotations

import random

import pytest

from statebackend.histogram import BOUNDS_S, Histogram, HistogramRecorder


def recorded(*seconds: float) -> Histogram:
    recorder = HistogramRecorder()
    for each in seconds:
        recorder.record(each)
    return recorder.snapshot()


def test_without_values_there_is_no_quantile() -> None:
    assert Histogram().quantile(0.5) is None
    assert Histogram().count == 0


def test_a_value_falls_into_the_bucket_whose_bound_it_does_not_exceed() -> None:
    for n, bound in enumerate(BOUNDS_S):
        assert recorded(bound).counts[n] == 1
        assert recorded(bound * 1.01).counts[n + 1] == 1
    assert recorded(0.0).counts[0] == 1


def test_what_is_above_the_last_bound_counts_as_the_last_bound() -> None:
    assert recorded(1e6).quantile(0.5) == BOUNDS_S[-1]


@pytest.mark.parametrize("q", [0.01, 0.5, 0.9, 0.99])
def test_quantiles_are_right_to_within_the_bucket(q: float) -> None:
    rng = random.Random(4)
    values = sorted(rng.lognormvariate(-4, 1.5) for _ in range(5000))
    exact = values[int(q * len(values))]
    found = recorded(*values).quantile(q)
    assert found is not None
    assert exact / 2 <= found <= exact * 2
    assert recorded(*values).sum_s == pytest.approx(sum(values))


def test_a_snapshot_does_not_change_any_more() -> None:
    recorder = HistogramRecorder()
    recorder.record(0.1)
    before = recorder.snapshot()
    recorder.record(0.1)
    assert before.count == 1
    assert recorder.snapshot().cumulative[-1] == 2
