"""What every object store guarantees, over every filesystem, and what the wrappers add."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from statebackend.errors import (
    AtomicCreateError,
    ObjectMissingError,
    StateStoreError,
    StorageFullError,
    StorageUnavailableError,
    StoreClosedError,
)
from statebackend.histogram import Histogram, HistogramRecorder
from statebackend.objectstore import TEMP_PREFIX, FsspecObjectStore, ObjectStore, PutResult, open_object_store
from statebackend.objectstore_counting import CountingObjectStore, OperationCount
from statebackend.objectstore_wrappers import RetryingObjectStore, RetryPolicy
from tests.conformance.conftest import Place
from tests.support.faulty_objectstore import CrashedError, FaultPlan, FaultyObjectStore, ManualClock, When

run = asyncio.run


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture(params=["local", "memory", "s3", "obstore-memory", "obstore-s3", "counting(retrying(local))"])
def store(
    request: pytest.FixtureRequest, place_of: Callable[[str], Place], executor: ThreadPoolExecutor
) -> ObjectStore:
    kind = request.param
    place = place_of("local" if "(" in kind else kind)
    store = open_object_store(place.url, executor, storage_options=place.options)
    return CountingObjectStore(RetryingObjectStore(store)) if "(" in kind else store


@pytest.fixture
def local(tmp_path: Path, executor: ThreadPoolExecutor) -> FsspecObjectStore:
    return open_object_store(tmp_path, executor)


# --- every store ---


def test_an_object_is_read_back_as_it_was_put(store: ObjectStore) -> None:
    async def story() -> None:
        big = os.urandom(3_000_000)
        await store.put("a/b/c.bin", big)
        await store.put("plain", memoryview(b"view"))
        await store.put("words", memoryview(bytes(16)).cast("Q"))
        await store.put("buffer", pa.py_buffer(b"buffer"))
        await store.put("empty", b"")
        assert await store.get("a/b/c.bin") == big
        assert [await store.get(n) for n in ("plain", "words", "buffer", "empty")] == [
            b"view",
            bytes(16),
            b"buffer",
            b"",
        ]

    run(story())


def test_put_replaces_and_put_if_absent_does_not(store: ObjectStore) -> None:
    async def story() -> None:
        assert await store.put_if_absent("m/1", b"first") is PutResult.CREATED
        assert await store.put_if_absent("m/1", b"second") is PutResult.EXISTS
        assert await store.get("m/1") == b"first"
        await store.put("m/1", b"third")
        assert await store.get("m/1") == b"third"

    run(story())


def test_the_caller_may_change_its_buffer_after_a_put(store: ObjectStore) -> None:
    async def story() -> None:
        data = bytearray(b"before")
        await store.put("a", memoryview(data))
        await store.put_if_absent("b", memoryview(data))
        data[:] = b"after!"
        assert [await store.get("a"), await store.get("b")] == [b"before", b"before"]

    run(story())


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 3), (2, 5), (7, None), (-3, None), (-100, None), (0, None), (8, 100), (10, 20), (50, 60), (5, 5), (5, 2)],
)
def test_get_range_slices_like_python(store: ObjectStore, start: int, end: int | None) -> None:
    async def story() -> None:
        await store.put("x", b"0123456789")
        assert await store.get_range("x", start, end) == b"0123456789"[start:end]

    run(story())


def test_a_missing_object_is_named(store: ObjectStore) -> None:
    async def story() -> None:
        for read in (store.get("sst/gone.arrow"), store.get_range("sst/gone.arrow", 0, 1)):
            with pytest.raises(ObjectMissingError, match=r"sst/gone\.arrow") as caught:
                await read
            assert isinstance(caught.value.__cause__, FileNotFoundError)

    run(story())


def test_list_is_sorted_complete_and_by_prefix(store: ObjectStore) -> None:
    async def story() -> None:
        assert await store.list("") == []
        assert await store.list("manifest/") == []
        for name in ("sst/w1-2", "manifest/2", "manifest/10", "sst/w1-1", "sst/w2-1", "sst/deep/w1", "top"):
            await store.put(name, b"")
        assert await store.list("manifest/") == ["manifest/10", "manifest/2"]
        assert await store.list("sst/w1-") == ["sst/w1-1", "sst/w1-2"]
        assert await store.list("sst/") == ["sst/deep/w1", "sst/w1-1", "sst/w1-2", "sst/w2-1"]
        assert await store.list("s") == ["sst/deep/w1", "sst/w1-1", "sst/w1-2", "sst/w2-1"]
        assert len(await store.list("")) == 7
        assert await store.list("man/") == []

    run(story())


def test_delete_removes_and_an_absent_object_is_fine(store: ObjectStore) -> None:
    async def story() -> None:
        await store.put("sst/1", b"x")
        await store.delete("sst/1")
        await store.delete("sst/1")
        await store.delete("never/there")
        assert await store.list("") == []
        assert await store.put_if_absent("sst/1", b"y") is PutResult.CREATED

    run(story())


@pytest.mark.parametrize("name", ["", "/etc/x", "a//b", "../x", "a/../../x", "a/", "./a", f"a/{TEMP_PREFIX}1"])
def test_a_name_cannot_leave_the_root(store: ObjectStore, name: str) -> None:
    for call in (store.get, store.delete):
        with pytest.raises(ValueError, match="object name"):
            run(call(name))
    with pytest.raises(ValueError, match="object name"):
        run(store.put(name, b""))


def test_of_racing_threads_exactly_one_creates_and_nobody_sees_a_part(store: ObjectStore) -> None:
    payloads = [bytes([i]) * 200_000 for i in range(8)]
    rounds = 20
    start = threading.Barrier(len(payloads))
    results: list[list[tuple[PutResult, bytes]]] = [[] for _ in payloads]

    def racer(index: int) -> None:
        async def story() -> None:
            for r in range(rounds):
                start.wait()
                outcome = await store.put_if_absent(f"manifest/{r}", payloads[index])
                results[index].append((outcome, await store.get(f"manifest/{r}")))

        run(story())

    threads = [threading.Thread(target=racer, args=(i,)) for i in range(len(payloads))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for r in range(rounds):
        outcomes = [results[i][r] for i in range(len(payloads))]
        winners = [i for i, (outcome, _) in enumerate(outcomes) if outcome is PutResult.CREATED]
        assert len(winners) == 1, f"round {r}: winners {winners}"
        assert {data for _, data in outcomes} == {payloads[winners[0]]}


# --- local ---


def _race_in_a_process(url: str, index: int, rounds: int, barrier: Any, results: Any) -> None:
    async def story() -> list[int]:
        with ThreadPoolExecutor(1) as pool:
            store = open_object_store(url, pool)
            won = []
            for r in range(rounds):
                await asyncio.to_thread(barrier.wait)
                if await store.put_if_absent(f"manifest/{r}", bytes([index]) * 100_000) is PutResult.CREATED:
                    won.append(r)
            return won

    results.put((index, asyncio.run(story())))


def test_of_racing_processes_exactly_one_creates(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    context, processes, rounds = multiprocessing.get_context("spawn"), 4, 20
    barrier, results = context.Barrier(processes), context.Queue()
    racers = [
        context.Process(target=_race_in_a_process, args=(str(tmp_path / "s"), i, rounds, barrier, results))
        for i in range(processes)
    ]
    for racer in racers:
        racer.start()
    won = dict(results.get(timeout=60) for _ in racers)
    for racer in racers:
        racer.join()
    assert sorted(r for rounds_won in won.values() for r in rounds_won) == list(range(rounds))
    store = open_object_store(tmp_path / "s", executor)
    for index, rounds_won in won.items():
        for r in rounds_won:
            assert run(store.get(f"manifest/{r}")) == bytes([index]) * 100_000


Put = Callable[[ObjectStore, str, bytes], Any]
PUTS: list[Put] = [lambda s, n, d: s.put(n, d), lambda s, n, d: s.put_if_absent(n, d)]
both_puts = pytest.mark.parametrize("put", PUTS, ids=["put", "put_if_absent"])


@both_puts
@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_no_object_and_no_temporary_file(
    tmp_path: Path, local: FsspecObjectStore, monkeypatch: pytest.MonkeyPatch, put: Put, call: str, number: int
) -> None:
    run(local.put("sst/old", b"old"))

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        for name in ("sst/new", "sst/old"):
            with pytest.raises(StorageFullError, match=name) as caught:
                run(put(local, name, b"new"))
            assert isinstance(caught.value.__cause__, OSError)
    assert [p.name for p in (tmp_path / "sst").iterdir()] == ["old"]
    assert run(local.get("sst/old")) == b"old"


@both_puts
def test_short_writes_of_the_system_are_continued(
    local: FsspecObjectStore, monkeypatch: pytest.MonkeyPatch, put: Put
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:1000]))
    data = os.urandom(10_500)
    run(put(local, "x", data))
    assert run(local.get("x")) == data


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to tell which file is synced")
@both_puts
def test_file_is_synced_before_it_gets_its_name_and_its_directory_after(
    tmp_path: Path, local: FsspecObjectStore, monkeypatch: pytest.MonkeyPatch, put: Put
) -> None:
    events: list[str] = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        synced = Path(f"/proc/self/fd/{fd}").readlink()
        named = (tmp_path / "a/b/x").exists()
        events.append(f"{'file' if synced.name.startswith(TEMP_PREFIX) else synced.relative_to(tmp_path)} {named}")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    run(put(local, "a/b/x", b"data"))
    # The new directories first, each in its parent; then the file; then its name.
    assert events == ["a False", ". False", "file False", "a/b True"]
    events.clear()
    run(put(local, "a/b/x", b"data"))
    assert events == ["file True", "a/b True"]


def test_leftovers_of_a_crash_are_not_listed(tmp_path: Path, local: FsspecObjectStore) -> None:
    run(local.put("manifest/1", b""))
    (tmp_path / "manifest" / f"{TEMP_PREFIX}123").write_bytes(b"half")
    assert run(local.list("")) == run(local.list("manifest/")) == ["manifest/1"]


def test_a_filesystem_without_hard_links_is_refused_and_nothing_stays(
    tmp_path: Path, local: FsspecObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with pytest.raises(AtomicCreateError, match="hard links"):
        run(local.put_if_absent("manifest/1", b""))
    assert list((tmp_path / "manifest").iterdir()) == []


@both_puts
def test_a_file_larger_than_the_system_allows_is_not_tried_again(tmp_path: Path, put: Put) -> None:
    """Really: the limit of the process on the size of files, in a process of its own."""
    code = f"""
        import asyncio, errno, resource, sys
        from concurrent.futures import ThreadPoolExecutor
        from statebackend.errors import StorageUnavailableError
        from statebackend.objectstore import open_object_store
        from statebackend.objectstore_base import needs_operator
        from statebackend.objectstore_wrappers import RetryingObjectStore
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with ThreadPoolExecutor(1) as pool:
            store = RetryingObjectStore(open_object_store(sys.argv[1], pool))
            try:
                asyncio.run(store.{"put" if put is PUTS[0] else "put_if_absent"}("sst/1", bytes(2 << 20)))
            except StorageUnavailableError as error:
                assert error.__cause__.errno == errno.EFBIG, error
                assert needs_operator(error) and store.retries == 0
                assert asyncio.run(store.list("")) == []
                print("refused")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "refused\n", done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file()], "what could not be finished was removed"


