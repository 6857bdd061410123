"""Two plans side by side: which operators stay, come, go or are described in another way, and what the user says of it.

A plan describes operators by their ids, see `describe_plan`. All functions here are pure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from operators.graph import INPUT, JOB
from statebackend import SchemaChanges

__all__ = [
    "UPGRADES",
    "PlanDiff",
    "Upgrade",
    "digest_of",
    "identity_of",
    "kind_of",
    "owner_of",
    "plan_differences",
    "results_of",
]

UPGRADES = "upgrades"
"""Key, in the plan's entry of the job, of what it has gone through, oldest first."""

_KIND = "operator"

_MAY_CHANGE: Mapping[str, frozenset[str]] = {
    "source": frozenset({"source", "event_time"}),
    "sink": frozenset({"sink"}),
    "window": frozenset({"aggregates", "emit_every_ms"}),
    "aggregate": frozenset({"aggregates", "states"}),
    "process": frozenset({"state", "keys"}),
    "materialize": frozenset({"every_ms"}),
}
"""What may differ in the description of an operator that keeps its state, by kind: the rest gives state its meaning.

Tables decide for themselves whether their columns can follow. Of a source and a sink see `_refusal`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upgrade:
    """What became of the operators of a state, by their ids; an argument of `StreamContext`.

    ``rename``: new ids by old ones; state, position and watermark follow. Operators are called by ``name=``, else by
    what they are, below the operator before them: to rename one may mean to rename those behind it.
    ``drop``: operators whose state goes. ``add``: new operators, which start empty: a source at its beginning,
    others with the rows that come from here on.
    ``change``: operators that keep their state and do something else with what comes from here on: other verbs before
    them, another file of a source, other aggregates of a window or a group. Results that are new start from nothing in
    windows that are open and groups that are there: they count only rows that come from here on. With a mapping,
    `SchemaChanges` say what names of columns cannot: what is renamed, which results or columns shall go, what new ones
    hold in old rows.
    ``reset``: operators that stay and start empty.
    """

    rename: Mapping[str, str] = field(default_factory=dict)
    drop: Collection[str] = ()
    add: Collection[str] = ()
    change: Mapping[str, SchemaChanges | None] | Collection[str] = ()
    reset: Collection[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.change, str) or any(isinstance(ids, str) for ids in (self.drop, self.add, self.reset)):
            raise TypeError("Upgrade: drop, add, change and reset take collections of operator ids, not one string")
        if len(set(self.rename.values())) != len(self.rename):
            raise ValueError(f"Upgrade: two operators are renamed to one: {dict(self.rename)}")

    @property
    def changes(self) -> dict[str, SchemaChanges]:
        """What is said of columns, by operator id."""
        return {k: v for k, v in self.change.items() if v is not None} if isinstance(self.change, Mapping) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDiff:
    """Two plans side by side, the old one under the new ids of ``renamed``; ids are in the order of their plan.

    ``changed``: lines that tell how. ``refused``: why an operator cannot keep its state.
    """

    old: Mapping[str, Any]
    new: Mapping[str, Any]
    renamed: Mapping[str, str]
    kept: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, str]

    @classmethod
    def of(cls, old: Mapping[str, Any], new: Mapping[str, Any], rename: Mapping[str, str]) -> PlanDiff:
        """The difference; renames of operators that are not there any more are passed over."""
        renamed = {was: now for was, now in rename.items() if was in old and now not in old and now in new}
        old = {renamed.get(name, name): _with_inputs(described, renamed, old) for name, described in old.items()}
        old[JOB] = identity_of(old)
        new = {**new, JOB: identity_of(new)}
        both = [name for name in new if name in old]
        changed = {name: tuple(found) for name in both if (found := plan_differences(old[name], new[name]))}
        refused = {name: why for name in changed if (why := _refusal(name, old[name], new[name])) is not None}
        return cls(
            old=old,
            new=new,
            renamed=renamed,
            kept=tuple(name for name in both if name not in changed and name != JOB),
            added=tuple(name for name in new if name not in old),
            removed=tuple(name for name in old if name not in new),
            changed=changed,
            refused=refused,
        )

    @property
    def empty(self) -> bool:
        """Whether the plans are the same."""
        return not (self.renamed or self.added or self.removed or self.changed)

    def likely_renames(self, upgrade: Upgrade) -> dict[str, str]:
        """Operators that are gone and look like one that is new: the same but for the id and what they read.

        Of those of which the upgrade does not speak.
        """
        found: dict[str, str] = {}
        for was in self.removed:
            alike = [name for name in self.added if name not in upgrade.add and name not in found.values()]
            alike = [name for name in alike if _itself(self.new[name]) == _itself(self.old[was])]
            if alike and was not in upgrade.drop:
                found[was] = alike[0]
        return found


def plan_differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two descriptions differ, one line each: ``path: old -> new``; of lists what is gone and what is new."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        return [
            line
            for name in names
            for line in plan_differences(old.get(name), new.get(name), f"{path}.{name}" if path else str(name))
        ]
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        if len(old) == len(new):
            pairs = enumerate(zip(old, new, strict=True))
            return [line for i, (a, b) in pairs for line in plan_differences(a, b, f"{path}[{i}]")]
        lines = [f"{path}: - {item!r}" for item in old if item not in new]
        return lines + [f"{path}: + {item!r}" for item in new if item not in old]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def owner_of(table: str, plan: Mapping[str, Any]) -> str:
    """The operator whose table this is; '' if it is nobody's."""
    owners = [n for n in plan if table == n or table.startswith(f"{n}:") or table == f"{n}.pending"]
    return max(owners, key=len, default="")


