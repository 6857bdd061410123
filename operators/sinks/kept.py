"""Output that is kept in the state until it is known to have arrived, cut into ranges by checkpoints.

Every kept batch has an ordinal that is never used twice (`PendingRows`); a checkpoint names the range of ordinals
that came since the one before, and goes on naming it until a later checkpoint finds it acknowledged. So whoever hands
the batches on, this process or the next, finds in the restored state exactly the batches of the ranges that the
manifest names, with the same ordinals; and "everything below n has arrived" is all that a receiver has to remember.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from operators.errors import OutputUncertainError
from operators.sinks.base import SinkContext
from operators.sinks.pending import PendingBatch, PendingRows
from statebackend import FencedError

__all__ = ["KeptOutput", "in_parts"]


class KeptOutput:
    """The kept batches of one sink.

    A range is a dict: ``{"checkpoint": id, "first": ordinal, "end": ordinal}`` and what `cut` was told to add; it is
    msgpack-able and what the manifest holds. ``write`` and ``cut`` belong to the job's thread, the rest to any.
    """

    def __init__(self, context: SinkContext, schema: pa.Schema, committables: Sequence[Any]) -> None:
        self._pending = PendingRows(context.backend, context.operator_id, schema)
        self._lock = threading.Lock()
        # Protected by _lock.
        self._ranges: list[dict[str, Any]] = [dict(c) for c in committables]
        self._resolved = False
        self._barrier = self._pending.next_ordinal
        self._acknowledged = min((r["first"] for r in self._ranges), default=self._barrier)

    @property
    def acknowledged(self) -> int:
        """Everything below this ordinal has arrived, as far as is known here."""
        with self._lock:
            return self._acknowledged

    @property
    def barrier(self) -> int:
        """The ordinal after the last one that a checkpoint has named, or may have."""
        with self._lock:
            return self._barrier

    @property
    def bytes(self) -> int:
        """Of all batches that are kept."""
        with self._lock:
            return self._pending.bytes

    def write(self, batch: pa.RecordBatch) -> None:
        """Keep a batch; one without rows is nothing."""
        if batch.num_rows:
            with self._lock:
                self._pending.append(batch)

    def cut(self, checkpoint_id: int, **more: Any) -> list[dict[str, Any]]:
        """At a barrier: name what came since the last one, forget what was acknowledged; all ranges that are open."""
        with self._lock:
            end = self._pending.next_ordinal
            if end > self._barrier:
                self._ranges.append({"checkpoint": checkpoint_id, "first": self._barrier, "end": end, **more})
            self._barrier = end
            self._ranges = [r for r in self._ranges if r["end"] > self._acknowledged]
            self._pending.drop(self._acknowledged)
            return [dict(r) for r in self._ranges]

    def batches(self, committable: Mapping[str, Any]) -> list[PendingBatch]:
        """The batches of a range that have not been acknowledged."""
        with self._lock:
            first = max(committable["first"], self._acknowledged)
            return [p for p in self._pending.batches if first <= p.ordinal < committable["end"]]

    def resolve(self, found: int | None, assumed: int | None, place: str, forgets: str) -> int:
        """Up to which ordinal the output has arrived, by what its receiver remembers (``found``; None: nothing).

        Where that does not fit the state ``assumed`` counts, what the user says; without it, or if that does not fit
        either, `OutputUncertainError`. ``place`` and ``forgets``, how the receiver comes to forget, are for its text.

        Raises `FencedError` when another process has gone on with the output while this one ran.
        """
        with self._lock:
            first, end = self._acknowledged, self._barrier
            again, self._resolved = self._resolved, True
        if found is not None and first <= found <= end:
            return found
        if found is None and first == end:
            return end  # nothing was ever sent, or everything is known to have arrived
        if found is not None and found > end and again:
            raise FencedError(f"{place}: another process has gone on with this output, up to number {found}")
        if assumed is not None and first <= assumed <= end:
            return assumed
        self._resolved = again
        if found is not None and found > end:
            raise OutputUncertainError(
                f"{place}: output up to number {found} was published, but the state knows of {end} only: it went back "
                "to an older checkpoint, or another process has gone on with it. What was published stays. To publish "
                f"what comes now after it, start the job once with assume_published={end}"
            )
        what = "the marker is gone" if found is None else f"the marker fell back to {found}"
        raise OutputUncertainError(
            f"{place}: {what} ({forgets}), so nobody knows whether the committed output number {first} to {end} is "
            f"there. Look, then start the job once with assume_published={first} to send it, or {end} if it is there"
        )

    def acknowledge(self, end: int) -> None:
        """Everything below this ordinal has arrived."""
        with self._lock:
            self._acknowledged = max(self._acknowledged, end)


def in_parts(waiting: Sequence[PendingBatch], bytes_max: int) -> list[list[PendingBatch]]:
    """The batches of each transaction, in order: so many bytes, or one batch."""
    parts: list[list[PendingBatch]] = []
    size = 0
    for kept in waiting:
        if not parts or size + kept.batch.nbytes > bytes_max:
            parts.append([])
            size = 0
        parts[-1].append(kept)
        size += kept.batch.nbytes
    return parts
