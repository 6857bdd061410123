"""Streams whose rows replace earlier ones, and the words with which they say so.

Most streams are append-only: every row is a fact of its own. Some operators correct themselves. They either
emit a *changelog*, whose column `OP` tells what each row does to the rows before it, or *upserts*:
a row replaces the earlier one with the same key. A verb that cannot take corrections refuses such a stream
when it is built (`require_append_only`); none ever counts a correction as a new fact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from operators.errors import SchemaError
from statebackend import rows_equal

__all__ = [
    "OP",
    "OP_FIELD",
    "Emit",
    "Op",
    "Updates",
    "changelog_schema",
    "changes",
    "in_pieces",
    "require_append_only",
    "retracts",
    "settle",
    "told",
    "upserted",
]

OP = "op"
"""Name of the column that tells what a row of a changelog does."""

_PIECE_ROWS = 1 << 16

OP_FIELD = pa.field(OP, pa.string(), nullable=False)


class Op(StrEnum):
    """What a row of a changelog does.

    An update is two rows of one batch, next to each other: what no longer holds, then what holds instead.
    """

    INSERT = "insert"
    UPDATE_BEFORE = "update-before"
    UPDATE_AFTER = "update-after"
    DELETE = "delete"


class Emit(StrEnum):
    """How an operator whose results change tells of it.

    ``CHANGELOG``: inserts, updates and deletes, at once. ``UPSERTS``: the new row of a key, at once.
    ``FINAL``: every row once, when it cannot change any more.
    """

    CHANGELOG = "changelog"
    UPSERTS = "upserts"
    FINAL = "final"


@dataclass(frozen=True, slots=True, kw_only=True)
class Updates:
    """That a stream corrects itself.

    ``key``: the columns of which there is one valid row each. ``changelog``: the stream has the column `OP`;
    else each row replaces the earlier one of its key. ``because``: which verb made it so, for messages.
    """

    key: tuple[str, ...]
    changelog: bool
    because: str


def require_append_only(verb: str, updates: Updates | None, hint: str = "") -> None:
    """Raise `SchemaError` where the input of a verb corrects itself, since its rows would be counted twice."""
    if updates is not None:
        kind = "a changelog" if updates.changelog else "upserts"
        raise SchemaError(
            f"{verb}: the input is {kind} ({updates.because}): corrected rows would be counted twice{hint}"
        )


_OPS = tuple(Op)
_INSERT, _BEFORE, _AFTER, _DELETE = range(len(_OPS))
_NAMES = pa.array([str(op) for op in _OPS], pa.string())


def changelog_schema(schema: pa.Schema) -> pa.Schema:
    """The columns of a changelog of rows of ``schema``: `OP`, then they.

    Raises `SchemaError` if they have a column of this name already.
    """
    if OP in schema.names:
        raise SchemaError(f"a changelog has a column {OP!r}; rename the input's first, with with_column_renamed")
    return pa.schema([OP_FIELD, *schema])


def changes(
    before: pa.RecordBatch, had: npt.NDArray[np.bool_], after: pa.RecordBatch, has: npt.NDArray[np.bool_]
) -> pa.RecordBatch:
    """The changelog that leads from ``before`` to ``after``, row by row.

    Row i of both belongs to one key; ``had`` and ``has`` tell whether the key had a row and has one. What is
    equal before and after is no change. The rows come in the order of i, both rows of an update side by side.
    """
    both = np.flatnonzero(had & has)
    same = np.zeros(len(had), dtype=bool)
    if len(both):
        places = pa.array(both)
        same[both] = rows_equal(
            [column.take(places) for column in before.columns], [column.take(places) for column in after.columns]
        )
    old, new = np.flatnonzero(had & ~same), np.flatnonzero(has & ~same)
    order = np.argsort(np.concatenate([2 * old, 2 * new + 1]), kind="stable")
    ops = np.concatenate([np.where(has[old], _BEFORE, _DELETE), np.where(had[new], _AFTER, _INSERT)])[order]
    rows = pa.concat_batches(
        [pa.RecordBatch.from_arrays(before.columns, schema=after.schema).take(pa.array(old)), after.take(pa.array(new))]
    ).take(pa.array(order))
    return _with_ops(ops, rows.columns, changelog_schema(after.schema))


def retracts(batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """Which rows of a changelog take a row back: deletes, and the first rows of updates."""
    mask: npt.NDArray[np.bool_] = pc.is_in(
        batch.column(OP), pa.array([Op.UPDATE_BEFORE, Op.DELETE], pa.string())
    ).to_numpy(zero_copy_only=False)
    return mask


def upserted(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows of a changelog that hold from now on, without `OP`."""
    return batch.filter(pa.array(~retracts(batch))).drop_columns([OP])


def told(
    emit: Emit,
    before: pa.RecordBatch,
    had: npt.NDArray[np.bool_],
    after: pa.RecordBatch,
    has: npt.NDArray[np.bool_],
) -> Iterator[pa.RecordBatch]:
    """The batches that tell of `changes`, as a changelog or as upserts."""
    changed = changes(before, had, after, has)
    if emit is Emit.UPSERTS:
        yield upserted(changed)
    else:
        yield from in_pieces(changed)


def in_pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A changelog in batches so small that no step after it cuts them; both rows of an update stay together."""
    start = 0
    while start < batch.num_rows:
        end = min(start + _PIECE_ROWS, batch.num_rows)
        if end < batch.num_rows and batch.column(OP)[end].as_py() == Op.UPDATE_AFTER:
            end -= 1
        yield batch.slice(start, end - start)
        start = end


def settle(batch: pa.RecordBatch, keep: npt.NDArray[np.bool_]) -> pa.RecordBatch:
    """The kept rows of a changelog, as a changelog.

    Both rows of an update are in the batch, as every operator emits them. An update of which only the old row is
    kept deletes it; one of which only the new row is kept inserts it.
    """
    ops = pc.index_in(batch.column(OP), _NAMES).to_numpy()
    before = ops == _BEFORE
    partner_kept = np.zeros(len(ops), dtype=bool)
    partner_kept[:-1] = keep[1:]
    partner_kept[1:][before[:-1]] = keep[:-1][before[:-1]]
    ops = np.where(before & ~partner_kept, _DELETE, np.where((ops == _AFTER) & ~partner_kept, _INSERT, ops))
    at = batch.schema.get_field_index(OP)
    batch = batch.set_column(at, batch.schema.field(at), _NAMES.take(pa.array(ops)))
    return batch if keep.all() else batch.filter(pa.array(keep))


def _with_ops(ops: npt.NDArray[np.intp], columns: list[pa.Array], schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([_NAMES.take(pa.array(ops)), *columns], schema=schema)
