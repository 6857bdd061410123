"""From the expressions of a join to keys, a bound on the distance of event times, and the rest.

The conditions are taken apart at their ANDs. An equality of a left and a right column is a key. A comparison that
amounts to ``left event time - right event time`` against a constant is a bound: each side is read as a sum of event
times and intervals. Everything else is a condition on pairs, which DataFusion evaluates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce

import pyarrow as pa
from datafusion import Expr

from operators.errors import SchemaError
from operators.verbs.join_sides import Joinable, JoinKeys
from operators.watermark import EventTimeColumn

__all__ = ["JoinConditions", "join_conditions"]

_NS_PER_MS = 1_000_000
_NS_PER_DAY = 86_400_000 * _NS_PER_MS
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "="}


@dataclass(frozen=True, slots=True)
class JoinConditions:
    """What the conditions say. ``lower`` and ``upper``: of the left minus the right event time, in nanoseconds,
    whether they are included; None for no bound."""

    keys: JoinKeys
    lower: tuple[int, bool] | None
    upper: tuple[int, bool] | None
    rest: Expr | None

    def units(self, per_ms: int) -> tuple[int | None, int | None]:
        """The bounds, included, in units of ``1/per_ms`` milliseconds."""
        unit = _NS_PER_MS // per_ms
        lower = upper = None
        if self.lower is not None:
            value, included = self.lower
            lower = -(-value // unit) if included else value // unit + 1
        if self.upper is not None:
            value, included = self.upper
            upper = value // unit if included else -(-value // unit) - 1
        return lower, upper


@dataclass(frozen=True, slots=True)
class _Sum:
    """So many times the left event time, the right event time, and so many nanoseconds.

    ``has_days``: whether some of those were said as days.
    """

    left: int = 0
    right: int = 0
    ns: int = 0
    has_days: bool = False

    def minus(self, other: _Sum) -> _Sum:
        return self.plus(_Sum(-other.left, -other.right, -other.ns, other.has_days))

    def plus(self, other: _Sum) -> _Sum:
        days = self.has_days or other.has_days
        return _Sum(self.left + other.left, self.right + other.right, self.ns + other.ns, days)


def join_conditions(verb: str, left: Joinable, right: Joinable, conditions: Sequence[Expr]) -> JoinConditions:
    """Take conditions apart. Columns that both sides have are told apart as ``col("left.x")`` and ``col("right.x")``.

    Raises `SchemaError` for a column that is on no side, or on both and not told apart.
    """
    return _Analysis(verb, left, right).of(conditions)


class _Analysis:
    def __init__(self, verb: str, left: Joinable, right: Joinable) -> None:
        self._verb = verb
        self._sides = (left, right)
        self._lower: tuple[int, bool] | None = None
        self._upper: tuple[int, bool] | None = None

    def of(self, conditions: Sequence[Expr]) -> JoinConditions:
        pairs: list[tuple[str, str]] = []
        rest: list[Expr] = []
        same_time = False
        for condition in conditions:
            for part in _parts(condition):
                pair = self._key(part)
                if pair is not None and pair == tuple(side.event_time for side in self._sides):
                    same_time = True
                    self._bound("=", 0)
                elif pair is not None:
                    pairs.append(pair)
                elif not self._times(part):
                    rest.append(part)
        keys = JoinKeys(tuple(dict.fromkeys(pairs)), same_time)
        return JoinConditions(keys, self._lower, self._upper, reduce(lambda a, b: a & b, rest) if rest else None)

    def _key(self, part: Expr) -> tuple[str, str] | None:
        """The left and the right column that an equality is about."""
        if part.variant_name() != "BinaryExpr" or part.to_variant().op() != "=":
            return None
        sides = [self._column(Expr(side)) for side in (part.to_variant().left(), part.to_variant().right())]
        found = {side[0]: side[1] for side in sides if side is not None}
        return (found[0], found[1]) if len(found) == 2 else None

    def _column(self, expr: Expr) -> tuple[int, str] | None:
        """Side and name of a column; None for anything else."""
        if expr.variant_name() != "Column":
            return None
        column = expr.to_variant()
        name, relation = column.name(), column.relation()
        has = [name in side.schema.names for side in self._sides]
        if relation is not None and str(relation) in ("left", "right"):
            index = int(str(relation) == "right")
            has = [has[i] and i == index for i in (0, 1)]
        if all(has):
            raise SchemaError(
                f'{self._verb}: both sides have a column {name!r}: say col("left.{name}") or col("right.{name}"), '
                "or rename one of them"
            )
        if not any(has):
            available = ", ".join(n for side in self._sides for n in side.schema.names)
            raise SchemaError(f"{self._verb}: no column {expr.canonical_name()!r}; available columns: {available}")
        return has.index(True), name

    def _times(self, part: Expr) -> bool:
        """Whether a condition is about the distance of event times; then it has been noted."""
        if None in (side.event_time for side in self._sides):
            return False
        variant = part.to_variant() if part.variant_name() in ("BinaryExpr", "Between") else None
        if part.variant_name() == "Between" and variant is not None and not variant.negated():
            middle = self._sum(Expr(variant.expr()))
            low, high = self._sum(Expr(variant.low())), self._sum(Expr(variant.high()))
            bounds = [(">=", low), ("<=", high)]
        elif part.variant_name() == "BinaryExpr" and variant is not None and variant.op() in _FLIPPED:
            middle = self._sum(Expr(variant.left()))
            bounds = [(variant.op(), self._sum(Expr(variant.right())))]
        else:
            return False
        distances = [None if middle is None or other is None else middle.minus(other) for _, other in bounds]
        if any(d is None or (d.left, d.right) not in ((1, -1), (-1, 1)) for d in distances):
            return False
        for (op, _), distance in zip(bounds, distances, strict=True):
            assert distance is not None
            if distance.has_days and not self._even_days():
                raise SchemaError(
                    f"{self._verb}: {part.canonical_name()}: a day has no fixed length in the time zone of the event "
                    "time; say it in hours"
                )
            if distance.left == 1:
                self._bound(op, -distance.ns)
            else:
                self._bound(_FLIPPED[op], distance.ns)
        return True

    def _even_days(self) -> bool:
        """Whether a day has 24 hours in the time zones of both event times."""
        times = [(side.schema, side.event_time) for side in self._sides]
        return all(time is not None and EventTimeColumn(schema, time).has_even_days for schema, time in times)

    def _sum(self, expr: Expr) -> _Sum | None:
        """The expression as a sum of event times and intervals; None if it is none."""
        kind = expr.variant_name()
        if kind == "Column":
            side, name = self._column(expr) or (0, "")
            if name != self._sides[side].event_time:
                return None
            return _Sum(left=1 - side, right=side)
        if kind == "Literal":
            return self._interval(expr)
        if kind == "BinaryExpr" and (variant := expr.to_variant()).op() in ("+", "-"):
            one, other = self._sum(Expr(variant.left())), self._sum(Expr(variant.right()))
            if one is None or other is None:
                return None
            return one.plus(other) if variant.op() == "+" else one.minus(other)
        return None

    def _interval(self, expr: Expr) -> _Sum | None:
        value = expr.python_value()
        if isinstance(value, pa.DurationScalar) and value.is_valid:
            per_unit = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}[value.type.unit]
            return _Sum(ns=value.value * per_unit)
        if isinstance(value, timedelta):
            return _Sum(ns=value // timedelta(microseconds=1) * 1000)
        if isinstance(value, pa.MonthDayNanoIntervalScalar) and value.is_valid:
            months, days, nanoseconds = value.as_py()
            if months:
                raise SchemaError(f"{self._verb}: {expr.canonical_name()}: months have no fixed length; say it in days")
            return _Sum(ns=days * _NS_PER_DAY + nanoseconds, has_days=days != 0)
        return None

    def _bound(self, op: str, ns: int) -> None:
        """Note that left minus right compares to so many nanoseconds like that."""
        if op in (">", ">=", "="):
            bound = (ns, op != ">")
            if self._lower is None or (ns, not bound[1]) > (self._lower[0], not self._lower[1]):
                self._lower = bound
        if op in ("<", "<=", "="):
            bound = (ns, op != "<")
            if self._upper is None or bound < self._upper:
                self._upper = bound


def _parts(condition: Expr) -> Iterator[Expr]:
    """The conditions that it joins by AND."""
    if condition.variant_name() == "BinaryExpr" and (variant := condition.to_variant()).op() == "AND":
        yield from _parts(Expr(variant.left()))
        yield from _parts(Expr(variant.right()))
    else:
        yield condition
