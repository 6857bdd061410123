"""One run of a job: restore, loop, last checkpoint, close.

The loop polls the sources in turn, pushes a batch and its watermark through the pipeline, and lets
the coordinator look at its checkpoints. Whatever ends the loop, every source, sink, thread and
(if the job opened it) the backend is closed; only a normal end takes a last checkpoint.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from operators.checkpoint import CheckpointCoordinator, Hook, Trigger
from operators.graph import Node, SinkNode, SourceNode, describe_plan
from operators.live_state import LiveJob
from operators.pipeline import Pipeline, build_pipeline
from operators.plan_diff import Upgrade
from operators.report import JobOutcome, JobProgress, JobResult, OperatorStats
from operators.runtime import BuildContext, Cursor, Output
from operators.signals import INTERRUPTED, Interrupts
from operators.sinks.base import BoundedSink, SinkContext
from operators.source_driver import SourceDriver
from operators.upgrade import ChangedTables, Migration, decide, declared_tables, with_past_of
from statebackend import Checkpoint, StateBackend, StateCheck, StoredTable

__all__ = ["Job", "JobSettings", "ProgressCallback"]

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[JobProgress], None]

_PROGRESS_INTERVAL_S = 0.1
_NOTHING_S = 0.002
"""How long to wait when no source has anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """How a job runs.

    ``checkpoint_interval_s``: seconds between checkpoints, None for none but those on demand and
    at the end; shorter ones replay less after a crash and write more small files.
    ``checkpoint_trigger``: takes a checkpoint at exact points of the input, besides the interval.
    ``tolerable_checkpoint_failures``: so many may fail in a row before the job does.
    ``worker_threads``: threads that aggregate while the job reads.
    ``upgrade``: what became of operators since the checkpoint, see `Upgrade`.
    ``handle_signals``: SIGINT and SIGTERM stop the job gracefully (when run in the main thread).
    ``clock``: wall-clock time, seconds since the epoch.
    """

    checkpoint_interval_s: float | None = 1.0
    checkpoint_trigger: Trigger | None = None
    tolerable_checkpoint_failures: int = 3
    worker_threads: int = field(default_factory=lambda: max(1, min(4, os.cpu_count() or 1)))
    upgrade: Upgrade | None = None
    handle_signals: bool = True
    clock: Callable[[], float] = time.time
    hook: Hook | None = None

    def __post_init__(self) -> None:
        if self.checkpoint_interval_s is not None and self.checkpoint_interval_s <= 0:
            raise ValueError(f"checkpoint_interval ({self.checkpoint_interval_s} s) must be positive, or None")
        if self.worker_threads < 1 or self.tolerable_checkpoint_failures < 0:
            raise ValueError("worker_threads must be at least 1, tolerable_checkpoint_failures at least 0")


