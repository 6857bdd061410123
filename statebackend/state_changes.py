"""How the columns of partial states follow when the aggregation of a table changes.

Results are matched by their names, since nothing else tells two aggregates of one kind apart: the store knows argument
columns by number only. A result that stays keeps its states, under whatever slot it has now. One that is added finds in
older states what its function gives for no rows at all; only functions of whose states we know that (``state_layout``)
can be added. One that goes must be named, like a column that goes. States behind no result, which an operator keeps for
itself, are matched by what they are.

Invariants:

* A state is never read as that of another function, of DISTINCT or not, of other literals, order or filter.
* Types of arguments are the same or wider; of states whose layout is DataFusion's own they are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from statebackend.aggregate_declaration import AggregateCall, Argument, Declaration, Output
from statebackend.state_layout import LAYOUTS, slot_and_part, slot_name
from statebackend.tables import SchemaChanges, TableSpec

__all__ = ["StateChanges", "state_changes"]

Widens = Callable[[pa.DataType, pa.DataType], bool]

_VARIANCE: Mapping[str, Any] = {"count": 0, "mean": 0.0, "m2": 0.0}
_EMPTY: Mapping[str, Mapping[str, Any]] = {
    "count": {"count": 0},
    "var": _VARIANCE, "var_pop": _VARIANCE, "stddev": _VARIANCE, "stddev_pop": _VARIANCE,
}  # fmt: skip
"""What the parts of a state hold after no rows, by function; all others are null, the count of an average too."""


@dataclass(frozen=True, slots=True)
class StateChanges:
    """``found``: the old column behind a new one; ``empty``: what older states hold in a column without one.

    ``added`` and ``dropped``: names of results.
    """

    found: Mapping[str, str]
    empty: Mapping[str, Any]
    added: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(slots=True)
class _Slots:
    """Which slot of the old aggregation a new one goes on from."""

    old: Declaration
    new: Declaration
    widens: Widens
    pairs: dict[int, int] = field(default_factory=dict)

    def go_on(self, name: str, before: Output, after: Output) -> None:
        """A result stays: so do the states of the calls behind it."""
        parts = [(before.call, after.call), (before.nan, after.nan), (before.seen, after.seen)]
        for was, now in parts:
            if was is None and now is None:
                continue
            if was is None or now is None or not self._same(self.old.calls[was], self.new.calls[now]):
                old, new = self.old.calls[before.call].described(), self.new.calls[after.call].described()
                raise ValueError(
                    f"{name!r} was {old} and is {new}, whose states are others: give it another name "
                    f"and say dropped=[{name!r}]"
                )
            if self.pairs.setdefault(now, was) != was or self._taken(was, now):
                raise ValueError(f"{name!r} shared its state with another result and does so no longer")

    def go_on_unnamed(self) -> None:
        """Calls behind no result, which an operator keeps for itself: the same call at the same turn is the same."""
        old, new = _unnamed(self.old), _unnamed(self.new)
        for now in new:
            if (was := next((n for n in old if self._same(self.old.calls[n], self.new.calls[now])), None)) is None:
                call = self.new.calls[now].described()
                raise ValueError(
                    f"{call} is kept beside the results and was not before: what it has missed is not known"
                )
            old.remove(was)
            self.pairs[now] = was

    def _taken(self, was: int, now: int) -> bool:
        return any(old == was and new != now for new, old in self.pairs.items())

    def _same(self, a: AggregateCall, b: AggregateCall) -> bool:
        ours = a.function in LAYOUTS and not a.distinct
        return (
            _shape(a) == _shape(b)
            and len(a.args) == len(b.args)
            and all(self._same_argument(x, y, ours=ours) for x, y in zip(a.args, b.args, strict=True))
        )

    def _same_argument(self, a: Argument, b: Argument, *, ours: bool) -> bool:
        if (a.column is None, a.literal) != (b.column is None, b.literal):
            return False
        return a.type == b.type or (ours and self.widens(a.type, b.type))


def state_changes(known: TableSpec, wanted: TableSpec, widens: Widens) -> StateChanges:
    """What becomes of the state columns of an aggregate table. Raises ``ValueError`` with the reason why it cannot be.

    ``widens``: whether every value of one type is one of another.
    """
    assert known.aggregation is not None
    assert wanted.aggregation is not None
    old, new = Declaration.decode(known.aggregation), Declaration.decode(wanted.aggregation)
    changes = wanted.changes or SchemaChanges()
    before = {output.name: output for output in old.outputs}
    slots = _Slots(old, new, widens)
    added, stayed = [], set()
    for output in new.outputs:
        name = output.name if output.name in before else changes.renamed.get(output.name, output.name)
        if name in before:
            stayed.add(name)
            slots.go_on(output.name, before[name], output)
        else:
            added.append(output.name)
            _require_addable(output, new)
    slots.go_on_unnamed()
    dropped = [name for name in before if name not in stayed]
    if missing := [name for name in dropped if name not in changes.dropped]:
        raise ValueError(f"results {missing} are missing: name them in SchemaChanges, as dropped={missing}")
    return StateChanges(*_columns(slots, known, wanted), tuple(added), tuple(dropped))


def _columns(slots: _Slots, known: TableSpec, wanted: TableSpec) -> tuple[dict[str, str], dict[str, Any]]:
    found, empty = {}, {}
    for name in wanted.schema.names[len(wanted.key) :]:
        slot, part = slot_and_part(name)
        was = slots.pairs.get(slot)
        old = None if was is None else f"{slot_name(was)}_{part}"
        if old is not None and old in known.schema.names:
            found[name] = old
        elif part in (parts := _EMPTY.get(slots.new.calls[slot].function, {})):
            empty[name] = parts[part]
    return found, empty


def _unnamed(declared: Declaration) -> list[int]:
    """The calls behind no result."""
    named = {number for output in declared.outputs for number in (output.call, output.nan, output.seen)}
    return [number for number in range(len(declared.calls)) if number not in named]


def _require_addable(output: Output, declared: Declaration) -> None:
    for number in (output.call, output.nan, output.seen):
        call = None if number is None else declared.calls[number]
        if call is not None and (call.distinct or call.function not in LAYOUTS):
            raise ValueError(
                f"{output.name!r} cannot be added: what {call.described()} keeps of no rows is not known, so it cannot "
                f"stand in states that are there; use a table of another name for it. {sorted(LAYOUTS)} can be added"
            )


def _shape(call: AggregateCall) -> tuple[Any, ...]:
    order = tuple((term.ascending, term.nulls_first) for term in call.order_by)
    return call.function, call.distinct, order, call.ignore_nulls, call.filter is None
