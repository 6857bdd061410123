"""Joins of rows in the same window: ``ON a.k = b.k AND tumble(a.t, INTERVAL '5 s') = tumble(b.t, INTERVAL '5 s')``.

The windows are those of both event times, tumbling or hopping; ``date_bin`` of an event time is another word for
``tumble``. In a SELECT right above, the call is the start of the window, and the event time of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_

from datafusion import Expr

from operators.errors import UnsupportedQueryError
from operators.sql.expressions import as_expr, bare, output_name, shown
from operators.sql.relation import Relation
from operators.sql.time_functions import Window, is_date_bin, is_window, window_of
from operators.stateful.window_aggregate import WINDOW_START
from operators.stream import DataStream

__all__ = ["SameWindow", "join_in_window", "same_window", "with_starts"]

_SIDES = {"inner": (0, 1), "left": (0,), "right": (1,), "full": (), "semi": (0,), "anti": (0,)}
"""Of which sides, 0 for the left, every row of the result has a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SameWindow:
    """An equality of windows: the calls of the left and of the right, and the window."""

    calls: tuple[str, str]
    window: Window


def same_window(both: Relation, streams: tuple[DataStream, DataStream], condition: Expr) -> SameWindow | None:
    """The windows that a condition equates; None if it is about something else, such as ``date_bin`` of any column.

    Raises `UnsupportedQueryError` for windows that are not the same, or not of both event times.
    """
    if condition.variant_name() != "BinaryExpr" or condition.to_variant().op() != "=":
        return None
    sides = [as_expr(side) for side in (condition.to_variant().left(), condition.to_variant().right())]
    if not all(is_window(side) for side in sides):
        return None
    windows = [window_of(side) for side in sides]
    places = [_side(both, streams, window) for window in windows]
    if sorted(places) != [0, 1] or windows[0].function not in ("tumble", "hop"):
        if all(is_date_bin(side) for side in sides):
            return None
        raise UnsupportedQueryError(shown(condition), "a window join equates tumble() or hop() of both event times")
    one, other = (windows[places.index(side)] for side in (0, 1))
    if (one.function, one.spans) != (other.function, other.spans):
        raise UnsupportedQueryError(shown(condition), "the windows of a window join must be the same on both sides")
    left, right = (bare(sides[places.index(side)]).canonical_name() for side in (0, 1))
    return SameWindow(calls=(left, right), window=one)


def _side(both: Relation, streams: tuple[DataStream, DataStream], window: Window) -> int:
    """Whose event time a window is of: 0 for the left, 1 for the right, 2 for neither."""
    time = bare(window.time)
    column = both.column(*output_name(time)) if time.variant_name() == "Column" else None
    times = [stream.event_time for stream in streams]
    return 2 if column is None else [*times, column].index(column)


def join_in_window(
    left: DataStream,
    right: DataStream,
    same: SameWindow,
    keys: Sequence[tuple[str, str]],
    rest: Sequence[Expr],
    how: str,
    name: str,
) -> DataStream:
    """Pairs with equal keys in the same window for which the rest holds."""
    slide, length = (same.window.spans[0], same.window.spans[-1])
    return left.window_join(
        right,
        length,
        slide,
        left_on=[one for one, _ in keys],
        right_on=[other for _, other in keys],
        how=how,
        filter=reduce(and_, rest) if rest else None,
        name=name,
    )


def with_starts(relation: Relation, same: SameWindow, how: str) -> Relation:
    """The result, in which a call of a side that every row has is the start of the window."""
    calls = [same.calls[side] for side in _SIDES[how]]
    return replace(relation, calls=dict.fromkeys(calls, WINDOW_START))
