"""Event time columns of every type, bad values, and how the watermark moves."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from operators.watermark import BadRows, EventTimeColumn, EventTimeSpec, WatermarkTracker

NOW = datetime(2024, 5, 1, tzinfo=UTC)


def batch_of(values: list[Any], kind: pa.DataType) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(values, kind)], names=["t"])


def tracker(kind: pa.DataType, **settings: Any) -> WatermarkTracker:
    spec = EventTimeSpec(column="t", **settings)
    return WatermarkTracker(spec, pa.schema([("t", kind)]), lambda: NOW.timestamp())


KINDS = [
    *(pa.timestamp(unit, zone) for unit in ("s", "ms", "us", "ns") for zone in (None, "UTC", "America/New_York")),
    pa.date32(),
    pa.date64(),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_time_type_gives_the_same_milliseconds(kind: pa.DataType) -> None:
    times = [date(1969, 12, 31), date(2013, 1, 1), date(2013, 1, 2)]
    expected = [-86_400_000, 1_356_998_400_000, 1_357_084_800_000]
    batch = batch_of(times, pa.date32()).columns[0].cast(pa.timestamp("ms")).cast(pa.int64())
    assert batch.to_pylist() == expected
    if pa.types.is_timestamp(kind):
        per_s = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}[kind.unit]
        array = pa.array([e // 1000 * per_s for e in expected]).view(kind)
    else:
        array = pa.array(times, kind)
    rows = pa.RecordBatch.from_arrays([array], names=["t"])
    column = EventTimeColumn(rows.schema, "t")
    assert (column.values(rows) // column.per_ms).tolist() == expected
    low, high = column.bounds(rows)
    assert (low // column.per_ms, high // column.per_ms) == (expected[0], expected[-1])
    assert tracker(kind, max_disorder_ms=5).observe(rows) == expected[-1] - 5


@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.time64("us"), pa.float64()], ids=str)
def test_a_column_that_is_no_time_is_refused_by_name(kind: pa.DataType) -> None:
    with pytest.raises(TypeError, match=r"'t'.*expected a timestamp"):
        EventTimeColumn(pa.schema([("t", kind)]), "t")
    with pytest.raises(ValueError, match=r"'u'.*available: t"):
        EventTimeColumn(pa.schema([("t", kind)]), "u")


def test_the_watermark_is_the_latest_time_rounded_down_minus_the_disorder_and_never_moves_back() -> None:
    follow = tracker(pa.timestamp("us"), max_disorder_ms=10)
    assert follow.observe(batch_of([], pa.timestamp("us"))) is None
    first = follow.observe(batch_of([100_999, 5], pa.timestamp("us")))
    assert first == 90
    assert follow.advance(90)
    assert follow.observe(batch_of([50_000], pa.timestamp("us"))) == 90
    assert not follow.advance(90)
    assert not follow.advance(80)
    assert follow.watermark == 90
    before_epoch = tracker(pa.timestamp("us"))
    assert before_epoch.observe(batch_of([-1], pa.timestamp("us"))) == -1


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_null_and_far_future_times_are_told_apart_from_good_ones(kind: pa.DataType) -> None:
    good = NOW.date() - timedelta(days=1)
    far = NOW.date() + timedelta(days=3)
    values: list[Any] = [good, None, far, good]
    array = pa.array(values, pa.date32())
    if pa.types.is_timestamp(kind):
        array = array.cast(pa.timestamp("s")).cast(pa.timestamp(kind.unit)).view(kind)
    else:
        array = array.cast(kind)
    batch = pa.RecordBatch.from_arrays([array, pa.array([0, 1, 2, 3])], names=["t", "n"])
    follow = WatermarkTracker(EventTimeSpec(column="t"), batch.schema, lambda: NOW.timestamp())
    found = follow.observe(batch)
    assert isinstance(found, BadRows)
    assert found.good["n"].to_pylist() == [0, 3]
    assert found.bad["n"].to_pylist() == [1, 2]
    assert (found.first_row, found.value, found.reason) == (1, None, "is null")
    found = follow.observe(batch.slice(2))
    assert isinstance(found, BadRows)
    assert found.first_row == 0
    assert "ahead of the clock" in found.reason
    assert found.value is not None
    assert "2024-05-0" in found.value
    assert not isinstance(follow.observe(batch.slice(3)), BadRows)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_that_overflow_are_bad_and_never_wrap_around(unit: str) -> None:
    kind = pa.timestamp(unit)
    for raw in ((1 << 63) - 1, -(1 << 63)):
        found = tracker(kind, future_limit_ms=86_400_000).observe(
            pa.RecordBatch.from_arrays([pa.array([raw]).view(kind)], names=["t"])
        )
        # Nanoseconds cannot reach 285,000 years back, so their smallest value can be computed with.
        assert isinstance(found, BadRows) or (unit == "ns" and raw < 0)


def test_the_limit_on_future_times_can_be_moved_or_lifted() -> None:
    far = batch_of([NOW.replace(tzinfo=None) + timedelta(days=400)], pa.timestamp("us"))
    assert isinstance(tracker(pa.timestamp("us")).observe(far), BadRows)
    assert isinstance(tracker(pa.timestamp("us"), future_limit_ms=401 * 86_400_000).observe(far), int)
    assert isinstance(tracker(pa.timestamp("us"), future_limit_ms=None).observe(far), int)


@pytest.mark.parametrize("settings", [{"max_disorder_ms": -1}, {"future_limit_ms": -1}])
def test_negative_limits_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        EventTimeSpec(column="t", **settings)
