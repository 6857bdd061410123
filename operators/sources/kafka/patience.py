"""Waits for a cluster that does not answer: with a line in the log now and then, and for so long only."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from operators.errors import SourceUnavailableError
from operators.kafka import ClusterDownError, StoppedError

__all__ = ["Patience"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_S = 0.5
_TELL_S = 10.0
"""How often the log tells that nobody answers."""


class Patience:
    """Of one opening of a source, on its thread. ``who``: the cluster, and ``what`` is read of it, for messages.

    ``limit_s``: seconds for which nobody may answer. ``stop``: ends all waiting.
    """

    def __init__(self, who: str, what: str, limit_s: float, stop: threading.Event) -> None:
        self._who = who
        self._what = what
        self._limit_s = limit_s
        self._stop = stop
        self._since: float | None = None
        self._told = 0.0

    @property
    def is_tried(self) -> bool:
        """Whether nobody answered when it was asked last."""
        return self._since is not None

    def ask(self, question: Callable[[], T]) -> T:
        """Ask until there is an answer; raises `SourceUnavailableError` if there is none for too long."""
        while True:
            began = time.monotonic()
            try:
                answer = question()
            except ClusterDownError as error:
                self.missed(str(error), began)
                if self._stop.wait(_RETRY_S):
                    raise StoppedError from error
            else:
                self.answered()
                return answer

    def missed(self, said: str, since: float | None = None) -> None:
        """Nobody answers, by what is said since that time (monotonic seconds; now by default)."""
        now = time.monotonic()
        if self._since is None:
            self._since, self._told = since or now, now - _TELL_S
        waited = now - self._since
        if waited >= self._limit_s:
            raise SourceUnavailableError(
                f"{self._who} did not answer for {self._limit_s:.0f} s: {said}; {self._what} are read on from the last "
                "checkpoint once the job is started again"
            )
        if now - self._told >= _TELL_S:
            self._told = now
            left = self._limit_s - waited
            logger.warning("Kafka source: %s does not answer (%s); trying again for %.0f s more", self._who, said, left)

    def answered(self) -> None:
        """Somebody answered."""
        if self._since is not None:
            logger.info("Kafka source: %s answers again", self._who)
            self._since = None
