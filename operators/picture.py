"""The graph of a job as a picture: SVG, laid out here, without any program to draw it.

A layered drawing, sources at the top (Sugiyama, Tagawa and Toda, "Methods for visual understanding of hierarchical
system structures", 1981): every box gets the layer below its lowest input; an edge that spans layers gets a bend in
each of them; boxes and bends of a layer are ordered by the mean place of their neighbours, a few sweeps down and up;
and placed as near as possible to them without overlap (least squares: pooling of adjacent violators).

Stateless verbs that follow each other without a branch share a box, as they are evaluated together.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

from operators.graph import Node, Port, SinkNode, SourceNode, StateNote, StepNode
from statebackend.markup import Markup, element, joined

__all__ = ["picture"]

_LINE, _PAD_X, _PAD_Y = 16, 12, 9
_GAP_X, _GAP_Y, _MARGIN = 28, 40, 8
_CHARACTERS_MAX, _LINES_MAX = 48, 4
_SWEEPS = 6
_FONT, _SIZE = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif", 12
_COLORS = {"source": "#e3eefa", "step": "#f6f6f6", "state": "#fdf1dc", "sink": "#e4f3e6", "operator": "#ececf6"}
_BORDERS = {"source": "#4a7fb5", "step": "#9a9a9a", "state": "#c98a1b", "sink": "#4d9356", "operator": "#7a78b0"}
_INK, _FAINT, _WARNING, _EDGE = "#1f2328", "#59636e", "#b3202a", "#8c959f"
_NARROW, _WIDE = frozenset("iljtfrI.,:;'|!()[]{} -"), frozenset("mwMW@%&")


@dataclass(frozen=True, slots=True)
class _Text:
    text: str
    color: str = _INK
    bold: bool = False


@dataclass(slots=True, eq=False)
class _Box:
    """A box of the drawing, or a bend of an edge (of no lines). ``x``: its middle; ``floor``: the end of its layer."""

    kind: str
    lines: Sequence[_Text] = ()
    whole: str = ""
    above: list[_Box] = field(default_factory=list)
    below: list[_Box] = field(default_factory=list)
    layer: int = 0
    x: float = 0.0
    y: float = 0.0
    floor: float = 0.0

    @property
    def width(self) -> float:
        return max((_width(line) for line in self.lines), default=-2 * _PAD_X) + 2 * _PAD_X

    @property
    def height(self) -> float:
        return len(self.lines) * _LINE + 2 * _PAD_Y if self.lines else 0


@dataclass(frozen=True, slots=True)
class _Edge:
    """From box to box by way of its bends; ``label``: the side output that it is."""

    boxes: Sequence[_Box]
    label: str


def picture(*ends: Port) -> Markup:
    """An ``<svg>`` of all operators that lead to the given ends, of which there is one at least."""
    boxes, edges = _boxes(ends)
    _put_into_layers(boxes)
    routed = [_routed(edge) for edge in edges]
    everything = list(dict.fromkeys([*boxes, *(box for edge in routed for box in edge.boxes)]))
    layers = _ordered(everything)
    _place(layers)
    left = min(box.x - box.width / 2 for box in everything) - _MARGIN
    right = max(box.x + box.width / 2 for box in everything) + _MARGIN
    bottom = max(box.y + box.height for box in everything) + _MARGIN
    return element(
        "svg",
        *(_drawn_edge(edge) for edge in routed),
        *(_drawn_box(box) for box in boxes),
        xmlns="http://www.w3.org/2000/svg",
        width=f"{right - left:.0f}",
        height=f"{bottom:.0f}",
        viewBox=f"{left:.1f} 0 {right - left:.1f} {bottom:.1f}",
        role="img",
        font_family=_FONT,
        font_size=_SIZE,
        style="max-width:100%;height:auto",
    )


# --- from the graph to boxes


def _boxes(ends: Iterable[Port]) -> tuple[list[_Box], list[_Edge]]:
    """A box for every operator and every chain of stateless verbs, inputs first, and the edges between them."""
    box_of: dict[int, _Box] = {}
    consumers = _consumers(ends)
    boxes: list[_Box] = []
    edges: list[_Edge] = []

    def visit(node: Node) -> _Box:
        if id(node) in box_of:
            return box_of[id(node)]
        chain = [node]
        while isinstance(head := chain[0], StepNode) and isinstance(before := head.input.node, StepNode):
            if consumers[id(before)] > 1:
                break
            chain.insert(0, before)
        sources = [(visit(port.node), _output(port)) for port in chain[0].inputs]
        box = _box(chain)
        box_of[id(node)] = box
        boxes.append(box)
        for source, label in sources:
            edges.append(_Edge((source, box), label))
            source.below.append(box)
            box.above.append(source)
        return box

    for end in ends:
        box = visit(end.node)
        if side := _output(end):
            boxes.append(_Box("step", [_Text(f"{side} rows")], above=[box]))
            box.below.append(boxes[-1])
            edges.append(_Edge((box, boxes[-1]), ""))
    return boxes, edges


def _consumers(ends: Iterable[Port]) -> dict[int, int]:
    """How many read each node; an end counts as one."""
    counts: dict[int, int] = {}

    def visit(node: Node) -> None:
        counts[id(node)] = counts.get(id(node), 0) + 1
        if counts[id(node)] == 1:
            for port in node.inputs:
                visit(port.node)

    for end in ends:
        visit(end.node)
    return counts


def _output(port: Port) -> str:
    """The name of a side output."""
    return "" if isinstance(port.node, StepNode | SinkNode) else port.node.output_names[port.index]


def _box(chain: Sequence[Node]) -> _Box:
    lines: list[_Text] = []
    for node in chain:
        lines += [_Text(part, bold=not isinstance(node, StepNode)) for part in _wrapped(node.label)]
    last = chain[-1]
    notes = () if isinstance(last, SourceNode | StepNode | SinkNode) else last.state
    for note in notes:
        lines += [_Text(part, _FAINT) for part in _wrapped(f"state {note.table}: {note.growth}")]
        if not note.bounded:
            lines.append(_Text("grows for ever", _WARNING, bold=True))
    whole = "\n".join([*(node.label for node in chain), *(f"state {n.table}: {n.growth}" for n in notes)])
    return _Box(_kind(last, notes), lines, whole)


def _kind(node: Node, notes: Sequence[StateNote]) -> str:
    kinds: tuple[tuple[type, str], ...] = ((SourceNode, "source"), (StepNode, "step"), (SinkNode, "sink"))
    for type_, kind in kinds:
        if isinstance(node, type_):
            return kind
    return "state" if notes else "operator"


def _wrapped(text: str) -> list[str]:
    lines = textwrap.wrap(text, _CHARACTERS_MAX, max_lines=_LINES_MAX, placeholder=" …")
    return lines or [" "]


def _width(line: _Text) -> float:
    """About as wide as it is in the widest of the usual fonts."""
    ems = sum(0.36 if c in _NARROW else 0.95 if c in _WIDE else 0.72 if c.isupper() else 0.61 for c in line.text)
    wide = sum(ord(c) > 0x2E80 for c in line.text) * 0.5
    return (ems + wide) * _SIZE * (1.12 if line.bold else 1.0)


# --- where the boxes are


def _put_into_layers(boxes: Sequence[_Box]) -> None:
    """Below all inputs; a source right above the first that reads it. ``boxes`` come inputs first."""
    for box in boxes:
        box.layer = max((above.layer + 1 for above in box.above), default=0)
    for box in boxes:
        if not box.above and box.below:
            box.layer = min(below.layer for below in box.below) - 1


def _routed(edge: _Edge) -> _Edge:
    """The edge with a bend in every layer between its ends."""
    first, last = edge.boxes
    first.below.remove(last)
    last.above.remove(first)
    path = [first, *(_Box("bend", layer=layer) for layer in range(first.layer + 1, last.layer)), last]
    for one, other in pairwise(path):
        one.below.append(other)
        other.above.append(one)
    return _Edge(path, edge.label)


def _ordered(boxes: Sequence[_Box]) -> list[list[_Box]]:
    """The layers, each in an order in which few edges cross."""
    layers: list[list[_Box]] = [[] for _ in range(max(box.layer for box in boxes) + 1)]
    for box in boxes:
        layers[box.layer].append(box)
    best, fewest = [list(layer) for layer in layers], _crossings(layers)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            place = {id(b): i / len(row) for row in layers for i, b in enumerate(row)}
            wanted = [_mean([place[id(n)] for n in (b.above if down else b.below)], place[id(b)]) for b in layer]
            layer[:] = [layer[i] for i in sorted(range(len(layer)), key=wanted.__getitem__)]
        if (crossings := _crossings(layers)) < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    return best


def _crossings(layers: Sequence[Sequence[_Box]]) -> int:
    """How many pairs of edges between one layer and the next cross."""
    count = 0
    for upper, lower in pairwise(layers):
        place = {id(box): i for i, box in enumerate(lower)}
        ends = [place[id(below)] for box in upper for below in sorted(box.below, key=lambda b: place[id(b)])]
        count += sum(one > other for i, one in enumerate(ends) for other in ends[i + 1 :])
    return count


def _place(layers: Sequence[list[_Box]]) -> None:
    y = float(_MARGIN)
    for layer in layers:
        floor = y + max(box.height for box in layer)
        for box in layer:
            box.y, box.floor = y, floor
        y = floor + _GAP_Y
        _spread(layer, [0.0] * len(layer))
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            _spread(layer, [_mean([n.x for n in (b.above if down else b.below)], b.x) for b in layer])


def _spread(layer: Sequence[_Box], wanted: Sequence[float]) -> None:
    """Set ``x`` as near to what is wanted as the order and the gaps of the layer allow, in least squares."""
    offsets = [0.0]
    for one, other in pairwise(layer):
        offsets.append(offsets[-1] + (one.width + other.width) / 2 + _GAP_X)
    groups: list[list[float]] = []
    for want, offset in zip(wanted, offsets, strict=True):
        groups.append([want - offset])
        while len(groups) > 1 and fmean(groups[-2]) >= fmean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    places = [fmean(group) for group in groups for _ in group]
    for box, place, offset in zip(layer, places, offsets, strict=True):
        box.x = place + offset


def _mean(values: Sequence[float], default: float) -> float:
    return fmean(values) if values else default


# --- drawing


def _drawn_box(box: _Box) -> Markup:
    left = box.x - box.width / 2
    lines = [
        element(
            "text",
            line.text,
            x=f"{left + _PAD_X:.1f}",
            y=f"{box.y + _PAD_Y + _LINE * number + 12:.1f}",
            fill=line.color,
            font_weight="600" if line.bold else None,
        )
        for number, line in enumerate(box.lines)
    ]
    frame = element(
        "rect",
        x=f"{left:.1f}",
        y=f"{box.y:.1f}",
        width=f"{box.width:.1f}",
        height=f"{box.height:.1f}",
        rx="5",
        fill=_COLORS[box.kind],
        stroke=_BORDERS[box.kind],
    )
    return element("g", element("title", box.whole), frame, *lines)


def _drawn_edge(edge: _Edge) -> Markup:
    """Curved between layers and straight within them, so that it meets no box of a layer that it passes."""
    first, *between, last = edge.boxes
    x, floor = first.x, first.floor
    path = [f"M{x:.1f},{first.y + first.height:.1f} V{floor:.1f}"]
    for box in (*between, last):
        half = (box.y - floor) / 2
        path.append(f"C{x:.1f},{floor + half:.1f} {box.x:.1f},{box.y - half:.1f} {box.x:.1f},{box.y:.1f}")
        if box is not last:
            path.append(f"V{box.floor:.1f}")
        x, floor = box.x, box.floor
    line = element("path", d=" ".join(path), fill="none", stroke=_EDGE, stroke_width="1.4")
    tip = f"{x - 4:.1f},{last.y - 7:.1f} {x + 4:.1f},{last.y - 7:.1f} {x:.1f},{last.y:.1f}"
    arrow = element("polygon", points=tip, fill=_EDGE)
    if not edge.label:
        return joined(line, arrow)
    middle = edge.boxes[1]
    label = element(
        "text",
        f"{edge.label} rows",
        x=f"{middle.x + 9:.1f}",
        y=f"{middle.y - 6:.1f}",
        fill=_FAINT,
        font_style="italic",
    )
    return joined(line, arrow, label)
