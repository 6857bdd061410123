"""The isolated runtime: nothing that happens to the host program reaches the work; close() leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from statebackend.daemon_pool import DaemonPool
from statebackend.errors import StoreClosedError
from statebackend.runtime import IsolatedRuntime


@pytest.fixture
def runtime(request: pytest.FixtureRequest) -> Iterator[IsolatedRuntime]:
    name = f"rt-{request.node.name[:60]}"
    runtime = IsolatedRuntime(name, io_threads=3, cpu_threads=2).start()
    yield runtime
    runtime.close(5)
    assert threads_of(name) == []


def threads_of(name: str) -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(name)]


class Gate:
    """Work that waits for the test: `reached` once it runs, `done` once it has finished."""

    def __init__(self) -> None:
        self.reached, self.done = threading.Event(), threading.Event()
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    async def work(self) -> str:
        self.reached.set()
        while not self._open.is_set():  # noqa: ASYNC110  (opened from another thread)
            await asyncio.sleep(0.002)
        self.done.set()
        return "finished"

    def block(self) -> str:
        self.reached.set()
        self._open.wait(30)
        self.done.set()
        return "finished"


async def answer(value: Any = 42) -> Any:
    return value


async def fail(message: str = "broken") -> None:
    raise ValueError(message)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# --- running work ---


def test_work_runs_on_the_runtimes_own_thread_and_loop(runtime: IsolatedRuntime) -> None:
    async def where() -> tuple[str, asyncio.AbstractEventLoop]:
        return threading.current_thread().name, asyncio.get_running_loop()

    name, loop = runtime.submit(where()).result(5)
    assert name == f"{runtime.name}-loop"
    assert runtime.submit(where).result(5)[1] is loop
    assert runtime.call(answer("x"), 5) == "x"


def test_errors_of_the_work_reach_the_one_who_waits(runtime: IsolatedRuntime) -> None:
    with pytest.raises(ValueError, match="broken"):
        runtime.call(fail())

    def no_coroutine() -> Any:
        raise KeyError("early")

    with pytest.raises(KeyError, match="early"):
        runtime.call(no_coroutine)
    gc.collect()
    assert runtime.failures == ()


def test_pools_run_blocking_and_computing_work_on_named_threads(runtime: IsolatedRuntime) -> None:
    def where(tag: str, *, more: str) -> tuple[str, str]:
        return threading.current_thread().name, tag + more

    async def both() -> list[tuple[str, str]]:
        return [await runtime.run_io(where, "a", more="1"), await runtime.run_cpu(where, "b", more="2")]

    (io, one), (cpu, two) = runtime.call(both)
    assert (one, two) == ("a1", "b2")
    assert io.startswith(f"{runtime.name}-io-")
    assert cpu.startswith(f"{runtime.name}-cpu-")


def test_the_io_pool_is_bounded_and_starts_threads_only_as_needed(runtime: IsolatedRuntime) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def job() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    async def burst() -> None:
        await asyncio.gather(*(runtime.run_io(job) for _ in range(20)))

    assert threads_of(f"{runtime.name}-io") == []
    runtime.call(burst)
    assert most == 3
    assert len(threads_of(f"{runtime.name}-io")) == 3


def test_a_stuck_job_does_not_hold_up_others_while_the_pool_has_room(runtime: IsolatedRuntime) -> None:
    gate = Gate()
    stuck = runtime.io_executor.submit(gate.block)
    gate.reached.wait(5)
    for _ in range(50):
        assert runtime.io_executor.submit(lambda: 1).result(5) == 1
    gate.open()
    assert stuck.result(5) == "finished"


def test_call_gives_up_after_its_timeout_and_the_work_goes_on(runtime: IsolatedRuntime) -> None:
    gate = Gate()
    with pytest.raises(TimeoutError):
        runtime.call(gate.work(), 0.02)
    gate.open()
    assert gate.done.wait(5)


def test_a_blocking_call_on_the_runtimes_own_thread_is_refused(runtime: IsolatedRuntime) -> None:
    async def nested() -> None:
        runtime.call(answer())

    with pytest.raises(RuntimeError, match="own thread"):
        runtime.call(nested)

    async def close_inside() -> None:
        runtime.close()

    with pytest.raises(RuntimeError, match="own thread"):
        runtime.call(close_inside)


# --- what the host does has no effect ---


def test_cancelling_the_future_drops_only_the_wait(runtime: IsolatedRuntime) -> None:
    gate = Gate()
    future = runtime.submit(gate.work())
    gate.reached.wait(5)
    assert future.cancel()
    gate.open()
    assert gate.done.wait(5)
    with pytest.raises(CancelledError):
        future.result(1)


def test_cancelling_the_task_of_the_host_that_awaits_has_no_effect(runtime: IsolatedRuntime) -> None:
    gate = Gate()

    async def host() -> None:
        waiting = asyncio.create_task(asyncio.wait_for(asyncio.wrap_future(runtime.submit(gate.work())), 30))
        await asyncio.to_thread(gate.reached.wait, 5)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(host())
    assert not gate.done.is_set()
    gate.open()
    assert gate.done.wait(5)
    assert runtime.call(answer()) == 42


def test_closing_the_loop_of_the_host_in_the_middle_has_no_effect(runtime: IsolatedRuntime) -> None:
    gate = Gate()
    loop = asyncio.new_event_loop()

    async def host() -> None:
        task = asyncio.create_task(wait_for_it())
        await asyncio.to_thread(gate.reached.wait, 5)
        held.append(task)

    async def wait_for_it() -> None:
        await asyncio.wrap_future(runtime.submit(gate.work()))

    held: list[asyncio.Task[None]] = []
    loop.run_until_complete(host())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    gate.open()
    assert gate.done.wait(5)
    assert runtime.call(answer()) == 42
    held[0]._log_destroy_pending = False  # type: ignore[attr-defined]  # destroyed while pending, on purpose


def test_ctrl_c_in_the_host_thread_interrupts_only_the_wait(runtime: IsolatedRuntime) -> None:
    gate = Gate()

    def interrupt() -> None:
        gate.reached.wait(5)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    killer = threading.Thread(target=interrupt)
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        runtime.call(gate.work(), 20)
    killer.join()
    gate.open()
    assert gate.done.wait(5)
    assert runtime.call(answer()) == 42


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_raised_by_the_work_itself_does_not_end_the_loop(
    runtime: IsolatedRuntime, error: type[BaseException]
) -> None:
    gate = Gate()
    other = runtime.submit(gate.work())

    async def interrupt() -> None:
        raise error

    with pytest.raises(error):
        runtime.call(interrupt)
    gate.open()
    assert other.result(5) == "finished"


# --- failures that nobody sees ---


def test_a_failure_whose_future_was_dropped_or_cancelled_is_kept_and_told(caplog: pytest.LogCaptureFixture) -> None:
    told: list[BaseException] = []
    with IsolatedRuntime("rt-unseen", on_failure=told.append) as runtime:
        runtime.submit(fail("dropped"))
        wait_for(lambda: len(runtime.failures) == 1)
        gate = Gate()

        async def late() -> None:
            await gate.work()
            await fail("cancelled")

        future = runtime.submit(late)
        future.cancel()
        gate.open()
        wait_for(lambda: len(runtime.failures) == 2)
        assert [str(f) for f in runtime.failures] == ["dropped", "cancelled"]
        assert list(runtime.failures) == told
        assert "dropped" in caplog.text


def test_a_failure_that_somebody_looked_at_is_not_kept(runtime: IsolatedRuntime) -> None:
    seen: list[BaseException | None] = []
    future: Future[None] | None = runtime.submit(fail("seen"))
    assert future is not None
    future.add_done_callback(lambda f: seen.append(f.exception()))
    wait_for(lambda: seen)
    future = None
    with pytest.raises(ValueError, match="awaited"):
        asyncio.run(_await(runtime.submit(fail("awaited"))))
    gc.collect()
    assert runtime.failures == ()


async def _await(future: Future[Any]) -> Any:
    return await asyncio.wrap_future(future)


def test_a_failure_of_a_task_that_the_work_started_by_itself_is_kept(runtime: IsolatedRuntime) -> None:
    async def start_and_forget() -> None:
        asyncio.create_task(fail("forgotten"))  # noqa: RUF006  (that is the point)
        await asyncio.sleep(0.01)

    runtime.call(start_and_forget)
    gc.collect()
    wait_for(lambda: [str(f) for f in runtime.failures] == ["forgotten"])


def test_an_observer_that_fails_does_no_harm() -> None:
    def observer(_: BaseException) -> None:
        raise RuntimeError("observer")

    with IsolatedRuntime("rt-observer", on_failure=observer) as runtime:
        runtime.submit(fail())
        wait_for(lambda: runtime.failures)
        assert runtime.call(answer()) == 42


# --- closing ---


def test_close_finishes_what_was_handed_over_and_leaves_no_thread() -> None:
    runtime = IsolatedRuntime("rt-close").start()

    async def work(i: int) -> int:
        await asyncio.sleep(0.05)
        return await runtime.run_io(lambda: i) + await runtime.run_cpu(lambda: i)

    futures = [runtime.submit(work(i)) for i in range(10)]
    runtime.close(10)
    assert [f.result(0) for f in futures] == [2 * i for i in range(10)]
    assert threads_of("rt-close") == []


def test_a_closed_runtime_refuses_work_and_may_be_closed_again() -> None:
    runtime = IsolatedRuntime("rt-closed").start()
    runtime.close(5)
    runtime.close(5)
    for refused in (lambda: runtime.submit(answer()), lambda: runtime.call(answer()), runtime.check_usable):
        with pytest.raises(StoreClosedError, match=r"rt-closed.*closed"):
            refused()
    with pytest.raises(StoreClosedError):
        runtime.io_executor.submit(print)
    with pytest.raises(RuntimeError, match="started before"):
        runtime.start()


def test_a_runtime_that_was_never_started_refuses_work_and_can_be_closed() -> None:
    runtime = IsolatedRuntime("rt-new")
    with pytest.raises(StoreClosedError):
        runtime.submit(answer())
    runtime.close()
    with pytest.raises(StoreClosedError):
        runtime.check_usable()


def test_work_that_outlasts_the_deadline_is_cancelled_and_its_waiter_told() -> None:
    runtime = IsolatedRuntime("rt-deadline").start()
    cleaned = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            cleaned.set()

    future = runtime.submit(endless)
    waiters: list[BaseException | None] = []
    waiter = threading.Thread(target=lambda: waiters.append(future.exception(20)))
    waiter.start()
    began = time.monotonic()
    runtime.close(0.05)
    assert time.monotonic() - began < 2
    waiter.join(5)
    assert cleaned.is_set()
    assert isinstance(waiters[0], StoreClosedError)
    assert threads_of("rt-deadline") == []


def test_background_work_is_cancelled_at_once_so_that_close_does_not_wait_for_it() -> None:
    runtime = IsolatedRuntime("rt-background").start()
    started = threading.Event()
    later: list[Future[Any]] = []

    async def ticker() -> None:
        started.set()
        await asyncio.sleep(1000)

    async def foreground() -> str:
        await asyncio.sleep(0.1)
        later.append(runtime.submit(ticker(), background=True))  # what it starts while closing is not begun
        with pytest.raises(StoreClosedError):
            runtime.submit(answer())
        assert ticking.cancelled()  # while this is still under way
        return "done"

    ticking = runtime.submit(ticker, background=True)
    started.wait(5)
    work = runtime.submit(foreground)
    began = time.monotonic()
    runtime.close(30)
    assert time.monotonic() - began < 3
    assert work.result(0) == "done"
    assert ticking.cancelled()
    assert later[0].cancelled()
    gc.collect()
    assert runtime.failures == ()


def test_work_that_will_not_be_cancelled_is_left_behind_and_its_waiter_told() -> None:
    runtime = IsolatedRuntime("rt-stubborn").start()

    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                continue

    future = runtime.submit(stubborn)
    began = time.monotonic()
    runtime.close(0.05)
    assert time.monotonic() - began < 5
    with pytest.raises(StoreClosedError):
        future.result(0)
    assert threads_of("rt-stubborn") == []


def test_close_names_the_thread_that_is_stuck_instead_of_hanging() -> None:
    runtime = IsolatedRuntime("rt-stuck").start()
    gate = Gate()

    async def blocked() -> str:
        return await runtime.run_io(gate.block)

    future = runtime.submit(blocked)
    gate.reached.wait(5)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="rt-stuck-io-0"):
        runtime.close(0.1)
    assert time.monotonic() - began < 5
    with pytest.raises(StoreClosedError):
        future.result(0)
    gate.open()
    runtime.close(5)
    assert threads_of("rt-stuck") == []


def test_close_names_its_own_loop_when_a_coroutine_blocks_it() -> None:
    runtime = IsolatedRuntime("rt-blocked").start()
    gate = Gate()

    async def blocking() -> str:
        return gate.block()

    future = runtime.submit(blocking)
    gate.reached.wait(5)
    with pytest.raises(TimeoutError, match="rt-blocked-loop"):
        runtime.close(0.1)
    with pytest.raises(StoreClosedError):
        future.result(0)
    gate.open()
    runtime.close(5)
    assert threads_of("rt-blocked") == []


def test_several_threads_may_close_at_once() -> None:
    runtime = IsolatedRuntime("rt-many").start()
    runtime.call(answer())
    errors: list[BaseException] = []

    def close() -> None:
        try:
            runtime.close(5)
        except BaseException as error:
            errors.append(error)

    closers = [threading.Thread(target=close) for _ in range(5)]
    for c in closers:
        c.start()
    for c in closers:
        c.join(10)
    assert errors == []
    assert threads_of("rt-many") == []


def test_submitting_races_with_close_without_losing_a_future() -> None:
    for _ in range(20):
        runtime = IsolatedRuntime("rt-race").start()
        futures: list[Future[Any]] = []

        def submit(runtime: IsolatedRuntime = runtime, futures: list[Future[Any]] = futures) -> None:
            try:
                while True:
                    futures.append(runtime.submit(answer()))
            except StoreClosedError:
                pass

        threads = [threading.Thread(target=submit) for _ in range(3)]
        for t in threads:
            t.start()
        time.sleep(0.002)
        runtime.close(10)
        for t in threads:
            t.join()
        assert all(f.result(0) == 42 for f in futures)


# --- the pool ---


def test_pool_drops_what_has_not_begun_and_refuses_more() -> None:
    pool, gate = DaemonPool("pool", 1), Gate()
    running, waiting = pool.submit(gate.block), pool.submit(print)
    gate.reached.wait(5)
    pool.shutdown(wait=False, cancel_futures=True)
    gate.open()
    pool.shutdown()
    assert running.result(0) == "finished"
    assert waiting.cancelled()
    assert threads_of("pool") == []
    with pytest.raises(StoreClosedError, match="pool"):
        pool.submit(print)
    with pytest.raises(ValueError, match="at least one"):
        DaemonPool("pool", 0)


def test_pool_finishes_what_waits_unless_told_to_drop_it_and_passes_errors_on() -> None:
    with DaemonPool("pool", 2) as pool:
        squares = [pool.submit(pow, i, 2) for i in range(100)]
        broken = pool.submit(int, "x")
        dropped = pool.submit(time.sleep, 0)
        dropped.cancel()
    assert [s.result(0) for s in squares] == [i * i for i in range(100)]
    assert isinstance(broken.exception(0), ValueError)


# --- processes ---


def in_a_process(code: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a script that has the imports below."""
    header = """
        import asyncio, os, sys, threading, time
        from statebackend.errors import StoreClosedError
        from statebackend.runtime import IsolatedRuntime
        """
    script = textwrap.dedent(header) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=timeout_s, check=False
    )


