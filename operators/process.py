"""Functions with keyed state and timers: what the user writes, and what it is called with.

Two forms. A `KeyedProcess` is called with one row at a time, a dict, and sees the state of its key as plain Python
values: easy, and slow. A `KeyedBatchProcess` is called once per batch with Arrow columns: the distinct keys, their
state rows, and the events with the key of each.

The state of a key is declared as class attributes with Arrow types (`ValueState`, `ListState`, `MapState`), so it is
columns in a table like any other state. Nothing of a function is kept but that: a function must not remember anything
in attributes of its own, since after a crash the rows since the last checkpoint come again.

Timers are state too. A timer of event time fires when the watermark has passed it; one of processing time when
the wall clock has. At the end of the input every pending timer of event time fires once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from operators.errors import SchemaError
from operators.windows import Int64Array

__all__ = [
    "KeyedBatch",
    "KeyedBatchProcess",
    "KeyedProcess",
    "ListState",
    "MapState",
    "ProcessContext",
    "StateCell",
    "TimerWords",
    "ValueState",
    "declared_states",
]

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")
Row: TypeAlias = Mapping[str, Any]


@dataclass(slots=True)
class StateCell(Generic[T]):
    """One value of the state of one key: ``value`` is None until it is set; set it to None to forget it."""

    value: T | None = None


class _Declared:
    """A piece of state, declared as a class attribute of a `KeyedProcess`; read through its `ProcessContext`."""

    name: str = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name


class ValueState(_Declared, Generic[T]):
    """One value of an Arrow type per key: ``context[self.total].value``."""

    def __init__(self, kind: pa.DataType) -> None:
        self.kind = kind


class ListState(_Declared, Generic[T]):
    """A list of values of an Arrow type per key, a row of a table each; ``context[self.seen]`` is a Python list."""

    def __init__(self, kind: pa.DataType) -> None:
        self.kind = kind


class MapState(_Declared, Generic[K, V]):
    """A map per key, an entry is a row of a table; ``context[self.prices]`` is a Python dict.

    The map of a key is read whole when a function first asks for it in a batch; what changed is written.
    """

    def __init__(self, key_kind: pa.DataType, kind: pa.DataType) -> None:
        self.key_kind = key_kind
        self.kind = kind


def declared_states(owner: type) -> dict[str, ValueState[Any] | ListState[Any] | MapState[Any, Any]]:
    """The states that a class declares, by name, base classes first."""
    attributes = {name: value for base in reversed(owner.__mro__) for name, value in vars(base).items()}
    return {n: v for n, v in attributes.items() if isinstance(v, ValueState | ListState | MapState)}


class ProcessContext:
    """The state and the timers of the key of the present call; valid during that call only."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.watermark_ms: int | None = None
        self.cells: Mapping[str, Any] = {}
        self.timers: list[tuple[str, int]] = []

    @overload
    def __getitem__(self, state: ValueState[T]) -> StateCell[T]: ...

    @overload
    def __getitem__(self, state: ListState[T]) -> MutableSequence[T]: ...

    @overload
    def __getitem__(self, state: MapState[K, V]) -> MutableMapping[K, V]: ...

    def __getitem__(self, state: Any) -> Any:
        """The state of this key: a `StateCell`, a list or a dict, to be read and changed in place."""
        return self.cells[state.name]

    def set_timer(self, time_ms: int) -> None:
        """Call `KeyedProcess.on_timer` when event time has passed ``time_ms`` (epoch milliseconds)."""
        self.timers.append(("set", int(time_ms)))

    def delete_timer(self, time_ms: int) -> None:
        """Forget the timer of this time, if there is one."""
        self.timers.append(("delete", int(time_ms)))

    def set_processing_timer(self, time_ms: int) -> None:
        """Call `KeyedProcess.on_processing_timer` when the wall clock has passed ``time_ms``."""
        self.timers.append(("set processing", int(time_ms)))

    def delete_processing_timer(self, time_ms: int) -> None:
        """Forget the processing timer of this time, if there is one."""
        self.timers.append(("delete processing", int(time_ms)))


class KeyedProcess:
    """A function of one row and the state of its key. Subclass it, and pass an instance to `DataStream.process`.

    ``schema``: the columns of the rows that the methods return. Declare state as class attributes::

        class Average(KeyedProcess):
            schema = pa.schema([("sensor", pa.string()), ("mean", pa.float64())])
            count = ValueState[int](pa.int64())
            total = ValueState[float](pa.float64())

            def process(self, row, context):
                count, total = context[self.count], context[self.total]
                count.value = (count.value or 0) + 1
                total.value = (total.value or 0.0) + row["value"]
                yield {"sensor": context.key[0], "mean": total.value / count.value}
    """

    schema: ClassVar[pa.Schema]

    def process(self, row: Row, context: ProcessContext) -> Iterable[Row] | None:
        """A row of the stream; what it returns is emitted."""
        raise NotImplementedError

    def on_timer(self, time_ms: int, context: ProcessContext) -> Iterable[Row] | None:
        """Event time has passed a timer of this key."""
        raise NotImplementedError

    def on_processing_timer(self, time_ms: int, context: ProcessContext) -> Iterable[Row] | None:
        """The wall clock has passed a timer of this key."""
        raise NotImplementedError


