"""Nothing that happens to the host program reaches the store's runtime.

A query that drives operators is cancelled, its event loop is closed in the middle of a flush, the
compactor is at work: the store finishes or says clearly why not, later writes work, and no thread
is left behind.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from statebackend import Checkpoint, StateStore, StateStoreError, StoreClosedError, StoreSettings
from statebackend.objectstore import FsspecObjectStore
from tests.support.faulty_objectstore import FaultPlan, FaultyObjectStore
from tests.support.stores import KV, QUICK, World, contents, job, put


def test_a_cancelled_query_and_a_closed_loop_do_not_touch_a_flush(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan) as store:
        held = plan.hang("put_if_absent", "sst/*")

        async def query() -> None:
            put(store, a=1)
            await asyncio.wrap_future(store.checkpoint(job(1)))

        loop = asyncio.new_event_loop()
        task = loop.create_task(query())
        loop.run_until_complete(asyncio.sleep(0.05))
        held.wait_until_reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

        put(store, b=2)
        second = store.checkpoint(job(2))
        held.release()
        assert second.result(10).checkpoint_id == 2
        assert store.health().ok
    with world.open() as again:
        assert contents(again) == {"a": 1, "b": 2}


@pytest.mark.parametrize("step", range(0, 60, 4))
def test_cancelling_at_any_moment_leaves_the_store_flushing(tmp_path: Path, step: int) -> None:
    """On the local filesystem, with the compactor at work: cancel, close the loop, write on, reopen."""
    with StateStore.open(tmp_path / "db", StoreSettings(l0_files_max=1)) as store:

        async def query() -> None:
            for i in range(100):
                put(store, **{"at": i, f"k{i}": i})
                await asyncio.wrap_future(store.checkpoint(job(i)))

        async def cancelled_after(steps: int) -> None:
            task = asyncio.ensure_future(query())
            for _ in range(steps):
                await asyncio.sleep(0.0005)
            task.cancel()
            await asyncio.wait([task])

        loop = asyncio.new_event_loop()
        loop.run_until_complete(cancelled_after(step))
        loop.close()
        put(store, end=1)
        final: Checkpoint = store.checkpoint(job(1000)).result(10)
        assert store.health().ok, store.health()
        expected = contents(store)
    with StateStore.open(tmp_path / "db") as again:
        assert again.restored is not None
        assert again.restored.checkpoint_id == final.checkpoint_id
        assert contents(again) == expected
        assert expected["end"] == 1


class CancelsAt:
    """Awaits for a host task, and cancels that task at its ``nth`` await, from 1."""

    def __init__(self, nth: int) -> None:
        self._left = nth

    async def __call__(self, awaited: Awaitable[Any]) -> Any:
        self._left -= 1
        if not self._left:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        return await awaited


@pytest.mark.parametrize("nth", range(1, 32))
def test_cancelling_at_every_await_leaves_the_store_flushing(world: World, nth: int) -> None:
    """Writes, checkpoints, flushes beside them, lookups and scans from a host task, cancelled at each of its awaits."""
    expected: dict[str, int] = {}
    before = threading.active_count()
    with world.open(settings=StoreSettings(block_rows=16, l0_files_max=2, gc_interval_s=None)) as store:

        async def query(wait: CancelsAt) -> None:
            for step in range(6):
                rows = {"at": step, f"k{step}": step}
                expected.update(rows)
                put(store, **rows)
                future = asyncio.wrap_future(store.checkpoint(job(step)))
                await wait(asyncio.to_thread(contents, store))
                await wait(future)
                await wait(asyncio.to_thread(store.table(KV).lookup, pa.record_batch({"key": ["at"]})))
                both = [asyncio.wrap_future(store.checkpoint(job(step))) for _ in range(2)]
                await wait(asyncio.gather(*both))
                await wait(asyncio.shield(asyncio.wrap_future(store.checkpoint(job(step)))))

        loop = asyncio.new_event_loop()
        task = loop.create_task(query(CancelsAt(nth)))
        loop.run_until_complete(asyncio.wait([task]))
        assert task.cancelled() == (nth <= 30)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        put(store, end=1)
        final: Checkpoint = store.checkpoint(job(99)).result(20)
        assert store.health().ok, store.health()
        assert contents(store) == {**expected, "end": 1}
    assert threading.active_count() <= before + 4, "the four threads of the world"
    with world.open() as again:
        assert again.restored is not None
        assert again.restored.checkpoint_id == final.checkpoint_id
        assert contents(again) == {**expected, "end": 1}


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("put_if_absent", "sst/w*"),
        ("put_if_absent", "sst/c*"),
        ("put_if_absent", "manifest/*"),
        ("get", "manifest/*"),
        ("get_range", "sst/*"),
        ("list", "sst/*"),
        ("delete", "*"),
    ],
)
def test_a_host_loop_that_is_closed_while_any_request_hangs_leaves_every_task_at_work(
    world: World, op: str, name: str
) -> None:
    plan = FaultPlan()
    settings = StoreSettings(l0_files_max=1, retained_checkpoints=1, cache_bytes=1, gc_interval_s=0.01)
    with world.open(plan, settings=settings) as store:

        async def query() -> None:
            for step in range(1000):
                put(store, at=step)
                await asyncio.wrap_future(store.checkpoint(job(step)))

        held = plan.hang(op, name)
        loop = asyncio.new_event_loop()
        task = loop.create_task(query())
        while not held.reached.is_set():
            loop.run_until_complete(asyncio.sleep(0.001))
        task.cancel()
        loop.run_until_complete(asyncio.wait([task]))
        loop.close()
        held.release()
        done = store.metrics()
        put(store, end=1)
        store.checkpoint(job(0)).result(20)
        for name_of in ("flusher", "compactor", "collector"):
            _keeps_completing(store, name_of, done.task(name_of).completed)
        assert store.health().ok, store.health()
        assert contents(store)["end"] == 1


def _keeps_completing(store: StateStore, task: str, before: int) -> None:
    def completed() -> bool:
        put(store, again=1)
        store.checkpoint(job(0)).result(20)
        return store.metrics().task(task).completed > before

    _wait_for(completed)


def test_a_compactor_that_fails_is_reported_and_hurts_nobody(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan, settings=StoreSettings(l0_files_max=1, commit_timeout_s=0.2)) as store:
        plan.fail("put_if_absent", "sst/c*", times=float("inf"))
        for i in range(4):
            put(store, a=i)
            store.checkpoint(job(i)).result(10)
        _wait_for(lambda: store.health().details["compaction_failures"] > 0)
        assert contents(store) == {"a": 3}
        plan.clear()
        put(store, a=9)
        store.checkpoint(job(9)).result(10)
        _wait_for(lambda: store.health().details["compactions"] > 0)
        _wait_for(lambda: store.health().ok)
        assert contents(store) == {"a": 9}


def test_closing_in_the_middle_of_a_flush_tells_whoever_waits(tmp_path: Path) -> None:
    plan = FaultPlan()
    world = World()
    store = StateStore.open("memory://", QUICK, objects=FaultyObjectStore(world.objects, plan))
    put(store, a=1)
    held = plan.hang("put_if_absent", "sst/*")
    future = store.checkpoint(job(1))
    held.wait_until_reached()
    store.close(0.2)
    with pytest.raises(StoreClosedError):
        future.result(5)
    held.release()
    with pytest.raises(StoreClosedError):
        put(store, a=2)
    with world.open() as again:
        assert contents(again) == {}
    world.close()


def test_no_thread_is_left_after_close(tmp_path: Path) -> None:
    before = threading.active_count()
    for _ in range(3):
        with StateStore.open(tmp_path / "db") as store:
            put(store, a=1)
            store.flush()
            contents(store)
    assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_is_refused_clearly_and_the_parent_goes_on(tmp_path: Path) -> None:
    script = f"""
        import os
        from statebackend import StateStore, StoreClosedError
        from tests.support.stores import put, contents
        store = StateStore.open({str(tmp_path / "db")!r})
        put(store, a=1)
        pid = os.fork()
        if pid == 0:
            try:
                put(store, a=2)
            except StoreClosedError as error:
                os._exit(42 if "fork" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
        store.flush()
        assert contents(store) == {{"a": 1}}
        store.close()
        print("parent fine")
    """
    assert "parent fine" in _python(script)


def test_leaving_without_close_neither_hangs_nor_loses_a_checkpoint(tmp_path: Path) -> None:
    script = f"""
        from statebackend import StateStore
        from tests.support.stores import put, job
        store = StateStore.open({str(tmp_path / "db")!r})
        put(store, a=1)
        store.checkpoint(job(1)).result()
        put(store, a=2)
        store.checkpoint(job(2))
    """
    _python(script)
    with StateStore.open(tmp_path / "db") as again:
        assert again.restored is not None
        assert contents(again)["a"] == again.restored.job.sources["source"]["next"]


def test_a_state_directory_deleted_under_a_running_store_is_a_clear_error(tmp_path: Path) -> None:
    """Nothing is acknowledged any more, however often it is tried, and the message names what is gone."""
    with StateStore.open(tmp_path / "db", StoreSettings(commit_timeout_s=0.5)) as store:
        put(store, a=1)
        store.checkpoint(job(1)).result(10)
        shutil.rmtree(tmp_path / "db")

        def write_and_commit() -> None:
            put(store, b=2)
            store.checkpoint(job(2)).result(20)

        for _ in range(3):
            with pytest.raises(StateStoreError, match=r"sst/w1|manifest/"):
                write_and_commit()
        assert not store.health().ok


def test_storage_calls_never_run_on_the_callers_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    original = FsspecObjectStore._run

    async def recording(self: FsspecObjectStore, *args: object) -> object:
        seen.add(threading.current_thread().name)
        return await original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(FsspecObjectStore, "_run", recording)
    with StateStore.open(tmp_path / "db") as store:
        put(store, a=1)
        store.flush()
        contents(store)
    assert seen == {"statestore-loop"}


def _python(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _wait_for(condition: object) -> None:
    waiting = threading.Event()
    for _ in range(500):
        if condition():  # type: ignore[operator]
            return
        waiting.wait(0.01)
    raise AssertionError("did not happen within 5 s")