class Job:
    """A pipeline that can be run once.

    ``open_backend`` is called when the job starts, with a check of the state for before anybody is fenced; the job
    closes the backend it returns if ``owns_backend``. ``live``: through which its state is read while it runs.
    ``keep_savepoint`` is called as ``keep_savepoint(name, checkpoint_id)`` once a job that was stopped with a savepoint
    has closed its backend; None where the state knows none. ``savepoint``: the name, for a job that a signal stops.
    """

    def __init__(
        self,
        name: str,
        nodes: Sequence[Node],
        open_backend: Callable[[StateCheck], StateBackend],
        *,
        owns_backend: bool,
        settings: JobSettings,
        on_progress: ProgressCallback | None = None,
        live: LiveJob | None = None,
        keep_savepoint: Callable[[str, int], None] | None = None,
        savepoint: str | None = None,
    ) -> None:
        self._keep_savepoint = keep_savepoint
        self._savepoint: str | None = None
        if savepoint is not None:
            self._ask_for_savepoint(savepoint)
        self.name = name
        self._live = live or LiveJob(name)
        self._nodes = nodes
        self._open_backend = open_backend
        self._owns_backend = owns_backend
        self._settings = settings
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._started = False
        self._stop = threading.Event()
        self._ended = False
        # Checkpoints asked for; deque.append and popleft are atomic.
        self._requests: deque[Future[Checkpoint]] = deque()

    def run(self) -> JobResult:
        """Run to the end of all inputs, or until it is stopped.

        Raises `JobMismatchError` if the state belongs to another job, `FencedError` when another
        process has taken over the state, and the errors of sources, user functions and storage.
        """
        with self._lock:
            if self._started:
                raise RuntimeError(f"job {self.name!r} was started before; make a new one with StreamContext.job()")
            self._started = True
        interrupts = Interrupts(self._stop)
        try:
            with interrupts.installed(enabled=self._settings.handle_signals):
                return replace(self._keep(self._run(interrupts)), signal=interrupts.number)
        except Exception as error:
            # DataFusion turns a KeyboardInterrupt in a Python callback into a bare Exception.
            if interrupts.aborted or "KeyboardInterrupt" in str(error):
                raise KeyboardInterrupt from error
            raise

    def stop(self, *, savepoint: str | None = None) -> None:
        """End gracefully after the current batch, with a last checkpoint; from any thread.

        ``savepoint``: keep that checkpoint under this name. `run` then raises `ValueError` if there is a savepoint
        of the name already; the checkpoint is taken in any case. A job that comes to its end first keeps none.
        """
        if savepoint is not None:
            self._ask_for_savepoint(savepoint)
        self._stop.set()

    def checkpoint(self) -> Future[Checkpoint]:
        """Ask for a checkpoint, from any thread; the future has it once it is committed.

        Before the job runs the request waits for it; after its end the future raises `RuntimeError`.
        """
        with self._lock:
            future: Future[Checkpoint] = Future()
            if self._ended:
                future.set_exception(RuntimeError(f"job {self.name!r} has ended"))
            else:
                self._requests.append(future)
            return future

    def _ask_for_savepoint(self, name: str) -> None:
        if self._keep_savepoint is None:
            raise ValueError(f"savepoint {name!r}: only a job whose state has a URL (state=...) can keep one")
        self._savepoint = name

    def _keep(self, result: JobResult) -> JobResult:
        """Keep the last checkpoint of a job that was stopped, if that was asked for; its backend is closed."""
        if result.outcome is not JobOutcome.STOPPED or self._savepoint is None:
            return result
        assert self._keep_savepoint is not None
        self._keep_savepoint(self._savepoint, result.checkpoints[-1].checkpoint_id)
        return replace(result, savepoint=self._savepoint)

    # -- one run

    def _run(self, interrupts: Interrupts) -> JobResult:
        started = time.monotonic()
        failure: BaseException | None = None
        with ExitStack() as stack:
            try:
                run = self._open(stack, interrupts, started)
                outcome = run.loop()
                return run.result(outcome)
            except BaseException as error:
                failure = error
                raise
            finally:
                self._end(failure)

    def _open(self, stack: ExitStack, interrupts: Interrupts, started: float) -> _Run:
        """Open the backend and restore: sinks first, so that what was committed is published again."""
        settings = self._settings
        plan: Mapping[str, Any] = describe_plan(self.name, self._nodes)
        backend = self._open_backend(partial(self._decide, plan))
        if self._owns_backend:
            stack.callback(backend.close)
        restored = backend.restored
        workers = ThreadPoolExecutor(settings.worker_threads, thread_name_prefix="window")
        stack.callback(workers.shutdown, wait=True, cancel_futures=True)
        context = BuildContext(backend=backend, job=None, workers=workers, cursor=Cursor(), clock=settings.clock)
        migration = None
        if restored is not None:
            # As before the backend was opened, but for what another process has committed in between.
            migration = self._decide(plan, restored, backend.stored_tables())
            if migration is not None:
                backend.move_tables(migration.tables)
            plan = with_past_of(restored.job, plan) if migration is None else migration.plan
            context = replace(context, job=restored.job if migration is None else migration.job)
        if settings.upgrade is not None and settings.upgrade.changes:
            context = replace(context, backend=ChangedTables(backend, settings.upgrade.changes))
        for node in self._nodes:
            if isinstance(node, SourceNode):
                stack.callback(node.source.close)
            elif isinstance(node, SinkNode):
                stack.callback(node.sink.close)
        pipeline = build_pipeline(self._nodes, context)
        for operator in pipeline.operators:
            stack.callback(operator.close)
        attempt = uuid.uuid4().hex[:12]
        hook = settings.hook or _unheard
        hook("restoring")
        for sink in pipeline.sinks:
            place = SinkContext(sink.operator_id, sink.schema, context.backend, backend.store_id, attempt)
            sink.sink.open(place, () if context.job is None else context.job.committables.get(sink.operator_id, ()))
        for source in pipeline.sources:
            source.open()
        hook("restored")
        coordinator = CheckpointCoordinator(
            backend,
            pipeline,
            plan,
            requests=self._requests,
            interval_s=settings.checkpoint_interval_s,
            tolerable_failures=settings.tolerable_checkpoint_failures,
            trigger=settings.checkpoint_trigger,
            hook=settings.hook,
        )
        stack.callback(coordinator.close)
        if restored is not None:
            logger.info("job %r: restored from checkpoint %d", self.name, restored.checkpoint_id)
        if migration is not None:
            coordinator.checkpoint_now()
            logger.info("job %r: the state was upgraded: %s", self.name, migration.summary)
        self._live.begin(backend, pipeline, plan)
        return _Run(
            pipeline,
            coordinator,
            self._live,
            restored,
            self._stop,
            interrupts,
            self._on_progress,
            started,
            settings,
        )

    def _decide(
        self, plan: Mapping[str, Any], restored: Checkpoint | None, tables: Mapping[str, StoredTable]
    ) -> Migration | None:
        """How the state becomes that of this plan; None if it is, or if no job has written to it yet.

        Nothing of a migration is durable before the first checkpoint, which commits it as a whole.
        """
        if restored is None or not restored.job.plan:
            return None
        declared = partial(declared_tables, self._nodes, self._settings.clock)
        return decide(restored.job, restored.checkpoint_id, tables, plan, self._settings.upgrade, declared)

    def _end(self, failure: BaseException | None) -> None:
        """Answer the requests that got no checkpoint."""
        self._live.end(failure)
        with self._lock:
            self._ended = True
        while self._requests:
            request = self._requests.popleft()
            error = RuntimeError(f"job {self.name!r} ended before the checkpoint was taken")
            error.__cause__ = failure
            request.set_exception(error)


