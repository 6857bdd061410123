"""Which tables can be declared, and how one in a manifest expires."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from statebackend import TableKind, TableOrder, TableSpec
from statebackend.ids import AttemptId, ManifestNumber, SequenceNumber, StoreId, WriterEpoch, WriterId
from statebackend.manifest import CompactionCommit, Manifest, TableState
from statebackend.schema_history import SchemaHistory
from statebackend.sstable import SSTableMeta

SCHEMA = pa.schema([("key", pa.string()), ("at", pa.int64()), ("value", pa.float64())])

HISTORY = SchemaHistory.begin(SCHEMA)


def spec(**changes: Any) -> TableSpec:
    return TableSpec(**{"name": "t", "schema": SCHEMA, "key": ("key",), "kind": TableKind.UPSERT} | changes)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"ttl_field": "none"}, "no column"),
        ({"ttl_field": "key"}, "is a key column: use time_field"),
        ({"ttl_field": "value"}, "ttl_field must be int64 or timestamp, not double"),
        ({"ttl_field": "at", "key": ("key", "at"), "time_field": "at"}, "not by both"),
        ({"ttl_field": "at", "kind": TableKind.AGGREGATE, "aggregation": {}}, "put a time into the key"),
        ({"ttl_field": "at", "order": TableOrder.TIME}, "needs a time_field"),
        ({"time_field": "at"}, "must be a key column"),
    ],
)
def test_a_ttl_that_cannot_be_kept_is_refused_when_declared(changes: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ValueError, match=refusal):
        spec(**changes)


def file(sequence: int, time_max: int) -> SSTableMeta:
    return SSTableMeta(
        name=f"f{sequence}", level=0, run=None, sequence=sequence, rows=1, size=1, tail_bytes=1, tail_checksum=0,
        hash_min=0, hash_max=9, time_min=0, time_max=time_max,
    )  # fmt: skip


FILES = tuple(file(n, time_max) for n, time_max in enumerate([3, 4, 9, 2, 8]))


def names(state: TableState) -> list[str]:
    return [f.name for f in state.files]


def test_of_an_upsert_table_with_a_ttl_only_the_oldest_files_go_unread() -> None:
    upsert = TableState(spec=spec(ttl_field="at"), history=HISTORY, files=FILES)
    assert names(upsert.expired(5)) == ["f2", "f3", "f4"]
    assert names(upsert.expired(1)) == ["f0", "f1", "f2", "f3", "f4"]
    append = replace(upsert, spec=spec(ttl_field="at", kind=TableKind.APPEND))
    assert names(append.expired(5)) == ["f2", "f4"]


def test_a_merge_does_not_miss_inputs_that_expired_meanwhile_and_replaces_those_that_stayed() -> None:
    before = Manifest(
        number=ManifestNumber(5), parent_attempt=AttemptId("a4"), store_id=StoreId("s"), writer_epoch=WriterEpoch(1),
        writer_id=WriterId("w"), attempt_id=AttemptId("a5"), created_ms=0,
        tables={"t": TableState(spec=spec(ttl_field="at"), history=HISTORY, files=FILES)},
    )  # fmt: skip
    merged = CompactionCommit(
        table="t",
        timeline=0,
        epoch=0,
        owner="c1-0-0",
        sequence=SequenceNumber(1),
        inputs=FILES[1:4],
        output=(file(9, 9),),
    )
    assert names(merged.apply(before).tables["t"]) == ["f0", "f9", "f4"]
    later = replace(before, tables={"t": before.tables["t"].expired(5)})
    assert names(merged.apply(later).tables["t"]) == ["f9", "f4"]  # f3 is expired too, but was still there