def results_of(described: Mapping[str, Any]) -> dict[str, str]:
    """The aggregates of an operator by the names of their results."""
    return {text.rsplit(" AS ", 1)[-1]: text for text in described.get("aggregates", ())}


def kind_of(described: Any) -> str:
    """What an operator is: source, window, sink, …"""
    return str(described.get(_KIND, "?")) if isinstance(described, Mapping) else "?"


def identity_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a job is, without its past."""
    return {k: v for k, v in plan.get(JOB, {}).items() if k != UPGRADES}


def digest_of(plan: Mapping[str, Any]) -> str:
    """Of a plan without its past."""
    text = json.dumps({**plan, JOB: identity_of(plan)}, sort_keys=True, default=lambda value: bytes(value).hex())
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _refusal(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why an operator of this description cannot keep the state of that one; None if it may."""
    if name == JOB:
        return "another job"
    kind = kind_of(new)
    if kind_of(old) != kind:
        return f"it was {kind_of(old)!r} and is {kind!r}"
    fixed = [
        k for k in {**old, **new} if k not in {_KIND, INPUT, *_MAY_CHANGE.get(kind, ())} and old.get(k) != new.get(k)
    ]
    if fixed:
        return f"its state has another meaning with other {', '.join(fixed)}"
    if kind in ("source", "sink") and old[kind].get("kind") != new[kind].get("kind"):
        return f"it is of another kind: {new[kind].get('kind')!r}, its state is that of {old[kind].get('kind')!r}"
    was, now = (results_of(described) for described in (old, new))
    if other := [name for name in was if name in now and was[name] != now[name]]:
        return f"its results {other} are computed from something else than before: give them other names"
    if new.get("changelog") and (added := [name for name in now if name not in was]):
        return f"its new results {added} would have rows taken back that they have never seen"
    if kind == "source" and _time_column(old) != _time_column(new):
        return "its event time is another column, and that which has passed means nothing for it"
    return None


def _with_inputs(described: Any, renamed: Mapping[str, str], old: Mapping[str, Any]) -> Any:
    """A description whose inputs have their new ids."""
    if not isinstance(described, Mapping) or INPUT not in described:
        return described
    inputs = described[INPUT]
    if not isinstance(inputs, Sequence) or isinstance(inputs, str):
        return described
    several = bool(inputs) and not isinstance(inputs[0], str)
    moved = [_moved_input(one, renamed, old) for one in (inputs if several else [inputs])]
    return {**described, INPUT: moved if several else moved[0]}


def _moved_input(stream: Sequence[str], renamed: Mapping[str, str], old: Mapping[str, Any]) -> list[str]:
    """The operator that a stream comes from, maybe with the name of one of its outputs, and the verbs behind it."""
    source = stream[0]
    ids = [name for name in old if source == name or source.startswith(f"{name}.")]
    upstream = max(ids, key=len, default="")
    return [renamed.get(upstream, upstream) + source[len(upstream) :], *stream[1:]]


def _itself(described: Any) -> Any:
    """An operator without what it reads."""
    return {k: v for k, v in described.items() if k != INPUT} if isinstance(described, Mapping) else described


def _time_column(described: Mapping[str, Any]) -> Any:
    return (described.get("event_time") or {}).get("column")
