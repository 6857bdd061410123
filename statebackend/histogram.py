"""Latencies in fixed buckets: recording costs one bisection, and histograms of several stores can be added up.

Bucket bounds double from half a millisecond to half a minute, so a quantile is right to within a factor of
two anywhere, and better inside a bucket, where values are taken to be spread evenly.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

__all__ = ["BOUNDS_S", "Histogram", "HistogramRecorder"]

BOUNDS_S: tuple[float, ...] = tuple(0.0005 * 2.0**n for n in range(17))
"""Upper bounds of the buckets in seconds, inclusive; one more bucket takes what is above the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How often a duration fell into each bucket of `BOUNDS_S`, and the sum of all durations in seconds."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)
    sum_s: float = 0.0

    @property
    def count(self) -> int:
        """Number of durations."""
        return sum(self.counts)

    @property
    def cumulative(self) -> tuple[int, ...]:
        """Number of durations at or below each bound, then of all."""
        return tuple(accumulate(self.counts))

    def quantile(self, q: float) -> float | None:
        """The duration in seconds that a share ``q`` of all does not exceed, or None without any.

        Linear inside the bucket where it lies, as Prometheus' ``histogram_quantile``; beyond the last bound
        the answer is the last bound.
        """
        if not self.count:
            return None
        rank, below = q * self.count, 0
        for n, bound in enumerate(BOUNDS_S):
            if self.counts[n] and below + self.counts[n] >= rank:
                lower = BOUNDS_S[n - 1] if n else 0.0
                return lower + (bound - lower) * (rank - below) / self.counts[n]
            below += self.counts[n]
        return BOUNDS_S[-1]


class HistogramRecorder:
    """Collects durations; written by one thread, read from any."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0

    def record(self, seconds: float) -> None:
        """Add one duration."""
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self._sum_s += seconds

    def snapshot(self) -> Histogram:
        """The counts up to now; the value does not change any more."""
        return Histogram(counts=tuple(self._counts), sum_s=self._sum_s)
