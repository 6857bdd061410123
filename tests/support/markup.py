"""What notebooks are shown: every piece of HTML and SVG is well-formed, and holds nothing that runs or loads."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

__all__ = ["HOSTILE", "parsed", "shown", "texts"]

HOSTILE = "<img src=x onerror=alert(1)>\"'&<script>"
"""A name that would be a part of the page if it were not escaped."""

_ELEMENTS = {
    "div", "span", "b", "table", "thead", "tbody", "tr", "th", "td", "details", "summary",
    "svg", "g", "rect", "title", "text", "path", "polygon",
}  # fmt: skip
_ATTRIBUTES = {
    "style", "xmlns", "width", "height", "viewBox", "role", "x", "y", "rx", "d", "points", "fill", "stroke",
    "stroke-width", "font-weight", "font-style", "font-family", "font-size",
}  # fmt: skip


def shown(thing: Any) -> ET.Element:
    """What a notebook shows of an object."""
    return parsed(thing._repr_html_())


def parsed(markup: str) -> ET.Element:
    """The tree of some HTML or SVG; an ``AssertionError`` where it has other elements or attributes than expected."""
    tree = ET.fromstring(f"<div>{markup}</div>")
    for node in tree.iter():
        assert node.tag.split("}")[-1] in _ELEMENTS, node.tag
        assert set(node.attrib) <= _ATTRIBUTES, node.attrib
        assert "url(" not in node.get("style", ""), node.attrib
    return tree


def texts(tree: ET.Element) -> list[str]:
    """Every text of the tree, in its order."""
    return [text.strip() for text in tree.itertext() if text.strip()]