class _Run:
    """The loop over an open pipeline."""

    def __init__(
        self,
        pipeline: Pipeline,
        coordinator: CheckpointCoordinator,
        live: LiveJob,
        restored: Checkpoint | None,
        stop: threading.Event,
        interrupts: Interrupts,
        on_progress: ProgressCallback | None,
        started: float,
        settings: JobSettings,
    ) -> None:
        self._clock = settings.clock
        self._hook = settings.hook or _unheard
        self._pipeline = pipeline
        self._coordinator = coordinator
        self._live = live
        self._restored = restored
        self._stop = stop
        self._interrupts = interrupts
        self._on_progress = on_progress
        self._started = started
        self._next_progress = 0.0
        totals = [source.source.total_rows for source in pipeline.sources]
        self._rows_total = None if None in totals else sum(t for t in totals if t is not None)

    def loop(self) -> JobOutcome:
        """Poll the sources in turn until all have ended or the job is stopped."""
        active = list(self._pipeline.sources)
        bounded = [s.sink for s in self._pipeline.sinks if isinstance(s.sink, BoundedSink)]
        processing_time = any(o.uses_processing_time for o in self._pipeline.operators)
        while active and not self._stop.is_set():
            for source in _round(active):
                if not self._step(source):
                    active.remove(source)
            if active and all(source.waiting for source in active):
                self._hook("idle")
                self._stop.wait(_NOTHING_S)
            if processing_time:
                self._pipeline.on_processing_time(int(self._clock() * 1000))
            self._coordinator.poll(full=any(sink.full for sink in bounded))
            self._live.answer()
            if self._on_progress is not None:
                self._report(time.monotonic())
        self._coordinator.finish(final=not active)
        if self._on_progress is not None:
            self._report(None)
        return JobOutcome.STOPPED if active else JobOutcome.FINISHED

    def result(self, outcome: JobOutcome) -> JobResult:
        """What this run did."""
        restored = self._restored
        return JobResult(
            outcome=outcome,
            seconds=time.monotonic() - self._started,
            rows_read=sum(s.rows_in for s in self._pipeline.sources),
            operators=self._operators(),
            checkpoints=tuple(self._coordinator.stats),
            failed_checkpoints=self._coordinator.failed,
            restored_from=None if restored is None else restored.checkpoint_id,
            restored_positions={} if restored is None else dict(restored.job.sources),
        )

    def _step(self, source: SourceDriver) -> bool:
        self._hook("poll")
        item = self._interrupts.polling(source.poll)
        if item is INTERRUPTED:
            return True
        return source.push(item)

    def _report(self, now: float | None) -> None:
        """Call back, at most every tenth of a second; None: at the end, in any case."""
        if self._on_progress is None or (now is not None and now < self._next_progress):
            return
        self._next_progress = (now or 0.0) + _PROGRESS_INTERVAL_S
        self._on_progress(
            JobProgress(
                seconds=time.monotonic() - self._started,
                rows_read=sum(s.rows_in for s in self._pipeline.sources),
                rows_total=self._rows_total,
                positions=self._pipeline.positions(),
                watermarks=self._pipeline.watermarks(),
                operators=self._operators(),
                checkpoints=tuple(self._coordinator.stats[-1:]),
                restored_from=None if self._restored is None else self._restored.checkpoint_id,
            )
        )

    def _operators(self) -> dict[str, OperatorStats]:
        pipeline = self._pipeline
        sources = {s.operator_id: _stats(s.rows_in, s.outputs) for s in pipeline.sources}
        return {**sources, **{o.operator_id: _stats(o.rows_in, o.outputs) for o in pipeline.operators}}


