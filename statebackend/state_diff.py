"""What changed in a table between two checkpoints: rows that came, went, or have other values.

Both are read range by range of the physical order (see ``sweep.py``), in the same ranges, and compared by their keys.
A range for which both checkpoints name the same blocks is not read at all, so that the cost is that of what was
written in between. An older checkpoint is read in the columns of the newer one: columns are those of one schema. The
two may be of a store and of a branch of it.

Invariants:

* A row that is in both with equal values is in no answer; null equals null and NaN equals NaN.
* Old and new values are those that a reader of either checkpoint sees; of an aggregate table the finalised ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from statebackend.checkpoint_reader import CheckpointReader, CheckpointTable
from statebackend.compaction import KeyRange, plan_ranges
from statebackend.errors import SchemaMismatchError
from statebackend.keys import canonicalise, rows_equal
from statebackend.manifest import Manifest, TableState
from statebackend.merge import HASH_COLUMN, TableLayout
from statebackend.objectstore_roots import is_inherited
from statebackend.sweep import Selection, Sweep
from statebackend.tables import TableKind

__all__ = ["StateDiff"]

_RANGE_BYTES = 2 << 20
"""Bytes of decoded blocks that are compared at once, about: little, so that much can be left out."""


@dataclass(frozen=True, slots=True)
class StateDiff:
    """A table at two checkpoints; None where it did not exist yet."""

    before: CheckpointTable | None
    after: CheckpointTable | None
    manifests: tuple[Manifest, Manifest]

    @classmethod
    def of(cls, name: str, before: CheckpointReader, after: CheckpointReader) -> StateDiff:
        """Raises ``KeyError`` when neither has the table, ``ValueError`` when it is an append table (its rows
        have no identity), `SchemaMismatchError` when the two are not versions of one table.
        """
        states = [reader.manifest.tables.get(name) for reader in (before, after)]
        newest = _newest(name, [state for state in states if state is not None])
        if newest is None:
            after.table(name)
            raise AssertionError("it has no such table")
        if newest.spec.kind is TableKind.APPEND:
            raise ValueError(f"table {name!r}: rows of kind 'append' have no identity, so none can be said to change")
        old, new = (
            None if state is None else reader.table_as(name, newest)
            for state, reader in zip(states, (before, after), strict=True)
        )
        return cls(old, new, (before.manifest, after.manifest))

    @property
    def schema(self) -> pa.Schema:
        """The key columns, ``old_…`` and ``new_…`` of every other column, and ``op``: insert, update or delete.

        A name that is taken already by a key column gets underscores behind it.
        """
        table = self._table
        key, rows = table.spec.key, table.layout.result_schema
        names = list(key)
        fields = [rows.field(name) for name in key]
        for field in rows:
            if field.name not in key:
                for prefix in ("old_", "new_"):
                    names.append(_unused(f"{prefix}{field.name}", names))
                    fields.append(pa.field(names[-1], field.type))
        return pa.schema([*fields, pa.field(_unused("op", names), pa.string())])

    @property
    def inline(self) -> bool:
        """Whether `rows` needs no threads of DataFusion."""
        return self._table.layout.inline

    def rows(self) -> Iterator[pa.RecordBatch]:
        """The differences, in pieces of bounded size, in no particular order."""
        with ExitStack() as stack:
            old, new = (None if t is None else stack.enter_context(t.sweep()) for t in (self.before, self.after))
            sides = zip((old, new), self.manifests, strict=True)
            indexes = {
                _origin(manifest, name): index
                for sweep, manifest in sides
                if sweep is not None
                for name, index in sweep.indexes.items()
            }
            for keys in plan_ranges(self._table.spec, list(indexes.values()), _RANGE_BYTES):
                if (found := self._changes(keys, old, new)) is not None and found.num_rows:
                    yield found

    @property
    def _table(self) -> CheckpointTable:
        table = self.after or self.before
        assert table is not None, "one of the two has the table"
        return table

    def _changes(self, keys: KeyRange, old: Sweep | None, new: Sweep | None) -> pa.RecordBatch | None:
        chosen = [{} if sweep is None else sweep.selection(keys) for sweep in (old, new)]
        if old is not None and new is not None and self._same(*chosen) and _none_died(old, new, chosen[0]):
            return None
        before, after = (
            _one(self._table.layout.result_schema, [] if sweep is None else sweep.rows_of(keys, blocks))
            for sweep, blocks in zip((old, new), chosen, strict=True)
        )
        return self._compare(before, after)

    def _same(self, old: Selection, new: Selection) -> bool:
        """Whether both sides name the same blocks, which may lie in a store that one of them was branched from."""
        before, after = (
            {_origin(manifest, name): blocks for name, blocks in side.items()}
            for side, manifest in zip((old, new), self.manifests, strict=True)
        )
        return before == after

    def _compare(self, old: pa.RecordBatch, new: pa.RecordBatch) -> pa.RecordBatch:
        """The differences of two sets of rows, each with at most one row of a key."""
        spec = self._table.spec
        places = _match(self._table.layout, old, new)
        values = [name for name in self._table.layout.result_schema.names if name not in spec.key]
        both = np.flatnonzero((places >= 0).all(axis=1))
        if len(both) and values:
            here, there = (pa.array(places[both, side]) for side in (0, 1))
            same = rows_equal([old.column(v).take(here) for v in values], [new.column(v).take(there) for v in values])
            places = np.delete(places, both[same], axis=0)
        elif len(both):
            places = np.delete(places, both, axis=0)
        ops = np.where(places[:, 0] < 0, "insert", np.where(places[:, 1] < 0, "delete", "update"))
        at_old, at_new = (pa.array(places[:, side], mask=places[:, side] < 0) for side in (0, 1))
        # Of every row, the key from the side that has it.
        at_key = pa.array(np.where(places[:, 1] < 0, places[:, 0], places[:, 1] + old.num_rows))
        columns = [pa.concat_arrays([old.column(k), new.column(k)]).take(at_key) for k in spec.key]
        for value in values:
            columns += [old.column(value).take(at_old), new.column(value).take(at_new)]
        return pa.RecordBatch.from_arrays([*columns, pa.array(ops.tolist(), pa.string())], schema=self.schema)


def _newest(name: str, states: Sequence[TableState]) -> TableState | None:
    """The state whose schema can read all: its versions begin with those of the others."""
    if not states:
        return None
    newest = max(states, key=lambda state: len(state.history.versions))
    for state in states:
        if (
            newest.history.versions[: len(state.history.versions)] != state.history.versions
            or (state.spec.kind, state.spec.order) != (newest.spec.kind, newest.spec.order)
            or (state.history == newest.history and state.fingerprint != newest.fingerprint)
        ):
            raise SchemaMismatchError(f"table {name!r} was declared anew between the checkpoints; compare by SQL")
    return newest


def _origin(manifest: Manifest, name: str) -> tuple[str, str]:
    """Of which store a file is, and what it is called there: two stores give the same names to files of their own."""
    if not is_inherited(name):
        return manifest.store_id, name
    _, number, plain = name.split("/", 2)
    return manifest.roots[int(number)].store_id, plain


def _none_died(old: Sweep, new: Sweep, chosen: Selection) -> bool:
    """Whether the watermark, moved between the two, left these blocks as they were."""
    marks = {sweep.view.watermark for sweep in (old, new)}
    if len(marks) == 1:
        return True
    highest = max(mark for mark in marks if mark is not None)
    return all(int(old.indexes[name].time_min[list(numbers)].min()) >= highest for name, numbers in chosen.items())


def _match(layout: TableLayout, old: pa.RecordBatch, new: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """For every key that is in one of them, its row in ``old`` and its row in ``new``, or -1."""
    names = list(layout.spec.key)
    keys = pa.RecordBatch.from_arrays(
        [pa.concat_arrays([old.column(name), new.column(name)]) for name in names],
        schema=pa.schema([layout.spec.schema.field(name) for name in names]),
    )
    keys = canonicalise(keys)
    hashed = keys.append_column(HASH_COLUMN, pa.array(layout.hash_of(keys)))
    order, starts = layout.sort_order(hashed)
    places = np.full((len(starts), 2), -1, dtype=np.int64)
    group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(order))))
    is_new = order >= old.num_rows
    places[group[~is_new], 0] = order[~is_new]
    places[group[is_new], 1] = order[is_new] - old.num_rows
    return places


def _one(schema: pa.Schema, batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """One batch out of any number, contiguous."""
    if not batches:
        return pa.RecordBatch.from_arrays([pa.array([], f.type) for f in schema], schema=schema)
    return pa.concat_batches(batches)


def _unused(name: str, taken: Sequence[str]) -> str:
    while name in taken:
        name += "_"
    return name
