"""Tables get other names, or go: with one checkpoint, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from statebackend import JobState, MemoryStateBackend, MemoryStateSpace, StateBackend, TableSpec
from tests.support.faulty_objectstore import CrashedError, FaultPlan, When
from tests.support.stores import KV, QUICK, World, contents, merged, put

NEW = replace(KV, name="new")
JOB = JobState(sources={"s": 3})


@pytest.fixture
def world() -> Iterator[World]:
    found = World()
    with found.open() as store:
        put(store, a=1, b=2)
        store.checkpoint(JOB).result()
    yield found
    found.close()


def rows(backend: StateBackend, spec: TableSpec) -> dict[str, Any]:
    return {r["key"]: r["value"] for b in backend.table(spec).scan() for r in b.to_pylist()}


def test_a_renamed_table_keeps_its_rows_and_the_old_name_is_free(world: World) -> None:
    with world.open() as store:
        assert store.stored_tables()["kv"].rows == 2
        store.move_tables({"kv": "new"})
        assert contents(store, NEW) == {"a": 1, "b": 2}
        assert contents(store) == {}, "a table of the old name is another one"
        timeline = store.manifest.timeline
        store.checkpoint(JOB).result()
        assert store.manifest.timeline == timeline + 1
        put(store, c=3)
        store.checkpoint(JOB).result()
        assert store.manifest.timeline == timeline + 1, "it happens once"
    with world.open() as store:
        assert contents(store, NEW) == {"a": 1, "b": 2}
        assert contents(store) == {"c": 3}


def test_a_dropped_table_is_gone_and_begins_anew(world: World) -> None:
    with world.open() as store:
        store.move_tables({"kv": None})
        put(store, z=9)
        store.checkpoint(JOB).result()
    with world.open() as store:
        assert contents(store) == {"z": 9}


def test_without_a_checkpoint_nothing_has_happened(world: World) -> None:
    with world.open() as store:
        store.move_tables({"kv": None})
        put(store, z=9)
    with world.open() as store:
        assert contents(store) == {"a": 1, "b": 2}


def test_names_that_two_tables_exchange_exchange_their_rows(world: World) -> None:
    with world.open() as store:
        store.table(NEW).write(pa.record_batch({"key": ["n"], "value": [7]}, schema=KV.schema))
        store.checkpoint(JOB).result()
    with world.open() as store:
        store.move_tables({"kv": "new", "new": "kv"})
        store.checkpoint(JOB).result()
        assert (contents(store), contents(store, NEW)) == ({"n": 7}, {"a": 1, "b": 2})


@pytest.mark.parametrize("when", list(When))
def test_a_crash_at_any_storage_call_leaves_the_old_names_or_the_new_ones(when: When) -> None:
    seen, call, done = set(), 0, False
    while not done:
        call += 1
        world, plan = World(), FaultPlan()
        with world.open() as store:
            put(store, a=1, b=2)
            store.checkpoint(JOB).result()
        plan.crash(nth=call, when=when)
        with suppress(CrashedError), world.open(plan) as store:
            store.move_tables({"kv": "new"})
            store.table(NEW).write(pa.record_batch({"key": ["c"], "value": [3]}, schema=KV.schema))
            store.checkpoint(replace(JOB, sources={"s": 4})).result(10)
            done = True
        with world.open(seed=call) as store:
            assert store.restored is not None
            moved = store.restored.job.sources == {"s": 4}
            seen.add(moved)
            assert set(store.stored_tables()) == ({"new"} if moved else {"kv"})
            expected = {"a": 1, "b": 2, "c": 3} if moved else {"a": 1, "b": 2}
            assert contents(store, NEW if moved else KV) == expected
        world.close()
    assert seen == {False, True}


def test_a_merge_that_was_planned_under_an_old_name_is_abandoned(world: World) -> None:
    with world.open() as store:
        for value in range(4):
            put(store, a=value)
            store.checkpoint(JOB).result()
        merged(store)
        runs = sum(f.run is not None for f in store.manifest.tables["kv"].files)
    with world.open(settings=replace(QUICK, compaction="none")) as store:
        store.move_tables({"kv": "new"})
        store.checkpoint(JOB).result()
        assert sum(f.run is not None for f in store.manifest.tables["new"].files) == runs
        assert contents(store, NEW) == {"a": 3, "b": 2}


def test_what_cannot_be_moved_is_refused_before_anything_happens(world: World) -> None:
    with world.open() as store:
        with pytest.raises(ValueError, match=r"no tables \['nix'\]; there are \['kv'\]"):
            store.move_tables({"nix": "x"})
        store.table(KV)
        with pytest.raises(ValueError, match="before any is opened"):
            store.move_tables({"kv": "new"})
    space = MemoryStateSpace()
    memory = MemoryStateBackend(space)
    memory.table(KV)
    memory.table(NEW)
    memory.checkpoint(JOB).result()
    memory.close()
    again = MemoryStateBackend(space)
    with pytest.raises(ValueError, match="two tables would be called"):
        again.move_tables({"kv": "new"})
    again.close()


def test_the_memory_backend_moves_tables_with_its_next_checkpoint() -> None:
    space = MemoryStateSpace()
    first = MemoryStateBackend(space)
    first.table(KV).write(pa.record_batch({"key": ["a"], "value": [1]}, schema=KV.schema))
    first.checkpoint(JOB).result()
    first.close()
    undone = MemoryStateBackend(space)
    undone.move_tables({"kv": None})
    undone.close()
    moved = MemoryStateBackend(space)
    moved.move_tables({"kv": "new"})
    assert rows(moved, NEW) == {"a": 1}
    moved.checkpoint(JOB).result()
    moved.close()
    again = MemoryStateBackend(space)
    assert rows(again, NEW) == {"a": 1}
    assert set(again.stored_tables()) == {"new"}
    again.close()
