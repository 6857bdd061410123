"""Runs functions with keyed state and timers (see `operators.process`).

A batch is cut into its distinct keys, their state is read with one look-up per table, the function is called, and what
it changed is written with one write per table. Timers that are due at a watermark fire in the order of their times.

Invariants:

* Between two calls of the operator all state lies in its tables.
* A row on which a function fails (with ``on_error="skip"``) leaves no trace in the state.
* With a ``ttl`` the state of a key is forgotten when event time has passed its last row by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from operators.engine import StatelessPlan, Step
from operators.errors import SchemaError
from operators.functions import OnError, all_rows
from operators.graph import Port, StateNote
from operators.process import KeyedBatch, KeyedBatchProcess, KeyedProcess, TimerWords, declared_states
from operators.rows import combined, group_codes
from operators.runtime import BaseOperator, BuildContext, Output, user_error
from operators.stateful.process_state import BatchState, KeyStates
from operators.stateful.timers import Timers
from operators.watermark import EventTimeColumn
from operators.windows import MAX_WATERMARK, Int64Array

__all__ = ["Process", "ProcessNode"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProcessNode:
    """Calls a function with keyed state. ``keys`` computes the key columns. Output 1: rows that it failed on."""

    operator_id: str
    input: Port
    input_schema: pa.Schema
    event_time: str | None
    keys: Step
    function: KeyedProcess | KeyedBatchProcess
    on_error: OnError
    ttl_ms: int | None
    output_names: tuple[str, ...] = ("", "failed")

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The one input."""
        return (self.input,)

    @property
    def label(self) -> str:
        """For `explain`."""
        return f"process {self.operator_id}: {type(self.function).__qualname__} by {', '.join(self.keys.schema.names)}"

    @property
    def state(self) -> tuple[StateNote, ...]:
        """The declared states and the timers."""
        bound = "" if self.ttl_ms is None else f" of the last {self.ttl_ms} ms of event time"
        notes = [
            StateNote(f"{self.operator_id}:{name}", f"{growth} per key{bound}", bounded=self.ttl_ms is not None)
            for name, growth in _growth(self.function)
        ]
        return (*notes, StateNote(f"{self.operator_id}:timers", "one row per pending timer", bounded=True))

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored: keys and states, not the function, which may be mended."""
        return {
            "operator": "process",
            "keys": str(self.keys.schema),
            "state": _described(self.function),
            "ttl_ms": self.ttl_ms,
        }

    def build(self, context: BuildContext) -> Process:
        """The operator, restored."""
        if isinstance(self.function, KeyedProcess):
            return _RowProcess(self, self.function, context)
        return _BatchProcess(self, self.function, context)


class Process(BaseOperator):
    """What both forms share: keys, timers, and the order in which things happen."""

    def __init__(self, node: ProcessNode, context: BuildContext) -> None:
        super().__init__(node.operator_id)
        self.failed = Output()
        self._node = node
        self._cursor = context.cursor
        self._keys = StatelessPlan([node.keys])
        self._times = None if node.event_time is None else EventTimeColumn(node.input_schema, node.event_time)
        self._watermark = context.watermark(node.operator_id)
        self._timers = Timers(context.backend, f"{node.operator_id}:timers", node.keys.schema)
        self._clock_timers = Timers(context.backend, f"{node.operator_id}:processing_timers", node.keys.schema)
        self._now_ms = self._clock_timers.passed or 0
        self._expiry = (
            None if node.ttl_ms is None else Timers(context.backend, f"{node.operator_id}:expiry", node.keys.schema)
        )

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What the function returns, and the rows on which it failed."""
        return (self.output, self.failed)

    @property
    def watermark(self) -> int | None:
        """The watermark up to which timers have fired."""
        return self._watermark

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Call the function; timers that it sets in the past fire right after."""
        keys, key_index = self._distinct(batch)
        self._fire(self._call(batch, keys, key_index))

    def on_watermark(self, watermark: int) -> None:
        """Fire what is due, then forget the state that has expired."""
        if self._watermark is None or watermark > self._watermark:
            self._watermark = watermark
            due = self._timers.take_due(watermark)
            if watermark < MAX_WATERMARK:
                self._fire(due)
            elif due.num_rows:
                self._call_timers(due)
            self._forget(watermark)
        super().on_watermark(watermark)

    def on_processing_time(self, now_ms: int) -> None:
        """Fire what is due by the clock."""
        self._now_ms = max(now_ms, self._now_ms)
        due = self._clock_timers.take_due(self._now_ms)
        if due.num_rows:
            self._fire(self._call_clock_timers(due))

    # -- what the forms do

    def _call(self, batch: pa.RecordBatch, keys: pa.RecordBatch, key_index: Int64Array) -> pa.RecordBatch:
        """Call the function on a batch; the timers that it set in the past."""
        raise NotImplementedError

    def _call_timers(self, due: pa.RecordBatch) -> pa.RecordBatch:
        """Call the function for timers; the timers that it set in the past meanwhile."""
        raise NotImplementedError

    def _call_clock_timers(self, due: pa.RecordBatch) -> pa.RecordBatch:
        """The same for timers of processing time."""
        raise NotImplementedError

    def _drop(self, keys: pa.RecordBatch, times: Int64Array) -> None:
        """Forget the state of the keys that expired at these times, unless they were renewed."""
        raise NotImplementedError

    # -- helpers

    def _fire(self, due: pa.RecordBatch) -> None:
        while due.num_rows:
            due = self._call_timers(due)

    def _forget(self, watermark: int) -> None:
        if self._expiry is not None and watermark < MAX_WATERMARK:
            expired = self._expiry.take_due(watermark)
            if expired.num_rows:
                times, keys = self._expiry.split(expired)
                self._drop(keys, times)

    def _distinct(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, Int64Array]:
        """The distinct keys of a batch, and for each row the number of its key."""
        try:
            keys = combined(self._keys.run(batch), self._keys.schema)
        except Exception as error:
            raise user_error(self.operator_id, self._cursor, error) from error
        code, _ = group_codes(keys.columns, keys.num_rows)
        _, first, number = np.unique(code, return_index=True, return_inverse=True)
        return keys.take(pa.array(first)), number.astype(np.int64)

    def _ends(self, batch: pa.RecordBatch, keys: int, key_index: Int64Array) -> Int64Array | None:
        """When the state of each key expires, by the rows of a batch."""
        if self._node.ttl_ms is None or self._times is None:
            return None
        latest = np.full(keys, np.iinfo(np.int64).min)
        np.maximum.at(latest, key_index, self._times.values(batch) // self._times.per_ms)
        ends: Int64Array = latest + self._node.ttl_ms
        return ends

    def _conform(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        schema = self._node.function.schema
        if rows.schema.names != schema.names or rows.schema.types != schema.types:
            raise SchemaError(
                f"{self.operator_id}: the function emitted columns\n{rows.schema.remove_metadata()}\n"
                f"its schema is\n{schema}"
            )
        return pa.RecordBatch.from_arrays(rows.columns, schema=schema)


class _RowProcess(Process):
    """Calls a `KeyedProcess` row by row."""

    def __init__(self, node: ProcessNode, function: KeyedProcess, context: BuildContext) -> None:
        super().__init__(node, context)
        self._function = function
        self._states = KeyStates(
            context.backend, node.operator_id, node.keys.schema, declared_states(type(function)), node.ttl_ms
        )

    @property
    def uses_processing_time(self) -> bool:
        """If the function has timers of processing time."""
        return type(self._function).on_processing_timer is not KeyedProcess.on_processing_timer

    def _call(self, batch: pa.RecordBatch, keys: pa.RecordBatch, key_index: Int64Array) -> pa.RecordBatch:
        skip = self._node.on_error is OnError.SKIP
        found: list[Mapping[str, Any]] = []
        failed: list[int] = []
        with self._states.of(keys, self._watermark, self._ends(batch, keys.num_rows, key_index)) as states:
            for number, (row, key) in enumerate(zip(batch.to_pylist(), key_index.tolist(), strict=True)):
                before = states.snapshot(key) if skip else None
                try:
                    found.extend(all_rows(self._function.process(row, states.context(key))))
                except Exception as error:
                    if before is None:
                        raise user_error(self.operator_id, f"row {number} of {self._cursor}", error) from error
                    states.restore(key, before)
                    failed.append(number)
        if failed:
            self.failed.emit(batch.take(pa.array(failed)))
        if states.ends is not None and self._expiry is not None:
            self._expiry.set(states.ends, keys)
        self._emit(found)
        return self._apply_timers(keys, states.timers)

    def _call_timers(self, due: pa.RecordBatch) -> pa.RecordBatch:
        times, keys = self._timers.split(due)
        return self._run_timers(times, keys, self._function.on_timer)

    def _call_clock_timers(self, due: pa.RecordBatch) -> pa.RecordBatch:
        times, keys = self._clock_timers.split(due)
        return self._run_timers(times, keys, self._function.on_processing_timer)

    def _run_timers(
        self, times: Int64Array, keys: pa.RecordBatch, function: Callable[[int, Any], Any]
    ) -> pa.RecordBatch:
        code, _ = group_codes(keys.columns, keys.num_rows)
        _, first, number = np.unique(code, return_index=True, return_inverse=True)
        distinct = keys.take(pa.array(first))
        found: list[Mapping[str, Any]] = []
        with self._states.of(distinct, self._watermark) as states:
            for time, key in zip(times.tolist(), number.tolist(), strict=True):
                if ("delete", time) in states.timers[key]:
                    continue  # taken back by a timer that fired before it
                try:
                    found.extend(all_rows(function(time, states.context(key))))
                except Exception as error:
                    raise user_error(self.operator_id, f"the timer of {time} ms", error) from error
        self._emit(found)
        return self._apply_timers(distinct, states.timers)

    def _emit(self, rows: list[Mapping[str, Any]]) -> None:
        schema = self._node.function.schema
        try:
            batch = pa.RecordBatch.from_pylist(rows, schema=schema)
        except (pa.ArrowInvalid, TypeError, AttributeError) as error:
            raise SchemaError(f"{self.operator_id}: the function's rows do not fit\n{schema}\n{error}") from error
        self.output.emit(batch)

    def _drop(self, keys: pa.RecordBatch, times: Int64Array) -> None:
        self._states.drop(keys, times)

    def _apply_timers(self, keys: pa.RecordBatch, asked: list[list[tuple[str, int]]]) -> pa.RecordBatch:
        """Set and delete the timers that the function asked for; of one time the last word counts."""
        event, clock = {}, {}
        for key, words in enumerate(asked):
            for word, time in words:
                if word.endswith("processing"):
                    clock[key, max(time, self._now_ms)] = word.startswith("set")
                else:
                    event[key, time] = word == "set"
        _apply(self._clock_timers, keys, clock)
        return _apply(self._timers, keys, event)


class _BatchProcess(Process):
    """Calls a `KeyedBatchProcess` with whole batches."""

    def __init__(self, node: ProcessNode, function: KeyedBatchProcess, context: BuildContext) -> None:
        super().__init__(node, context)
        self._function = function
        self._states = BatchState(
            context.backend, node.operator_id, node.keys.schema, function.state, with_end=node.ttl_ms is not None
        )

    @property
    def uses_processing_time(self) -> bool:
        """If the function has timers of processing time."""
        return type(self._function).on_processing_timers is not KeyedBatchProcess.on_processing_timers

    def _call(self, batch: pa.RecordBatch, keys: pa.RecordBatch, key_index: Int64Array) -> pa.RecordBatch:
        ends = self._ends(batch, keys.num_rows, key_index)
        times = np.zeros(keys.num_rows, dtype=np.int64)
        call = self._states.read(keys, batch, key_index, times, self._watermark)
        try:
            self._function.process(call)
        except Exception as error:
            if self._node.on_error is OnError.RAISE:
                raise user_error(self.operator_id, self._cursor, error) from error
            self.failed.emit(batch)
            return self._timers.set(times[:0], keys.slice(0, 0))
        return self._answer(call, ends)

    def _call_timers(self, due: pa.RecordBatch) -> pa.RecordBatch:
        return self._run_timers(*self._timers.split(due), self._function.on_timers)

    def _call_clock_timers(self, due: pa.RecordBatch) -> pa.RecordBatch:
        return self._run_timers(*self._clock_timers.split(due), self._function.on_processing_timers)

    def _run_timers(
        self, times: Int64Array, keys: pa.RecordBatch, function: Callable[[KeyedBatch], None]
    ) -> pa.RecordBatch:
        """Each call has a key once, so several timers of one key take several calls."""
        code, _ = group_codes(keys.columns, keys.num_rows)
        order = np.argsort(code, kind="stable")
        begins = np.append(True, code[order][1:] != code[order][:-1])
        turn = np.empty(len(order), dtype=np.int64)
        turn[order] = np.arange(len(order)) - np.flatnonzero(begins)[np.cumsum(begins) - 1]
        late = []
        for number in range(int(turn.max()) + 1):
            here = np.flatnonzero(turn == number)
            events = combined([], self._node.input_schema)
            call = self._states.read(
                keys.take(pa.array(here)), events, np.zeros(0, dtype=np.int64), times[here], self._watermark
            )
            try:
                function(call)
            except Exception as error:
                raise user_error(self.operator_id, f"timers up to {times[here].max()} ms", error) from error
            late.append(self._answer(call, None))
        return combined(late, late[0].schema)

    def _answer(self, call: KeyedBatch, ends: Int64Array | None) -> pa.RecordBatch:
        if ends is not None and self._expiry is not None:
            self._expiry.set(self._states.renewed(ends), call.keys)
        self._states.write(call, ends)
        for rows in call.emitted:
            self.output.emit(self._conform(rows))
        clock = [words._replace(times=np.maximum(words.times, self._now_ms)) for words in call.processing_timers]
        _apply_last(self._clock_timers, call.keys, clock)
        return _apply_last(self._timers, call.keys, call.timers)

    def _drop(self, keys: pa.RecordBatch, times: Int64Array) -> None:
        self._states.drop(keys, times)


def _apply(timers: Timers, keys: pa.RecordBatch, words: Mapping[tuple[int, int], bool]) -> pa.RecordBatch:
    """Timers by (key number, time): set where true, deleted where false; those set in the past are returned."""
    index = np.asarray([key for key, _ in words], dtype=np.int64)
    times = np.asarray([time for _, time in words], dtype=np.int64)
    chosen = np.fromiter(words.values(), dtype=bool, count=len(words))
    timers.delete(times[~chosen], keys.take(pa.array(index[~chosen])))
    return timers.set(times[chosen], keys.take(pa.array(index[chosen])))


def _apply_last(timers: Timers, keys: pa.RecordBatch, words: Sequence[TimerWords]) -> pa.RecordBatch:
    """The same for many timers at once: of one time and key the last word counts."""
    if not words:
        return combined([], timers.schema)
    times = np.concatenate([some.times for some in words])
    index = np.concatenate([some.keys for some in words])
    chosen = np.repeat([some.is_set for some in words], [len(some.times) for some in words])
    if not chosen.all():
        order = np.lexsort((np.arange(len(times)), times, index))
        times, index, chosen = times[order], index[order], chosen[order]
        last = np.append((times[1:] != times[:-1]) | (index[1:] != index[:-1]), True)
        times, index, chosen = times[last], index[last], chosen[last]
        timers.delete(times[~chosen], keys.take(pa.array(index[~chosen])))
    return timers.set(times[chosen], keys.take(pa.array(index[chosen])))


def _growth(function: KeyedProcess | KeyedBatchProcess) -> list[tuple[str, str]]:
    if isinstance(function, KeyedBatchProcess):
        return [("state", "one row")]
    return KeyStates.growth(declared_states(type(function)))


def _described(function: KeyedProcess | KeyedBatchProcess) -> Any:
    if isinstance(function, KeyedBatchProcess):
        return str(function.state)
    return KeyStates.described(declared_states(type(function)))
