"""Which windows a time belongs to: pure arithmetic on integers, no state, no clock.

Windows are ``[start, start + length)`` with ``start`` a multiple of ``slide`` counted from the
epoch (floor division, so times before 1970 need no special case). A *pane* is a piece of time that
every window holds completely or not at all, so a window is a merge of panes and a row is aggregated
once however many windows it falls into. Window starts lie at multiples of ``slide`` and window ends
at multiples of ``slide`` plus ``length % slide``, so two panes a slide are enough for any pair::

    length 10, slide 4   windows  [0 ........ 10)  [4 ........ 14)  [8 ....
                         panes    |0 |2 |4 |6 |8 |10 ...             ends lie at 2 (mod 4)

    length 2, slide 5    windows  [0 2)    [5 7)                     panes = windows, gaps between

A cumulate window grows by a ``step`` until it has its full ``length``, then begins anew; its panes are the
steps, and what identifies a window is its end::

    length 6, step 2     windows  [0 2) [0 4) [0 6)  [6 8) [6 10) ...
                         panes    |0 |2 |4 |6 |8 |10 ...

Several kinds of windows over the same rows (`WindowSet`) share their panes, which are as long as all lengths and
slides can be divided by; what identifies a window tells its kind too.

Invariants:

* Every time lies in exactly one pane, and in no pane if ``slide > length`` leaves it in a gap.
* `Windows.firing` costs as much as there are live panes, however far the watermark jumps.

A watermark W says: from now on only times ``>= W`` are on time. Window ``[s, e)`` fires when
``W >= e`` and is closed when ``W >= e + allowed_lateness``. All times are epoch milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from math import gcd
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "MAX_WATERMARK",
    "CumulateSpec",
    "Duration",
    "Int64Array",
    "WindowSet",
    "WindowSpec",
    "Windows",
    "milliseconds",
]

Int64Array: TypeAlias = npt.NDArray[np.int64]
Duration: TypeAlias = timedelta | int
"""A length of time: a timedelta, or an integer number of milliseconds."""

MAX_WATERMARK = (1 << 63) - 1
"""The watermark after the end of a bounded input: nothing more will come."""


def milliseconds(duration: Duration, what: str) -> int:
    """The duration in whole milliseconds; ``what`` names it in the error.

    Raises `TypeError` for another type and `ValueError` for a fraction of a millisecond.
    """
    if isinstance(duration, timedelta):
        whole, rest = divmod(duration, timedelta(milliseconds=1))
        if rest:
            raise ValueError(f"{what}: {duration!r} is not a whole number of milliseconds")
        return whole
    if isinstance(duration, bool) or not isinstance(duration, int):
        raise TypeError(f"{what}: expected a timedelta or integer milliseconds, found {duration!r}")
    return duration


class Windows(Protocol):
    """A rule that says which windows there are. A window is identified by one integer, its start or its end.

    All arguments and results are epoch milliseconds; identities in results ascend, and so do the starts that
    belong to them.
    """

    @property
    def length(self) -> int:
        """Of the longest window."""

    @property
    def allowed_lateness(self) -> int:
        """How long after its end a window can still change."""

    @property
    def single_pane(self) -> bool:
        """Whether every window is one pane, and identified by its start."""

    @property
    def has_gaps(self) -> bool:
        """Whether some times lie in no window."""

    @property
    def panes_per_window(self) -> int:
        """How many panes a window holds at most."""

    def described(self) -> str:
        """For people: ``10000 ms every 2000 ms``."""

    def parameters(self) -> dict[str, Any]:
        """What must agree when a job is restored."""

    def inside(self, times: Int64Array, per_ms: int = 1) -> npt.NDArray[np.bool_]:
        """Which times lie in a window at all."""

    def pane_starts(self, times: Int64Array, per_ms: int = 1) -> Int64Array:
        """The pane start (ms) of every time, given in ``1/per_ms`` milliseconds; none may lie in a gap."""

    def bounds(self, windows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Start and end of the windows with these identities."""

    def firing(self, panes: Iterable[int], after: int | None, upto: int) -> list[int]:
        """The windows with ``after < end <= upto`` that hold one of the panes.

        ``after`` is the watermark before (None: there was none), ``upto`` the one after.
        """

    def next_end(self, pane: int, after: int | None) -> int | None:
        """The end of the first window that holds the pane and ends after ``after``; None if all have ended."""

    def closed_before(self, watermark: int) -> int:
        """The earliest time still needed: all windows of an earlier time are closed, its pane is dead."""

    def fired_before(self, watermark: int) -> int:
        """The end of the last window that has fired: an earlier time may lie in a window that has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSpec:
    """Tumbling (``length == slide``), sliding or sampling (``slide > length``) windows, identified by their start."""

    length: int
    slide: int
    allowed_lateness: int = 0

    def __post_init__(self) -> None:
        if self.length <= 0 or self.slide <= 0:
            raise ValueError(f"window: length ({self.length} ms) and slide ({self.slide} ms) must be positive")
        if self.allowed_lateness < 0:
            raise ValueError(f"window: allowed_lateness ({self.allowed_lateness} ms) must not be negative")

    @property
    def single_pane(self) -> bool:
        """Whether a window is one pane (tumbling and sampling windows)."""
        return self.slide >= self.length

    @property
    def has_gaps(self) -> bool:
        """Whether some times lie in no window."""
        return self.slide > self.length

    @property
    def panes_per_window(self) -> int:
        """How many panes a window holds at most."""
        return 1 if self.single_pane else 2 * self.length // self.slide + 1

    def described(self) -> str:
        """For people."""
        return f"{self.length} ms" if self.slide == self.length else f"{self.length} ms every {self.slide} ms"

    def parameters(self) -> dict[str, Any]:
        """What must agree when a job is restored."""
        return {"length_ms": self.length, "slide_ms": self.slide, "allowed_lateness_ms": self.allowed_lateness}

    def bounds(self, windows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Start and end of the windows with these starts."""
        return windows, windows + self.length

    @property
    def _end_offset(self) -> int:
        return self.length % self.slide

    def pane_of(self, time: int) -> int | None:
        """The start of the pane that holds ``time``; None in a gap."""
        base = time - time % self.slide
        if self.has_gaps:
            return base if time - base < self.length else None
        return base + self._end_offset if time - base >= self._end_offset else base

    def pane_starts(self, times: Int64Array, per_ms: int = 1) -> Int64Array:
        """The pane start (ms) of every time, given in ``1/per_ms`` milliseconds; none may lie in a gap."""
        slide = self.slide * per_ms
        index = np.floor_divide(times, slide)
        starts = index * self.slide
        if self._end_offset and not self.has_gaps:
            starts += np.where(times - index * slide >= self._end_offset * per_ms, self._end_offset, 0)
        return starts

    def inside(self, times: Int64Array, per_ms: int = 1) -> npt.NDArray[np.bool_]:
        """Which times lie in a window at all."""
        return np.mod(times, self.slide * per_ms) < self.length * per_ms

    def windows_of(self, pane: int) -> range:
        """The starts of the windows that hold the pane, ascending."""
        first = (pane - self.length) // self.slide + 1
        last = pane // self.slide
        return range(first * self.slide, last * self.slide + 1, self.slide)

    def first_end(self, pane: int) -> int:
        """The end of the first window that holds the pane."""
        return ((pane - self.length) // self.slide + 1) * self.slide + self.length

    def firing(self, panes: Iterable[int], after: int | None, upto: int) -> list[int]:
        """Starts of the windows with ``after < end <= upto`` that hold one of the panes, ascending.

        ``after`` is the watermark before (None: there was none), ``upto`` the one after.
        """
        slide = self.slide
        starts: set[int] = set()
        for pane in panes:
            windows = self.windows_of(pane)
            first, last = windows[0], windows[-1]
            if after is not None and first + self.length <= after:
                first = ((after - self.length) // slide + 1) * slide
            if last + self.length > upto:
                last = (upto - self.length) // slide * slide
            starts.update(range(first, last + 1, slide))
        return sorted(starts)

    def next_end(self, pane: int, after: int | None) -> int | None:
        """The end of the first window that holds the pane and ends after ``after``; None if all have ended."""
        end = self.first_end(pane)
        if after is None or end > after:
            return end
        end = ((after - self.length) // self.slide + 1) * self.slide + self.length
        return end if end - self.length <= pane else None

    def closed_before(self, watermark: int) -> int:
        """The earliest time still needed: all windows of an earlier time are closed, its pane is dead."""
        return ((watermark - self.length - self.allowed_lateness) // self.slide + 1) * self.slide

    def fired_before(self, watermark: int) -> int:
        """The end of the last window that has fired: an earlier time may lie in a window that has."""
        return (watermark - self.length) // self.slide * self.slide + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class CumulateSpec:
    """Windows that grow by ``step`` up to ``length``, in milliseconds, identified by their end."""

    length: int
    step: int
    allowed_lateness: int = 0
    single_pane: bool = False
    has_gaps: bool = False

    def __post_init__(self) -> None:
        if self.length <= 0 or self.step <= 0:
            raise ValueError(f"window: length ({self.length} ms) and step ({self.step} ms) must be positive")
        if self.length % self.step:
            raise ValueError(f"window: length ({self.length} ms) must be a multiple of step ({self.step} ms)")
        if self.allowed_lateness < 0:
            raise ValueError(f"window: allowed_lateness ({self.allowed_lateness} ms) must not be negative")

    @property
    def panes_per_window(self) -> int:
        """How many panes a window holds at most."""
        return self.length // self.step

    def described(self) -> str:
        """For people."""
        return f"up to {self.length} ms in steps of {self.step} ms"

    def parameters(self) -> dict[str, Any]:
        """What must agree when a job is restored."""
        return {"length_ms": self.length, "step_ms": self.step, "allowed_lateness_ms": self.allowed_lateness}

    def inside(self, times: Int64Array, per_ms: int = 1) -> npt.NDArray[np.bool_]:  # noqa: ARG002
        """All do."""
        return np.ones(len(times), dtype=bool)

    def pane_starts(self, times: Int64Array, per_ms: int = 1) -> Int64Array:
        """The start (ms) of the step that holds each time."""
        starts: Int64Array = np.floor_divide(times, self.step * per_ms) * self.step
        return starts

    def bounds(self, windows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Start and end of the windows with these ends."""
        return np.floor_divide(windows - 1, self.length) * self.length, windows

    def firing(self, panes: Iterable[int], after: int | None, upto: int) -> list[int]:
        """Ends of the windows with ``after < end <= upto`` that hold one of the panes."""
        ends: set[int] = set()
        for pane in panes:
            last = min(pane // self.length * self.length + self.length, upto // self.step * self.step)
            first = pane + self.step if after is None else max(pane + self.step, (after // self.step + 1) * self.step)
            ends.update(range(first, last + 1, self.step))
        return sorted(ends)

    def next_end(self, pane: int, after: int | None) -> int | None:
        """The end of the first window that holds the pane and ends after ``after``; None if all have ended."""
        first = pane // self.step * self.step + self.step
        end = first if after is None else max(first, (after // self.step + 1) * self.step)
        return end if end <= pane // self.length * self.length + self.length else None

    def closed_before(self, watermark: int) -> int:
        """The earliest time still needed."""
        return (watermark - self.allowed_lateness) // self.length * self.length

    def fired_before(self, watermark: int) -> int:
        """The end of the last window that has fired."""
        return watermark // self.step * self.step


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSet:
    """Several kinds of windows over the same panes. Window ``start`` of kind i is ``start * len(kinds) + i``."""

    kinds: tuple[WindowSpec, ...]
    single_pane: bool = False

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ValueError("windows: give at least one length")
        if twice := [kind.described() for n, kind in enumerate(self.kinds) if kind in self.kinds[:n]]:
            raise ValueError(f"windows: {twice[0]} is there twice")
        if len({kind.allowed_lateness for kind in self.kinds}) > 1:
            raise ValueError("windows: all kinds have one allowed_lateness")

    @property
    def pane(self) -> int:
        """The length of a pane."""
        return gcd(*(n for kind in self.kinds for n in (kind.length, kind.slide)))

    @property
    def length(self) -> int:
        """Of the longest window."""
        return max(kind.length for kind in self.kinds)

    @property
    def allowed_lateness(self) -> int:
        """How long after its end a window can still change."""
        return self.kinds[0].allowed_lateness

    @property
    def has_gaps(self) -> bool:
        """Whether some times lie in no window."""
        return all(kind.has_gaps for kind in self.kinds)

    @property
    def panes_per_window(self) -> int:
        """How many panes a window holds at most."""
        return self.length // self.pane

    def described(self) -> str:
        """For people."""
        return " and ".join(kind.described() for kind in self.kinds)

    def parameters(self) -> dict[str, Any]:
        """What must agree when a job is restored."""
        return {"windows": [kind.parameters() for kind in self.kinds]}

    def kind_of(self, windows: Int64Array) -> Int64Array:
        """Which kind each window is of."""
        kinds: Int64Array = np.mod(windows, len(self.kinds))
        return kinds

    def inside(self, times: Int64Array, per_ms: int = 1) -> npt.NDArray[np.bool_]:
        """Which times lie in a window at all."""
        found: npt.NDArray[np.bool_] = np.any([kind.inside(times, per_ms) for kind in self.kinds], axis=0)
        return found

    def pane_starts(self, times: Int64Array, per_ms: int = 1) -> Int64Array:
        """The start (ms) of the pane that holds each time."""
        starts: Int64Array = np.floor_divide(times, self.pane * per_ms) * self.pane
        return starts

    def bounds(self, windows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Start and end of the windows with these identities."""
        starts = np.floor_divide(windows, len(self.kinds))
        lengths = np.asarray([kind.length for kind in self.kinds], dtype=np.int64)
        return starts, starts + lengths[self.kind_of(windows)]

    def firing(self, panes: Iterable[int], after: int | None, upto: int) -> list[int]:
        """The windows with ``after < end <= upto`` that hold one of the panes."""
        live, count = list(panes), len(self.kinds)
        found: list[int] = []
        for number, kind in enumerate(self.kinds):
            held = [pane for pane in live if kind.pane_of(pane) is not None]
            found.extend(start * count + number for start in kind.firing(held, after, upto))
        return sorted(found)

    def next_end(self, pane: int, after: int | None) -> int | None:
        """The end of the first window that holds the pane and ends after ``after``; None if all have ended."""
        ends = [kind.next_end(pane, after) for kind in self.kinds if kind.pane_of(pane) is not None]
        return min((end for end in ends if end is not None), default=None)

    def closed_before(self, watermark: int) -> int:
        """The earliest time that any kind still needs."""
        return min(kind.closed_before(watermark) for kind in self.kinds)

    def fired_before(self, watermark: int) -> int:
        """The end of the last window of any kind that has fired."""
        return max(kind.fired_before(watermark) for kind in self.kinds)
