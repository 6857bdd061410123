"""Operators that call functions of the user: on batches, on rows, asynchronously.

They keep nothing. A function that raises stops the job with an error that names the operator and the batch, the
checkpoint before it stays good; with ``on_error="skip"`` the rows that it was given go to the side output instead.

An asynchronous function runs on an event loop of the operator's own, several batches at once; results and
watermarks are handed on in the order in which they came, and at a barrier nothing is under way.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import pyarrow as pa

from operators.errors import SchemaError
from operators.graph import Port, StateNote
from operators.runtime import BaseOperator, BuildContext, Cursor, Operator, Output, user_error
from operators.windows import MAX_WATERMARK

__all__ = ["AsyncFunction", "BatchFunction", "FunctionKind", "FunctionNode", "OnError", "Rows", "all_rows"]

Rows: TypeAlias = pa.RecordBatch | pa.Table | Iterable[pa.RecordBatch] | None
"""What a function may return: rows in one or several pieces, or nothing."""


def all_rows(result: Iterable[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    """What a function of a row returned, or None for nothing; all of it before any is used, as a generator may raise.

    Raises `TypeError` for a single row.
    """
    if isinstance(result, Mapping):
        raise TypeError("it must return rows (a list, or yield them), not one row")
    return list(result or ())


class OnError(StrEnum):
    """What happens when a function of the user raises."""

    RAISE = "raise"
    SKIP = "skip"


class FunctionKind(StrEnum):
    """How a function is called."""

    BATCHES = "map_batches"
    ROWS = "flat_map"
    ASYNC = "map_async"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FunctionNode:
    """Calls ``function`` on everything; its result has ``schema``. Output 1: rows that it failed on.

    ``capacity``: batches under way at once, ``timeout_s``: seconds for each; of asynchronous functions.
    """

    operator_id: str
    input: Port
    input_schema: pa.Schema
    schema: pa.Schema
    kind: FunctionKind
    function: Callable[..., Any]
    on_error: OnError
    capacity: int = 1
    timeout_s: float | None = None
    output_names: tuple[str, ...] = ("", "failed")
    state: tuple[StateNote, ...] = ()

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The one input."""
        return (self.input,)

    @property
    def label(self) -> str:
        """For `explain`."""
        return f"{self.kind} {self.operator_id}: {_name(self.function)}"

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored: not the function, which may be mended."""
        return {"operator": str(self.kind), "schema": str(self.schema)}

    def build(self, context: BuildContext) -> Operator:
        """The operator."""
        if self.kind is FunctionKind.ASYNC:
            return AsyncFunction(self, context.cursor)
        return BatchFunction(self, context.cursor)


class _Function(BaseOperator):
    """What the operators share: checking results, and what to do with an error."""

    def __init__(self, node: FunctionNode, cursor: Cursor) -> None:
        super().__init__(node.operator_id)
        self.failed = Output()
        self._node = node
        self._cursor = cursor

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The results, and the rows on which the function failed."""
        return (self.output, self.failed)

    def _emit(self, rows: Rows) -> None:
        for piece in _pieces(rows):
            self.output.emit(self._conform(piece))

    def _conform(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        schema = self._node.schema
        if not isinstance(batch, pa.RecordBatch):
            raise SchemaError(f"{self.operator_id}: the function returned {type(batch).__name__}, not Arrow rows")
        if batch.schema.names != schema.names or batch.schema.types != schema.types:
            raise SchemaError(
                f"{self.operator_id}: the function returned columns\n{batch.schema.remove_metadata()}\n"
                f"its stream was declared with\n{schema}"
            )
        return pa.RecordBatch.from_arrays(batch.columns, schema=schema)

    def _fail(self, batch: pa.RecordBatch, where: str, error: Exception) -> None:
        if self._node.on_error is OnError.RAISE:
            raise user_error(self.operator_id, where, error) from error
        self.failed.emit(batch)


class BatchFunction(_Function):
    """Calls a function on every batch, or on every row."""

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Emit what the function makes of the rows."""
        if self._node.kind is FunctionKind.ROWS:
            self._flat_map(batch)
            return
        try:
            pieces = list(_pieces(self._node.function(batch)))
        except Exception as error:  # noqa: BLE001 - the user's
            self._fail(batch, str(self._cursor), error)
        else:
            self._emit(pieces)

    def _flat_map(self, batch: pa.RecordBatch) -> None:
        found: list[Mapping[str, Any]] = []
        failed: list[int] = []
        for number, row in enumerate(batch.to_pylist()):
            try:
                found.extend(all_rows(self._node.function(row)))
            except Exception as error:  # noqa: BLE001 - the user's
                if self._node.on_error is OnError.RAISE:
                    self._fail(batch, f"row {number} of {self._cursor}", error)
                failed.append(number)
        if failed:
            self.failed.emit(batch.take(failed))
        try:
            rows = pa.RecordBatch.from_pylist(found, schema=self._node.schema)
        except (pa.ArrowInvalid, TypeError, AttributeError) as error:
            raise SchemaError(
                f"{self.operator_id}: the function's rows do not fit the declared columns\n{self._node.schema}\n{error}"
            ) from error
        self.output.emit(rows)


@dataclass(frozen=True, slots=True)
class _Call:
    """A batch under way: its rows, where it came from, and what will become of it."""

    batch: pa.RecordBatch
    where: str
    result: Future[list[pa.RecordBatch]]


class AsyncFunction(_Function):
    """Calls an asynchronous function on several batches at once, keeping their order."""

    def __init__(self, node: FunctionNode, cursor: Cursor) -> None:
        super().__init__(node, cursor)
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"async {node.operator_id}", daemon=True)
        # Calls and watermarks (None: idle) that were not handed on yet, in order.
        self._waiting: deque[_Call | int | None] = deque()
        self._running = 0

    @property
    def uses_processing_time(self) -> bool:
        """Results are handed on between batches too."""
        return True

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Begin a call; hand on what is done, and wait while too many are under way."""
        if not self._thread.is_alive():
            self._thread.start()
        result = asyncio.run_coroutine_threadsafe(self._call(batch), self._loop)
        self._waiting.append(_Call(batch, str(self._cursor), result))
        self._running += 1
        self._hand_on(self._node.capacity)

    def announce(self, watermark: int) -> None:
        """It comes later than it seems: only after the batches before it."""

    def on_watermark(self, watermark: int) -> None:
        """Hand it on after the batches before it."""
        self._waiting.append(watermark)
        self._hand_on(self._node.capacity if watermark < MAX_WATERMARK else 0)

    def on_idle(self) -> None:
        """Hand it on after the batches before it."""
        self._waiting.append(None)
        self._hand_on(self._node.capacity)

    def on_processing_time(self, now_ms: int) -> None:
        """Hand on what is done."""
        del now_ms
        self._hand_on(self._node.capacity)

    def drain(self) -> None:
        """Wait for everything."""
        self._hand_on(0)

    def close(self) -> None:
        """Give up what is under way, and end the thread."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def _hand_on(self, leave: int) -> None:
        """Hand on from the front what is done, waiting until at most ``leave`` calls are under way."""
        while self._waiting:
            first = self._waiting[0]
            if isinstance(first, _Call):
                if self._running <= leave and not first.result.done():
                    return
                self._settle(first)
                self._running -= 1
            self._waiting.popleft()
            if first is None:
                super().on_idle()
            elif isinstance(first, int):
                super().on_watermark(first)

    def _settle(self, call: _Call) -> None:
        try:
            pieces = call.result.result()
        except Exception as error:  # noqa: BLE001 - the user's
            self._fail(call.batch, call.where, error)
        else:
            self._emit(pieces)

    async def _call(self, batch: pa.RecordBatch) -> list[pa.RecordBatch]:
        async with asyncio.timeout(self._node.timeout_s):
            return list(_pieces(await self._node.function(batch)))


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _pieces(rows: Rows) -> Iterable[pa.RecordBatch]:
    if rows is None:
        return ()
    if isinstance(rows, pa.RecordBatch):
        return (rows,)
    return rows.to_batches() if isinstance(rows, pa.Table) else rows


def _name(function: Callable[..., Any] | Callable[..., Awaitable[Any]]) -> str:
    return getattr(inspect.unwrap(function), "__qualname__", type(function).__name__)
