"""Windows in GROUP BY: which function says which window, and how long.

``tumble(ts, size)``, ``hop(ts, slide, size)``, ``session(ts, gap)``, ``cumulate(ts, step, size)``, and ``date_bin(size,
ts)`` as another word for ``tumble``. The expression itself is the start of the window; ``window_start_time()`` and
``window_end_time()``, written like aggregates, are its bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
from datafusion import Expr

from operators.errors import UnsupportedQueryError
from operators.sql.expressions import as_expr, bare, shown
from operators.sql.names import WINDOW_FUNCTIONS
from operators.stream import DataStream

__all__ = ["Window", "is_date_bin", "is_window", "milliseconds_of", "window_of"]

_NS_PER_MS = 1_000_000
_MS_PER_DAY = 86_400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A window function with its intervals, in milliseconds."""

    function: str
    time: Expr
    spans: tuple[int, ...]

    def aggregate(self, stream: DataStream, keys: Sequence[Expr], aggregates: Sequence[Expr], name: str) -> DataStream:
        """Aggregate by window and keys; ``name``: of the operator."""
        match self.function:
            case "session":
                return stream.session_window(keys, aggregates, *self.spans, name=name)
            case "cumulate":
                return stream.cumulate_window(keys, aggregates, *self.spans, name=name)
            case "hop":
                slide, length = self.spans
                return stream.window(keys, aggregates, length, slide, name=name)
            case _:
                return stream.window(keys, aggregates, *self.spans, name=name)


def is_window(expr: Expr) -> bool:
    """Whether the expression is a call of a window function, or of ``date_bin``."""
    inner = bare(expr)
    return inner.variant_name() == "ScalarFunction" and inner.rex_call_operator() in (*WINDOW_FUNCTIONS, "date_bin")


def is_date_bin(expr: Expr) -> bool:
    """Whether a call that stands for a window may also be a value like any."""
    return bare(expr).rex_call_operator() == "date_bin"


def window_of(expr: Expr) -> Window:
    """The window that the expression stands for.

    Raises `UnsupportedQueryError` where an interval is no constant, has months or is no whole number of milliseconds.
    """
    inner = bare(expr)
    function = inner.rex_call_operator()
    operands = [as_expr(o) for o in inner.rex_call_operands()]
    if function == "date_bin":
        if len(operands) > 2:
            raise UnsupportedQueryError(shown(expr), "windows begin at 1970-01-01 00:00; leave the origin out")
        operands.reverse()
        function = "tumble"
    spans = tuple(_milliseconds(operand, expr) for operand in operands[1:])
    return Window(function=function, time=operands[0], spans=spans)


def milliseconds_of(expr: Expr, *, even_days: bool) -> int | None:
    """A constant interval in milliseconds; None for any other expression, and for months and parts of milliseconds.

    ``even_days``: whether days have 24 hours; None for days that have not.
    """
    value = expr.python_value() if expr.variant_name() == "Literal" else None
    if not isinstance(value, pa.MonthDayNanoIntervalScalar) or not value.is_valid:
        return None
    months, days, nanoseconds = value.as_py()
    whole, rest = divmod(nanoseconds, _NS_PER_MS)
    return None if months or rest or (days and not even_days) else int(days * _MS_PER_DAY + whole)


def _milliseconds(expr: Expr, call: Expr) -> int:
    value = expr.python_value() if expr.variant_name() == "Literal" else None
    if not isinstance(value, pa.MonthDayNanoIntervalScalar) or not value.is_valid:
        raise UnsupportedQueryError(shown(call), "write its length as a constant, INTERVAL '10 seconds'")
    months, days, nanoseconds = value.as_py()
    if months:
        raise UnsupportedQueryError(shown(call), "months have no fixed length; say it in days")
    whole, rest = divmod(nanoseconds, _NS_PER_MS)
    if rest:
        raise UnsupportedQueryError(shown(call), "a window is a whole number of milliseconds long")
    return int(days * _MS_PER_DAY + whole)
