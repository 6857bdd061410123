"""Deduplication: of all rows with one key, the first or the last by event time.

Rows are compared by event time, then by the columns given to break ties, then by their order in the
stream. What the result looks like is the user's choice:

* as a changelog or as upserts, at once: every batch is cut to one row per key, those are compared with the
  rows that are kept, and the winners are emitted and kept in their place;
* final: every row once, when nothing can take its place any more. The *first* row of a key is final when the
  watermark has passed it: rows wait in a table ordered by time, and when the watermark has passed them, the
  first of every key that was not seen before goes out. The *last* row is final at the end of the input: until then
  rows are written blindly, in order of time, and the table's own rule, that the newest write wins, is
  the deduplication. Only rows that are not newer than everything before them have to be compared.

Invariants:

* With a ttl, a key is forgotten when the watermark has passed its kept row by the ttl; rows older than that are
  late and set aside, as whether they are the first can no longer be known.
* What a watermark makes final is emitted at that watermark, in the order of event time; never again after a restore.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa

from operators.changelog import Emit, changelog_schema, told
from operators.graph import Port, StateNote
from operators.ordering import Bools, Groups, SortTerm, group_rows, is_ordered, order_codes, precedes
from operators.rows import combined
from operators.runtime import BaseOperator, BuildContext, Operator, Output
from operators.stateful.tables import sweep, unused_name
from operators.watermark import EventTimeColumn
from operators.windows import MAX_WATERMARK, Int64Array
from statebackend import LookupResult, StateBackend, StateTable, TableKind, TableOrder, TableSpec

__all__ = ["Deduplicate", "DeduplicateNode", "DeduplicateSpec", "FirstWhenFinal", "Keep", "LastAtTheEnd"]


class Keep(StrEnum):
    """Which row of a key is kept."""

    FIRST = "first"
    LAST = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeduplicateSpec:
    """What is kept of rows of ``schema``. ``order_by`` breaks ties of ``event_time``; ``ttl_ms``: None for ever."""

    schema: pa.Schema
    event_time: str
    key: tuple[str, ...]
    keep: Keep
    order_by: tuple[SortTerm, ...]
    ttl_ms: int | None
    emit: Emit

    @property
    def time_name(self) -> str:
        """The column, in tables, with the event time as an integer."""
        return unused_name("at", self.schema.names)

    @property
    def result_schema(self) -> pa.Schema:
        """Columns of the result."""
        return changelog_schema(self.schema) if self.emit is Emit.CHANGELOG else self.schema


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeduplicateNode:
    """A deduplication. Output 1: with a ttl, rows that came too late."""

    operator_id: str
    input: Port
    spec: DeduplicateSpec

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The one input."""
        return (self.input,)

    @property
    def input_schema(self) -> pa.Schema:
        """Columns of the input, and of the rows that came too late."""
        return self.spec.schema

    @property
    def output_names(self) -> tuple[str, ...]:
        """The kept rows, and those that came too late."""
        return ("", "late")

    @property
    def label(self) -> str:
        """For `explain`."""
        spec = self.spec
        order = ", ".join([spec.event_time, *map(str, spec.order_by)])
        return f"deduplicate {self.operator_id}: {spec.keep} of ({', '.join(spec.key)}) by {order}, {spec.emit}"

    @property
    def state(self) -> tuple[StateNote, ...]:
        """One row per key; rows that wait for the watermark."""
        spec = self.spec
        bounded = spec.ttl_ms is not None
        span = f" of the last {spec.ttl_ms} ms of event time" if bounded else ""
        if spec.emit is Emit.FINAL and spec.keep is Keep.FIRST:
            return (
                StateNote(f"{self.operator_id}:seen", f"one key and its time per key{span}", bounded=bounded),
                StateNote(f"{self.operator_id}:waiting", "every row that the watermark has not passed", bounded=True),
            )
        return (StateNote(f"{self.operator_id}:rows", f"one row per key{span}", bounded=bounded),)

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        spec = self.spec
        return {
            "operator": "deduplicate",
            "event_time": spec.event_time,
            "key": list(spec.key),
            "keep": str(spec.keep),
            "order_by": [str(term) for term in spec.order_by],
            "ttl_ms": spec.ttl_ms,
            "emit": str(spec.emit),
        }

    def build(self, context: BuildContext) -> Operator:
        """The operator, restored."""
        kind: type[Deduplicate | FirstWhenFinal] = Deduplicate
        if self.spec.emit is Emit.FINAL:
            kind = FirstWhenFinal if self.spec.keep is Keep.FIRST else LastAtTheEnd
        return kind(self.operator_id, self.spec, context.backend, context.watermark(self.operator_id))


