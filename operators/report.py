"""What a job tells about itself: progress while it runs, a result when it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from statebackend.markup import Markup, card, facts, grid

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

    def _repr_html_(self) -> str:
        of = "" if self.rows_total is None else f" of {self.rows_total:,}"
        named = {"rows read": f"{self.rows_read:,}{of}", "seconds": self.seconds, "restored from": self.restored_from}
        return card("running", "JobProgress", facts(named), _operators(self.operators), _checkpoints(self.checkpoints))


class JobOutcome(StrEnum):
    """Why a job ended without an error."""

    FINISHED = "finished"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """What a run did. ``restored_from`` is the checkpoint id, ``restored_positions`` are by source id.

    ``savepoint``: under which name a job that was stopped kept its last checkpoint, if that was asked for.
    ``signal``: the number of the one that stopped it, if one did.
    """

    outcome: JobOutcome
    seconds: float
    rows_read: int
    operators: Mapping[str, OperatorStats]
    checkpoints: Sequence[CheckpointStats]
    failed_checkpoints: int
    restored_from: int | None
    restored_positions: Mapping[str, Any]
    savepoint: str | None = None
    signal: int | None = None

    @property
    def late_rows(self) -> int:
        """Rows that came after all their windows were closed, and rows with a bad event time."""
        return sum(stats.side_rows for stats in self.operators.values())

    def _repr_html_(self) -> str:
        named = {
            "rows read": self.rows_read,
            "seconds": self.seconds,
            "rows/s": round(self.rows_read / self.seconds) if self.seconds else None,
            "restored from checkpoint": self.restored_from,
            "failed checkpoints": self.failed_checkpoints or None,
        }
        return card(
            self.outcome.value, "JobResult", facts(named), _operators(self.operators), _checkpoints(self.checkpoints)
        )


_CHECKPOINTS = 5
"""The newest checkpoints that are shown, of those of a run."""


def _operators(of: Mapping[str, OperatorStats]) -> Markup:
    rows = [(name, stats.rows_in, stats.rows_out, stats.side_rows) for name, stats in of.items()]
    columns = ("operator", "rows in", "rows out", "late or bad rows")
    aside = any(stats.side_rows for stats in of.values())
    return grid(columns, rows) if aside else grid(columns[:3], [row[:3] for row in rows])


def _checkpoints(of: Sequence[CheckpointStats]) -> Markup:
    shown = of[-_CHECKPOINTS:]
    title = "checkpoints" if len(shown) == len(of) else f"the last {_CHECKPOINTS} of {len(of):,} checkpoints"
    rows = [(c.checkpoint_id, c.drain_ms, c.sync_ms, c.duration_ms, c.rows, c.bytes) for c in shown]
    return grid(("checkpoint", "drain ms", "stood still ms", "until committed ms", "rows", "bytes"), rows, title)
