"""Recent writes that are asked for keys: how many pieces there are, and how often a row is copied for it."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from statebackend import TableKind, TableSpec
from statebackend.keys import Hasher
from statebackend.memtable import APPEND_PIECES, MemTable
from statebackend.merge import TableLayout

ROWS = 3_000
WRITES = 200


@pytest.mark.parametrize(
    ("kind", "copies", "pieces"),
    [
        (TableKind.UPSERT, math.log2(WRITES), math.log2(WRITES)),
        (TableKind.APPEND, math.log(WRITES, APPEND_PIECES) + 1, APPEND_PIECES * math.log(WRITES, APPEND_PIECES)),
    ],
    ids=str,
)
def test_rows_are_merged_few_times_and_lie_in_few_pieces_although_keys_are_asked_for_after_every_write(
    kind: TableKind, copies: float, pieces: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TableSpec(name="t", schema=pa.schema([("k", pa.int64()), ("v", pa.int64())]), key=("k",), kind=kind)
    layout = TableLayout.of(spec, Hasher(), {})
    memtable = MemTable(layout)
    merged = 0
    merge = TableLayout.merge

    def counted(self: TableLayout, pieces: list[pa.RecordBatch], **options: object) -> pa.RecordBatch:
        nonlocal merged
        merged += sum(piece.num_rows for piece in pieces)
        return merge(self, pieces, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TableLayout, "merge", counted)
    most = 0
    for number in range(WRITES):
        keys = np.arange(ROWS) + number * ROWS
        memtable.append(pa.record_batch([pa.array(keys), pa.array(-keys)], schema=spec.schema))
        fold = memtable.begin_fold()
        found = fold.sorted()
        memtable.adopt(fold, found)
        most = max(most, len(found))
        assert sum(piece.batch.num_rows for piece in found) == (number + 1) * ROWS
    assert most <= pieces
    assert merged <= copies * WRITES * ROWS
    values = np.sort(np.concatenate([piece.batch.column("k").to_numpy() for piece in found]))
    assert (values == np.arange(WRITES * ROWS)).all()
    for piece in found:
        hashes = layout.order_columns(piece.batch)[0]
        assert (hashes[1:] >= hashes[:-1]).all()
