"""A history of all that a store goes through, crashed at every storage call, before and after its effect.

A crash after a call that only reads is one before the next call, so after the effect is tried for writes and deletes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pytest

from statebackend import StateStore, StateStoreError, StoreSettings, clone, open_checkpoint
from statebackend.branches import drop_branch, release_parent
from statebackend.inspect import read_store
from statebackend.maintenance import collect, create_savepoint, drop_savepoint, rollback
from statebackend.verification import verify
from tests.support.faulty_objectstore import CrashedError, FaultPlan, When
from tests.support.places import Places, process
from tests.support.stores import KV, LOG, job, merged

MAIN, BRANCH = "memory://main", "memory://branch"
SETTINGS = StoreSettings(
    block_rows=256, compression=None, l0_files_max=1, retained_checkpoints=2, memory_bytes=3_000, gc_interval_s=None,
    commit_timeout_s=5.0, io_threads=1, cpu_threads=1,
)  # fmt: skip

State = tuple[int, dict[str, int], tuple[int, ...]]
"""Position of the job, table of keys, log."""
EMPTY: State = (0, {}, ())


class History:
    """What is done to two places, and which states each may be found in: the last that was acknowledged, or one
    that was under way when a crash came."""

    def __init__(self, places: Places, before: History | None = None) -> None:
        self.places = places
        self.may_be: dict[str, list[State]] = dict(before.may_be if before else {MAIN: [EMPTY], BRANCH: []})
        self.saved = before.saved if before else EMPTY

    def attempt(self, url: str, after: State, step: Callable[[], Any]) -> None:
        """A step that leads to ``after``, for certain once it is acknowledged."""
        self.may_be[url] = [*self.may_be[url], after]
        step()
        self.may_be[url] = [after]

    def job(self, url: str, *positions: int) -> None:
        """Open the store as a job does and go through the events at ``positions``, a checkpoint after each."""
        with StateStore.open(url, SETTINGS) as store:
            state = found(store)
            assert state in self.may_be[url], f"{url} is {state}, expected one of {self.may_be[url]}"
            for position in positions:
                state = event(store, state, position)
                commit = store.checkpoint(job(position))
                self.attempt(url, state, lambda commit=commit: commit.result(10))  # type: ignore[misc]
                merged(store)

    # --- the history, part by part ---

    def begins(self) -> None:
        self.job(MAIN, 1, 2, 3, 4)

    def is_collected_and_saved(self) -> None:
        collect(MAIN)
        create_savepoint(MAIN, "s")
        self.saved = self.may_be[MAIN][-1]

    def goes_on_while_it_is_read(self) -> None:
        with open_checkpoint(MAIN) as reader:
            self.job(MAIN, 5, 6)
            assert sum(b.num_rows for b in reader.table("kv").scan()) == len(self.saved[1])

    def is_rolled_back(self) -> None:
        self.attempt(MAIN, self.saved, lambda: rollback(MAIN, savepoint="s"))
        self.job(MAIN, 30, 31)

    def is_branched(self) -> None:
        self.attempt(BRANCH, self.saved, lambda: clone(MAIN, BRANCH, savepoint="s"))
        drop_savepoint(MAIN, "s")

    def goes_on_beside_its_branch(self) -> None:
        self.job(MAIN, 40, 41)
        collect(MAIN)

    def has_a_branch_that_goes_on(self) -> None:
        self.job(BRANCH, 50, 53)

    def has_a_branch_that_is_collected(self) -> None:
        self.job(BRANCH, 56)
        collect(BRANCH)

    def is_left_by_its_branch(self) -> None:
        assert release_parent(BRANCH) == MAIN
        collect(MAIN)
        self.job(BRANCH, 60)


PARTS = (
    History.begins,
    History.is_collected_and_saved,
    History.goes_on_while_it_is_read,
    History.is_rolled_back,
    History.is_branched,
    History.goes_on_beside_its_branch,
    History.has_a_branch_that_goes_on,
    History.has_a_branch_that_is_collected,
    History.is_left_by_its_branch,
)


def event(store: StateStore, state: State, position: int) -> State:
    """Writes, a delete, an expiry, and now and then more than memory may hold; what the state is then."""
    _, keys, log = state
    put = {f"k{position % 3}": position, "last": position}
    kv, at = store.table(KV), store.table(LOG)
    kv.write(pa.record_batch({"key": list(put), "value": list(put.values())}, schema=KV.schema))
    gone = f"k{(position + 1) % 3}"
    kv.delete(pa.record_batch({"key": [gone]}))
    at.write(pa.record_batch({"at": [position], "text": ["x"]}, schema=LOG.schema))
    at.expire(position - 2)
    keys = {k: v for k, v in (keys | put).items() if k != gone}
    if position % 3 == 2:
        many = {f"f{i}": position for i in range(200)}
        kv.write(pa.record_batch({"key": list(many), "value": list(many.values())}, schema=KV.schema))
        assert store._early.early is not None, "it is flushed before its checkpoint"
        store._early.early.result(10)
        keys = keys | many
    return position, keys, tuple(t for t in (*log, position) if t >= position - 2)


def found(store: StateStore) -> State:
    """What an open store holds."""
    keys = {r["key"]: r["value"] for b in store.table(KV).scan() for r in b.to_pylist()}
    log = tuple(r["at"] for b in store.table(LOG).scan() for r in b.to_pylist())
    return (store.restored.job.sources["source"]["next"] if store.restored else 0), keys, log


def check(history: History) -> None:
    """After a crash everything is as it was acknowledged, or as it was about to be, and everything works."""
    there = [url for url in (MAIN, BRANCH) if history.places.names(url, "manifest/")]
    for url in there:
        history.job(url, 101)
        collect(url)
    branches = read_store(MAIN).latest.branches if MAIN in there else {}
    for store_id in branches:  # a reservation without a branch, or of one that needs it no longer, can be dropped
        with suppress(StateStoreError):
            drop_branch(MAIN, store_id)
    for url in there:
        collect(url)
        assert verify(url).problems == ()
        history.job(url)


@pytest.mark.parametrize("part", range(len(PARTS)), ids=[p.__name__ for p in PARTS])
@pytest.mark.parametrize("when", When, ids=[w.name.lower() for w in When])
def test_a_crash_at_any_storage_call_leaves_what_was_acknowledged(part: int, when: When) -> None:
    with Places() as places:
        before = History(places)
        with process(places=places):
            for earlier in PARTS[:part]:
                earlier(before)
        objects, calls = places.snapshot(), 0
        kinds: list[str | None] = [None] if when is When.BEFORE else ["put_if_absent", "delete"]
        while kinds:
            calls += 1
            plan = FaultPlan()
            plan.crash(kinds[0], nth=calls, when=when)
            places.restore(objects)
            history = History(places, before)
            with process(plan, places=places) as running:
                try:
                    PARTS[part](history)
                except CrashedError:
                    pass
                except StateStoreError:
                    assert running.crashed, "only the crash may stop it"
                if not running.crashed:  # beyond the last call of its kind
                    kinds, calls = kinds[1:], 0
            with process(places=places):
                check(history)


def test_the_history_has_all_that_it_is_for() -> None:
    with Places() as places, process(places=places) as running:
        history = History(places)
        for part in PARTS:
            part(history)
        calls = [(c.op, c.name.partition("-")[0]) for s in running.stores for c in s.calls]
    assert len(calls) > 300
    assert ("put_if_absent", "sst/c1") in calls, "merges"
    assert ("put_if_absent", "sst/w1") in calls
    assert {op for op, name in calls if name.startswith("sst/")} == {"put_if_absent", "get_range", "delete", "list"}
    assert {op for op, name in calls if name.startswith("savepoint/")} == {"put_if_absent", "get", "delete", "list"}
