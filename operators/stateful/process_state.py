"""The state of functions in tables: read for the keys of a batch, written back where it changed.

Tables of one operator: ``values`` (one row per key, a column per `ValueState`, and when it expires), ``list.<name>``
(key, position, value) and ``map.<name>`` (key, slot, entry). Position and slot are the time column of their table,
so that all rows of a key are found by the key alone, in their order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from operators.process import KeyedBatch, ListState, MapState, ProcessContext, StateCell, ValueState
from operators.stateful.tables import unused_name
from operators.windows import Int64Array
from statebackend import StateBackend, StateTable, TableKind, TableSpec

__all__ = ["BatchState", "Calls", "KeyStates"]

States = Mapping[str, ValueState[Any] | ListState[Any] | MapState[Any, Any]]


class KeyStates:
    """The declared states of a `KeyedProcess`."""

    def __init__(self, backend: StateBackend, operator_id: str, keys: pa.Schema, states: States, ttl: int | None):
        self.keys = keys
        self.states = states
        self.end = None if ttl is None else unused_name("end", [*keys.names, *states])
        self.values = {name: s for name, s in states.items() if isinstance(s, ValueState)}
        self._values_table: StateTable | None = None
        if self.values or self.end is not None:
            fields = [pa.field(_column(keys, name), s.kind) for name, s in self.values.items()]
            if self.end is not None:
                fields.append(pa.field(self.end, pa.int64()))
            spec = TableSpec(
                name=f"{operator_id}:values",
                schema=pa.schema([*keys, *fields]),
                key=tuple(keys.names),
                kind=TableKind.UPSERT,
            )
            self._values_table = backend.table(spec)
        self._collections = {
            name: backend.table(_collection(f"{operator_id}:{_table(name, state)}", keys, state))
            for name, state in states.items()
            if not isinstance(state, ValueState)
        }

    @staticmethod
    def growth(states: States) -> list[tuple[str, str]]:
        """Every table, and how many rows it has per key."""
        collections = {n: s for n, s in states.items() if not isinstance(s, ValueState)}
        values = [("values", "one row")] if len(collections) < len(states) else []
        return values + [(_table(n, s), "one row per element") for n, s in collections.items()]

    @staticmethod
    def described(states: States) -> dict[str, str]:
        """What must agree when a job is restored."""
        return {
            name: f"map of {s.key_kind} to {s.kind}"
            if isinstance(s, MapState)
            else f"{'value' if isinstance(s, ValueState) else 'list'} of {s.kind}"
            for name, s in states.items()
        }

    @contextmanager
    def of(self, keys: pa.RecordBatch, watermark: int | None, ends: Int64Array | None = None) -> Iterator[Calls]:
        """The states of these distinct keys; what was changed is written at the end of the block, unless it raises.

        ``ends``: when each key's state expires at the earliest (epoch ms).
        """
        calls = Calls(self, keys, watermark)
        yield calls
        if self._values_table is not None:
            calls.ends = self._write_values(calls, keys, ends)
        for name, table in self._collections.items():
            if name in calls.loaded:
                self._write_collection(name, table, calls, keys)

    def drop(self, keys: pa.RecordBatch, times: Int64Array) -> None:
        """Forget the keys that expired at these times, unless they were renewed since."""
        assert self._values_table is not None
        assert self.end is not None
        found = self._values_table.lookup(keys)
        expired = found.batch.column(self.end).fill_null(_NEVER).to_numpy(zero_copy_only=False) == times
        gone = keys.filter(pa.array(expired))
        if gone.num_rows:
            self._values_table.delete(gone)
            for table in self._collections.values():
                rows = table.matches(gone).batch
                if rows.num_rows:
                    table.delete(rows.select(table.spec.key))

    # -- reading

    def load_values(self, keys: pa.RecordBatch) -> tuple[list[dict[str, Any]], Int64Array | None]:
        """The values of every key by name, None where there is none, and when they expire."""
        if self._values_table is None:
            return [{} for _ in range(keys.num_rows)], None
        found = self._values_table.lookup(keys).batch
        columns = {name: found.column(_column(self.keys, name)).to_pylist() for name in self.values}
        ends = None if self.end is None else found.column(self.end).fill_null(_NEVER).to_numpy(zero_copy_only=False)
        return [{name: column[i] for name, column in columns.items()} for i in range(keys.num_rows)], ends

    def load_collection(self, name: str, keys: pa.RecordBatch) -> tuple[list[Any], list[dict[Any, int]]]:
        """The list or dict of every key, and of dicts the slot of every entry."""
        state = self.states[name]
        found = self._collections[name].matches(keys)
        place, *columns = [column.to_pylist() for column in found.batch.columns[len(self.keys) :]]
        contents: list[Any] = [[] if isinstance(state, ListState) else {} for _ in range(keys.num_rows)]
        slots: list[dict[Any, int]] = [{} for _ in range(keys.num_rows)]
        for row, key in enumerate(found.key_index.to_pylist()):
            if isinstance(state, ListState):
                contents[key].append(columns[0][row])
            else:
                contents[key][columns[0][row]] = columns[1][row]
                slots[key][columns[0][row]] = place[row]
        return contents, slots

    # -- writing

    def _write_values(self, calls: Calls, keys: pa.RecordBatch, ends: Int64Array | None) -> Int64Array | None:
        assert self._values_table is not None
        before, stored_ends = calls.values
        renewed = None
        if self.end is not None:
            assert stored_ends is not None
            renewed = stored_ends if ends is None else np.maximum(stored_ends, ends)
        changed, emptied, rows = [], [], []
        for key in range(keys.num_rows):
            now = {name: calls.cell(name, key).value for name in self.values}
            differs = any(not _same(now[name], before[key][name]) for name in self.values)
            if renewed is None and differs and all(value is None for value in now.values()):
                emptied.append(key)
            elif differs or (renewed is not None and ends is not None):
                changed.append(key)
                rows.append(now)
        if emptied:
            self._values_table.delete(keys.take(pa.array(emptied)))
        if changed:
            index = pa.array(changed)
            columns = [pa.array([row[name] for row in rows], state.kind) for name, state in self.values.items()]
            if renewed is not None:
                columns.append(pa.array(renewed).take(index))
            schema = self._values_table.spec.schema
            self._values_table.write(pa.RecordBatch.from_arrays([*keys.take(index).columns, *columns], schema=schema))
        return renewed

    def _write_collection(self, name: str, table: StateTable, calls: Calls, keys: pa.RecordBatch) -> None:
        state = self.states[name]
        written: list[tuple[int, int, Any, Any]] = []
        gone: list[tuple[int, int]] = []
        contents, slots = calls.originals[name]
        for key in range(keys.num_rows):
            now, before = calls.cell(name, key), contents[key]
            if isinstance(state, ListState):
                for place, value in enumerate(now):
                    if place >= len(before) or not _same(value, before[place]):
                        written.append((key, place, None, value))
                gone += [(key, place) for place in range(len(now), len(before))]
            else:
                free = max(slots[key].values(), default=-1) + 1
                for entry, value in now.items():
                    if entry not in before:
                        written.append((key, free, entry, value))
                        free += 1
                    elif not _same(value, before[entry]):
                        written.append((key, slots[key][entry], entry, value))
                gone += [(key, slots[key][entry]) for entry in before if entry not in now]
        schema = table.spec.schema
        if gone:
            key_rows = keys.take(pa.array([key for key, _ in gone]))
            places = pa.array([place for _, place in gone], pa.int64())
            key_schema = pa.schema([schema.field(n) for n in table.spec.key])
            table.delete(pa.RecordBatch.from_arrays([*key_rows.columns, places], schema=key_schema))
        if written:
            key_rows = keys.take(pa.array([w[0] for w in written]))
            columns = [pa.array([w[1] for w in written], pa.int64())]
            if isinstance(state, MapState):
                columns.append(pa.array([w[2] for w in written], state.key_kind))
            columns.append(pa.array([w[3] for w in written], state.kind))
            table.write(pa.RecordBatch.from_arrays([*key_rows.columns, *columns], schema=schema))


class Calls:
    """The states of the distinct keys of one batch, as Python values, while a function is called with them.

    ``timers``: what the function asked for, per key. ``ends``: when each key expires, known after the block.
    """

    def __init__(self, states: KeyStates, keys: pa.RecordBatch, watermark: int | None) -> None:
        self._states = states
        self._keys = keys
        self._tuples = [tuple(row.values()) for row in keys.to_pylist()]
        self._context = ProcessContext()
        self._context.watermark_ms = watermark
        self.timers: list[list[tuple[str, int]]] = [[] for _ in self._tuples]
        self.ends: Int64Array | None = None
        self.values = states.load_values(keys)
        self.loaded: dict[str, list[Any]] = {
            name: [StateCell(values[name]) for values in self.values[0]] for name in states.values
        }
        self.originals: dict[str, tuple[list[Any], list[dict[Any, int]]]] = {}

    def context(self, key: int) -> ProcessContext:
        """The context of a call with this key."""
        context = self._context
        context.key, context.timers, context.cells = self._tuples[key], self.timers[key], _Cells(self, key)
        return context

    def cell(self, name: str, key: int) -> Any:
        """The state of this name: a cell, a list or a dict."""
        if name not in self.loaded:
            self.originals[name] = self._states.load_collection(name, self._keys)
            self.loaded[name] = [copy.copy(content) for content in self.originals[name][0]]
        return self.loaded[name][key]

    def snapshot(self, key: int) -> tuple[int, dict[str, Any]]:
        """What `restore` needs."""
        return len(self.timers[key]), {name: copy.copy(cells[key]) for name, cells in self.loaded.items()}

    def restore(self, key: int, before: tuple[int, dict[str, Any]]) -> None:
        """As if the calls since the snapshot had not been made."""
        timers, cells = before
        del self.timers[key][timers:]
        for name, loaded in self.loaded.items():
            loaded[key] = cells[name] if name in cells else copy.copy(self.originals[name][0][key])


class _Cells(Mapping[str, Any]):
    """The states of one key, read when they are asked for."""

    __slots__ = ("_calls", "_key")

    def __init__(self, calls: Calls, key: int) -> None:
        self._calls = calls
        self._key = key

    def __getitem__(self, name: str) -> Any:
        return self._calls.cell(name, self._key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls.loaded)

    def __len__(self) -> int:
        return len(self._calls.loaded)


class BatchState:
    """The state of a `KeyedBatchProcess`: one row per key."""

    def __init__(
        self, backend: StateBackend, operator_id: str, keys: pa.Schema, state: pa.Schema, *, with_end: bool
    ) -> None:
        self._state = pa.schema([f.with_nullable(True) for f in state])
        self._end = unused_name("end", [*keys.names, *state.names]) if with_end else None
        end = [] if self._end is None else [pa.field(self._end, pa.int64())]
        self._table = backend.table(
            TableSpec(
                name=f"{operator_id}:state",
                schema=pa.schema([*keys, *self._state, *end]),
                key=tuple(keys.names),
                kind=TableKind.UPSERT,
            )
        )
        self._ends: Int64Array = np.zeros(0, dtype=np.int64)

    def read(
        self,
        keys: pa.RecordBatch,
        events: pa.RecordBatch,
        key_index: Int64Array,
        times: Int64Array,
        watermark: int | None,
    ) -> KeyedBatch:
        """What the function is called with."""
        found = self._table.lookup(keys)
        if self._end is not None:
            self._ends = found.batch.column(self._end).fill_null(_NEVER).to_numpy(zero_copy_only=False)
        state = found.batch.select(self._state.names)
        known = found.hit.to_numpy(zero_copy_only=False)
        return KeyedBatch(keys, state, known, events, key_index, times, watermark)

    def renewed(self, ends: Int64Array) -> Int64Array:
        """When the keys that were read last expire, given their new rows."""
        later: Int64Array = np.maximum(self._ends, ends)
        return later

    def write(self, call: KeyedBatch, ends: Int64Array | None) -> None:
        """What the function answered."""
        rows = call.keys.num_rows
        cleared = np.zeros(rows, dtype=bool) if call.cleared is None else np.asarray(call.cleared, dtype=bool)
        put = np.zeros(rows, dtype=bool)
        state = call.state
        if call.new_state is not None:
            put = np.ones(rows, dtype=bool) if call.changed is None else np.asarray(call.changed, dtype=bool)
            state = _chosen(put, call.new_state.cast(self._state), call.state)
        write = put if ends is None else put | call.known
        write &= ~cleared
        columns = [*call.keys.columns, *state.columns]
        if self._end is not None:
            columns.append(pa.array(self._ends if ends is None else self.renewed(ends)))
        if write.any():
            batch = pa.RecordBatch.from_arrays(columns, schema=self._table.spec.schema)
            self._table.write(batch.filter(pa.array(write)))
        if (cleared & call.known).any():
            self._table.delete(call.keys.filter(pa.array(cleared & call.known)))

    def drop(self, keys: pa.RecordBatch, times: Int64Array) -> None:
        """Forget the keys that expired at these times, unless they were renewed since."""
        assert self._end is not None
        found = self._table.lookup(keys)
        expired = found.batch.column(self._end).fill_null(_NEVER).to_numpy(zero_copy_only=False) == times
        if expired.any():
            self._table.delete(keys.filter(pa.array(expired)))


_NEVER = np.iinfo(np.int64).min


def _chosen(new: Any, ours: pa.RecordBatch, theirs: pa.RecordBatch) -> pa.RecordBatch:
    """Row by row ``ours`` where ``new``, else ``theirs``."""
    index = np.where(new, 0, ours.num_rows) + np.arange(ours.num_rows)
    both = pa.concat_batches([ours, theirs.cast(ours.schema)])
    return both.take(pa.array(index))


def _same(a: Any, b: Any) -> bool:
    return a is b or bool(type(a) is type(b) and a == b)


def _column(keys: pa.Schema, name: str) -> str:
    return unused_name(name, keys.names)


def _table(name: str, state: Any) -> str:
    return f"{'list' if isinstance(state, ListState) else 'map'}.{name}"


def _collection(name: str, keys: pa.Schema, state: ListState[Any] | MapState[Any, Any]) -> TableSpec:
    place = unused_name("position" if isinstance(state, ListState) else "slot", keys.names)
    fields = [pa.field(place, pa.int64(), nullable=False)]
    if isinstance(state, MapState):
        fields.append(pa.field(unused_name("entry", keys.names), state.key_kind))
    fields.append(pa.field(unused_name("value", keys.names), state.kind))
    return TableSpec(
        name=name,
        schema=pa.schema([*keys, *fields]),
        key=(*keys.names, place),
        kind=TableKind.UPSERT,
        time_field=place,
    )
