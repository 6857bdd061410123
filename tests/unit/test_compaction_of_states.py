"""Aggregate tables that the compactor did not open: states are reduced where possible, else kept as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from datafusion import Accumulator, col, udaf
from datafusion import functions as f

from statebackend import Aggregation, StateStore, StoreSettings, TableKind, TableSpec
from statebackend.compaction_tool import compact
from statebackend.compactor import CompactionLayouts
from statebackend.inspect import read_store
from statebackend.keys import Hasher
from statebackend.manifest import Manifest
from statebackend.verification import verify

QUIET = StoreSettings(compaction="none", l0_files_max=2, gc_interval_s=None, block_rows=16)
INPUT = pa.schema([("key", pa.int64()), ("value", pa.int64())])


class Product(Accumulator):
    """Not one of DataFusion's own, so only a process that registers it can merge its states."""

    def __init__(self) -> None:
        self._product = 1

    def state(self) -> list[pa.Scalar]:
        return [pa.scalar(self._product, pa.int64())]

    def update(self, values: pa.Array) -> None:
        for value in values:
            self._product *= value.as_py()

    def merge(self, states: list[pa.Array]) -> None:
        self.update(states[0])

    def evaluate(self) -> pa.Scalar:
        return pa.scalar(self._product, pa.int64())


PRODUCT = udaf(Product, [pa.int64()], pa.int64(), [pa.int64()], "immutable", name="product")


def aggregation(*, with_python: bool) -> Aggregation:
    aggregates = [f.count(col("value")).alias("n"), f.sum(col("value")).alias("total")]
    if with_python:
        aggregates.append(PRODUCT(col("value")).alias("product"))
    return Aggregation.compile(INPUT, [col("key")], aggregates, udafs=[PRODUCT] if with_python else [])


def spec(of: Aggregation) -> TableSpec:
    return TableSpec(
        name="states",
        schema=of.merger.state_schema,
        key=("key",),
        kind=TableKind.AGGREGATE,
        aggregation=of.declaration,
    )


def fill(path: Path, of: Aggregation, udafs: dict[str, Any], steps: range) -> None:
    with StateStore.open(path, QUIET, udafs=udafs) as store:
        for _ in steps:
            rows = pa.record_batch([list(range(50)), [2] * 50], schema=INPUT)
            for states in of.partial([rows]):
                store.table(spec(of)).write(states)
            store.flush()


def results(path: Path, of: Aggregation, udafs: dict[str, Any]) -> list[dict[str, Any]]:
    with StateStore.open(path, QUIET, udafs=udafs) as store:
        rows = [r for b in of.merger.final(store.table(spec(of)).scan(merged=False)) for r in b.to_pylist()]
        keys = pa.record_batch({"key": [7]})
        assert store.table(spec(of)).lookup(keys).hit.to_pylist() == [True]
        return sorted(rows, key=lambda r: r["key"])


def newest(path: Path) -> Manifest:
    return read_store(str(path)).latest


def test_states_of_a_table_that_nobody_opened_are_reduced_from_their_declaration(tmp_path: Path) -> None:
    of = aggregation(with_python=False)
    fill(tmp_path, of, {}, range(5))
    assert compact(str(tmp_path), settings=QUIET).stats.rows_dropped == 200
    (file,) = newest(tmp_path).tables["states"].files
    assert file.rows == 50
    assert results(tmp_path, of, {}) == [{"key": k, "n": 5, "total": 10} for k in range(50)]


def test_states_of_a_python_function_that_is_not_at_hand_are_kept_unreduced_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    of, udafs = aggregation(with_python=True), {"product": PRODUCT}
    fill(tmp_path, of, udafs, range(5))
    assert compact(str(tmp_path), settings=QUIET).stats.rows_dropped == 0
    (file,) = newest(tmp_path).tables["states"].files
    assert (file.level, file.rows) == (1, 250), "flushed files stay few although nothing could be reduced"
    assert not verify(str(tmp_path)).problems
    expected = [{"key": k, "n": 5, "total": 10, "product": 32} for k in range(50)]
    assert results(tmp_path, of, udafs) == expected
    fill(tmp_path, of, udafs, range(3))
    compact(str(tmp_path), settings=QUIET, udafs=udafs, everything=True)
    (file,) = newest(tmp_path).tables["states"].files
    assert file.rows == 50, "a process that has the function reduces what was left"
    assert results(tmp_path, of, udafs) == [e | {"n": 8, "total": 16, "product": 256} for e in expected]


def test_states_of_another_layout_are_never_reduced(tmp_path: Path) -> None:
    fill(tmp_path, aggregation(with_python=False), {}, range(1))
    state = newest(tmp_path).tables["states"]
    layouts = CompactionLayouts(Hasher(), {})
    assert layouts.of(state).merger is not None
    assert layouts.of(replace(state, fingerprint="of another DataFusion")).merger is None
