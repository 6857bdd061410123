"""What a user has built: nodes of streams, before anything runs.

Operator ids name state, positions and staged output in a checkpoint, so they come from the user or
from what an operator is (verb, names, parameters) and never from its place among the others:
inserting a filter changes no id. Stateless steps keep nothing and have no id.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pyarrow as pa

from operators.engine import Step
from operators.sinks.base import Sink
from operators.sources.base import Source
from operators.watermark import EventTimeSpec
from operators.windows import WindowSpec
from statebackend import Aggregation

__all__ = [
    "INPUT",
    "JOB",
    "Graph",
    "Node",
    "Port",
    "SinkNode",
    "SourceNode",
    "StepNode",
    "WindowNode",
    "derived_id",
    "describe_plan",
    "explain",
    "upstream_id",
]

JOB = "__job__"
"""Key of the job itself in the plan; no operator id can equal it."""

INPUT = "input"
"""Key, in the description of an operator, of what it reads: the operator before it and the verbs between."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_DERIVED_MAX = 96


@dataclass(frozen=True, slots=True)
class Port:
    """One output of a node: 0 is the main one."""

    node: Node
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceNode:
    """Reads a source. Output 1: rows with a bad event time."""

    operator_id: str
    source: Source
    schema: pa.Schema
    event_time: EventTimeSpec | None

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
    def label(self) -> str:
        """For `explain`."""
        return self.step.label


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowNode:
    """A windowed aggregation. Output 1: rows that came too late."""

    operator_id: str
    input: Port
    input_schema: pa.Schema
    event_time: str
    windows: WindowSpec
    aggregation: Aggregation
    group_by: tuple[str, ...]
    aggregates: tuple[str, ...]

    @property
    def label(self) -> str:
        """For `explain`."""
        result = self.aggregation.merger.result_schema.names[1:]
        spec = self.windows
        return f"window {self.operator_id}: {', '.join(result)} over {spec.length} ms every {spec.slide} ms"

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        return {
            "operator": "window",
            "event_time": self.event_time,
            "length_ms": self.windows.length,
            "slide_ms": self.windows.slide,
            "allowed_lateness_ms": self.windows.allowed_lateness,
            "group_by": list(self.group_by),
            "aggregates": list(self.aggregates),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SinkNode:
    """Hands a stream to a sink."""

    operator_id: str
    input: Port
    schema: pa.Schema
    sink: Sink

    @property
    def label(self) -> str:
        """For `explain`."""
        return f"sink {self.operator_id} ({self.sink.guarantee})"

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        return {"operator": "sink", "sink": dict(self.sink.describe())}


Node: TypeAlias = SourceNode | StepNode | WindowNode | SinkNode


@dataclass(slots=True)
class Graph:
    """The nodes of one context, in the order in which they were made."""

    sinks: list[SinkNode] = field(default_factory=list)
    _ids: set[str] = field(default_factory=set)

    def claim(self, name: str | None, derive: Callable[[], str]) -> str:
        """The user's name for an operator, or one derived from what it is.

        Raises `ValueError` for a name that cannot be one or that is taken.
        """
        operator_id = derive() if name is None else name
        if not _ID.fullmatch(operator_id):
            raise ValueError(f"name {operator_id!r}: use letters, digits, '.', '_' and '-', at most 120 of them")
        if operator_id in self._ids:
            hint = "give one of the two a name=" if name is None else "choose another name="
            raise ValueError(f"two operators are called {operator_id!r}, which names their state: {hint}")
        self._ids.add(operator_id)
        return operator_id

    def nodes(self) -> list[Node]:
        """All nodes that lead to a sink, inputs before their consumers."""
        ordered: dict[int, Node] = {}

        def visit(node: Node) -> None:
            if id(node) not in ordered:
                if not isinstance(node, SourceNode):
                    visit(node.input.node)
                ordered[id(node)] = node

        for sink in self.sinks:
            visit(sink)
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
    suffix = "" if port.index == 0 else ".late" if isinstance(port.node, WindowNode) else ".bad"
    return port.node.operator_id + suffix


def explain(port: Port) -> str:
    """The operators that lead to a stream, the last one first, indented as they feed each other."""
    lines: list[str] = []
    node: Node | None = port.node
    while node is not None:
        lines.append("  " * len(lines) + node.label)
        node = None if isinstance(node, SourceNode) else node.input.node
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
        if not isinstance(node, SourceNode):
            plan[node.operator_id][INPUT] = _input_of(node.input)
    return plan


def _input_of(port: Port) -> list[str]:
    """The operator that a stream comes from, then the verbs on the way."""
    verbs: list[str] = []
    node = port.node
    while isinstance(node, StepNode):
        verbs.insert(0, node.label)
        node = node.input.node
    return [upstream_id(port), *verbs]
