"""Takes checkpoints of a running job: barrier, commit in the background, publish in order.

At a barrier, between two batches, the pipeline is drained; then the stream stands still while every
sink names what it will publish, positions and watermarks are collected and the backend cuts its
tables. All else happens beside the stream: the backend stages and commits, and one side thread
publishes what is committed, in the order of the checkpoints.

Invariants:

* Nothing is published before the checkpoint that names it is committed.
* A checkpoint is committed and published before the next is cut; one that comes due meanwhile waits.
* A failed checkpoint loses nothing: tables and sinks bring it again with the next one.
* After `FencedError` nothing is published any more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from operators.pipeline import Pipeline
from operators.report import CheckpointStats
from statebackend import (
    Checkpoint,
    CommitUnknownError,
    FencedError,
    JobState,
    StateBackend,
    StorageUnavailableError,
)

__all__ = ["CheckpointCoordinator", "Hook", "Trigger"]

logger = logging.getLogger(__name__)

Hook = Callable[[str], None]
"""Called with the name of each step of the protocol; a test may crash or raise there.

On the job's thread: ``restoring`` (the sinks are about to be opened), ``restored``, ``poll`` (a source is about to be
asked), ``idle`` (no source has anything), ``barrier``, ``drained``, ``prepared``, ``handed_over``. On the backend's
threads, for every sink that stages: ``stage``, ``staged``. On the publisher's: ``committed``, for every sink
``publish``, and ``published``.
"""

Trigger = Callable[[], bool]
"""Whether a checkpoint is to be cut at this point of the input; called on the job's thread."""

_PASSING = (StorageUnavailableError, CommitUnknownError, OSError)
_STATS_MAX = 10_000  # of a job that runs for ever, the newest are kept
_FINAL_ATTEMPTS = 5
_FINAL_BACKOFF_S = 0.2


@dataclass(slots=True)
class _Running:
    """A checkpoint between its cut and its publication."""

    commit: Future[Checkpoint]
    committables: Mapping[str, Sequence[Any]]
    positions: Mapping[str, Any]
    requests: list[Future[Checkpoint]]
    drain_ms: float
    sync_ms: float
    published: Future[None] = field(default_factory=Future)


