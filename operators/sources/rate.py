"""How many rows a second are taken from a source.

The source is not asked while it rests, so nothing piles up behind the limit. Positions do not know of
it: a limit may be changed, or taken away, when a job is restored.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["RateLimit"]

_CATCH_UP_S = 0.1


class RateLimit:
    """At most ``rows_per_s`` rows a second on average; a job that was busy may catch up a tenth of a second.

    ``clock``: monotonic seconds. Raises `ValueError` unless the rate is positive.
    """

    def __init__(self, rows_per_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        if not 0 < rows_per_s < float("inf"):
            raise ValueError(f"max_rows_per_second must be positive, or None, not {rows_per_s}")
        self._rows_per_s = rows_per_s
        self._clock = clock
        self._next: float | None = None

    def ready(self) -> bool:
        """Whether the source may be asked."""
        return self._next is None or self._clock() >= self._next

    def took(self, rows: int) -> None:
        """So many rows came."""
        now = self._clock()
        begin = now if self._next is None else max(self._next, now - _CATCH_UP_S)
        self._next = begin + rows / self._rows_per_s
