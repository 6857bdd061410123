"""Runs one query over a directory of events, from a checkpoint if there is one, and says what it did."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import pyarrow as pa

from operators.context import StreamContext
from operators.nexmark.counter import EventCounter, kill_this_process
from operators.nexmark.memory import peak_bytes
from operators.nexmark.model import EVENT_TIME
from operators.nexmark.queries import Query
from operators.nexmark.source import EventFiles
from operators.report import JobResult
from operators.sinks import published_rolls
from operators.stream import DataStream
from statebackend import StateBackend

__all__ = ["QueryRun", "RunReport", "RunSettings"]

_ROLL_ROWS = 250_000
_ROLL_S = 10.0
_BATCHES_PER_S = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What the user may choose; see the help of the command.

    ``input``, ``output``: paths or URLs of directories. ``checkpoint_events``, ``kill_after_events``: in events of
    all kinds, None for none. ``parallelism``: threads that work beside the one that reads; None for the default.
    ``stop_with_savepoint``: as for `StreamContext`. ``events_per_second``: of all kinds, None for no limit.
    """

    input: str
    state: str | StateBackend
    output: str
    checkpoint_interval_s: float | None = 1.0
    checkpoint_events: int | None = None
    watermark_delay_ms: int = 4000
    batch_rows: int = 65_536
    parallelism: int | None = None
    kill_after_events: int | None = None
    stop_with_savepoint: str | None = None
    events_per_second: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a run did.

    ``events``: how far the stream is, in events of all kinds, also those of earlier runs; ``seconds``: from the first
    poll to the last publication; ``events_per_second``: of this run; ``rows_out``: rows that the output
    directory holds, also from earlier runs; ``checkpoints``, their pauses and ``checkpoint_bytes``: of this run.
    """

    query: str
    events: int
    seconds: float
    events_per_second: float
    peak_rss_mib: float
    rows_out: int
    checkpoints: int
    checkpoint_sync_ms_p50: float | None
    checkpoint_sync_ms_max: float | None
    checkpoint_bytes: int
    restored_from: int | None

    def line(self) -> str:
        """As one JSON object."""
        return json.dumps(asdict(self))


class QueryRun:
    """One run, to be run once. ``kill``: what `RunSettings.kill_after_events` does.

    Raises `BadInputError` and `SchemaError` for input that is not there or has not the columns.
    """

    def __init__(self, query: Query, settings: RunSettings, *, kill: Callable[[], None] = kill_this_process) -> None:
        files = EventFiles(settings.input)
        self._query = query
        self._settings = settings
        self._last_publication: float | None = None
        self.counter = EventCounter(
            files.events,
            checkpoint_events=settings.checkpoint_events,
            kill_after=settings.kill_after_events,
            kill=kill,
        )
        limits = [files.batch_events(settings.batch_rows), settings.checkpoint_events, settings.kill_after_events]
        if settings.events_per_second is not None:  # which come in many small batches, not in a large one now and then
            limits.append(max(1, settings.events_per_second // _BATCHES_PER_S))
        batch_events = min(limit for limit in limits if limit is not None)
        self.context = StreamContext(
            f"nexmark-{query.name}",
            state=settings.state,
            checkpoint_interval=settings.checkpoint_interval_s,
            checkpoint_trigger=self.counter.checkpoint_due,
            worker_threads=settings.parallelism,
            hook=self._on_step,
            stop_with_savepoint=settings.stop_with_savepoint,
        )
        streams = {
            kind: self.context.from_source(
                files.source(kind, columns, self.counter, batch_events),
                event_time=EVENT_TIME if EVENT_TIME in columns else None,
                max_disorder=settings.watermark_delay_ms,
                future_limit=None,
                max_rows_per_second=files.rows_per_second(kind, settings.events_per_second),
                name=kind,
            )
            for kind, columns in query.inputs.items()
        }
        _without_views(query.build(streams)).write_parquet(
            settings.output, query.partition_by, name="output", roll_rows=_ROLL_ROWS, roll_seconds=_ROLL_S
        )

    def run(self, on_progress: Callable[[int], None] = lambda _: None) -> tuple[JobResult, RunReport]:
        """Run to the end of the input, or until a signal stops it; raises as `Job.run` does."""
        result = self.context.run(lambda _: on_progress(self.counter.passed))
        end = time.perf_counter() if self._last_publication is None else self._last_publication
        seconds = end - (self.counter.began_at or end)
        events = self.counter.passed - self.counter.first
        pauses = [checkpoint.sync_ms for checkpoint in result.checkpoints]
        report = RunReport(
            query=self._query.name,
            events=self.counter.passed,
            seconds=round(seconds, 3),
            events_per_second=round(events / seconds, 1) if seconds > 0 else 0.0,
            peak_rss_mib=round(peak_bytes() / (1 << 20), 1),
            rows_out=sum(roll.rows for roll in published_rolls(self._settings.output)),
            checkpoints=len(result.checkpoints),
            checkpoint_sync_ms_p50=round(statistics.median(pauses), 3) if pauses else None,
            checkpoint_sync_ms_max=round(max(pauses), 3) if pauses else None,
            checkpoint_bytes=sum(checkpoint.bytes for checkpoint in result.checkpoints),
            restored_from=result.restored_from,
        )
        return result, report

    def _on_step(self, step: str) -> None:
        if step == "published":
            self._last_publication = time.perf_counter()


def _without_views(stream: DataStream) -> DataStream:
    """Text as plain strings: some functions of DataFusion make string views, with which not every reader can work."""
    views = [field.name for field in stream.schema if pa.types.is_string_view(field.type)]
    return stream.cast(dict.fromkeys(views, pa.string())) if views else stream
