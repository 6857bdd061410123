"""MemTables: folded in the background of nobody, and without anybody waiting for it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytest

from statebackend import StateStore, memtable
from statebackend.keys import Hasher
from statebackend.memtable import Fold
from statebackend.merge import TableLayout
from tests.support.stores import KV, LOG, World, contents, job, put


class Held:
    """A fold that waits, and what it was asked to merge."""

    def __init__(self, fold: Callable[[Fold], Any]) -> None:
        self.reached, self.release, self._fold = threading.Event(), threading.Event(), fold

    def __call__(self, fold: Fold) -> Any:
        if not self.reached.is_set():
            self.reached.set()
            assert self.release.wait(30), "nobody released the fold"
        return self._fold(fold)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    held = Held(Fold.sorted)
    monkeypatch.setattr(memtable.Fold, "sorted", lambda fold: held(fold))
    return held


def while_folding(store: StateStore, held: Held, meanwhile: Callable[[], None]) -> dict[str, int]:
    """What a read finds during whose fold something else happens."""
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(contents, store)
        assert held.reached.wait(30)
        other = pool.submit(meanwhile)
        try:
            other.result(30)  # it does not wait for the fold
        finally:
            held.release.set()
        return reading.result(30)


def test_a_write_does_not_wait_for_a_fold_and_is_read_after_it(world: World, held: Held) -> None:
    with world.open() as store:
        put(store, a=1, b=1)
        found = while_folding(store, held, lambda: put(store, a=2))
        assert found in ({"a": 1, "b": 1}, {"a": 2, "b": 1})
        assert contents(store) == {"a": 2, "b": 1}


def test_a_barrier_does_not_wait_for_a_fold_which_is_then_given_up(world: World, held: Held) -> None:
    with world.open() as store:
        put(store, a=1, b=1)
        assert while_folding(store, held, lambda: store.checkpoint(job(1)).result(30) and None) == {"a": 1, "b": 1}
        assert store.table(KV).memtable.rows == 0, "what was frozen does not come back"
        put(store, b=2)
        assert contents(store) == {"a": 1, "b": 2}
    with world.open() as again:
        assert contents(again) == {"a": 1, "b": 1}


def test_a_fold_is_not_done_twice_by_two_readers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    merged: list[int] = []
    sort = memtable._sort_pieces
    monkeypatch.setattr(memtable, "_sort_pieces", lambda *args: merged.append(len(args[1])) or sort(*args))
    with world.open() as store, ThreadPoolExecutor(8) as pool:
        for step in range(20):
            put(store, a=step)
        assert list(pool.map(lambda _: contents(store), range(8))) == [{"a": 19}] * 8
        assert merged == [20]


@pytest.mark.parametrize("seed", range(3))
def test_readers_writers_and_barriers_at_once_lose_nothing(world: World, seed: int) -> None:
    rng = random.Random(seed)
    with world.open(seed=seed) as store, ThreadPoolExecutor(4) as pool:
        done = threading.Event()

        def read() -> int:
            last, reads = 0, 0
            while not done.is_set() or not reads:
                found = contents(store)
                assert len(found) >= last, "what was seen stays"
                last, reads = len(found), reads + 1
            return reads

        readers = [pool.submit(read) for _ in range(3)]
        try:
            for n in range(150):
                put(store, **{f"k{n}": n})
                if rng.random() < 0.1:
                    store.checkpoint(job(n)).result(30)
        finally:
            done.set()
        assert all(reader.result(30) for reader in readers)
        assert contents(store) == {f"k{n}": n for n in range(150)}


def test_rows_and_bytes_are_counted_through_folds_and_expiry() -> None:
    layout = TableLayout.of(LOG, Hasher(), {})
    table = memtable.MemTable(layout)
    for at in range(10):
        table.append(pa.record_batch({"at": [at], "text": ["x" * at]}, schema=layout.canonical))
    fold = table.begin_fold()
    table.append(pa.record_batch({"at": [99], "text": ["new"]}, schema=layout.canonical))
    table.adopt(fold, fold.sorted())
    assert (table.rows, len(table.pieces()), table.is_sorted) == (11, 2, False)
    assert table.nbytes == sum(p.batch.nbytes for p in table.pieces())
    late = table.begin_fold()
    table.expire(50)
    assert table.rows == 1
    table.adopt(late, late.sorted())
    assert table.rows == 1, "what expired meanwhile does not come back"