def test_a_forked_process_is_told_that_it_cannot_use_the_runtime() -> None:
    done = in_a_process("""
        runtime = IsolatedRuntime("rt").start()
        async def answer(): return 42
        runtime.call(answer())
        runtime.call(lambda: runtime.run_io(int))
        runtime._lock.acquire()  # as if another thread had been inside at the moment of the fork
        pid = os.fork()
        if pid == 0:
            told = 0
            for use in (lambda: runtime.submit(answer()), lambda: runtime.call(answer()), runtime.close,
                        runtime.check_usable, lambda: runtime.io_executor.submit(print)):
                try:
                    use()
                except StoreClosedError as error:
                    told += "fork" in str(error)
            sys.exit(told)  # runs the exit handlers too
        _, status = os.waitpid(pid, 0)
        runtime._lock.release()
        assert os.waitstatus_to_exitcode(status) == 5, status
        assert runtime.call(answer()) == 42
        runtime.close(5)
        print("ok")
        """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "raise KeyboardInterrupt"])
def test_the_interpreter_exits_promptly_without_close_whatever_is_under_way(ending: str) -> None:
    done = in_a_process(f"""
        runtime = IsolatedRuntime("rt").start()
        def blocked():
            print("blocked", flush=True)
            threading.Event().wait()
        async def endless():
            await asyncio.sleep(1000)
        async def stuck():
            await runtime.run_io(blocked)
        held = [runtime.submit(endless()), runtime.submit(stuck()), runtime.submit(endless(), background=True)]
        time.sleep(0.2)
        print(time.monotonic(), flush=True)
        {ending}
        """)
    ended = time.monotonic()
    assert done.stdout.startswith("blocked")
    assert ended - float(done.stdout.split()[1]) < 8
    assert done.returncode == {"": 0, "sys.exit(3)": 3, "raise KeyboardInterrupt": -signal.SIGINT}[ending]


def test_an_idle_runtime_does_not_delay_the_exit() -> None:
    done = in_a_process("""
        runtime = IsolatedRuntime("rt").start()
        async def work(): return await runtime.run_io(int) + await runtime.run_cpu(int)
        runtime.call(work)
        print(time.monotonic(), flush=True)
        """)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - float(done.stdout) < 2
