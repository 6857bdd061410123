"""What a user has built: nodes of streams, before anything runs.

Operator ids name state, positions and staged output in a checkpoint, so they come from the user or
from what an operator is (verb, names, parameters) and never from its place among the others:
inserting a filter changes no id. Stateless steps keep nothing and have no id.

A node with state is an `OperatorNode`: it names its inputs, describes itself, and builds its own
operator. It lives beside that operator (``operators.stateful``); nothing here knows any of them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol, TypeAlias

import pyarrow as pa

from operators.engine import Step
from operators.runtime import BuildContext, Operator
from operators.sinks.base import Sink
from operators.sources.base import Source
from operators.sources.rate import RateLimit
from operators.watermark import EventTimeSpec

__all__ = [
    "INPUT",
    "JOB",
    "Graph",
    "Node",
    "OperatorNode",
    "Port",
    "SinkNode",
    "SourceNode",
    "StateNote",
    "StepNode",
    "derived_id",
    "describe_plan",
    "explain",
    "upstream_id",
]

JOB = "__job__"
"""Key of the job itself in the plan; no operator id can equal it."""

INPUT = "input"
"""Key, in the description of an operator, of what it reads: per input the operator before it and the verbs between."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_DERIVED_MAX = 96


@dataclass(frozen=True, slots=True)
class Port:
    """One output of a node: 0 is the main one."""

    node: Node
    index: int = 0


@dataclass(frozen=True, slots=True)
class StateNote:
    """For people: one state table of an operator and how large it grows.

    ``bounded``: whether event time, a ttl or a fixed number of rows limits it. Else it grows with the
    number of distinct keys for as long as the job runs.
    """

    table: str
    growth: str
    bounded: bool


class OperatorNode(Protocol):
    """A node that keeps state. ``output_names``: "" for the main output, a word for each side output."""

    @property
    def operator_id(self) -> str:
        """Names its state in every checkpoint."""

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Where its rows come from; `Operator.process` is told the number."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """One per output of the operator, in order."""

    @property
    def label(self) -> str:
        """For `explain`."""

    @property
    def state(self) -> tuple[StateNote, ...]:
        """Its tables, for `explain`."""

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored; begins with ``{"operator": kind}``."""

    def build(self, context: BuildContext) -> Operator:
        """The operator, restored."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceNode:
    """Reads a source. Output 1: rows with a bad event time; 2: records that could not be decoded."""

    operator_id: str
    source: Source
    schema: pa.Schema
    event_time: EventTimeSpec | None
    limit: RateLimit | None = None

    @property
    def inputs(self) -> tuple[Port, ...]:
        """None."""
        return ()

    @property
    def output_names(self) -> tuple[str, ...]:
        """The rows, those with a bad event time, and records that could not be decoded."""
        return ("", "bad", "dead_letters")

    @property
    def label(self) -> str:
        """For `explain`."""
        return f"source {self.operator_id}"

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        time = None if self.event_time is None else self.event_time.describe()
        return {"operator": "source", "source": dict(self.source.describe()), "event_time": time}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepNode:
    """A stateless verb."""

    input: Port
    step: Step

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The one input."""
        return (self.input,)

    @property
    def label(self) -> str:
        """For `explain`."""
        return self.step.label


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SinkNode:
    """Hands a stream to a sink."""

    operator_id: str
    input: Port
    schema: pa.Schema
    sink: Sink

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The one input."""
        return (self.input,)

    @property
    def output_names(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def label(self) -> str:
        """For `explain`."""
        return f"sink {self.operator_id} ({self.sink.guarantee})"

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        return {"operator": "sink", "sink": dict(self.sink.describe())}


Node: TypeAlias = SourceNode | StepNode | SinkNode | OperatorNode


@dataclass(slots=True)
class Graph:
    """The nodes of one context, in the order in which they were made."""

    sinks: list[SinkNode] = field(default_factory=list)
    _ids: set[str] = field(default_factory=set)

    def claim(self, name: str | None, derive: Callable[[], str], *, keeps_state: bool = True) -> str:
        """The user's name for an operator, or one derived from what it is.

        Derived names of operators that keep no state are numbered where they would meet: nothing is found by them.
        Raises `ValueError` for a name that cannot be one or that is taken.
        """
        operator_id = derive() if name is None else name
        if name is None and not keeps_state and operator_id in self._ids:
            numbered = (f"{operator_id}-{number}" for number in count(2))
            operator_id = next(n for n in numbered if n not in self._ids)
        if not _ID.fullmatch(operator_id):
            raise ValueError(f"name {operator_id!r}: use letters, digits, '.', '_' and '-', at most 120 of them")
        if operator_id in self._ids:
            hint = "give one of the two a name=" if name is None else "choose another name="
            raise ValueError(f"two operators are called {operator_id!r}, which names their state: {hint}")
        self._ids.add(operator_id)
        return operator_id

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """What is built inside stays if nothing is raised; else its names are free again and its sinks are gone."""
        ids, sinks = set(self._ids), len(self.sinks)
        try:
            yield
        except BaseException:
            self._forget_since(ids, sinks)
            raise

    @contextmanager
    def undone(self) -> Iterator[None]:
        """What is built inside is there inside only."""
        ids, sinks = set(self._ids), len(self.sinks)
        try:
            yield
        finally:
            self._forget_since(ids, sinks)

    def _forget_since(self, ids: set[str], sinks: int) -> None:
        self._ids = ids
        del self.sinks[sinks:]

    def release(self, dropped: Port, kept: Iterable[Port]) -> None:
        """Free the names of what leads to ``dropped`` alone: neither to a sink nor to what is kept."""
        used = _leading_to([*self.sinks, *(port.node for port in kept)])
        for node in _leading_to([dropped.node]):
            if node not in used and not isinstance(node, StepNode):
                self._ids.discard(node.operator_id)

    def nodes(self) -> list[Node]:
        """All nodes that lead to a sink, inputs before their consumers.

        Raises `ValueError` if two have one name, of which one was released.
        """
        nodes = _leading_to(self.sinks)
        ids = [node.operator_id for node in nodes if not isinstance(node, StepNode)]
        if twice := [name for name in ids if ids.count(name) > 1]:
            raise ValueError(f"two operators are called {twice[0]!r}, which names their state: one was dropped in SQL")
        return nodes


def _leading_to(ends: Iterable[Node]) -> list[Node]:
    """The nodes and all before them, inputs before their consumers."""
    ordered: dict[int, Node] = {}

    def visit(node: Node) -> None:
        if id(node) not in ordered:
            for port in node.inputs:
                visit(port.node)
            ordered[id(node)] = node

    for end in ends:
        visit(end)
    return list(ordered.values())


def derived_id(*parts: str, within: str | None = None) -> str:
    """An operator id from words; ``within`` is the id of the operator upstream that has one."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts)).strip("_.-") or "operator"
    if within is not None:
        text = f"{within}.{text}"
    if len(text) > _DERIVED_MAX:
        text = f"{text[: _DERIVED_MAX - 9]}-{zlib.crc32(text.encode()):08x}"
    return text


