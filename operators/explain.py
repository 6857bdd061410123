"""What a job or a stream is made of, to be read: as text, and in a notebook as a picture."""

from __future__ import annotations

from operators.graph import Port, explain
from operators.picture import picture
from statebackend.markup import Markup

__all__ = ["Explanation"]


class Explanation(str):
    """The text of `explain`; a notebook shows the picture instead, and ``print`` the text.

    The picture is of the graph as it was when this was made.
    """

    __slots__ = ("_ends",)

    _ends: tuple[Port, ...]

    @classmethod
    def of(cls, *ends: Port, columns: str = "") -> Explanation:
        """The operators that lead to ``ends``; ``columns``: a line about the rows that leave them."""
        made = cls("\n".join(filter(None, [explain(*ends), columns])))
        made._ends = ends
        return made

    @property
    def picture(self) -> Markup | None:
        """An SVG image; None of a job without ends."""
        return picture(*self._ends) if self._ends else None

    def _repr_svg_(self) -> str | None:
        return self.picture

    def __repr__(self) -> str:
        """The text, not a literal with its line ends spelled out: this is how a shell shows it."""
        return str(self)
