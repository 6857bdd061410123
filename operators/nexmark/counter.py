"""How far a run is, in events of the whole stream.

A query reads one, two or three kinds of events. The stream has *passed* event n when every reader has
handed out all its rows up to n and what came of them was processed; so a count of events means the
same for every query and goes on through restarts. Checkpoints and the kill go by that count.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

__all__ = ["EventCounter", "kill_this_process"]


def kill_this_process() -> None:
    """SIGKILL: nothing is flushed, nothing is closed."""
    os.kill(os.getpid(), signal.SIGKILL)


class EventCounter:
    """Counts for one run. All calls come from the job's thread.

    Args:
        total: events of the whole stream.
        checkpoint_events: how many events lie between two checkpoints; None for none.
        kill_after: call ``kill`` when so many events have been passed; None never. A run that is restored
            beyond that point is not killed.
    """

    def __init__(
        self,
        total: int,
        *,
        checkpoint_events: int | None = None,
        kill_after: int | None = None,
        kill: Callable[[], None] = kill_this_process,
    ) -> None:
        self.total = total
        self._checkpoint_events = checkpoint_events
        self._kill_after = kill_after
        self._kill = kill
        self._reached: dict[str, int] = {}
        self._last_checkpoint = 0
        self.began_at: float | None = None
        """When the first reader was polled, by `time.perf_counter`."""
        self.first = 0
        """Events that had been passed by then."""

    @property
    def passed(self) -> int:
        """Events that every reader has passed."""
        return min(self._reached.values(), default=0)

    def open(self, reader: str, events: int) -> None:
        """A reader begins after so many events; every reader is opened before the first one is polled."""
        self._reached[reader] = events

    def poll(self) -> None:
        """A reader is polled, so all that was handed out before has been processed: kill if it is time."""
        if self.began_at is None:
            self.began_at = time.perf_counter()
            self.first = self._last_checkpoint = self.passed
            if self._kill_after is not None and self.first >= self._kill_after:
                self._kill_after = None
        if self._kill_after is not None and self.passed >= self._kill_after:
            self._kill()

    def reach(self, reader: str, events: int) -> None:
        """A reader hands out its rows of the first so many events."""
        self._reached[reader] = max(events, self._reached[reader])

    def end(self, reader: str) -> None:
        """A reader has no more rows."""
        self.reach(reader, self.total)
        self.poll()

    def checkpoint_due(self) -> bool:
        """Whether a multiple of the events between checkpoints was passed since it last was true."""
        every = self._checkpoint_events
        if every is None or self.passed // every == self._last_checkpoint // every:
            return False
        self._last_checkpoint = self.passed
        return True
