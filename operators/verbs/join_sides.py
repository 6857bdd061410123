"""From what a user says of a join to its sides and columns: keys, names and types, the same for every kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import pyarrow as pa

from operators.changelog import Updates, require_append_only
from operators.errors import SchemaError
from operators.stateful.join_parts import JoinHow, JoinOutput, JoinSide, PairFilter, plain_type
from operators.verbs.base import Column

__all__ = ["FixedRows", "JoinKeys", "JoinSides", "Joinable", "Keys", "join_how", "join_keys", "join_sides"]

Keys: TypeAlias = str | Sequence[str] | None
"""One column, or several; None: not said."""


class Joinable(Protocol):
    """What can be a side of a join."""

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""

    @property
    def event_time(self) -> str | None:
        """Its event time column."""

    @property
    def updates(self) -> Updates | None:
        """How it corrects itself; None if it does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedRows:
    """A side that is no stream: the rows of a lookup."""

    schema: pa.Schema
    event_time: None = None
    updates: None = None


@dataclass(frozen=True, slots=True)
class JoinKeys:
    """Pairs of a left and a right column that must be equal.

    ``event_times``: whether the event times of both sides are such a pair; it is not among ``pairs``.
    """

    pairs: tuple[tuple[str, str], ...]
    event_times: bool


@dataclass(frozen=True, slots=True)
class JoinSides:
    """Both sides of a join, the columns of its result and its condition beside the keys."""

    left: JoinSide
    right: JoinSide
    output: JoinOutput
    pair_filter: PairFilter | None


def join_how(verb: str, how: str) -> JoinHow:
    """The kind of a join; `ValueError` for another word."""
    try:
        return JoinHow(how)
    except ValueError:
        raise ValueError(f"{verb}: how={how!r}; there are {', '.join(JoinHow)}") from None


def join_keys(verb: str, left: Joinable, right: Joinable, on: Keys, left_on: Keys, right_on: Keys) -> JoinKeys:
    """The pairs of key columns: ``on``, or ``left_on`` with ``right_on``.

    Raises `SchemaError` where a column is missing or types differ, `ValueError` where the arguments do not fit.
    """
    pairs = tuple(_paired(verb, on, left_on, right_on))
    for stream, names in ((left, [a for a, _ in pairs]), (right, [b for _, b in pairs])):
        require_append_only(verb, stream.updates)
        if missing := [name for name in names if name not in stream.schema.names]:
            raise SchemaError(f"{verb}: no column {missing[0]!r}; available columns: {', '.join(stream.schema.names)}")
        if reserved := [name for name in stream.schema.names if name.startswith("__")]:
            raise SchemaError(f"{verb}: column names {reserved} are reserved in state; rename them")
    times = (left.event_time, right.event_time)
    rest = tuple(pair for pair in dict.fromkeys(pairs) if pair != times)
    for a, b in rest:
        _check_types(verb, left.schema.field(a), right.schema.field(b))
    return JoinKeys(rest, len(rest) < len(dict.fromkeys(pairs)) and None not in times)


def join_sides(
    verb: str,
    left: Joinable,
    right: Joinable,
    keys: JoinKeys,
    how: JoinHow,
    condition: Column | None,
    *,
    timed: bool,
    numbered: bool,
) -> JoinSides:
    """Sides and result columns. ``timed``: event time matters; ``numbered``: rows that come out alone have numbers."""
    times = (left.event_time, right.event_time) if timed else (None, None)
    if timed:
        _check_times_are_no_keys(verb, keys, times)
    merged = [a for a, b in keys.pairs if a == b]
    if keys.event_times and left.event_time == right.event_time and left.event_time is not None:
        merged.append(left.event_time)
        _check_types(verb, left.schema.field(left.event_time), right.schema.field(left.event_time))
    common = [n for n in left.schema.names if n in right.schema.names and n not in merged]
    if common and how.pairs:
        raise SchemaError(
            f"{verb}: both sides have columns {common}, and a stream has no qualified names: drop them from one side, "
            f"or rename them there with with_column_renamed({common[0]!r}, ...)"
        )
    pair_filter = None if condition is None else _pair_filter(verb, left, right, keys, merged, common, condition)
    needed = {b for _, b in keys.pairs} | {times[1]} | set(pair_filter.columns if pair_filter else ()) - set(common)
    kept = [n for n in right.schema.names if how.pairs or n in needed]
    one = JoinSide(
        name="left",
        schema=left.schema,
        keys=tuple(a for a, _ in keys.pairs),
        time=times[0],
        kept=tuple(left.schema.names),
        numbered=numbered and (how.left_alone or how is JoinHow.SEMI),
    )
    other = JoinSide(
        name="right",
        schema=right.schema,
        keys=tuple(b for _, b in keys.pairs),
        time=times[1],
        kept=tuple(kept),
        numbered=numbered and how.right_alone,
    )
    output = JoinOutput(left=one.rows_schema, right=other.rows_schema, merged=tuple(merged), both=how.pairs)
    return JoinSides(one, other, output, pair_filter)


def _paired(verb: str, on: Keys, left_on: Keys, right_on: Keys) -> list[tuple[str, str]]:
    lists = [[names] if isinstance(names, str) else list(names or ()) for names in (on, left_on, right_on)]
    both, left, right = lists
    if both and (left or right):
        raise ValueError(f"{verb}: give on=, or left_on= and right_on=, not both")
    if len(left) != len(right):
        raise ValueError(f"{verb}: left_on has {len(left)} columns, right_on has {len(right)}")
    return [(name, name) for name in both] or list(zip(left, right, strict=True))


def _check_types(verb: str, left: pa.Field, right: pa.Field) -> None:
    one, other = plain_type(left.type), plain_type(right.type)
    if one != other:
        raise SchemaError(
            f"{verb}: {left.name!r} of the left is {left.type}, {right.name!r} of the right is {right.type}: "
            f"cast one of them, with cast({{{right.name!r}: ...}})"
        )
    if pa.types.is_nested(one) or isinstance(one, pa.BaseExtensionType):
        raise SchemaError(f"{verb}: {left.name!r} is {left.type}; join on its fields, each as a column")


def _check_times_are_no_keys(verb: str, keys: JoinKeys, times: tuple[str | None, str | None]) -> None:
    for index, name in enumerate(times):
        if any(pair[index] == name for pair in keys.pairs):
            raise SchemaError(
                f"{verb}: the event time {name!r} of one side can only equal the event time of the other; "
                f"for another column make a copy of it, with with_column"
            )


def _pair_filter(
    verb: str,
    left: Joinable,
    right: Joinable,
    keys: JoinKeys,
    merged: Sequence[str],
    common: Sequence[str],
    condition: Column,
) -> PairFilter:
    plain = {name for pair in keys.pairs for name in pair}
    fields = [*left.schema, *(f for f in right.schema if f.name not in merged and f.name not in common)]
    schema = pa.schema([pa.field(f.name, plain_type(f.type) if f.name in plain else f.type) for f in fields])
    pair_filter = PairFilter(f"{verb} filter", schema, condition)
    if unclear := [name for name in pair_filter.columns if name in common]:
        raise SchemaError(f"{verb}: the condition names {unclear}, which both sides have: rename them on one side")
    return pair_filter
