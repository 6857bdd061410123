"""Joins of two streams, and of a stream with what changes slowly."""

from __future__ import annotations

import os
from typing import Self

import pyarrow as pa
from datafusion import Expr
from pyarrow import parquet

from operators.changelog import require_append_only
from operators.errors import SchemaError
from operators.graph import Port, upstream_id
from operators.stateful.asof_join import AsofJoinNode
from operators.stateful.interval_join import IntervalJoinNode
from operators.stateful.join_parts import JoinHow, TimeDistance
from operators.stateful.lookup_join import CachedLookup, LookupFunction, LookupJoinNode
from operators.stateful.window_aggregate import WINDOW_END, WINDOW_START
from operators.stateful.window_join import WindowJoinNode
from operators.verbs.base import Column, StreamBase
from operators.verbs.join_conditions import join_conditions
from operators.verbs.join_sides import FixedRows, JoinKeys, Keys, join_how, join_keys, join_sides
from operators.watermark import EventTimeColumn
from operators.windows import Duration, WindowSpec, milliseconds

__all__ = ["JoinVerbs"]

_UNBOUNDED = (
    "{verb}: how={how!r} without a bound on event time: {why} Bound the distance of event times (ttl=, or "
    "interval_join), or join windows (window_join)"
)


class JoinVerbs(StreamBase):
    """Joins: by key alone, by key and nearness of event time, by window, with versions, with a lookup.

    Keys are columns of equal types (cast where they differ); dictionaries and the kinds of strings count as their
    plain type, in which they come out. Null keys match nothing; NaN equals NaN. The result has the columns of the
    left, then those of the right; key columns that have one name on both sides come once. Other names that both sides
    have are an error, as streams have no qualified names. ``how``: inner, left, right, full, semi (left rows with a
    partner) or anti (left rows without one). ``filter``: a further condition on pairs, in columns of both sides.
    """

    def join(
        self,
        right: Self,
        on: Keys = None,
        how: str = "inner",
        *,
        left_on: Keys = None,
        right_on: Keys = None,
        filter: Column | None = None,  # noqa: A002  (DataFusion's word)
        ttl: Duration | None = None,
        name: str | None = None,
    ) -> Self:
        """Join rows of equal keys, however far apart they come, or with ``ttl`` at most that far apart in event time.

        Without ``ttl`` (a timedelta or milliseconds) both sides are kept for ever, pairs come out as soon as
        the later row is there, and only inner and semi joins are possible: whether a row has no partner is never
        certain. The result has no event time. If the event times of both sides are among the keys
        (``on=["window_start_time", ...]`` after windows), or with ``ttl``, this is `interval_join`.

        Raises `SchemaError` for wrong columns and types and for a join that could not be answered.
        """
        verb = "join"
        keys = self._keys(verb, right, on, left_on, right_on)
        kind = join_how(verb, how)
        if ttl is None and not keys.event_times:
            return self._join_within(verb, right, keys, kind, filter, None, name)
        span = None if ttl is None else milliseconds(ttl, "ttl")
        if span is not None and span < 0:
            raise ValueError(f"join: ttl ({span} ms) must not be negative")
        distance = self._distance(verb, right, keys, None if span is None else -span, span)
        return self._join_within(verb, right, keys, kind, filter, distance, name)

    def join_on(self, right: Self, *conditions: Expr, how: str = "inner", name: str | None = None) -> Self:
        """Join rows for which all conditions hold, like DataFusion's ``join_on``.

        Equalities of a left and a right column are keys. Comparisons of the event times of both sides, with
        intervals or durations added (``col("t").between(col("u"), col("u") + lit(timedelta(minutes=5)))``), are the
        bounds of an `interval_join`. The rest is its ``filter``. A column that both sides have is written
        ``col("left.x")`` or ``col("right.x")``, in equalities and comparisons of event times. Without a bound on event
        times this is `join`, with what is said there.

        Raises `SchemaError` for wrong columns and for conditions that leave neither a key nor a bound.
        """
        verb = "join_on"
        self._same_job(verb, right)
        for stream in (self, right):
            require_append_only(verb, stream.updates)
        found = join_conditions(verb, self, right, conditions)
        keys = join_keys(verb, self, right, None, [a for a, _ in found.keys.pairs], [b for _, b in found.keys.pairs])
        keys = JoinKeys(keys.pairs, found.keys.event_times)
        distance = None
        if (found.lower, found.upper) != (None, None):
            per_ms = self._finer_unit(verb, right)
            distance = _between(verb, keys, *found.units(per_ms), per_ms)
        elif not keys.pairs:
            raise SchemaError(
                f"{verb}: needs an equality of a left and a right column, or comparisons of both event times: else "
                "every row would be compared with every other. For an equality of expressions make a column of each "
                "first, with with_column"
            )
        return self._join_within(verb, right, keys, join_how(verb, how), found.rest, distance, name)

    def interval_join(
        self,
        right: Self,
        on: Keys = None,
        how: str = "inner",
        *,
        before: Duration | None,
        after: Duration | None,
        left_on: Keys = None,
        right_on: Keys = None,
        filter: Column | None = None,  # noqa: A002  (DataFusion's word)
        name: str | None = None,
    ) -> Self:
        """Join rows of equal keys whose event times are near: ``left BETWEEN right - before AND right + after``.

        ``before`` and ``after`` are timedeltas or milliseconds and may be negative; None is no bound. Pairs come out
        as soon as the later row is there; a row without a partner (left, right, full, anti) once, when the
        watermark has passed its last possible partner, a left row of a semi join at its first one. Rows behind the
        watermark go to `late_rows_of`. Without a key every pair that is near enough matches.

        The event time of the result is the left's, of a right join the right's; a full join has one only if the event
        times are a common key. It lies behind the watermark by as much as a row may wait: so much later does a window
        after the join fire. State: each row until the watermark has passed its last possible partner, for ever if
        that side has no bound.

        Raises `SchemaError` for wrong columns and types and for a join that could not be answered.
        """
        verb = "interval_join"
        keys = self._keys(verb, right, on, left_on, right_on)
        below = None if before is None else -milliseconds(before, "before")
        above = None if after is None else milliseconds(after, "after")
        distance = self._distance(verb, right, keys, below, above)
        return self._join_within(verb, right, keys, join_how(verb, how), filter, distance, name)

    def window_join(
        self,
        right: Self,
        length: Duration,
        slide: Duration | None = None,
        *,
        on: Keys = None,
        how: str = "inner",
        left_on: Keys = None,
        right_on: Keys = None,
        filter: Column | None = None,  # noqa: A002  (DataFusion's word)
        name: str | None = None,
    ) -> Self:
        """Join rows of equal keys that lie in the same window ``[start, start + length)``.

        ``length`` and ``slide`` (default: ``length``) are timedeltas or milliseconds. Everything comes out when the
        watermark passes the end of the window; rows of sliding windows once per window. The result begins with
        ``window_start_time``, its event time, and ``window_end_time`` (timestamp[ms] in the zone of the left's
        event time). Rows that come when all their windows have fired: `late_rows_of`. State: the rows of open windows.

        Raises `SchemaError` for wrong columns and types, `ValueError` for wrong durations.
        """
        verb = "window_join"
        keys = self._keys(verb, right, on, left_on, right_on)
        span = milliseconds(length, "window length")
        windows = WindowSpec(length=span, slide=span if slide is None else milliseconds(slide, "window slide"))
        zone = EventTimeColumn(self.schema, self._require_event_time(verb)).zone
        right._require_event_time(verb)
        if keys.event_times:
            raise SchemaError(f"{verb}: the event times are among the keys; use join(), which needs no window for that")
        kind = join_how(verb, how)
        sides = join_sides(verb, self, right, keys, kind, filter, timed=True, numbered=False)
        bound = pa.timestamp("ms", zone)
        if taken := [name for name in (WINDOW_START, WINDOW_END) if name in sides.output.schema.names]:
            raise SchemaError(f"{verb}: the input has a column {taken[0]!r}, as the result will: rename it first")
        columns = [pa.field(WINDOW_START, bound), pa.field(WINDOW_END, bound), *sides.output.schema]
        words = [upstream_id(right.port), *(b for _, b in keys.pairs), str(windows.length), str(windows.slide)]
        node = WindowJoinNode(
            operator_id=self._claim(name, verb, *words),
            inputs=(self.port, right.port),
            how=kind,
            left=sides.left,
            right=sides.right,
            windows=windows,
            output=sides.output,
            schema=pa.schema(columns),
            pair_filter=sides.pair_filter,
        )
        return self._derive(Port(node), node.schema, event_time=WINDOW_START)

    def asof_join(
        self,
        right: Self,
        on: Keys = None,
        how: str = "inner",
        *,
        tolerance: Duration | None = None,
        left_on: Keys = None,
        right_on: Keys = None,
        name: str | None = None,
    ) -> Self:
        """Join every row with the newest right row of its key at or before its event time: a versioned table.

        A row comes out when the watermark of both sides has passed its event time, so that the answer is final, and
        in the order of event time; ``how`` is inner or left. Of right rows with one key and time the last one counts.
        ``tolerance`` (a timedelta or milliseconds): a right row that is older than that does not count. Left rows
        behind the watermark: `late_rows_of`; a right row behind the watermark counts for what is still to come out.

        State: the left rows that the watermark has not passed; the newest version of every key, with ``tolerance`` only
        if it is not older. The event time is the left's.

        Raises `SchemaError` for wrong columns and types.
        """
        verb = "asof_join"
        keys = self._keys(verb, right, on, left_on, right_on)
        kind = join_how(verb, how)
        if kind not in (JoinHow.INNER, JoinHow.LEFT):
            raise ValueError(f"{verb}: how={how!r}; there are inner, left")
        if not keys.pairs or keys.event_times:
            raise SchemaError(f"{verb}: needs a key (on=, or left_on= and right_on=) beside the event times")
        span = None if tolerance is None else milliseconds(tolerance, "tolerance")
        if span is not None and span < 0:
            raise ValueError(f"{verb}: tolerance ({span} ms) must not be negative")
        distance = self._distance(verb, right, keys, 0, span)
        sides = join_sides(verb, self, right, keys, kind, None, timed=True, numbered=False)
        node = AsofJoinNode(
            operator_id=self._claim(name, verb, upstream_id(right.port), *(b for _, b in keys.pairs)),
            inputs=(self.port, right.port),
            how=kind,
            left=sides.left,
            right=sides.right,
            distance=distance,
            output=sides.output,
        )
        return self._derive(Port(node), sides.output.schema, event_time=self.event_time)

    def lookup_join(
        self,
        lookup: pa.Table | str | os.PathLike[str] | LookupFunction,
        on: Keys = None,
        how: str = "inner",
        *,
        schema: pa.Schema | None = None,
        cache_rows: int = 100_000,
        cache_ttl: Duration | None = None,
        left_on: Keys = None,
        right_on: Keys = None,
        name: str | None = None,
    ) -> Self:
        """Join every row with the rows that are looked up for its key: all of them, or none; ``how`` is inner or left.

        ``lookup``: an Arrow table, the path of a Parquet file or directory, read when the stream is built, or a
        function. A function gets a RecordBatch of keys (each once, none null, named as in ``right_on``) and returns
        a RecordBatch or a Table of ``schema`` with all rows that have them, in any order. Of its answers, that
        there is no row included, ``cache_rows`` are remembered, for ``cache_ttl`` (a timedelta or milliseconds of the
        clock; None: while the job runs).

        No state is kept: rows that are read again after a crash are looked up again, so the output is exactly once,
        but only as repeatable as the answers are. Event time passes through.

        Raises `SchemaError` for wrong columns and types; a function that raises is a `UserFunctionError`.
        """
        verb = "lookup_join"
        kind = join_how(verb, how)
        if kind not in (JoinHow.INNER, JoinHow.LEFT):
            raise ValueError(f"{verb}: how={how!r}; there are inner, left")
        rows: pa.Table | CachedLookup
        if callable(lookup):
            if schema is None:
                raise ValueError(f"{verb}: a function needs schema=, the columns that it returns")
            if cache_rows < 0:
                raise ValueError(f"{verb}: cache_rows ({cache_rows}) must not be negative")
            ttl = None if cache_ttl is None else milliseconds(cache_ttl, "cache_ttl")
            rows = CachedLookup(function=lookup, cache_rows=cache_rows, cache_ttl_ms=ttl)
        else:
            rows = lookup if isinstance(lookup, pa.Table) else parquet.read_table(os.fspath(lookup))
            schema = rows.schema
        right = FixedRows(schema=schema)
        keys = join_keys(verb, self, right, on, left_on, right_on)
        if not keys.pairs:
            raise SchemaError(f"{verb}: needs a key (on=, or left_on= and right_on=)")
        sides = join_sides(verb, self, right, keys, kind, None, timed=False, numbered=False)
        node = LookupJoinNode(
            operator_id=self._claim(name, "lookup", *(a for a, _ in keys.pairs)),
            input=self.port,
            how=kind,
            left=sides.left,
            right=sides.right,
            rows=rows,
            output=sides.output,
        )
        return self._derive(Port(node), sides.output.schema, event_time=self.event_time, time_note=self._time_note)

    def late_rows_of(self, side: str) -> Self:
        """The rows of one side of a join, ``"left"`` or ``"right"``, that came behind the watermark."""
        node = self.port.node
        if not isinstance(node, IntervalJoinNode | WindowJoinNode | AsofJoinNode):
            raise ValueError("late_rows_of: call it right on the result of a join of two streams")
        if f"late_{side}" not in node.output_names:
            raise ValueError(f"late_rows_of: {side!r}; this join has {', '.join(node.output_names[1:])}")
        schema = (node.left if side == "left" else node.right).schema
        port = Port(node, node.output_names.index(f"late_{side}"))
        return self._derive(port, schema, event_time=None, time_note="late rows have no watermark")

    # -- helpers

    def _keys(self, verb: str, right: Self, on: Keys, left_on: Keys, right_on: Keys) -> JoinKeys:
        self._same_job(verb, right)
        return join_keys(verb, self, right, on, left_on, right_on)

    def _same_job(self, verb: str, right: Self) -> None:
        if self._context is not right._context:
            raise ValueError(f"{verb}: the two streams belong to different contexts, so they cannot be in one job")

    def _distance(
        self, verb: str, right: Self, keys: JoinKeys, lower_ms: int | None, upper_ms: int | None
    ) -> TimeDistance:
        """Bounds on ``left - right`` in the finer unit of both event times."""
        per_ms = self._finer_unit(verb, right)
        lower, upper = (None if bound is None else bound * per_ms for bound in (lower_ms, upper_ms))
        return _between(verb, keys, lower, upper, per_ms)

    def _finer_unit(self, verb: str, right: Self) -> int:
        """Units to the millisecond of the finer event time."""
        one = EventTimeColumn(self.schema, self._require_event_time(verb))
        other = EventTimeColumn(right.schema, right._require_event_time(verb))
        return max(one.per_ms, other.per_ms)

    def _join_within(
        self,
        verb: str,
        right: Self,
        keys: JoinKeys,
        how: JoinHow,
        condition: Column | None,
        distance: TimeDistance | None,
        name: str | None,
    ) -> Self:
        """A join of rows whose event times differ by so much; None: their event times do not matter."""
        timed = distance is not None
        distance = distance or TimeDistance(lower=None, upper=None, per_ms=1)
        waits = distance.reach(0), distance.reach(1)
        for alone, wait, side in ((how.left_alone, waits[0], "left"), (how.right_alone, waits[1], "right")):
            if alone and wait is None:
                why = f"a {side} row may find a partner at any later time, so it is never certain that it has none."
                raise SchemaError(_UNBOUNDED.format(verb=verb, how=str(how), why=why))
        if not keys.pairs and waits == (None, None):
            raise SchemaError(f"{verb}: needs a key (on=, or left_on= and right_on=) or a bound on event time")
        sides = join_sides(verb, self, right, keys, how, condition, timed=timed, numbered=True)
        event_time, holdback, note = _result_time(self, right, how, distance, sides.output.merged)
        node = IntervalJoinNode(
            operator_id=self._claim(name, verb, upstream_id(right.port), *(b for _, b in keys.pairs)),
            inputs=(self.port, right.port),
            how=how,
            left=sides.left,
            right=sides.right,
            distance=distance,
            output=sides.output,
            holdback=holdback,
            pair_filter=sides.pair_filter,
        )
        return self._derive(Port(node), sides.output.schema, event_time=event_time, time_note=note)


