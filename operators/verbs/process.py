"""The verb for functions with keyed state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from operators.engine import plan_step
from operators.errors import SchemaError
from operators.functions import OnError
from operators.graph import Port
from operators.process import KeyedBatchProcess, KeyedProcess
from operators.stateful.process import ProcessNode
from operators.verbs.base import Column, StreamBase
from operators.windows import Duration, milliseconds

__all__ = ["ProcessVerbs"]


class ProcessVerbs(StreamBase):
    """Logic of the user's own, with state per key and timers."""

    def process(
        self,
        key_by: Sequence[Column] | Column,
        function: KeyedProcess | KeyedBatchProcess,
        *,
        ttl: Duration | None = None,
        on_error: str = "raise",
        name: str | None = None,
    ) -> Self:
        """Call a function with the rows of each key and its state; see `operators.process`.

        ``key_by``: columns or expressions, at least one. ``ttl``: the state of a key is forgotten when event time
        has passed its last row by this; None: it is kept for ever. ``on_error="skip"`` sends the rows on
        which the function fails to `failed_rows`, and their state stays as it was; an error in a timer
        always stops the job. The result has the columns of ``function.schema`` and no event time: assign one with
        `assign_event_time` if it has it.

        Raises `SchemaError` for a wrong column, or a ttl on a stream without event time.
        """
        if not isinstance(function, KeyedProcess | KeyedBatchProcess):
            raise TypeError(f"process: expected a KeyedProcess or KeyedBatchProcess, not {type(function).__name__}")
        self._require_append_only("process")
        keys, _ = self._grouping(key_by, [])
        if not keys:
            raise ValueError("process: needs at least one column to key by")
        forget = None if ttl is None else milliseconds(ttl, "ttl")
        if forget is not None:
            self._require_event_time("process with a ttl")
            if forget <= 0:
                raise ValueError(f"process: ttl ({forget} ms) must be positive, or None")
        step = plan_step("process", self._schema, lambda frame: frame.select(*keys), self._picked(keys))
        if isinstance(function, KeyedBatchProcess):
            names = [*step.schema.names, *function.state.names]
            if twice := sorted({n for n in names if names.count(n) > 1}):
                raise SchemaError(f"process: {twice} are columns of the key and of the state")
        node = ProcessNode(
            operator_id=self._claim(name, "process", type(function).__name__, *step.schema.names),
            input=self._port,
            input_schema=self._schema,
            event_time=self._event_time,
            keys=step,
            function=function,
            on_error=OnError(on_error),
            ttl_ms=forget,
        )
        note = "what a function emits has no event time: use assign_event_time()"
        return self._derive(Port(node), function.schema, event_time=None, time_note=note)
