"""What every StateBackend keeps, whoever wrote it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datafusion import col
from datafusion import functions as f

from statebackend import (
    Aggregation,
    FencedError,
    JobState,
    SchemaChanges,
    SchemaMismatchError,
    StateBackend,
    StateStoreError,
    StoreClosedError,
    StoreSettings,
    TableKind,
    TableOrder,
    TableSpec,
    backend_names,
    open_backend,
)
from statebackend.keys import hash_columns
from tests.conformance.conftest import Place
from tests.support.stores import KV, LOG, job

Open = Callable[[], StateBackend]
TTL = TableSpec(
    name="ttl",
    schema=pa.schema([("key", pa.string()), ("until", pa.timestamp("ms")), ("value", pa.int64())]),
    key=("key",),
    kind=TableKind.UPSERT,
    ttl_field="until",
)
INPUT = pa.schema([("window", pa.int64()), ("key", pa.string()), ("value", pa.float64())])
AGGREGATION = Aggregation.compile(
    INPUT,
    [col("window"), col("key")],
    [f.count(col("value")).alias("n"), f.avg(col("value")).alias("mean"), f.max(col("value")).alias("most")],
)
SUMS = TableSpec(
    name="sums",
    schema=AGGREGATION.merger.state_schema,
    key=("window", "key"),
    kind=TableKind.AGGREGATE,
    order=TableOrder.TIME,
    time_field="window",
    aggregation=AGGREGATION.declaration,
)


@pytest.fixture(params=["lsm-local", "lsm-memory", "lsm-s3", "memory", "slatedb"])
def open_again(request: pytest.FixtureRequest, tmp_path: Path, place_of: Callable[[str], Place]) -> Iterator[Open]:
    opened: list[StateBackend] = []
    name = f"{request.node.name}-{tmp_path.name}"
    place = place_of(request.param.removeprefix("lsm-") if "-" in request.param else "memory")

    def open_() -> StateBackend:
        if request.param == "memory":
            opened.append(open_backend(name, backend="memory"))
        elif request.param == "slatedb":
            opened.append(open_backend(str(tmp_path / "slate"), backend="slatedb"))
        else:
            settings = StoreSettings(block_rows=16, l0_files_max=2)
            opened.append(open_backend(place.url, settings=settings, storage_options=place.options))
        return opened[-1]

    yield open_
    for backend in opened:
        backend.close()


def kv(**rows: int | None) -> pa.RecordBatch:
    return pa.record_batch({"key": list(rows), "value": list(rows.values())}, schema=KV.schema)


def keys(*names: str | None) -> pa.RecordBatch:
    return pa.record_batch({"key": pa.array(names, pa.string())})


def rows(batches: list[pa.RecordBatch]) -> list[tuple[Any, ...]]:
    return [tuple(r.values()) for b in batches for r in b.to_pylist()]


def commit(backend: StateBackend, state: JobState | None = None) -> int:
    return int(backend.checkpoint(state or JobState()).result(10).checkpoint_id)


def events(*triples: tuple[int, str | None, float]) -> list[pa.RecordBatch]:
    return AGGREGATION.partial([pa.record_batch(list(zip(*triples, strict=True)), schema=INPUT)])


def final(table: Any, **options: Any) -> list[tuple[Any, ...]]:
    return sorted(rows(AGGREGATION.merger.final(table.scan(**options))), key=str)


def test_the_names_of_the_backends_are_registered() -> None:
    assert {"lsm", "memory", "slatedb"} <= set(backend_names())
    with pytest.raises(ValueError, match="no state backend 'nope'"):
        open_backend("x", backend="nope")


def test_a_new_backend_has_nothing_to_restore(open_again: Open) -> None:
    assert open_again().restored is None


def test_tables_and_positions_recover_at_the_same_checkpoint(open_again: Open) -> None:
    backend = open_again()
    table = backend.table(KV)
    table.write(kv(a=1, b=2))
    first = commit(backend, job(10))
    table.write(kv(a=3))
    second = commit(backend, job(20))
    table.write(kv(a=99, c=99))  # after the barrier: lost with the crash
    again = open_again()
    assert second > first
    assert again.restored is not None
    assert again.restored.checkpoint_id == second
    assert again.restored.job == job(20)
    assert sorted(rows(again.table(KV).scan())) == [("a", 3), ("b", 2)]


def test_a_checkpoint_cuts_at_the_moment_of_the_call(open_again: Open) -> None:
    backend = open_again()
    table = backend.table(KV)
    table.write(kv(a=1))
    held = threading.Event()
    future = backend.checkpoint(job(1), prepare=[lambda: held.wait(10) and None])
    table.write(kv(a=2))
    assert rows(table.scan()) == [("a", 2)]
    held.set()
    future.result(10)
    assert rows(table.scan()) == [("a", 2)]
    assert rows(open_again().table(KV).scan()) == [("a", 1)]


def test_a_failed_checkpoint_leaves_its_rows_to_the_next(open_again: Open) -> None:
    backend = open_again()
    table = backend.table(KV)
    table.write(kv(a=1))

    def broken() -> None:
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        backend.checkpoint(job(1), prepare=[broken]).result(10)
    assert not backend.health().ok
    table.write(kv(b=2))
    commit(backend, job(2))
    assert backend.health().ok
    again = open_again()
    assert again.restored is not None
    assert again.restored.job == job(2)
    assert sorted(rows(again.table(KV).scan())) == [("a", 1), ("b", 2)]


def test_cancelling_the_future_drops_only_the_wait(open_again: Open) -> None:
    backend = open_again()
    backend.table(KV).write(kv(a=1))
    held = threading.Event()
    future = backend.checkpoint(job(1), prepare=[lambda: held.wait(10) and None])
    future.cancel()
    held.set()
    commit(backend, job(2))
    assert rows(open_again().table(KV).scan()) == [("a", 1)]


def test_opening_again_fences_the_older_backend(open_again: Open) -> None:
    old = open_again()
    old.table(KV).write(kv(a=1))
    commit(old)
    new = open_again()
    with pytest.raises(FencedError):
        old.checkpoint(JobState()).result(10)
    with pytest.raises(FencedError):
        old.table(KV).write(kv(a=2))
    new.table(KV).write(kv(b=2))
    commit(new)


def test_a_closed_backend_says_so(open_again: Open) -> None:
    backend = open_again()
    table = backend.table(KV)
    backend.close()
    backend.close()
    for call in (lambda: table.write(kv(a=1)), table.scan, lambda: backend.checkpoint(JobState())):
        with pytest.raises(StoreClosedError):
            call()


def test_upserts_deletes_and_lookups(open_again: Open) -> None:
    backend = open_again()
    table = backend.table(KV)
    for step in range(12):
        table.write(kv(**{f"k{i}": step * 100 + i for i in range(step, step + 30)}))
        table.delete(keys(f"k{step}", "never"))
        if step % 3 == 2:
            commit(backend)
    for reopen in (False, True):
        if reopen:
            table = open_again().table(KV)
        found = table.lookup(keys("k0", "k11", "k12", None, "k40", "k12"))
        assert found.hit.to_pylist() == [False, False, True, False, True, True]
        assert found.batch.column("value").to_pylist() == [None, None, 1112, None, 1140, 1112]
        assert found.batch.schema.names == KV.schema.names
        assert len(rows(table.scan())) == 29


def test_a_null_key_is_a_key_and_a_null_value_a_value(open_again: Open) -> None:
    backend = open_again()
    table = backend.table(KV)
    table.write(pa.record_batch({"key": [None, "x"], "value": [7, None]}, schema=KV.schema))
    commit(backend)
    found = open_again().table(KV).lookup(keys(None, "x"))
    assert found.hit.to_pylist() == [True, True]
    assert found.batch.column("value").to_pylist() == [7, None]


def test_keys_that_are_canonically_equal_are_one_key(open_again: Open) -> None:
    schema = pa.schema([("key", pa.float64()), ("value", pa.int64())])
    table = open_again().table(TableSpec(name="floats", schema=schema, key=("key",), kind=TableKind.UPSERT))
    table.write(pa.record_batch({"key": [0.0, float("nan")], "value": [1, 2]}, schema=schema))
    table.write(pa.record_batch({"key": [-0.0], "value": [3]}, schema=schema))
    found = table.lookup(pa.record_batch({"key": [-0.0, 0.0, -float("nan")]}))
    assert found.batch.column("value").to_pylist() == [3, 3, 2]


EDGES = pa.schema([("key", pa.string()), ("part", pa.int32()), ("at", pa.timestamp("ms")), ("value", pa.int64())])
PROBES = [("a", 1), ("b", None), (None, 2), ("zz", 1), ("a", 1), (None, None)]


def edges(kind: TableKind, order: TableOrder) -> TableSpec:
    return TableSpec(name="edges", schema=EDGES, key=("key", "part", "at"), kind=kind, order=order, time_field="at")


def partition_keys(*pairs: tuple[str | None, int | None]) -> pa.RecordBatch:
    return pa.record_batch(list(zip(*pairs, strict=True)), schema=pa.schema(list(EDGES)[:2]))


@pytest.mark.parametrize("order", [TableOrder.HASH, TableOrder.TIME])
@pytest.mark.parametrize("kind", [TableKind.UPSERT, TableKind.APPEND])
def test_matches_are_all_live_rows_of_the_partition_keys(open_again: Open, kind: TableKind, order: TableOrder) -> None:
    rng = random.Random(f"{kind} {order}")
    backend = open_again()
    table = backend.table(edges(kind, order))
    written: list[tuple[str | None, int | None, int, int]] = []

    def expected(start: int, end: int) -> list[tuple[int, Any, Any, int, int]]:
        kept = written if kind is TableKind.APPEND else [(*k, v) for k, v in {r[:3]: r[3] for r in written}.items()]
        alive = [r for r in kept if max(start, 5) <= r[2] < end]
        return [(i, *r) for i, p in enumerate(PROBES) for r in sorted(alive, key=lambda r: r[2]) if r[:2] == p]

    def found(*time_range: int) -> list[tuple[Any, ...]]:
        matches = table.matches(partition_keys(*PROBES), time_range or (None, None))
        assert matches.key_index.type == pa.int64()
        assert matches.batch.schema == EDGES
        columns = [*matches.batch.columns[:2], matches.batch.column("at").cast(pa.int64()), matches.batch.column(3)]
        return list(zip(matches.key_index.to_pylist(), *(c.to_pylist() for c in columns), strict=True))

    table.expire(5)
    assert found() == []
    for step in range(12):
        rows = [
            (rng.choice(["a", "b", None]), rng.choice([1, 2, None]), rng.randrange(20), 1000 * step + i)
            for i in range(30)
        ]
        written += rows
        table.write(pa.record_batch(list(zip(*rows, strict=True)), schema=EDGES))
        if step % 3 == 2:
            commit(backend)
        assert found() == expected(0, 99)
    assert found(8, 13) == expected(8, 13)
    assert found(13, 8) == []
    commit(backend)
    table = open_again().table(edges(kind, order))
    assert found() == expected(0, 99)
    assert table.matches(partition_keys(*PROBES).slice(0, 0)).batch.num_rows == 0


def test_matches_of_deleted_rows_and_of_states(open_again: Open) -> None:
    backend = open_again()
    table, sums = backend.table(KV), backend.table(SUMS)
    table.write(kv(a=1, b=2))
    for value in (1.0, 3.0):
        for batch in events((10, "a", value), (20, "a", value), (10, None, value)):
            sums.write(batch)
        commit(backend)
        found = sums.matches(pa.record_batch({"key": pa.array(["x", "a", None])}), (10, 20))
    assert found.key_index.to_pylist() == [1, 2]
    assert sorted(rows(AGGREGATION.merger.final([found.batch])), key=str) == [
        (10, "a", 2, 2.0, 3.0),
        (10, None, 2, 2.0, 3.0),
    ]
    table.delete(keys("a"))
    found = table.matches(keys("b", "a", "b"))
    assert found.key_index.to_pylist() == [0, 2]
    assert rows([found.batch]) == [("b", 2), ("b", 2)]
    with pytest.raises(ValueError, match="time range needs a time_field"):
        table.matches(keys("a"), (1, None))
    with pytest.raises(SchemaMismatchError, match="part"):
        backend.table(edges(TableKind.APPEND, TableOrder.HASH)).matches(keys("a"))


@pytest.mark.parametrize("order", [TableOrder.HASH, TableOrder.TIME])
def test_hash_ranges_divide_a_table(open_again: Open, order: TableOrder) -> None:
    backend = open_again()
    table = backend.table(edges(TableKind.APPEND, order))
    for step in range(4):
        table.write(pa.record_batch([[str(i) for i in range(50)], [step] * 50, range(50), range(50)], schema=EDGES))
        if step < 3:
            commit(backend)
    cuts = [None, 1 << 61, 1 << 63, (1 << 64) - (1 << 60), 1 << 64]
    parts = [rows(table.scan(["key", "part"], hash_range=(low, high))) for low, high in pairwise(cuts)]
    assert all(parts)
    assert sorted(chain(*parts)) == sorted(rows(table.scan(["key", "part"])))
    for (low, high), part in zip(pairwise(cuts), parts, strict=True):
        hashes = hash_columns(partition_keys(*part).columns)
        assert ((hashes >= np.uint64(low or 0)) & (hashes <= np.uint64(high - 1))).all()
    assert table.scan(hash_range=(1 << 64, None)) == []
    assert table.scan(hash_range=(5, 5)) == []
    with pytest.raises(ValueError, match="not within"):
        table.scan(hash_range=(-1, None))


def test_hash_ranges_divide_partial_states(open_again: Open) -> None:
    backend = open_again()
    table = backend.table(SUMS)
    for step in range(3):
        for batch in events(*((10, str(i), 1.0) for i in range(20))):
            table.write(batch)
        if step < 2:
            commit(backend)
    for merged in (True, False):
        parts = [final(table, hash_range=r, merged=merged) for r in ((None, 1 << 63), (1 << 63, None))]
        assert all(parts)
        assert sorted(chain(*parts), key=str) == final(table)


def test_partial_states_merge_across_memtables_files_and_restarts(open_again: Open) -> None:
    backend = open_again()
    table = backend.table(SUMS)
    expected: dict[tuple[int, str | None], list[float]] = {}
    for step in range(9):
        triples = [(step // 4 * 10, key, float(step * i)) for i, key in enumerate(["a", "b", None, "a"])]
        for window, key, value in triples:
            expected.setdefault((window, key), []).append(value)
        for batch in events(*triples):
            table.write(batch)
        if step % 2:
            commit(backend)
    want = sorted(((w, k, len(v), sum(v) / len(v), max(v)) for (w, k), v in expected.items()), key=str)
    assert final(table) == want
    assert final(table, merged=False) == want
    commit(backend)
    restored = open_again().table(SUMS)
    assert final(restored) == want
    assert final(restored, time_range=(10, 20)) == [w for w in want if w[0] == 10]
    hit = restored.lookup(pa.record_batch([[10, 10, 99], ["a", "zz", "a"]], schema=pa.schema(list(INPUT)[:2])))
    assert hit.hit.to_pylist() == [True, False, False]


def test_expired_rows_are_hidden_at_once_and_never_come_back(open_again: Open) -> None:
    backend = open_again()
    table = backend.table(LOG)
    table.write(pa.record_batch({"at": [1, 2, 3], "text": ["a", "b", "c"]}, schema=LOG.schema))
    commit(backend)
    table.write(pa.record_batch({"at": [4, 1], "text": ["d", "late"]}, schema=LOG.schema))
    table.expire(3)
    table.expire(2)  # never moves back
    assert table.watermark == 3
    assert rows(table.scan()) == [(3, "c"), (4, "d")]
    commit(backend)
    again = open_again().table(LOG)
    assert again.watermark == 3
    assert rows(again.scan()) == [(3, "c"), (4, "d")]


def test_the_watermark_recovers_with_its_checkpoint(open_again: Open) -> None:
    backend = open_again()
    table = backend.table(LOG)
    table.write(pa.record_batch({"at": [1, 2], "text": ["a", "b"]}, schema=LOG.schema))
    commit(backend)
    table.expire(100)  # after the barrier: the crash undoes it, for the rows will be wanted again
    assert rows(table.scan()) == []
    again = open_again().table(LOG)
    assert again.watermark is None
    assert rows(again.scan()) == [(1, "a"), (2, "b")]


def held(*triples: tuple[str, int, int]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(c, f.type) for c, f in zip(zip(*triples, strict=True), TTL.schema, strict=True)],
                           schema=TTL.schema)  # fmt: skip


def seen(table: Any, *names: str) -> dict[str, int]:
    """What is found of these keys, by lookup; a scan must show the same."""
    found = table.lookup(keys(*names))
    hits = {
        n: v for n, v, hit in zip(names, found.batch["value"].to_pylist(), found.hit.to_pylist(), strict=True) if hit
    }
    assert dict(rows(table.scan(columns=["key", "value"]))) == hits
    assert {r["key"]: r["value"] for r in table.matches(keys(*names)).batch.to_pylist()} == hits
    return hits


@pytest.mark.parametrize("commits", [(), (0,), (1,), (0, 1, 2), (0, 2)])
def test_a_key_whose_newest_row_is_expired_is_gone_with_its_older_rows(
    open_again: Open, commits: tuple[int, ...]
) -> None:
    backend = open_again()
    table = backend.table(TTL)
    steps = [held(("a", 100, 1), ("b", 5, 1), ("c", 5, 1)), held(("a", 5, 2), ("b", 100, 2))]
    for step, batch in enumerate(steps):
        table.write(batch)
        if step in commits:
            commit(backend)
    assert seen(table, "a", "b", "c", "d") == {"a": 2, "b": 2, "c": 1}
    table.expire(10)
    assert seen(table, "a", "b", "c", "d") == {"b": 2}
    if 2 in commits:
        commit(backend)
    table.write(held(("c", 10, 3), ("d", 9, 3)))  # a row at the watermark lives, one below is dead at once
    for _ in range(4):  # more files than an LSM store leaves unmerged
        table.write(held(("z", 9, 0)))
        commit(backend)
    assert seen(table, "a", "b", "c", "d") == {"b": 2, "c": 3}
    again = open_again().table(TTL)
    assert again.watermark == 10
    assert seen(again, "a", "b", "c", "d") == {"b": 2, "c": 3}
    again.expire(50)
    assert seen(again, "a", "b", "c", "d") == {"b": 2}
    again.delete(keys("b"))
    assert seen(again, "a", "b", "c", "d") == {}


def test_what_expires_by_ttl_after_the_barrier_is_there_again_after_a_crash(open_again: Open) -> None:
    backend = open_again()
    table = backend.table(TTL)
    for until in (5, 7):
        table.write(held(("a", until, until), ("b", 100, 1)))
        commit(backend)
    table.expire(50)
    table.write(held(("c", 60, 1)))
    assert seen(table, "a", "b", "c") == {"b": 1, "c": 1}
    again = open_again().table(TTL)
    assert again.watermark is None
    assert seen(again, "a", "b", "c") == {"a": 7, "b": 1}


def test_every_row_of_an_append_table_expires_by_its_own_ttl(open_again: Open) -> None:
    backend = open_again()
    spec = TableSpec(
        name="list",
        schema=pa.schema([("key", pa.string()), ("until", pa.int64())]),
        key=("key",),
        kind=TableKind.APPEND,
        ttl_field="until",
    )
    table = backend.table(spec)
    for until in (1, 9, 2, 8, 3, 7):
        table.write(pa.record_batch({"key": ["a", "b"], "until": [until, until]}, schema=spec.schema))
        if until % 2:
            commit(backend)
    table.expire(4)
    want = [("a", 9), ("a", 8), ("a", 7), ("b", 9), ("b", 8), ("b", 7)]
    assert sorted(rows(table.scan()), key=lambda r: r[0]) == want
    commit(backend)
    again = open_again().table(spec)
    assert sorted(rows(again.scan()), key=lambda r: r[0]) == want


def test_a_row_without_a_ttl_is_refused(open_again: Open) -> None:
    table = open_again().table(TTL)
    with pytest.raises(ValueError, match="null in the ttl column 'until'"):
        table.write(pa.record_batch({"key": ["a"], "until": [None], "value": [1]}, schema=TTL.schema))
    assert rows(table.scan()) == []


def test_an_append_table_keeps_equal_rows_in_write_order(open_again: Open) -> None:
    backend = open_again()
    table = backend.table(LOG)
    written = []
    for step in range(8):
        batch = [(5, f"{step}-{i}") for i in range(3)]
        written += batch
        table.write(pa.record_batch(list(zip(*batch, strict=True)), schema=LOG.schema))
        if step % 2:
            commit(backend)
    assert rows(table.scan()) == written
    commit(backend)
    assert rows(open_again().table(LOG).scan()) == written


def test_scans_return_the_columns_and_times_asked_for(open_again: Open) -> None:
    backend = open_again()
    table = backend.table(LOG)
    table.write(pa.record_batch({"at": range(100), "text": [str(i) for i in range(100)]}, schema=LOG.schema))
    commit(backend)
    assert rows(table.scan(columns=["text"], time_range=(97, None))) == [("97",), ("98",), ("99",)]
    assert rows(table.scan(time_range=(None, 1))) == [(0, "0")]
    assert rows(table.scan(time_range=(50, 50))) == []


def kv_with(*columns: tuple[str, pa.DataType], key: str = "key", **changes: Any) -> TableSpec:
    return TableSpec(
        name="kv", schema=pa.schema(columns), key=(key,), kind=TableKind.UPSERT, changes=SchemaChanges(**changes)
    )


def test_a_table_with_another_spec_is_refused_and_both_are_named(open_again: Open) -> None:
    backend = open_again()
    backend.table(KV)
    commit(backend)
    narrower = kv_with(("key", pa.string()), ("value", pa.int8()))
    with pytest.raises(SchemaMismatchError, match=r"int64(.|\n)*int8"):
        backend.table(narrower)
    with pytest.raises(SchemaMismatchError, match=r"int64(.|\n)*int8"):
        open_again().table(narrower)
    assert rows(open_again().table(KV).scan()) == []


def test_columns_change_when_a_table_is_opened_and_every_row_follows(
    open_again: Open, request: pytest.FixtureRequest
) -> None:
    old = kv_with(("key", pa.string()), ("value", pa.int32()), ("note", pa.string()))
    new = kv_with(
        ("more", pa.int8()), ("id", pa.string()), ("amount", pa.int64()), ("unit", pa.string()),
        key="id", renamed={"id": "key", "amount": "value"}, dropped=["note"], defaults={"unit": "EUR"},
    )  # fmt: skip
    backend = open_again()
    table = backend.table(old)
    for step in range(4):
        batch = {"key": ["a", "b", f"k{step}"], "value": [step, step, step], "note": ["x"] * 3}
        table.write(pa.record_batch(batch, schema=old.schema))
        commit(backend)
    table.delete(keys("b", "k0"))
    commit(backend)
    with pytest.raises(SchemaMismatchError, match="note"):  # open with other columns, or not able to change at all
        backend.table(new)
    backend = open_again()
    if request.node.callspec.params["open_again"] == "slatedb":
        with pytest.raises(SchemaMismatchError, match="columns cannot change"):
            backend.table(new)
        return
    want = {"a": (None, "a", 3, "EUR"), **{f"k{i}": (None, f"k{i}", i, "EUR") for i in (1, 2, 3)}}
    for again in range(3):  # not committed, committed, opened with what it is already
        table = backend.table(new)
        assert {r[1]: r for r in rows(table.scan())} == want
        table.write(pa.record_batch([[7], ["n"], [2**40], ["USD"]], schema=new.schema))
        found = table.lookup(pa.record_batch({"id": ["a", "b", "n"]}))
        assert found.hit.to_pylist() == [True, False, True]
        assert found.batch.column("amount").to_pylist() == [3, None, 2**40]
        assert table.matches(pa.record_batch({"id": ["k1"]})).batch.to_pylist()[0]["unit"] == "EUR"
        if again:
            want["n"] = (7, "n", 2**40, "USD")
            table.delete(pa.record_batch({"id": ["k2"]}))
            want.pop("k2", None)
            commit(backend)
        backend = open_again()
    with pytest.raises(SchemaMismatchError, match="is missing"):
        backend.table(old)


def test_a_deletion_needs_no_value_in_a_column_that_is_never_null(open_again: Open) -> None:
    spec = TableSpec(
        name="strict",
        schema=pa.schema([("key", pa.string()), pa.field("value", pa.int64(), nullable=False)]),
        key=("key",),
        kind=TableKind.UPSERT,
    )
    backend = open_again()
    table = backend.table(spec)
    table.write(pa.record_batch([["a", "b"], [1, 2]], schema=spec.schema))
    commit(backend)
    table.delete(keys("a"))
    commit(backend)
    found = open_again().table(spec).scan()
    assert rows(found) == [("b", 2)]
    assert [b.schema for b in found] == [spec.schema]


def test_a_batch_that_does_not_fit_is_refused_and_nothing_is_written(open_again: Open) -> None:
    backend = open_again()
    table, log = backend.table(KV), backend.table(LOG)
    with pytest.raises(SchemaMismatchError, match="value"):
        table.write(pa.record_batch({"key": ["a"], "value": ["not a number"]}))
    with pytest.raises(SchemaMismatchError, match="key"):
        table.lookup(pa.record_batch({"wrong": ["a"]}))
    with pytest.raises(ValueError, match="null in the time column"):
        log.write(pa.record_batch({"at": [None], "text": ["x"]}, schema=LOG.schema))
    with pytest.raises(ValueError, match="expire"):
        log.delete(pa.record_batch({"at": [1]}))
    assert rows(table.scan()) == []


def test_a_table_that_the_job_does_not_open_is_kept(open_again: Open) -> None:
    backend = open_again()
    backend.table(KV).write(kv(a=1))
    commit(backend)
    middle = open_again()
    middle.table(LOG).write(pa.record_batch({"at": [1], "text": ["x"]}, schema=LOG.schema))
    commit(middle)
    assert rows(open_again().table(KV).scan()) == [("a", 1)]


def test_writers_on_many_threads_lose_nothing(open_again: Open) -> None:
    backend = open_again()
    table = backend.table(KV)

    def work(thread: int) -> None:
        for i in range(25):
            table.write(kv(**{f"{thread}-{i}": i}))
            if i % 10 == 9:
                commit(backend)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    commit(backend)
    assert len(rows(open_again().table(KV).scan())) == 100


def test_columns_without_nulls_can_be_deleted_and_read_back(open_again: Open) -> None:
    strict = pa.schema([pa.field("key", pa.string(), nullable=False), pa.field("value", pa.int64(), nullable=False)])
    spec = TableSpec(name="strict", schema=strict, key=("key",), kind=TableKind.UPSERT)
    backend = open_again()
    table = backend.table(spec)
    table.write(pa.record_batch([["a", "b"], [1, 2]], schema=strict))
    table.delete(pa.record_batch([["a"]], schema=strict.remove(1)))
    commit(backend)
    backend.close()
    table = open_again().table(spec)
    assert rows(table.scan()) == [("b", 2)]
    assert table.scan()[0].schema == strict
    assert table.lookup(pa.record_batch([["a", "b"]], schema=strict.remove(1))).hit.to_pylist() == [False, True]
    table.write(pa.record_batch([["a"], [3]], schema=strict))
    assert sorted(rows(table.scan())) == [("a", 3), ("b", 2)]


def test_what_is_stored_is_told_before_any_table_is_opened(open_again: Open) -> None:
    backend = open_again()
    assert backend.stored_tables() == {}
    backend.table(KV).write(kv(a=1, b=2))
    commit(backend)
    stored = open_again().stored_tables()
    assert {name: table.spec for name, table in stored.items()} == {KV.name: KV}
    assert stored[KV.name].rows in (2, None), "None where rows are not counted"


def can_move(backend: StateBackend) -> bool:
    """Moves the tables, unless the backend says that it cannot; then nothing has happened."""
    try:
        backend.move_tables({KV.name: "other", LOG.name: None})
    except StateStoreError:
        return False
    return True


def test_tables_get_other_names_with_the_next_checkpoint_or_stay_as_they_were(open_again: Open) -> None:
    backend = open_again()
    backend.table(KV).write(kv(a=1))
    backend.table(LOG).write(pa.record_batch({"at": [1], "text": ["x"]}, schema=LOG.schema))
    commit(backend)
    backend = open_again()
    with pytest.raises(ValueError, match="no tables"):
        backend.move_tables({"nix": None})
    if not can_move(backend):
        assert rows(backend.table(KV).scan()) == [("a", 1)]
        return
    other = replace(KV, name="other")
    assert rows(backend.table(other).scan()) == [("a", 1)]
    assert rows(open_again().table(KV).scan()) == [("a", 1)], "no checkpoint has said so"
    backend = open_again()
    backend.move_tables({KV.name: "other", LOG.name: None})
    backend.table(other).write(kv(b=2))
    commit(backend)
    backend = open_again()
    assert set(backend.stored_tables()) == {"other"}
    assert sorted(rows(backend.table(other).scan())) == [("a", 1), ("b", 2)]
    assert rows(backend.table(LOG).scan()) == []
