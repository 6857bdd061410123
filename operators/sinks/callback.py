"""Output handed to a function of the user.

`CallbackSink` calls it after the commit, with batches kept in the state until then, and gives each
one a name, (checkpoint id, sequence), that stays the same when it is called again after a crash: a
callee that drops names it has seen has every row exactly once. The sequence is the batch's ordinal in
the state, so it grows over the whole life of the job and names the batch by itself. `ImmediateCallbackSink` calls it at
once, before any commit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa

from operators.errors import UserFunctionError
from operators.sinks.base import Guarantee, Prepared, SinkContext, conform
from operators.sinks.kept import KeptOutput

__all__ = ["CallbackSink", "CommittedFunction", "ImmediateCallbackSink"]

CommittedFunction: TypeAlias = Callable[[pa.RecordBatch, int, int], object]
"""(batch, checkpoint id, sequence): the last grows by one from batch to batch and is never used twice."""


class CallbackSink:
    """Calls ``function(batch, checkpoint_id, sequence)`` once the checkpoint of the batch is committed.

    At least once with stable names: between the call and the next committed checkpoint a crash makes
    it be called again with the same arguments. Nothing is ever called for rows that are not committed.
    It is called from one thread at a time, in the order of ``sequence``. If it raises,
    `UserFunctionError` stops the publication, which begins again there at the next checkpoint.

    ``memory_bytes``: how much may wait for it, in bytes of Arrow memory, before the job stops reading and takes a
    checkpoint: a slow function holds back the sources.
    """

    guarantee = Guarantee.AT_LEAST_ONCE

    def __init__(self, function: CommittedFunction, *, memory_bytes: int = 64 << 20) -> None:
        if not callable(function):
            raise TypeError(f"expected a function, not {type(function).__name__}")
        if memory_bytes < 1:
            raise ValueError(f"memory_bytes must be at least 1, not {memory_bytes}")
        self._function = function
        self._memory_bytes = memory_bytes
        self._context: SinkContext | None = None
        self._publishing = threading.Lock()

    def describe(self) -> Mapping[str, Any]:
        """Nothing but its kind: functions cannot be compared."""
        return {"kind": "callback"}

    def open(self, context: SinkContext, committables: Sequence[Any]) -> None:
        """Call the function again for what was committed and may not have been acknowledged."""
        self._schema = context.schema.remove_metadata()
        self._kept = KeptOutput(context, self._schema, committables)
        self._context = context
        self.publish(committables)

    def write(self, batch: pa.RecordBatch) -> None:
        """Keep a batch until its checkpoint is committed; batches without rows are dropped."""
        self._kept.write(conform(self._opened().operator_id, self._schema, batch))

    @property
    def full(self) -> bool:
        """Whether as much waits as may; see `BoundedSink`."""
        return self._context is not None and self._kept.bytes >= self._memory_bytes

    def prepare(self, checkpoint_id: int, *, final: bool) -> Prepared:  # noqa: ARG002 - the last one is no other
        """Name the batches since the last barrier; forget those that were acknowledged."""
        self._opened()
        return Prepared(self._kept.cut(checkpoint_id))

    def publish(self, committables: Sequence[Any]) -> None:
        """Call the function for every batch that it has not acknowledged in this process."""
        context = self._opened()
        with self._publishing:
            for committable in committables:
                for kept in self._kept.batches(committable):
                    try:
                        self._function(kept.batch, committable["checkpoint"], kept.ordinal)
                    except Exception as e:
                        position = {"checkpoint": committable["checkpoint"], "sequence": kept.ordinal}
                        raise UserFunctionError(context.operator_id, position=position, cause=e) from e
                    self._kept.acknowledge(kept.ordinal + 1)

    def close(self) -> None:
        """Let go; what is committed and not acknowledged is called when the job is opened again."""
        self._context = None

    def _opened(self) -> SinkContext:
        if self._context is None:
            raise RuntimeError("the callback sink is not open")
        return self._context


class ImmediateCallbackSink:
    """Calls ``function(batch)`` at once, on the job's thread.

    At least once: after a crash it is called again with rows it has seen, in batches that may be cut
    differently. If it raises, `UserFunctionError` stops the job.
    """

    guarantee = Guarantee.AT_LEAST_ONCE

    def __init__(self, function: Callable[[pa.RecordBatch], object]) -> None:
        if not callable(function):
            raise TypeError(f"expected a function, not {type(function).__name__}")
        self._function = function
        self._operator_id = "callback"
        self._schema = pa.schema([])
        self._batches = 0

    def describe(self) -> Mapping[str, Any]:
        """Nothing but its kind."""
        return {"kind": "immediate_callback"}

    def open(self, context: SinkContext, committables: Sequence[Any]) -> None:  # noqa: ARG002 - has none
        """Remember what to check."""
        self._operator_id = context.operator_id
        self._schema = context.schema.remove_metadata()

    def write(self, batch: pa.RecordBatch) -> None:
        """Call the function."""
        batch = conform(self._operator_id, self._schema, batch)
        try:
            self._function(batch)
        except Exception as e:
            raise UserFunctionError(self._operator_id, position={"batch": self._batches}, cause=e) from e
        self._batches += 1

    def prepare(self, checkpoint_id: int, *, final: bool) -> Prepared:  # noqa: ARG002 - nothing to prepare
        """Nothing to commit."""
        return Prepared()

    def publish(self, committables: Sequence[Any]) -> None:
        """Nothing to publish."""

    def close(self) -> None:
        """Nothing to release."""