def upstream_id(port: Port) -> str:
    """The id of the nearest operator upstream that has one, and which of its outputs is meant."""
    while isinstance(port.node, StepNode):
        port = port.node.input
    name = port.node.output_names[port.index]
    return f"{port.node.operator_id}.{name}" if name else port.node.operator_id


def explain(*ends: Port) -> str:
    """The operators that lead to streams or sinks, the last one first, indented as they feed each other."""
    lines: list[str] = []
    seen: set[int] = set()

    def visit(port: Port, depth: int) -> None:
        node = port.node
        again = id(node) in seen and bool(node.inputs)
        output = "" if isinstance(node, StepNode | SinkNode) else node.output_names[port.index]
        shown = f"{output.replace('_', ' ')} rows of {node.label}" if output else node.label
        lines.append("  " * depth + shown + (" (as above)" if again else ""))
        if again:
            return
        seen.add(id(node))
        if not isinstance(node, SourceNode | StepNode | SinkNode):
            for note in node.state:
                bound = "" if note.bounded else "; GROWS FOR EVER"
                lines.append("  " * depth + f"  | state {note.table}: {note.growth}{bound}")
        for before in node.inputs:
            visit(before, depth + 1)

    for end in ends:
        visit(end, 0)
    return "\n".join(lines)


def describe_plan(name: str, nodes: Sequence[Node]) -> dict[str, Any]:
    """What identifies a job in its checkpoints, by operator id.

    Stateless verbs have no id; they are part of what the operator after them reads (`INPUT`).
    """
    plan: dict[str, Any] = {JOB: {"name": name}}
    for node in nodes:
        if isinstance(node, StepNode):
            continue
        plan[node.operator_id] = dict(node.describe())
        if node.inputs:
            described = [_input_of(port) for port in node.inputs]
            plan[node.operator_id][INPUT] = described[0] if len(described) == 1 else described
    return plan


def _input_of(port: Port) -> list[str]:
    """The operator that a stream comes from, then the verbs on the way."""
    verbs: list[str] = []
    node = port.node
    source = port
    while isinstance(node, StepNode):
        verbs.insert(0, node.label)
        source = node.input
        node = source.node
    return [upstream_id(source), *verbs]
