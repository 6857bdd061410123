"""What only the SlateDB backend has to keep: its encoding, repeated commits, its stores."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from slatedb import uniffi as slatedb

from statebackend import (
    CorruptionError,
    FencedError,
    JobState,
    StorageUnavailableError,
    TableKind,
    TableOrder,
    TableSpec,
    open_backend,
)
from statebackend.keys import Hasher, canonicalise
from statebackend.memtable import MemTable
from statebackend.merge import TableLayout
from statebackend.slatedb_backend import SlateStateBackend, open_slatedb
from statebackend.slatedb_rows import RowCodec
from tests.support.s3_server import BUCKET, SECRET, S3Server
from tests.support.stores import KV, LOG, job


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[SlateStateBackend]:
    backend = open_slatedb(str(tmp_path / "db"))
    yield backend
    backend.close()


def write(backend: Any, **rows: int) -> None:
    backend.table(KV).write(pa.record_batch({"key": list(rows), "value": list(rows.values())}, schema=KV.schema))


def log(backend: Any, *rows: tuple[int, str]) -> None:
    backend.table(LOG).write(pa.record_batch(list(zip(*rows, strict=True)), schema=LOG.schema))


def rows(backend: Any, spec: TableSpec = KV) -> list[tuple[Any, ...]]:
    return sorted(tuple(r.values()) for b in backend.table(spec).scan() for r in b.to_pylist())


def entries(backend: SlateStateBackend, spec: TableSpec) -> int:
    return len(backend.scan(backend.snapshot, *backend.table(spec).codec.range_of(None, None)))


@pytest.mark.parametrize("broken", ["write", "flush"])
def test_a_commit_whose_outcome_is_unknown_is_not_counted_twice(
    backend: SlateStateBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Once the batch is in the database and the flush fails, once it never got there."""
    write(backend, a=1, b=1)
    log(backend, (1, "one"))
    backend.checkpoint(job(1)).result(10)
    write(backend, a=2)
    log(backend, (1, "two"), (2, "three"))

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

    async def fail(*_: Any) -> None:
        raise slatedb.Error.Unavailable("injected")

    whole = backend._db
    setattr(Broken, broken, fail)
    monkeypatch.setattr(backend, "_db", Broken())
    with pytest.raises(StorageUnavailableError, match="injected"):
        backend.checkpoint(job(2)).result(10)
    monkeypatch.setattr(backend, "_db", whole)
    assert rows(backend) == [("a", 2), ("b", 1)]
    log(backend, (1, "four"))
    backend.checkpoint(job(3)).result(10)
    again = open_slatedb(str(tmp_path / "db"))
    assert rows(again) == [("a", 2), ("b", 1)]
    assert rows(again, LOG) == [(1, "four"), (1, "one"), (1, "two"), (2, "three")]
    assert again.restored is not None
    assert again.restored.job == job(3)
    again.close()


def test_a_commit_holds_nothing_of_the_checkpoint_after_it(backend: SlateStateBackend, tmp_path: Path) -> None:
    first, second = threading.Event(), threading.Event()
    write(backend, a=1)
    one = backend.checkpoint(job(1), prepare=[lambda: first.wait(10) and None])
    write(backend, b=2)
    two = backend.checkpoint(job(2), prepare=[lambda: second.wait(10) and None])
    first.set()
    one.result(10)
    assert rows(backend) == [("a", 1), ("b", 2)]
    again = open_slatedb(str(tmp_path / "db"))
    assert rows(again) == [("a", 1)]
    second.set()
    with pytest.raises(FencedError):
        two.result(10)
    again.close()


def test_deleted_and_expired_rows_leave_the_database(backend: SlateStateBackend) -> None:
    write(backend, a=1, b=1)
    log(backend, *((i, "x") for i in range(10)))
    backend.checkpoint(job(1)).result(10)
    assert (entries(backend, KV), entries(backend, LOG)) == (2, 10)
    backend.table(KV).delete(pa.record_batch({"key": ["a", "never"]}))
    backend.table(LOG).expire(7)
    backend.checkpoint(job(2)).result(10)
    assert (entries(backend, KV), entries(backend, LOG)) == (1, 3)