class _Keeping(BaseOperator):
    """What all three have in common: times, ttl, watermark."""

    def __init__(self, operator_id: str, spec: DeduplicateSpec, watermark: int | None) -> None:
        super().__init__(operator_id)
        self.late = Output()
        self._spec = spec
        self._times = EventTimeColumn(spec.schema, spec.event_time)
        self._ttl = None if spec.ttl_ms is None else spec.ttl_ms * self._times.per_ms
        self._terms = spec.order_by
        self._timed_schema = spec.schema.append(pa.field(spec.time_name, pa.int64()))
        self._watermark = watermark

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The kept rows, and those that came too late."""
        return (self.output, self.late)

    @property
    def watermark(self) -> int | None:
        """How far event time has come."""
        return self._watermark

    def _advances(self, watermark: int) -> bool:
        """Whether this is news; at a restore the watermark comes again that was acted upon before."""
        if self._watermark is not None and watermark <= self._watermark:
            return False
        self._watermark = watermark
        return True

    @property
    def _forgotten(self) -> int | None:
        """Keys are forgotten whose row has a time before this."""
        if self._ttl is None or self._watermark is None or self._watermark == MAX_WATERMARK:
            return None
        return self._watermark * self._times.per_ms - self._ttl

    def _on_time(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch without the rows that are too late, which go to their output."""
        forgotten = self._forgotten
        if forgotten is None or not batch.num_rows:
            return batch
        late = self._times.values(batch) < forgotten
        if not late.any():
            return batch
        self.late.emit(batch.filter(pa.array(late)))
        return batch.filter(pa.array(~late))

    def _upsert_spec(self, what: str, schema: pa.Schema) -> TableSpec:
        return TableSpec(
            name=f"{self.operator_id}:{what}",
            schema=schema,
            key=self._spec.key,
            kind=TableKind.UPSERT,
            ttl_field=None if self._ttl is None else self._spec.time_name,
        )

    def _with_time(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        times = pa.array(self._times.values(batch))
        return pa.RecordBatch.from_arrays([*batch.columns, times], schema=self._timed_schema)

    def _keys(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return batch.select(list(self._spec.key))

    def _grouped(self, batch: pa.RecordBatch) -> Groups:
        return group_rows(self._keys(batch).columns, batch.num_rows, self._codes(batch))

    def _codes(self, batch: pa.RecordBatch) -> list[Int64Array]:
        """By event time, then by what breaks ties."""
        return order_codes(batch, [SortTerm(self._spec.event_time), *self._terms])


class Deduplicate(_Keeping):
    """Emits each change at once."""

    def __init__(self, operator_id: str, spec: DeduplicateSpec, backend: StateBackend, watermark: int | None) -> None:
        super().__init__(operator_id, spec, watermark)
        # The time is kept in a column of its own only where it decides on expiry.
        self._table_schema = spec.schema if self._ttl is None else self._timed_schema
        self._table: StateTable = backend.table(self._upsert_spec("rows", self._table_schema))

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Keep and emit the rows that win."""
        batch = self._on_time(batch)
        if not batch.num_rows:
            return
        rows = self._one_per_key(batch)
        found = self._table.lookup(self._keys(rows))
        wins = self._wins(rows, found)
        if not wins.all():
            mask = pa.array(wins)
            rows = rows.filter(mask)
            found = LookupResult(found.batch.filter(mask), found.hit.filter(mask))
        if not rows.num_rows:
            return
        self._write(rows)
        if self._spec.emit is Emit.UPSERTS:
            self.output.emit(rows)
            return
        had: Bools = found.hit.to_numpy(zero_copy_only=False)
        before = found.batch.select(self._spec.schema.names)
        for changed in told(self._spec.emit, before, had, rows, np.ones(rows.num_rows, dtype=bool)):
            self.output.emit(changed)

    def on_watermark(self, watermark: int) -> None:
        """Forget what is older than the ttl."""
        if self._advances(watermark) and (forgotten := self._forgotten) is not None:
            self._table.expire(forgotten)
        super().on_watermark(watermark)

    def _write(self, rows: pa.RecordBatch) -> None:
        self._table.write(rows if self._ttl is None else self._with_time(rows))

    def _one_per_key(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The row of every key that wins among those of the batch, in the order of the batch."""
        groups = self._grouped(batch)
        if len(groups.starts) == batch.num_rows:
            return batch
        winners = groups.firsts if self._spec.keep is Keep.FIRST else groups.lasts
        return batch.take(pa.array(np.sort(winners)))

    def _wins(self, rows: pa.RecordBatch, found: LookupResult) -> Bools:
        """Which rows take the place of the one that is kept for their key, if one is."""
        wins: Bools = ~found.hit.to_numpy(zero_copy_only=False)
        met = np.flatnonzero(~wins)
        if not len(met):
            return wins
        here = pa.array(met)
        kept = found.batch.select(self._spec.schema.names).take(here)
        kept = pa.RecordBatch.from_arrays(kept.columns, schema=self._spec.schema)
        new = pa.RecordBatch.from_arrays(rows.take(here).columns, schema=self._spec.schema)
        codes = self._codes(pa.concat_batches([kept, new]))
        old_codes, new_codes = [c[: len(met)] for c in codes], [c[len(met) :] for c in codes]
        if self._spec.keep is Keep.FIRST:
            wins[met] = precedes(new_codes, old_codes)
        else:
            wins[met] = ~precedes(new_codes, old_codes)
        return wins


class LastAtTheEnd(Deduplicate):
    """Keeps the last row of every key, and emits all of them at the end of the input.

    Of the last row of all, what it is ordered by is kept beside them: rows that do not come before it win without a
    look at the rows of their keys.
    """

    def __init__(self, operator_id: str, spec: DeduplicateSpec, backend: StateBackend, watermark: int | None) -> None:
        super().__init__(operator_id, spec, backend, watermark)
        self._ordering = list(dict.fromkeys([spec.event_time, *(term.column for term in spec.order_by)]))
        self._what = unused_name("what", self._ordering)
        columns = [spec.schema.field(name) for name in self._ordering]
        self._progress = backend.table(
            TableSpec(
                name=f"{operator_id}:progress",
                schema=pa.schema([(self._what, pa.string()), *columns]),
                key=(self._what,),
                kind=TableKind.UPSERT,
            )
        )
        stored = self._progress.scan()
        self._last = stored[0].select(self._ordering) if stored else None
        self._kept_last = self._last

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Write the rows in order; first those that come before the last of all, where they win."""
        if not batch.num_rows:
            return
        codes = self._codes(batch)
        if not is_ordered(codes):
            order = np.lexsort(tuple(reversed(codes)))
            batch = batch.take(pa.array(order))
            codes = [code[order] for code in codes]
        before = self._before_last(batch)
        if before:
            old = self._one_per_key(batch.slice(0, before))
            wins = self._wins(old, self._table.lookup(self._keys(old)))
            self._write(old.filter(pa.array(wins)))
        if before < batch.num_rows:
            self._write(batch.slice(before))
            self._last = batch.select(self._ordering).slice(batch.num_rows - 1)

    def _before_last(self, batch: pa.RecordBatch) -> int:
        """How many of the rows, which are in order, come before the last of all so far."""
        if self._last is None:
            return 0
        rows = batch.select(self._ordering)
        last = pa.RecordBatch.from_arrays(self._last.columns, schema=rows.schema)
        codes = self._codes(pa.concat_batches([last, rows]))
        return int(precedes([code[1:] for code in codes], [code[:1] for code in codes]).sum())

    def on_watermark(self, watermark: int) -> None:
        """At the end of the input, emit; before that the stream has no event time to hand on."""
        if watermark != MAX_WATERMARK:
            self._advances(watermark)
            return
        if self._advances(watermark):
            for batches in sweep(self._table):
                for batch in batches:
                    self.output.emit(batch.select(self._spec.schema.names))
        self.late.advance(watermark)
        self.output.advance(watermark)

    def drain(self) -> None:
        """Keep what the last row is ordered by."""
        if self._last is not None and self._last is not self._kept_last:
            # A copy, as the slice would keep its whole batch alive.
            row = self._last.take(pa.array([0]))
            columns = [pa.array(["last"]), *row.columns]
            self._progress.write(pa.RecordBatch.from_arrays(columns, schema=self._progress.spec.schema))
            self._last = self._kept_last = row


class FirstWhenFinal(_Keeping):
    """Emits the first row of every key once the watermark has passed it."""

    def __init__(self, operator_id: str, spec: DeduplicateSpec, backend: StateBackend, watermark: int | None) -> None:
        super().__init__(operator_id, spec, watermark)
        at = spec.time_name
        keys = [spec.schema.field(name) for name in spec.key]
        self._seen: StateTable = backend.table(self._upsert_spec("seen", pa.schema([*keys, (at, pa.int64())])))
        self._waiting: StateTable = backend.table(
            TableSpec(
                name=f"{operator_id}:waiting",
                schema=self._timed_schema,
                key=(at,),
                kind=TableKind.APPEND,
                order=TableOrder.TIME,
                time_field=at,
            )
        )

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Let the rows wait; for those behind the watermark there is nothing to wait for."""
        batch = self._on_time(batch)
        if not batch.num_rows:
            return
        if self._watermark is not None:
            behind = self._times.values(batch) < min(self._watermark * self._times.per_ms, MAX_WATERMARK)
            if behind.any():
                self._pass_on(self._with_time(batch.filter(pa.array(behind))))
                batch = batch.filter(pa.array(~behind))
        if batch.num_rows:
            self._waiting.write(self._with_time(batch))

    def on_watermark(self, watermark: int) -> None:
        """Emit the first rows that the watermark has passed."""
        if self._advances(watermark):
            limit = min(watermark * self._times.per_ms, MAX_WATERMARK)
            passed = self._waiting.scan(time_range=(None, limit))
            if passed:
                self._waiting.expire(limit)
                self._pass_on(combined(passed, self._timed_schema))
            if (forgotten := self._forgotten) is not None:
                self._seen.expire(forgotten)
        super().on_watermark(watermark)

    def _pass_on(self, rows: pa.RecordBatch) -> None:
        """Emit the rows that are the first of their key, or a ttl after the one before."""
        times = rows.column(rows.num_columns - 1).to_numpy()
        groups = self._grouped(rows)
        found = self._seen.lookup(self._keys(rows.take(pa.array(groups.firsts))))
        span = MAX_WATERMARK if self._ttl is None else self._ttl
        seen = found.hit.to_numpy(zero_copy_only=False)
        since = found.batch.column(self._spec.time_name).fill_null(0).to_numpy()
        taken = self._take_firsts(times[groups.order], groups.ids, _free_from(since, seen, span), span)
        if not len(taken):
            return
        chosen = groups.order[taken]
        kept = rows.take(pa.array(chosen))
        self._seen.write(kept.select(self._seen.spec.schema.names))
        in_time = np.lexsort((chosen, times[chosen]))
        self.output.emit(kept.take(pa.array(in_time)).select(self._spec.schema.names))

    @staticmethod
    def _take_firsts(times: Int64Array, group: Int64Array, free_from: Int64Array, span: int) -> Int64Array:
        """Places of the rows that open a key: at or after the time from which it is free, which they set anew.

        Rows come by group and time. One round takes one row per key; without a ttl there is but one.
        """
        taken: list[Int64Array] = []
        places = np.arange(len(times))
        while True:
            places = places[times[places] >= free_from[group[places]]]
            groups = group[places]
            first = places[np.append(True, groups[1:] != groups[:-1])] if len(places) else places
            if not len(first):
                return np.sort(np.concatenate(taken)) if taken else places
            taken.append(first)
            free_from[group[first]] = _free_from(times[first], np.ones(len(first), dtype=bool), span)
            if span == MAX_WATERMARK:
                return first if len(taken) == 1 else np.sort(np.concatenate(taken))


def _free_from(since: Int64Array, seen: Bools, span: int) -> Int64Array:
    """From which time on a row opens its key anew."""
    ends = np.full(len(since), MAX_WATERMARK) if span == MAX_WATERMARK else since + span
    return np.where(seen, ends, np.iinfo(np.int64).min)
