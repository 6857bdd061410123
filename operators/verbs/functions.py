"""Verbs that call functions of the user."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, Self

import pyarrow as pa

from operators.functions import FunctionKind, FunctionNode, OnError, Rows
from operators.graph import Port
from operators.stateful.process import ProcessNode
from operators.verbs.base import StreamBase

__all__ = ["FunctionVerbs"]


class FunctionVerbs(StreamBase):
    """Functions of batches, of rows, and asynchronous ones.

    All take ``schema``, the columns of what the function returns (default: those of the stream), and ``on_error``:
    ``"raise"`` stops the job with a `UserFunctionError`, ``"skip"`` sends the rows on which the function failed
    to `failed_rows`. The event time column stays what it is if the result has it, with the same type; a function
    that makes times earlier makes late rows.
    """

    def map_batches(
        self,
        function: Callable[[pa.RecordBatch], Rows],
        schema: pa.Schema | None = None,
        *,
        on_error: str = "raise",
        name: str | None = None,
    ) -> Self:
        """Call a function on every batch; it returns a record batch, a table, several batches, or None.

        It must not depend on where batches begin and end, nor remember anything: after a crash the rows since the
        last checkpoint come again, and not in the same batches.
        """
        return self._function(FunctionKind.BATCHES, function, schema, on_error, name)

    def flat_map(
        self,
        function: Callable[[Mapping[str, Any]], Iterable[Mapping[str, Any]] | None],
        schema: pa.Schema | None = None,
        *,
        on_error: str = "raise",
        name: str | None = None,
    ) -> Self:
        """Call a function on every row, a dict; it returns any number of dicts, or None. Python per row: slow."""
        return self._function(FunctionKind.ROWS, function, schema, on_error, name)

    def map_async(
        self,
        function: Callable[[pa.RecordBatch], Awaitable[Rows]],
        schema: pa.Schema | None = None,
        *,
        capacity: int = 8,
        timeout: float | timedelta | None = None,
        on_error: str = "raise",
        name: str | None = None,
    ) -> Self:
        """Call an asynchronous function on every batch, ``capacity`` of them at once; the order is kept.

        For look-ups over the network. ``timeout``: seconds (or a timedelta) for one call, None for no limit. All
        calls run on one event loop of their own; at a checkpoint they are waited for.
        """
        if capacity < 1:
            raise ValueError(f"map_async: capacity ({capacity}) must be at least 1")
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        if seconds is not None and seconds <= 0:
            raise ValueError(f"map_async: timeout ({seconds} s) must be positive, or None")
        return self._function(FunctionKind.ASYNC, function, schema, on_error, name, capacity, seconds)

    def failed_rows(self) -> Self:
        """The rows on which the function failed, with ``on_error="skip"``; they have no event time."""
        node = self._port.node
        if not isinstance(node, FunctionNode | ProcessNode) or node.on_error is not OnError.SKIP:
            raise ValueError('failed_rows: call it right on map_*, flat_map or process with on_error="skip"')
        schema = node.input_schema
        return self._derive(Port(node, 1), schema, event_time=None, time_note="failed rows have no watermark")

    def _function(
        self,
        kind: FunctionKind,
        function: Callable[..., Any],
        schema: pa.Schema | None,
        on_error: str,
        name: str | None,
        capacity: int = 1,
        timeout_s: float | None = None,
    ) -> Self:
        self._require_append_only(kind)
        result = self._schema if schema is None else schema.remove_metadata()
        node = FunctionNode(
            operator_id=self._claim(name, kind, getattr(function, "__name__", "function"), keeps_state=False),
            input=self._port,
            input_schema=self._schema,
            schema=result,
            kind=kind,
            function=function,
            on_error=OnError(on_error),
            capacity=capacity,
            timeout_s=timeout_s,
        )
        event_time, note = self._event_time, self._time_note
        if event_time is not None and (
            event_time not in result.names or result.field(event_time).type != self._schema.field(event_time).type
        ):
            event_time, note = None, f"the result of {kind} has no column {event_time!r} of its type"
        return self._derive(Port(node), result, event_time=event_time, time_note=note)