def test_tables_whose_names_begin_alike_do_not_meet(backend: SlateStateBackend) -> None:
    specs = [TableSpec(name=n, schema=KV.schema, key=KV.key, kind=KV.kind) for n in ("a", "ab", "b", "é" * 100)]
    for number, spec in enumerate(specs):
        backend.table(spec).write(pa.record_batch({"key": ["k"], "value": [number]}, schema=KV.schema))
    backend.checkpoint(JobState()).result(10)
    assert [rows(backend, spec) for spec in specs] == [[("k", n)] for n in range(4)]


def test_keys_that_collide_share_an_entry_and_stay_apart() -> None:
    layout = TableLayout.of(KV, Hasher(bits=0), {})
    codec, memtable = RowCodec(layout), MemTable(layout)

    def apply(existing: pa.RecordBatch, tombstone: bool, **rows: int | None) -> dict[bytes, bytes | None]:
        batch = pa.record_batch({"key": list(rows), "value": list(rows.values())}, schema=KV.schema)
        memtable.append(batch, tombstone=tombstone)
        return codec.changes(existing, codec.merged(memtable.take()), None)

    (first,) = apply(codec.rows_of([]), False, a=1, b=2, c=3).values()
    assert first is not None
    (second,) = apply(codec.rows_of([first]), True, b=None).values()
    assert second is not None
    left = codec.rows_of([second]).select(["key", "value"]).to_pydict()
    assert left == {"key": ["a", "c"], "value": [1, 3]}
    assert list(apply(codec.rows_of([second]), True, a=None, c=None).values()) == [None]


def test_keys_of_a_time_ordered_table_sort_by_time() -> None:
    schema = pa.schema([("at", pa.timestamp("us")), ("key", pa.string())])
    spec = TableSpec(
        name="t", schema=schema, key=("at", "key"), kind=TableKind.UPSERT, order=TableOrder.TIME, time_field="at"
    )
    codec = RowCodec(TableLayout.of(spec, Hasher(), {}))
    times = [-(1 << 63), -5, -1, 0, 1, 1 << 40, (1 << 63) - 1]
    batch = canonicalise(pa.record_batch([pa.array(times, pa.timestamp("us")), list("gfedcba")], schema=schema))
    keys = codec.keys_of(codec.layout.to_stored(batch))
    assert keys == sorted(keys)
    low, high = codec.range_of(-1, 1)
    assert [low <= k < high for k in keys] == [False, False, True, True, False, False, False]
    low, high = codec.range_of(None, None)
    assert all(low <= k < high for k in keys)


def test_a_value_that_is_no_batch_is_corruption(backend: SlateStateBackend) -> None:
    with pytest.raises(CorruptionError, match="'kv'"):
        backend.table(KV).codec.rows_of([b"garbage that is not arrow"])


def test_a_store_in_memory_outlives_its_backend() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    first = open_backend(url, backend="slatedb")
    write(first, a=1)
    first.checkpoint(job(1)).result(10)
    first.close()
    second = open_backend(url, backend="slatedb")
    assert rows(second) == [("a", 1)]
    second.close()


def test_it_runs_on_s3_and_fences_there(s3: S3Server) -> None:
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    options = {
        "aws_endpoint": s3.endpoint,
        "aws_access_key_id": "key",
        "aws_secret_access_key": SECRET,
        "aws_region": "us-east-1",
        "aws_allow_http": "true",
    }
    old = open_backend(url, backend="slatedb", storage_options=options)
    write(old, a=1)
    old.checkpoint(job(1)).result(30)
    new = open_backend(url, backend="slatedb", storage_options=options)
    assert rows(new) == [("a", 1)]
    with pytest.raises(FencedError, match="newer DB client"):
        old.checkpoint(job(2)).result(30)
    assert not old.health().ok
    for backend in (old, new):
        backend.close()


def test_settings_reach_slatedb(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="flush_interval"):
        open_slatedb(str(tmp_path / "db"), settings={"flush_interval": '"not a time"'})
    open_slatedb(str(tmp_path / "db"), settings={"flush_interval": '"1ms"'}).close()
