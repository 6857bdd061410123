"""Names: the functions that the dialect adds to DataFusion's own, and what the operators of a query are called."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from operators.graph import derived_id

__all__ = ["BOUND_FUNCTIONS", "WINDOW_FUNCTIONS", "OperatorNames"]

WINDOW_FUNCTIONS: Mapping[str, int] = MappingProxyType({"tumble": 1, "hop": 2, "session": 1, "cumulate": 2})
"""The functions that stand for windows, and how many intervals each takes after the event time."""

BOUND_FUNCTIONS = ("window_start_time", "window_end_time")
"""The bounds of the window of a group, named as the columns of the result of `DataStream.window`."""


class OperatorNames:
    """Ids for the operators of one query: its name and words about each, with a number where those are the same.

    The same query gives the same ids, so its state is found again.
    """

    def __init__(self, query: str) -> None:
        self._query = query
        self._given: dict[str, int] = {}

    def claim(self, *words: str) -> str:
        """The id of one more operator."""
        name = derived_id(self._query, *words)
        self._given[name] = number = self._given.get(name, 0) + 1
        return name if number == 1 else derived_id(name, str(number))
