"""HTML and SVG for notebooks: what ``_repr_html_`` of the objects of these packages is made of.

A notebook shows an object as HTML in which names and values of users stand: of tables, columns, operators, positions,
rows. All of them reach the page through `element`, which escapes whatever is not `Markup` already.

Invariants:

* Only this module makes `Markup` out of text, and only of tags and attributes that it wrote itself.
* Nothing is loaded, run or linked: no scripts, no style sheets, no references. Styles are inline and take the colours
  of the page, light or dark.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

__all__ = ["Markup", "card", "details", "element", "facts", "grid", "joined"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""What neither HTML nor XML can hold: an SVG with one of them is not shown at all."""
_TEXT_MAX = 200
_LINE = "1px solid rgba(128,128,128,.35)"


class Markup(str):
    """Text that is HTML or SVG already; everything else is escaped where it is put into it."""

    __slots__ = ()


def element(tag: str, *content: object, **attributes: object) -> Markup:
    """One element. Content that is not `Markup` is text; None is nothing.

    A name of an attribute may end in ``_``, and has ``-`` for ``_`` within; None leaves the attribute out.
    Raises ``ValueError`` for a tag or a name of an attribute that is none.
    """
    names = [name.removesuffix("_").replace("_", "-") for name in attributes]
    for name in (tag, *names):
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of an element or attribute")
    given = zip(names, attributes.values(), strict=True)
    shown = "".join(f' {name}="{_escaped(value)}"' for name, value in given if value is not None)
    return Markup(f"<{tag}{shown}>{joined(*content)}</{tag}>")


def joined(*content: object) -> Markup:
    """Several things one after the other."""
    return Markup("".join(part if isinstance(part, Markup) else _escaped(part) for part in content if part is not None))


def card(title: object, kind: str, *parts: Markup | None) -> Markup:
    """An object: what it is called, what kind of thing it is, and its parts below."""
    kind_shown = element("span", kind, style="opacity:.6;margin-left:.6em;font-size:90%")
    head = element("div", element("b", title), kind_shown, style="margin-bottom:.3em")
    return element("div", head, *parts, style="border-left:3px solid rgba(80,130,180,.7);padding:.2em 0 .2em .8em")


def facts(named: Mapping[str, object]) -> Markup:
    """A line of facts, each with its name; those that are None are left out."""
    shown = [
        element("span", element("span", name, style="opacity:.6"), " ", _value(value), style="margin-right:1.4em")
        for name, value in named.items()
        if value is not None
    ]
    return element("div", *(joined(fact, " ") for fact in shown), style="margin:.15em 0")


def grid(
    columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None, *, right: Collection[str] = ()
) -> Markup:
    """A table; columns with numbers, and those named in ``right``, are put to the right."""
    listed = [tuple(row) for row in rows]
    numeric = (any(_is_number(row[at]) for row in listed) for at in range(len(columns)))
    sides = ["right" if n or c in right else "left" for n, c in zip(numeric, columns, strict=True)]
    head = [element("th", c, style=_cell(side, border=True)) for c, side in zip(columns, sides, strict=True)]
    body = [
        element("tr", *(element("td", _value(value), style=_cell(s)) for value, s in zip(row, sides, strict=True)))
        for row in listed
    ]
    table = element(
        "table",
        element("thead", element("tr", *head)),
        element("tbody", *body),
        style="border-collapse:collapse;margin:.2em 0 .4em 0;font-size:90%",
    )
    return joined(
        None if title is None else element("div", title, style="opacity:.75;margin-top:.5em"),
        table if listed else element("div", "none", style="opacity:.6"),
    )


def details(summary: str, *content: Markup) -> Markup:
    """Something that is shown when it is asked for."""
    return element("details", element("summary", summary, style="cursor:pointer;opacity:.75"), *content)


def _cell(side: str, *, border: bool = False) -> str:
    line = f"border-bottom:{_LINE};opacity:.75;" if border else ""
    return f"{line}text-align:{side};padding:.15em .9em .15em 0;vertical-align:top;white-space:pre-wrap"


def _value(value: object) -> object:
    """As a reader wants it: numbers in groups of three, long texts cut."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= _TEXT_MAX else f"{text[:_TEXT_MAX]}…"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _escaped(value: object) -> str:
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)))