class TimerWords(NamedTuple):
    """Timers that a function set, or took back: times in epoch ms, and the number of the key of each."""

    times: Int64Array
    keys: Int64Array
    is_set: bool


class KeyedBatch:
    """What a `KeyedBatchProcess` is called with, and how it answers.

    ``keys``: the distinct keys, a row each. ``state``: row i is the state of key i, null where nothing is known yet;
    ``known`` (numpy bool) tells which are known. ``events``: the rows, and ``key_index`` (numpy int64) the key of
    each. For a timer ``events`` is empty and ``times`` (numpy int64, epoch ms) has the time of each key's timer.
    """

    def __init__(
        self,
        keys: pa.RecordBatch,
        state: pa.RecordBatch,
        known: npt.NDArray[np.bool_],
        events: pa.RecordBatch,
        key_index: Int64Array,
        times: Int64Array,
        watermark_ms: int | None,
    ) -> None:
        self.keys = keys
        self.state = state
        self.known = known
        self.events = events
        self.key_index = key_index
        self.times = times
        self.watermark_ms = watermark_ms
        # What the function answered.
        self.emitted: list[pa.RecordBatch] = []
        self.new_state: pa.RecordBatch | None = None
        self.cleared: npt.NDArray[np.bool_] | None = None
        self.changed: npt.NDArray[np.bool_] | None = None
        self.timers: list[TimerWords] = []
        self.processing_timers: list[TimerWords] = []

    def emit(self, rows: pa.RecordBatch) -> None:
        """Rows of the declared schema."""
        self.emitted.append(rows)

    def put(self, state: pa.RecordBatch, changed: npt.NDArray[np.bool_] | None = None) -> None:
        """The new state, a row per key; with ``changed`` only of the keys where it is true."""
        if state.num_rows != self.keys.num_rows:
            raise SchemaError(f"put: {state.num_rows} rows of state for {self.keys.num_rows} keys")
        self.new_state = state
        self.changed = changed

    def clear(self, keys: npt.NDArray[np.bool_]) -> None:
        """Forget the state of the keys where this is true; wins over `put`."""
        self.cleared = keys

    def set_timers(self, times_ms: Int64Array, keys: Int64Array | None = None) -> None:
        """Event-time timers: one per key, or of the keys with these numbers."""
        self.timers.append(self._words("set_timers", times_ms, keys, is_set=True))

    def delete_timers(self, times_ms: Int64Array, keys: Int64Array | None = None) -> None:
        """Forget these event-time timers, where there are any; those that are due with the present ones fire.

        Of one time and key the last word counts.
        """
        self.timers.append(self._words("delete_timers", times_ms, keys, is_set=False))

    def set_processing_timers(self, times_ms: Int64Array, keys: Int64Array | None = None) -> None:
        """Call `KeyedBatchProcess.on_processing_timers` when the wall clock has passed these times."""
        self.processing_timers.append(self._words("set_processing_timers", times_ms, keys, is_set=True))

    def delete_processing_timers(self, times_ms: Int64Array, keys: Int64Array | None = None) -> None:
        """Forget these processing timers, where there are any."""
        self.processing_timers.append(self._words("delete_processing_timers", times_ms, keys, is_set=False))

    def _words(self, name: str, times_ms: Int64Array, keys: Int64Array | None, *, is_set: bool) -> TimerWords:
        index = np.arange(self.keys.num_rows) if keys is None else np.asarray(keys, dtype=np.int64)
        times = np.asarray(times_ms, dtype=np.int64)
        if len(index) != len(times):
            raise SchemaError(f"{name}: {len(times)} times for {len(index)} keys")
        return TimerWords(times, index, is_set)


class KeyedBatchProcess:
    """A function of batches and the state of their keys. Subclass it, and pass an instance to `DataStream.process`.

    ``schema``: the columns of what it emits; ``state``: the columns of the state, a row per key.
    """

    schema: ClassVar[pa.Schema]
    state: ClassVar[pa.Schema]

    def process(self, batch: KeyedBatch) -> None:
        """A batch of the stream."""
        raise NotImplementedError

    def on_timers(self, batch: KeyedBatch) -> None:
        """Event time has passed these timers, one per key."""
        raise NotImplementedError

    def on_processing_timers(self, batch: KeyedBatch) -> None:
        """The wall clock has passed these timers, one per key."""
        raise NotImplementedError