class CheckpointCoordinator:
    """Decides when, and carries out. All methods belong to the job's thread.

    ``requests``: checkpoints on demand, appended by any thread, answered here. ``interval_s`` None:
    only on demand and at the end. ``trigger``: asked after every round of batches; where it is true a checkpoint
    is cut right there, as soon as the one before is committed and published. ``tolerable_failures``: how many
    checkpoints in a row may fail before the job does.
    """

    def __init__(
        self,
        backend: StateBackend,
        pipeline: Pipeline,
        plan: Mapping[str, Any],
        *,
        requests: deque[Future[Checkpoint]],
        interval_s: float | None,
        tolerable_failures: int,
        trigger: Trigger | None = None,
        hook: Hook | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._pipeline = pipeline
        self._plan = plan
        self._requests = requests
        self._interval_s = interval_s
        self._tolerable_failures = tolerable_failures
        self._trigger = trigger
        self._hook: Hook = hook or (lambda _: None)
        self._clock = clock
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._stopped = threading.Event()
        # State below belongs to the job's thread.
        restored = backend.restored
        self._barrier_id = 0 if restored is None else restored.checkpoint_id
        self._due = clock() + (interval_s or 0.0)
        self._running: _Running | None = None
        self._publishing: _Running | None = None
        self._failures = 0
        self._last_error: BaseException | None = None
        self.failed = 0
        self.stats: list[CheckpointStats] = []

    def poll(self, *, full: bool = False) -> None:
        """Between two batches: look at what has finished, take a checkpoint if one is due.

        ``full``: a sink can take no more; wait for the checkpoint that is under way, then take one in any case.

        Raises `FencedError` at once, another error when it has come up too often.
        """
        if self._running is not None and self._running.commit.done():
            self._settle()
        if self._publishing is not None and self._publishing.published.done():
            self._settle_publication()
        if (self._trigger is not None and self._trigger()) or full:
            self._wait()
            self._barrier(final=False)
        elif self._running is None and self._publishing is None and self._is_due():
            self._barrier(final=False)

    def finish(self, *, final: bool) -> None:
        """The last checkpoint: commit and publish everything, then commit that it is published.

        ``final``: the input has ended. A failure that may pass is tried again a few times.
        """
        self._wait()
        for attempt in range(_FINAL_ATTEMPTS):
            failed = self.failed
            self._barrier(final=final)
            named = self._running is not None and bool(self._running.committables)
            self._wait()
            if self.failed > failed:
                time.sleep(_FINAL_BACKOFF_S * 2**attempt)
            elif not named:
                return
        if self._failures and self._last_error is not None:
            raise self._last_error

    def checkpoint_now(self) -> None:
        """A checkpoint between two batches, committed and published when this returns.

        A failure that may pass is left to the next one, which commits the same.
        """
        self._wait()
        self._barrier(final=False)
        self._wait()

    def close(self) -> None:
        """Stop the side thread; requests that have no outcome yet are left to the job."""
        self._stopped.set()
        self._publisher.shutdown(wait=True, cancel_futures=True)
        if self._running is not None:
            self._requests.extend(self._running.requests)

    # -- barrier

    def _is_due(self) -> bool:
        if self._requests:
            return True
        return self._interval_s is not None and self._clock() >= self._due

    def _barrier(self, *, final: bool) -> None:
        self._barrier_id += 1
        self._hook("barrier")
        begin = time.perf_counter()
        self._pipeline.drain()
        self._hook("drained")
        drained = time.perf_counter()
        prepared = {s.operator_id: s.sink.prepare(self._barrier_id, final=final) for s in self._pipeline.sinks}
        committables = {name: list(p.committables) for name, p in prepared.items() if p.committables}
        stages = [self._told(p.stage) for p in prepared.values() if p.stage is not None]
        self._hook("prepared")
        state = JobState(
            sources=self._pipeline.positions(),
            watermarks=self._pipeline.watermarks(),
            committables=committables,
            plan=self._plan,
        )
        commit = self._backend.checkpoint(state, stages)
        cut = time.perf_counter()
        requests = [self._requests.popleft() for _ in range(len(self._requests))]
        running = _Running(
            commit, committables, state.sources, requests, (drained - begin) * 1e3, (cut - drained) * 1e3
        )
        self._running = running
        commit.add_done_callback(lambda _: self._publish_soon(running))
        if self._interval_s is not None:
            self._due = self._clock() + self._interval_s
        self._hook("handed_over")

    def _told(self, stage: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            self._hook("stage")
            stage()
            self._hook("staged")

        return run

    # -- publication, on the side thread

    def _publish_soon(self, running: _Running) -> None:
        """Called on the backend's thread when the outcome of the commit is known."""
        try:
            self._publisher.submit(self._publish, running)
        except RuntimeError:
            # The job is closing; the next one publishes from the manifest.
            running.published.cancel()

    def _publish(self, running: _Running) -> None:
        try:
            if not running.commit.cancelled() and running.commit.exception() is None and not self._stopped.is_set():
                self._hook("committed")
                for sink in self._pipeline.sinks:
                    if sink.operator_id in running.committables:
                        self._hook("publish")
                        sink.sink.publish(running.committables[sink.operator_id])
                self._hook("published")
        except BaseException as error:  # noqa: BLE001 - it is raised on the job's thread
            running.published.set_exception(error)
        else:
            running.published.set_result(None)

    # -- outcomes, on the job's thread

    def _wait(self) -> None:
        if self._running is not None:
            self._running.commit.exception()
            self._settle()
        if self._publishing is not None:
            self._publishing.published.exception()
            self._settle_publication()

    def _settle(self) -> None:
        running, self._running = self._running, None
        assert running is not None
        error = running.commit.exception()
        if error is not None:
            self._fail(error, "checkpoint", running.requests)
            return
        checkpoint = running.commit.result()
        self._failures = 0
        self.stats.append(
            CheckpointStats(
                checkpoint_id=checkpoint.checkpoint_id,
                drain_ms=running.drain_ms,
                sync_ms=running.sync_ms,
                duration_ms=checkpoint.duration_s * 1e3,
                bytes=checkpoint.bytes_written,
                rows=checkpoint.rows_written,
            )
        )
        del self.stats[:-_STATS_MAX]
        for request in running.requests:
            request.set_result(checkpoint)
        for source in self._pipeline.sources:
            if source.operator_id in running.positions:
                source.committed(running.positions[source.operator_id])
        self._publishing = running

    def _settle_publication(self) -> None:
        running, self._publishing = self._publishing, None
        assert running is not None
        error = running.published.exception()
        if error is not None:
            self._fail(error, "publication", [])

    def _fail(self, error: BaseException, what: str, requests: Sequence[Future[Checkpoint]]) -> None:
        for request in requests:
            request.set_exception(error)
        if isinstance(error, FencedError):
            self._stopped.set()
            raise error
        self.failed += 1
        self._failures += 1
        self._last_error = error
        if not isinstance(error, _PASSING) or self._failures > self._tolerable_failures:
            raise error
        logger.warning("%s failed (%d in a row), it will come again: %r", what, self._failures, error)
