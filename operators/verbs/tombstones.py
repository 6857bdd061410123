"""Changelogs for places that hold the row of each key, and forget it on demand."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from operators.changelog import OP, Op

__all__ = ["split_changelog"]


def split_changelog(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.Array]:
    """The rows that say what holds from now on, without `OP`, and which of them say that nothing does."""
    ops = batch.column(OP)
    kept = batch.filter(pc.not_equal(ops, Op.UPDATE_BEFORE))
    return kept.drop_columns([OP]), pc.equal(kept.column(OP), Op.DELETE)
