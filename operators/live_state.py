"""Lets other threads of the process read the state of a running job, as it is between two batches.

A reader leaves a request; the job answers it when it comes to the end of its round of batches, where it also takes its
checkpoints: operators write what they hold back, the backend copies references to its tables (`StateStore.snapshot`),
and the job goes on. Everything else happens on the reader's side. Requests that wait together get the same snapshot.

So a reader waits for one round at most, a checkpoint that the job waits for included, and the job for nobody.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from operators.pipeline import Pipeline
from statebackend import JobState, LiveBackend, StateBackend, StateSnapshot

__all__ = ["LiveJob", "LiveReader"]


class LiveJob:
    """The state of a job that runs, or will. Its runs follow one another."""

    def __init__(self, name: str) -> None:
        self._name = name
        # State below is protected by _lock, except that the job's thread looks without it whether somebody waits.
        self._lock = threading.Lock()
        self._waiting: deque[Future[StateSnapshot]] = deque()
        self._ended = False
        self._thread: int | None = None
        # State below belongs to the job's thread.
        self._run: tuple[StateBackend, Pipeline, Mapping[str, Any]] | None = None

    def snapshot(self, timeout_s: float) -> StateSnapshot:
        """All tables between two batches, and the positions of the sources there; from any thread but the job's.

        Before the job runs, the call waits for it. Raises ``RuntimeError`` when the job has ended or is asked by a
        callback of its own, ``TimeoutError`` when no batch ended in time, ``TypeError`` when the backend cannot be read
        live.
        """
        answer: Future[StateSnapshot] = Future()
        with self._lock:
            if self._thread == threading.get_ident():
                raise RuntimeError(
                    f"job {self._name!r}: a callback of the job cannot read its state, which is to be seen only when "
                    "the batch that the callback is part of has ended; read it from another thread"
                )
            if self._ended:
                raise RuntimeError(f"job {self._name!r} has ended; statebackend.open_state(URL) reads its checkpoints")
            self._waiting.append(answer)
        try:
            return answer.result(timeout_s)
        except TimeoutError:
            answer.cancel()
            raise TimeoutError(
                f"job {self._name!r}: no round of batches ended within {timeout_s:g} s: it has not begun, or a source, "
                "a function or the storage takes its time; statebackend.open_state(URL) reads the newest checkpoint"
            ) from None

    # --- the job's thread ---

    def begin(self, backend: StateBackend, pipeline: Pipeline, plan: Mapping[str, Any]) -> None:
        """A run has its operators; requests are answered from now on."""
        with self._lock:
            self._ended, self._thread = False, threading.get_ident()
        self._run = (backend, pipeline, plan)

    def answer(self) -> None:
        """Between two batches: give those who wait what they wait for.

        Raises what writing the held back rows raises, as a barrier would.
        """
        if not self._waiting:
            return
        with self._lock:
            waiting = [future for future in self._waiting if future.set_running_or_notify_cancel()]
            self._waiting.clear()
        if not waiting:
            return
        assert self._run is not None
        backend, pipeline, plan = self._run
        if not isinstance(backend, LiveBackend):
            unknown = TypeError(f"job {self._name!r}: a {type(backend).__name__} cannot be read live")
            for future in waiting:
                future.set_exception(unknown)
            return
        try:
            pipeline.drain()
            job = JobState(sources=pipeline.positions(), watermarks=pipeline.watermarks(), plan=plan)
            snapshot = backend.snapshot(job)
        except BaseException as error:
            for future in waiting:
                future.set_exception(error)
            raise
        for future in waiting:
            future.set_result(snapshot)

    def end(self, failure: BaseException | None) -> None:
        """The run is over."""
        self._run = None
        with self._lock:
            self._ended, self._thread = True, None
            waiting, self._waiting = self._waiting, deque()
        for future in waiting:
            if future.set_running_or_notify_cancel():
                error = RuntimeError(f"job {self._name!r} ended before its state could be read")
                error.__cause__ = failure
                future.set_exception(error)


@dataclass(frozen=True, slots=True)
class LiveReader:
    """A job as `statebackend.LiveState`; a snapshot may take ``timeout_s`` seconds."""

    job: LiveJob
    timeout_s: float

    def snapshot(self) -> StateSnapshot:
        """See `LiveJob.snapshot`."""
        return self.job.snapshot(self.timeout_s)
