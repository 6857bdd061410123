"""Batches from an async generator: a subscription, a websocket, an HTTP feed.

The generator runs in a thread and an event loop of its own, a few batches ahead of the job, and waits while the job is
behind. While it has nothing the source is idle. The position is the number of batches handed out: a function
that takes the number of the first batch seeks by itself, one without arguments is called again and its batches are
skipped, and a generator that was made already is read once and refuses any position but the beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from operators.errors import SourceChangedError, SourceNotReplayableError
from operators.sources.base import IDLE, Idle, Position, SourceBatch
from operators.sources.iterable import conform_batch, takes_start
from operators.sources.readahead import ReadAhead

__all__ = ["AsyncBatches", "AsyncSource"]

AsyncBatches: TypeAlias = AsyncIterator[pa.RecordBatch | pa.Table]

_READ_AHEAD = 4
_WAIT_S = 0.01


class AsyncSource:
    """Record batches that an async generator supplies.

    Args:
        batches: an async generator function without arguments (replayable; called again and skipped forward), one
            that takes the number of the first batch (replayable by seeking), or an async iterator (read once).
        schema: the schema of every batch.

    A batch with other columns is a `SchemaError`. An error of the generator passes through, with a note that tells the
    batch. When the source is closed the generator is cancelled where it waits.
    """

    def __init__(
        self,
        batches: Callable[[], AsyncBatches] | Callable[[int], AsyncBatches] | AsyncBatches,
        schema: pa.Schema,
    ) -> None:
        self._replayable = not isinstance(batches, AsyncIterator)
        self._seeks = callable(batches) and takes_start(batches)
        self._make: Callable[..., AsyncBatches] = batches if callable(batches) else lambda: batches
        self._schema = schema.remove_metadata()
        self._used = False
        self._feed: _Feed | None = None
        self._reader: ReadAhead[pa.RecordBatch | pa.Table] | None = None
        self._batches = 0
        self._rows = 0

    @property
    def schema(self) -> pa.Schema:
        """The schema of every batch."""
        return self._schema

    @property
    def total_rows(self) -> None:
        """Unknown."""
        return

    def describe(self) -> Mapping[str, Any]:
        """Only the schema: what the user's code supplies cannot be compared."""
        return {"kind": "async", "schema": self._schema.to_string()}

    def open(self, position: Position | None) -> None:
        """Start at a position; raises `SourceNotReplayableError` for a generator that was read before."""
        self.close()
        start, rows = (0, 0) if position is None else (int(position["batches"]), int(position["rows"]))
        if not self._replayable and (start or self._used):
            reason = f"asked to start at batch {start}" if start else "opened a second time"
            raise SourceNotReplayableError(
                f"async source: a generator that was made already was {reason}; give the function that makes it instead"
            )
        self._used = True
        self._feed = _Feed(lambda: self._make(start) if self._seeks else self._make())
        self._reader = ReadAhead(self._feed.items(), depth=_READ_AHEAD, name="async-source")
        self._batches, self._rows = (start, rows) if self._seeks else (0, 0)
        while self._batches < start and self._next() is not None:
            pass
        if (self._batches, self._rows) != (start, rows):
            found = f"{self._rows} rows in {self._batches} batches"
            self.close()
            raise SourceChangedError("async source", expected=f"{rows} rows in {start} batches", found=found)

    def poll(self) -> SourceBatch | Literal[Idle.IDLE] | None:
        """The next batch; None at the end, `IDLE` while the generator waits."""
        if self._reader is None:
            raise RuntimeError("the async source is not open")
        if not self._reader.wait(_WAIT_S):
            return IDLE
        return self._next()

    def close(self) -> None:
        """Cancel the generator, and wait until it has ended."""
        if self._reader is not None and self._feed is not None:
            self._feed.cancel()
            self._reader.close()
            self._reader = self._feed = None

    def _next(self) -> SourceBatch | None:
        assert self._reader is not None
        try:
            item = self._reader.next()
        except Exception as e:
            e.add_note(f"raised by the user's async generator in place of batch {self._batches}")
            raise
        if item is None:
            return None
        batch = conform_batch(item, self._schema, f"batch {self._batches} of the async source")
        self._batches += 1
        self._rows += batch.num_rows
        return SourceBatch(batch, {"batches": self._batches, "rows": self._rows})


class _Feed:
    """An async generator as a plain one, with an event loop in the thread that iterates it."""

    def __init__(self, make: Callable[[], AsyncBatches]) -> None:
        self._make = make
        self._lock = threading.Lock()
        # State below is protected by _lock.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: asyncio.Task[pa.RecordBatch | pa.Table] | None = None
        self._cancelled = False

    def items(self) -> Generator[pa.RecordBatch | pa.Table, None, None]:
        """The batches, until the generator ends or `cancel`."""
        with asyncio.Runner() as runner:
            batches = self._make()
            try:
                while True:
                    try:
                        yield runner.run(self._one(batches))
                    except (StopAsyncIteration, asyncio.CancelledError):
                        return
            finally:
                if isinstance(batches, AsyncGenerator):
                    runner.run(batches.aclose())

    def cancel(self) -> None:
        """End `items` where it waits; from any thread."""
        with self._lock:
            self._cancelled = True
            if self._loop is not None and self._waiting is not None:
                with contextlib.suppress(RuntimeError):  # the loop has just been closed
                    self._loop.call_soon_threadsafe(self._waiting.cancel)

    async def _one(self, batches: AsyncBatches) -> pa.RecordBatch | pa.Table:
        task = asyncio.ensure_future(_anext(batches))
        with self._lock:
            if self._cancelled:
                task.cancel()
            self._loop, self._waiting = asyncio.get_running_loop(), task
        try:
            return await task
        finally:
            with self._lock:
                self._waiting = None


async def _anext(batches: AsyncBatches) -> pa.RecordBatch | pa.Table:
    return await anext(batches)
