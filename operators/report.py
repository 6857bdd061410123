"""What a job tells about itself: progress while it runs, a result when it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

__all__ = ["CheckpointStats", "JobOutcome", "JobProgress", "JobResult", "OperatorStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointStats:
    """One committed checkpoint.

    ``drain_ms``: time to aggregate what was buffered; ``sync_ms``: time the stream stood still for the
    cut itself; ``duration_ms``: from the cut to the commit; ``bytes`` and ``rows``: what was written.
    """

    checkpoint_id: int
    drain_ms: float
    sync_ms: float
    duration_ms: float
    bytes: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorStats:
    """Rows of this run through one operator. ``side_rows``: late rows of a window, bad rows of a source."""

    rows_in: int
    rows_out: int
    side_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress:
    """A glance at a running job. ``rows_total`` is None where a source does not know its size.

    ``positions``, ``watermarks`` (epoch ms) and ``operators`` are by operator id; ``rows_read``
    counts this run only.
    """

    seconds: float
    rows_read: int
    rows_total: int | None
    positions: Mapping[str, Any]
    watermarks: Mapping[str, int]
    operators: Mapping[str, OperatorStats]
    checkpoints: Sequence[CheckpointStats]
    restored_from: int | None


class JobOutcome(StrEnum):
    """Why a job ended without an error."""

    FINISHED = "finished"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What a run did. ``restored_from`` is the checkpoint id, ``restored_positions`` are by source id."""

    outcome: JobOutcome
    seconds: float
    rows_read: int
    operators: Mapping[str, OperatorStats]
    checkpoints: Sequence[CheckpointStats]
    failed_checkpoints: int
    restored_from: int | None
    restored_positions: Mapping[str, Any]

    @property
    def late_rows(self) -> int:
        """Rows that came after all their windows were closed, and rows with a bad event time."""
        return sum(stats.side_rows for stats in self.operators.values())
