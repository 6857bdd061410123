"""What a background task did so far: written by the task, read from any thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["TaskProgress"]


class TaskProgress:
    """Runs, failures and the failure that counts now, of one background task.

    ``last_error`` is the failure of the latest run, None after one that succeeded; ``last_run_ms`` when the latest
    run ended, in epoch milliseconds.
    """

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self._now_ms = now_ms
        self._under_way = 0
        self.completed = 0
        self.failures = 0
        self.last_error: BaseException | None = None
        self.last_run_ms: int | None = None

    @property
    def running(self) -> bool:
        """Whether a run is under way; there may be several."""
        return self._under_way > 0

    def failed(self, error: BaseException) -> None:
        """A failure that kept a run from beginning."""
        self.failures += 1
        self.last_error = error
        self.last_run_ms = self._now_ms()

    @contextmanager
    def run(self, *expected: type[BaseException]) -> Iterator[None]:
        """One run; what it raises is kept and goes on. Being cancelled, or what is ``expected``, is no failure."""
        self._under_way += 1
        try:
            yield
        except BaseException as error:
            if not isinstance(error, (asyncio.CancelledError, *expected)):
                self.failures += 1
                self.last_error = error
            raise
        else:
            self.completed += 1
            self.last_error = None
        finally:
            self._under_way -= 1
            self.last_run_ms = self._now_ms()
