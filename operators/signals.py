"""SIGINT and SIGTERM: the first asks a job to stop gracefully, the second aborts it.

A source that waits for input is woken, so that the first signal takes effect at once: the handler
raises inside `Interrupts.polling`, and only there. The batch that may be lost with it was not
processed, so its position is not committed and the restarted job reads it again.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import FrameType
from typing import Final, TypeVar

__all__ = ["INTERRUPTED", "Interrupted", "Interrupts"]

T = TypeVar("T")


class Interrupted(Enum):
    """The type of `INTERRUPTED`."""

    INTERRUPTED = "interrupted"


INTERRUPTED: Final = Interrupted.INTERRUPTED
"""What `Interrupts.polling` returns when a signal ended it."""


class _WakeUp(KeyboardInterrupt):
    """Raised by the handler in a source that waits; no ``except Exception`` swallows it."""


class Interrupts:
    """The signals of one run; ``stop`` is set by the first one."""

    def __init__(self, stop: threading.Event) -> None:
        self.aborted = False
        self.number: int | None = None  # of the signal that asked for the stop
        self._stop = stop
        self._polling = False
        self._woken = False

    @contextmanager
    def installed(self, *, enabled: bool) -> Iterator[None]:
        """Handle the signals inside, if this is the main thread."""
        if not enabled or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def polling(self, poll: Callable[[], T]) -> T | Interrupted:
        """Call ``poll``, which may wait; `INTERRUPTED` if a signal woke it."""
        try:
            self._polling = True
            try:
                return poll()
            finally:
                self._polling = False
        except BaseException:
            # A source may have wrapped what woke it.
            if self._woken:
                return INTERRUPTED
            raise

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._stop.is_set():
            self.aborted = True
            raise KeyboardInterrupt(f"signal {number}, the second one: aborted without a last checkpoint")
        self.number = number
        self._stop.set()
        if self._polling:
            self._woken = True
            raise _WakeUp