def _unheard(_: str) -> None:
    """Nobody listens to the steps of the protocol."""


def _round(active: Sequence[SourceDriver]) -> list[SourceDriver]:
    """Whom to poll next: every source without event time, and of the others the one that is furthest behind.

    So the inputs of a join advance side by side. Which round follows is a function of the watermarks alone, and
    checkpoints are taken between rounds: a restored job polls in the same order. Sources that had nothing when they
    were polled last do not keep the others waiting, unless those are too far ahead already (``max_drift``).
    """
    timed = [s for s in active if s.timed]
    ready = [s for s in timed if not s.waiting]
    behind = min(ready, key=_progress, default=None)
    if behind is not None and behind.max_drift_ms is not None:
        slowest = min(_progress(s) for s in timed)
        if slowest > -math.inf and _progress(behind) - slowest > behind.max_drift_ms:
            behind = None
    return [s for s in active if not s.timed or s.waiting or s is behind]


def _progress(source: SourceDriver) -> float:
    return -math.inf if source.watermark is None else source.watermark


def _stats(rows_in: int, outputs: Sequence[Output]) -> OperatorStats:
    rows = [output.rows for output in outputs]
    return OperatorStats(rows_in=rows_in, rows_out=sum(rows[:1]), side_rows=sum(rows[1:]))