@pytest.mark.parametrize("operation", ["get", "get_range", "put", "put_if_absent", "list", "delete"])
def test_lost_permission_is_an_error_that_names_the_object_and_the_cause(
    local: FsspecObjectStore, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """By injection, since the superuser may read everything."""
    run(local.put("sst/1", b"x"))

    def deny(path: object, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", deny)
    monkeypatch.setattr(Path, "unlink", deny)
    monkeypatch.setattr(os, "open", deny)
    monkeypatch.setattr(os, "scandir", deny)
    args: dict[str, tuple[Any, ...]] = {"get_range": (0, 1), "put": (b"",), "put_if_absent": (b"",)}
    name = "sst/" if operation == "list" else "sst/1"
    with pytest.raises(StorageUnavailableError, match=r"sst.*Permission denied") as caught:
        run(getattr(local, operation)(name, *args.get(operation, ())))
    assert isinstance(caught.value.__cause__, PermissionError)
    assert not isinstance(caught.value, StorageFullError)


def test_a_root_that_is_a_file_is_an_error_and_not_an_empty_store(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = open_object_store(tmp_path / "file", executor)
    for call in (store.list("manifest/"), store.list(""), store.put("manifest/1", b""), store.get("manifest/1")):
        with pytest.raises(StorageUnavailableError, match="file"):
            run(call)


def test_a_directory_removed_under_a_writer_is_an_error_once_and_then_made_again(
    tmp_path: Path, local: FsspecObjectStore
) -> None:
    run(local.put("sst/1", b""))
    (tmp_path / "sst" / "1").unlink()
    (tmp_path / "sst").rmdir()
    with pytest.raises(StorageUnavailableError, match="sst/2"):
        run(local.put("sst/2", b""))
    run(local.put("sst/2", b""))
    assert run(local.list("")) == ["sst/2"]


# --- opening ---


def test_urls_and_paths_mean_the_same_place(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    for url in (tmp_path / "a b", str(tmp_path / "a b"), f"file://{tmp_path}/a b", f"file://{tmp_path}/a b/"):
        store = open_object_store(url, executor)
        run(store.put("x", str(url).encode()))
        assert (tmp_path / "a b" / "x").read_bytes() == str(url).encode()
        assert store.describe() == f"file://{tmp_path}/a b"


def test_nothing_is_created_by_opening_or_reading(tmp_path: Path, executor: ThreadPoolExecutor) -> None:
    store = open_object_store(tmp_path / "s", executor)
    assert run(store.list("")) == []
    assert not (tmp_path / "s").exists()


class _OddFilesystem:
    protocol = ("odd",)

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def unstrip_protocol(self, path: str) -> str:
        return f"odd://{path}"

    def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
        if mode == "create" and path in self.files:
            raise FileExistsError(path)
        self.files[path] = data

    def cat_file(self, path: str, start: int | None, end: int | None) -> bytes:
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path][start:end]

    def find(self, path: str, on_error: str) -> list[str]:
        assert on_error == "raise"
        return [p for p in self.files if p.startswith(path)]

    def rm_file(self, path: str) -> None:
        del self.files[path]


def test_a_filesystem_that_may_not_create_atomically_is_refused_unless_the_user_insists(
    executor: ThreadPoolExecutor,
) -> None:
    with pytest.raises(AtomicCreateError, match=r"odd://bucket.*_OddFilesystem"):
        FsspecObjectStore(_OddFilesystem(), "bucket", executor)
    store = FsspecObjectStore(_OddFilesystem(), "bucket", executor, allow_unsafe_create=True)

    async def story() -> None:
        assert await store.put_if_absent("m/1", b"one") is PutResult.CREATED
        assert await store.put_if_absent("m/1", b"two") is PutResult.EXISTS
        await store.put("m/2", b"three")
        assert await store.list("m/") == ["m/1", "m/2"]
        await store.delete("m/2")
        assert await store.get("m/1") == b"one"

    run(story())


def test_blocking_calls_run_on_the_given_executor_and_never_on_the_loop(tmp_path: Path) -> None:
    threads = set()

    class Watching(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            def watched() -> Any:
                threads.add(threading.current_thread())
                return fn(*args, **kwargs)

            return super().submit(watched)

    for url in (str(tmp_path), f"memory://{uuid.uuid4().hex}"):
        with Watching(2) as pool:
            store = open_object_store(url, pool)
            run(store.put("x", b"1"))
            assert run(store.get("x")) == b"1"
            run(store.list(""))
        with pytest.raises(StoreClosedError, match="x"):
            run(store.get("x"))
    assert threads
    assert threading.main_thread() not in threads


# --- retrying ---


@asynccontextmanager
async def flaky(
    policy: RetryPolicy | None = None,
) -> AsyncIterator[tuple[RetryingObjectStore, FaultyObjectStore, ManualClock]]:
    with ThreadPoolExecutor(2) as pool:
        clock = ManualClock(auto=True)
        faulty = FaultyObjectStore(open_object_store(f"memory://{uuid.uuid4().hex}", pool))
        yield RetryingObjectStore(faulty, policy, sleep=clock.sleep, rng=random.Random(7)), faulty, clock


def test_transient_failures_are_tried_again_with_growing_jittered_waits() -> None:
    async def story() -> None:
        policy = RetryPolicy(attempts_max=6, delay_s_initial=0.1, delay_s_max=0.5)
        async with flaky(policy) as (store, faulty, clock):
            faulty.plan.fail("put", times=5)
            await store.put("x", b"data")
            assert await store.get("x") == b"data"
            assert len(clock.slept) == 5
            for slept, bound in zip(clock.slept, (0.1, 0.2, 0.4, 0.5, 0.5), strict=True):
                assert 0 <= slept <= bound
            assert len(set(clock.slept)) == 5

    run(story())


def test_the_last_failure_is_raised_when_the_tries_are_used_up() -> None:
    async def story() -> None:
        async with flaky(RetryPolicy(attempts_max=3)) as (store, faulty, clock):
            faulty.plan.fail(times=float("inf"))
            for call in (
                store.get("x"),
                store.get_range("x", 0, 1),
                store.put("x", b""),
                store.list(""),
                store.delete("x"),
            ):
                with pytest.raises(StorageUnavailableError, match="injected"):
                    await call
            assert len(faulty.calls) == 5 * 3
            assert len(clock.slept) == 5 * 2

    run(story())


@pytest.mark.parametrize(
    "error", [ObjectMissingError("no"), StorageFullError("full"), AtomicCreateError("no"), ValueError("no")], ids=repr
)
def test_what_does_not_pass_by_itself_is_not_tried_again(error: Exception) -> None:
    async def story() -> None:
        async with flaky() as (store, faulty, _):
            faulty.plan.fail(error=error)
            with pytest.raises(type(error)):
                await store.get("x")
            assert len(faulty.calls) == 1

    run(story())


def test_lost_permission_is_not_tried_again() -> None:
    async def story() -> None:
        async with flaky() as (store, faulty, _):
            error = StorageUnavailableError("denied")
            error.__cause__ = PermissionError()
            faulty.plan.fail(error=error)
            with pytest.raises(StorageUnavailableError, match="denied"):
                await store.get("x")
            assert len(faulty.calls) == 1

    run(story())


def test_put_if_absent_is_tried_once_so_that_its_own_lost_success_is_not_called_a_conflict() -> None:
    async def story() -> None:
        async with flaky() as (store, faulty, clock):
            faulty.plan.lose_response("put_if_absent")
            with pytest.raises(StorageUnavailableError):
                await store.put_if_absent("m/1", b"mine")
            assert len(faulty.calls) == 1
            assert clock.slept == []
            assert await store.get("m/1") == b"mine"

    run(story())


def test_a_call_that_hangs_is_unavailable_after_its_timeout() -> None:
    async def story() -> None:
        async with flaky(RetryPolicy(attempts_max=2, timeout_s=0.05)) as (store, faulty, _):
            faulty.plan.hang("get", times=2)
            with pytest.raises(StorageUnavailableError, match=r"'x'.*0\.05 s"):
                await store.get("x")
            assert len(faulty.calls) == 2
            faulty.plan.hang("put_if_absent")
            with pytest.raises(StorageUnavailableError, match="may still take effect"):
                await store.put_if_absent("x", b"")

    run(story())


@pytest.mark.parametrize(
    "wrong", [{"attempts_max": 0}, {"delay_s_initial": 3.0}, {"delay_s_initial": -1.0}, {"timeout_s": 0.0}], ids=str
)
def test_senseless_retry_policies_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RetryPolicy(**wrong)


# --- counting ---


def test_requests_bytes_errors_and_latencies_are_counted_by_operation_and_kind(executor: ThreadPoolExecutor) -> None:
    async def story() -> None:
        clock = ManualClock()
        faulty = FaultyObjectStore(open_object_store(f"memory://{uuid.uuid4().hex}", executor))
        store = CountingObjectStore(faulty, clock)

        async def half_a_second(_: float) -> None:
            clock.advance(0.5)

        faulty.plan.delay("put", seconds=0.5, times=2, sleep=half_a_second)
        await store.put("savepoint/a", b"12345")
        before = store.snapshot()
        await store.put("savepoint/a", memoryview(bytes(16)).cast("Q"))
        await store.put_if_absent("sst/w1-0-0-1.arrow", b"123")
        await store.put_if_absent("sst/w1-0-0-1.arrow", b"123")
        await store.put_if_absent("sst/c1-0-0-1.arrow", b"1234")
        await store.get("sst/w1-0-0-1.arrow")
        await store.get_range("savepoint/a", 0, 4)
        await store.list("manifest/")
        await store.delete("sst/w1-0-0-1.arrow")
        with pytest.raises(ObjectMissingError):
            await store.get("sst/w1-0-0-1.arrow")

        def recorded(*seconds: float) -> Histogram:
            recorder = HistogramRecorder()
            for each in seconds:
                recorder.record(each)
            return recorder.snapshot()

        assert before == {("put", "savepoint"): OperationCount(requests=1, bytes_written=5, latency=recorded(0.5))}
        assert store.snapshot() == {
            ("put", "savepoint"): OperationCount(requests=2, bytes_written=21, latency=recorded(0.5, 0.5)),
            ("put_if_absent", "flushed"): OperationCount(requests=2, bytes_written=3, latency=recorded(0, 0)),
            ("put_if_absent", "merged"): OperationCount(requests=1, bytes_written=4, latency=recorded(0)),
            ("get", "flushed"): OperationCount(requests=2, errors=1, bytes_read=3, latency=recorded(0, 0)),
            ("get_range", "savepoint"): OperationCount(requests=1, bytes_read=4, latency=recorded(0)),
            ("list", "manifest"): OperationCount(requests=1, latency=recorded(0)),
            ("delete", "flushed"): OperationCount(requests=1, latency=recorded(0)),
        }

    run(story())


# --- the tool of the fault tests ---


def test_faults_happen_to_the_calls_that_the_plan_names(executor: ThreadPoolExecutor) -> None:
    async def story() -> None:
        store = FaultyObjectStore(open_object_store(f"memory://{uuid.uuid4().hex}", executor), FaultPlan())
        store.plan.fail("put", "sst/*", nth=2, error=StorageFullError("full"))
        store.plan.lose_response("put_if_absent", lambda name: name.endswith("7"))
        await store.put("sst/1", b"")
        await store.put("other", b"")
        with pytest.raises(StorageFullError):
            await store.put("sst/2", b"")
        with pytest.raises(StateStoreError, match="injected at call 4"):
            await store.put_if_absent("m/7", b"")
        await store.put("sst/3", b"")
        assert await store.list("") == ["m/7", "other", "sst/1", "sst/3"]
        assert [(c.number, c.op, c.name) for c in store.calls][-2:] == [(5, "put", "sst/3"), (6, "list", "")]

    run(story())


@pytest.mark.parametrize(("when", "written"), [(When.BEFORE, False), (When.AFTER, True)])
def test_after_a_crash_every_call_fails_also_one_that_was_under_way(
    executor: ThreadPoolExecutor, when: When, written: bool
) -> None:
    async def story() -> None:
        inner = open_object_store(f"memory://{uuid.uuid4().hex}", executor)
        store = FaultyObjectStore(inner)
        hang = store.plan.hang("put", "slow")
        store.plan.crash("put", "x", when=when)
        slow = asyncio.create_task(store.put("slow", b""))
        await asyncio.to_thread(hang.wait_until_reached)
        with pytest.raises(CrashedError):
            await store.put("x", b"")
        with pytest.raises(CrashedError):
            await store.list("")
        hang.release()
        with pytest.raises(CrashedError):
            await slow
        assert await inner.list("") == (["x"] if written else [])

    run(story())


def test_manual_clock_wakes_sleepers_in_order_from_any_thread() -> None:
    async def story() -> None:
        clock, woken = ManualClock(start_s=10), []

        async def sleeper(seconds: float) -> None:
            await clock.sleep(seconds)
            woken.append(seconds)

        tasks = [asyncio.create_task(sleeper(s)) for s in (3, 1, 2)]
        await asyncio.sleep(0.01)
        await asyncio.to_thread(clock.advance, 2)
        await asyncio.wait(tasks[1:], timeout=5)
        assert woken == [1, 2]
        assert clock() == 12
        assert clock.now_ms() == 12_000
        clock.advance(1)
        await tasks[0]

    began = time.monotonic()
    run(story())
    assert time.monotonic() - began < 5