def _between(verb: str, keys: JoinKeys, lower: int | None, upper: int | None, per_ms: int) -> TimeDistance:
    """These bounds, and equal event times if they are a key."""
    if keys.event_times:
        lower = 0 if lower is None else max(lower, 0)
        upper = 0 if upper is None else min(upper, 0)
    if lower is not None and upper is not None and lower > upper:
        raise ValueError(f"{verb}: no two event times are at least {lower} and at most {upper} units apart")
    return TimeDistance(lower=lower, upper=upper, per_ms=per_ms)


def _result_time(
    left: StreamBase, right: StreamBase, how: JoinHow, distance: TimeDistance, merged: tuple[str, ...]
) -> tuple[str | None, int | None, str]:
    """The event time of a join's result, by how much it lies behind the watermark, and why if there is none."""
    waits = distance.reach(0), distance.reach(1)
    if how is JoinHow.FULL:
        if left.event_time in merged:
            return left.event_time, max(w or 0 for w in waits), ""
        return None, None, "rows of a full join lack the event time of one side; use assign_event_time()"
    for stream, wait, has in ((left, waits[0], how is not JoinHow.RIGHT), (right, waits[1], how in ("inner", "right"))):
        if has and wait is not None:
            return stream.event_time, wait, ""
    return None, None, "a row of a join without a bound on event time may be as old as the job"
