"""Files of every format version stay readable: the stores in ``tests/data`` were written once and are never rewritten.

``python -m tests.unit.test_golden DIRECTORY`` writes such a store for a new format version.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datafusion import col
from datafusion import functions as f

from statebackend import (
    Aggregation,
    JobState,
    SchemaChanges,
    StateStore,
    StoreSettings,
    TableKind,
    TableOrder,
    TableSpec,
    open_checkpoint,
)
from statebackend.maintenance import create_savepoint
from statebackend.manifest_codec import decode_manifest, encode_manifest
from statebackend.verification import verify

DATA = Path(__file__).resolve().parents[1] / "data"
STORES = sorted(DATA.glob("store_v*"))

INPUT = pa.schema([("window", pa.timestamp("ms", "UTC")), ("key", pa.string()), ("value", pa.float64())])
EVENTS = pa.record_batch([[0, 0, 0, 60_000], ["a", None, "a", "a"], [1.0, 2.0, 4.0, float("nan")]], schema=INPUT)
UPSERTS = TableSpec(
    name="upserts",
    schema=pa.schema([("id", pa.int64()), ("tags", pa.list_(pa.string())), ("price", pa.decimal128(10, 2))]),
    key=("id",),
    kind=TableKind.UPSERT,
)
APPENDS = TableSpec(
    name="appends",
    schema=pa.schema([("at", pa.int64()), ("name", pa.string())]),
    key=("at", "name"),
    kind=TableKind.APPEND,
    order=TableOrder.TIME,
    time_field="at",
)
LEASES = TableSpec(
    name="leases",
    schema=pa.schema([("id", pa.int64()), ("until", pa.timestamp("ms")), ("holder", pa.string())]),
    key=("id",),
    kind=TableKind.UPSERT,
    ttl_field="until",
)
PRICES_1 = TableSpec(
    name="prices",
    schema=pa.schema([("id", pa.int32()), ("price", pa.float32()), ("note", pa.string())]),
    key=("id",),
    kind=TableKind.UPSERT,
)
PRICES_2 = TableSpec(
    name="prices",
    schema=pa.schema([("item", pa.int64()), ("currency", pa.string()), ("amount", pa.float64())]),
    key=("item",),
    kind=TableKind.UPSERT,
    changes=SchemaChanges(renamed={"item": "id", "amount": "price"}, dropped=["note"], defaults={"currency": "EUR"}),
)
JOB = JobState(
    sources={"source": {"file": "x.parquet", "row": 7}},
    watermarks={"source": -1},
    committables={"sink": [{"roll": "r1", "rows": 3}]},
    plan={"source": {"operator": "source"}},
)


def aggregation() -> Aggregation:
    return Aggregation.compile(
        INPUT,
        [col("window"), col("key")],
        [f.count(col("value")).alias("n"), f.avg(col("value")).alias("mean"), f.max(col("value")).alias("most")],
    )


def states(of: Aggregation) -> TableSpec:
    return TableSpec(
        name="states",
        schema=of.merger.state_schema,
        key=("window", "key"),
        kind=TableKind.AGGREGATE,
        order=TableOrder.TIME,
        time_field="window",
        aggregation=of.declaration,
    )


def write_golden(directory: Path) -> None:
    of = aggregation()
    with StateStore.open(directory, StoreSettings(block_rows=2), rng=random.Random(1)) as store:
        table = store.table(UPSERTS)
        prices = pa.array([None, "1.50", "2.25"]).cast(pa.decimal128(10, 2))
        table.write(pa.record_batch([[1, 2, 3], [["x"], [], None], prices], schema=UPSERTS.schema))
        table.delete(pa.record_batch({"id": [2]}))
        for batch in of.partial([EVENTS]):
            store.table(states(of)).write(batch)
        log = store.table(APPENDS)
        log.write(pa.record_batch([[5, 5, 1], ["b", "b", "old"]], schema=APPENDS.schema))
        log.expire(2)
        leases = store.table(LEASES)
        leases.write(pa.record_batch([[1, 2], [9, 9], ["x", "y"]], schema=LEASES.schema))
        leases.write(pa.record_batch([[1], [4], ["z"]], schema=LEASES.schema))
        leases.expire(5)
        store.table(PRICES_1).write(pa.record_batch([[1, 2], [1.5, 2.5], ["x", "y"]], schema=PRICES_1.schema))
        store.checkpoint(JOB).result()
    create_savepoint(str(directory), "first")
    with StateStore.open(directory, StoreSettings(block_rows=2), rng=random.Random(2)) as store:
        store.table(PRICES_2).write(pa.record_batch([[2**40], ["USD"], [0.1]], schema=PRICES_2.schema))
        store.checkpoint(JOB).result()


def rows(batches: list[pa.RecordBatch]) -> list[tuple[Any, ...]]:
    return sorted((tuple(r.values()) for b in batches for r in b.to_pylist()), key=str)


def test_there_is_a_store_of_every_format_version() -> None:
    from statebackend.format import MANIFEST_VERSION

    assert [s.name for s in STORES] == [f"store_v{n}" for n in range(1, MANIFEST_VERSION + 1)]


@pytest.mark.parametrize("golden", STORES, ids=lambda p: p.name)
def test_a_store_of_an_older_version_is_read_and_continued(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden, tmp_path / "store")
    assert verify(str(tmp_path / "store")).problems == ()
    of = aggregation()
    for step in range(2):
        with StateStore.open(tmp_path / "store") as store:
            assert store.restored is not None
            assert store.restored.job == JOB
            assert [r[0] for r in rows(store.table(UPSERTS).scan())] == [1, 3]
            assert rows(store.table(APPENDS).scan()) == [(5, "b"), (5, "b")]
            assert store.table(APPENDS).watermark == 2
            assert [(r[0], r[2]) for r in rows(store.table(LEASES).scan())] == [(2, "y")]
            assert rows(store.table(PRICES_2).scan()) == [(1, "EUR", 1.5), (2**40, "USD", 0.1), (2, "EUR", 2.5)]
            final = of.merger.final(store.table(states(of)).scan())
            found = {(r["window"].minute, r["key"]): (r["n"], r["mean"]) for b in final for r in b.to_pylist()}
            assert found[0, "a"] == (2, 2.5)
            assert found[0, None] == (1, 2.0)
            assert found[1, "a"][0] == 1
            if not step:
                store.checkpoint(JOB).result(10)


@pytest.mark.parametrize("golden", STORES, ids=lambda p: p.name)
def test_a_savepoint_holds_a_table_as_it_was_before_its_columns_changed(golden: Path) -> None:
    with open_checkpoint(golden, savepoint="first", pin=False) as checkpoint:
        prices = checkpoint.table("prices")
        assert prices.spec.schema == PRICES_1.schema
        assert rows(prices.scan()) == [(1, 1.5, "x"), (2, 2.5, "y")]


@pytest.mark.parametrize("golden", STORES, ids=lambda p: p.name)
def test_manifests_are_written_as_they_were_read(golden: Path) -> None:
    for path in sorted((golden / "manifest").iterdir()):
        assert encode_manifest(decode_manifest(path.read_bytes(), path.name)) == path.read_bytes()


@pytest.mark.parametrize("golden", STORES, ids=lambda p: p.name)
def test_any_arrow_reader_opens_an_sstable(golden: Path) -> None:
    for path in (golden / "sst").iterdir():
        assert pa.ipc.open_file(path).read_all().num_rows > 0


if __name__ == "__main__":
    write_golden(Path(sys.argv[1]))
