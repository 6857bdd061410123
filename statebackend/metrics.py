"""What an open store is doing, as values; the same figures as rows and in Prometheus' text format.

`StoreMetrics` is a snapshot. `StoreMetrics.samples` flattens it to named figures, from which the Arrow table, the
text and the HTTP port (``metrics_server.py``) are made, so that all of them agree. Names follow the Prometheus
conventions: a base unit as suffix, ``_total`` for what only grows.

Amplification::

    write = bytes written to the storage / bytes of flushed SSTables         what compaction and manifests add
    read  = flushed files + sorted runs of the most crowded table            pieces in which one key is looked for
    space = bytes of the files of all kept checkpoints / of the newest       what retention adds
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any, Protocol

import pyarrow as pa

from statebackend import display
from statebackend.compactor import CompactionStats
from statebackend.histogram import BOUNDS_S, Histogram
from statebackend.objectstore_counting import OperationCount

__all__ = [
    "AMPLIFICATION",
    "METRICS_SCHEMA",
    "Amplification",
    "BackgroundStatus",
    "CacheMetrics",
    "MemoryMetrics",
    "Observed",
    "Sample",
    "SampleKind",
    "StoreMetrics",
    "TableMetrics",
    "TaskState",
    "gauge",
    "table_samples",
    "to_arrow",
    "to_prometheus",
]


class TaskState(StrEnum):
    """What a background task is doing. FAILED: its latest run failed and it waits for the next."""

    IDLE = "idle"
    RUNNING = "running"
    FAILED = "failed"


class SampleKind(StrEnum):
    """The types of Prometheus that are used here."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One named figure; ``value`` is a `Histogram` where ``kind`` says so. ``unit`` is a word, empty for a number."""

    name: str
    kind: SampleKind
    help: str
    unit: str = ""
    labels: Mapping[str, str]
    value: float | Histogram


class Observed(Protocol):
    """Something whose figures can be read again and again: an open store."""

    def samples(self) -> Sequence[Sample]:
        """The figures now, grouped by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackgroundStatus:
    """One background task: ``flusher``, ``compactor`` or ``collector``.

    ``backlog``: frozen MemTables (flusher), flushed files beyond ``l0_files_max`` (compactor), objects that the latest
    plan has still to delete (collector). ``last_error``: why the latest run failed, None if it did not.
    ``last_run_ms``: when it ended, in epoch milliseconds.
    """

    task: str
    state: TaskState
    last_error: str | None
    backlog: int
    completed: int
    failures: int
    last_run_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TableMetrics:
    """One table that is open or that the newest manifest names; ``rows`` and ``bytes`` are those of its files."""

    name: str
    kind: str
    l0_files: int
    sorted_runs: int
    files: int
    rows: int
    bytes: int
    memtable_rows: int
    memtable_bytes: int
    watermark: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMetrics:
    """One cache: ``block`` (decoded blocks in memory) or ``disk`` (chunks of SSTables of a remote store)."""

    name: str
    hits: int
    misses: int
    bytes: int
    bytes_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryMetrics:
    """Bytes that the store holds: rows not yet in files (of them frozen ones), cached blocks and filters, cached block
    indexes."""

    memtables: int
    frozen: int
    blocks: int
    indexes: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.memtables + self.blocks + self.indexes


@dataclass(frozen=True, slots=True, kw_only=True)
class Amplification:
    """See the module; None while there is nothing to divide by, ``space`` before the first collection."""

    write: float | None
    read: int
    space: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreMetrics:
    """Everything about one open store since it was opened.

    ``requests``: what went to the storage, by (operation, kind of object), every call once however often it was
    tried; ``retries``: tries beyond the first. ``checkpoints``: how long checkpoints took from barrier to commit.
    ``conflicts``: commits that met another one and were applied again; ``unknown_outcomes``: commits whose
    outcome could not be learned in time. ``write_stalls``, ``write_stall_s``: how often, and for how many seconds in
    all, writers waited for the storage.
    """

    store_id: str
    url: str
    checkpoint_id: int
    checkpoint_created_ms: int | None
    manifest_number: int
    writer_epoch: int
    timeline: int
    tasks: tuple[BackgroundStatus, ...]
    tables: tuple[TableMetrics, ...]
    caches: tuple[CacheMetrics, ...]
    memory: MemoryMetrics
    amplification: Amplification
    requests: Mapping[tuple[str, str], OperationCount]
    retries: int
    checkpoints: Histogram
    commits: int
    conflicts: int
    unknown_outcomes: int
    write_stalls: int
    write_stall_s: float
    objects_collected: int
    compaction: CompactionStats

    def _repr_html_(self) -> str:
        return display.metrics(self)

    def task(self, name: str) -> BackgroundStatus:
        """The status of one background task. Raises ``KeyError``."""
        return {t.task: t for t in self.tasks}[name]

    def table(self, name: str) -> TableMetrics:
        """The figures of one table. Raises ``KeyError``."""
        return {t.name: t for t in self.tables}[name]

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the storage."""
        return sum(c.bytes_read for c in self.requests.values())

    @property
    def bytes_written(self) -> int:
        """Bytes that went to the storage."""
        return sum(c.bytes_written for c in self.requests.values())

    def samples(self) -> list[Sample]:
        """Every figure by name, those of one name together."""
        found = [
            *_of_store(self),
            *_of_tasks(self),
            *_of_compaction(self.compaction),
            *table_samples(self.tables),
            *_of_caches(self),
            *_of_requests(self),
        ]
        return sorted(found, key=lambda s: s.name)  # stable: the order of labels stays

    def to_arrow(self) -> pa.Table:
        """The figures as a table, see `to_arrow`."""
        return to_arrow(self.samples())

    def to_prometheus(self) -> str:
        """The figures in Prometheus' text format, see `to_prometheus`."""
        return to_prometheus(self.samples())


AMPLIFICATION = "Write: bytes written per byte flushed. Read: pieces per key. Space: bytes kept per byte live."

METRICS_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("labels", pa.map_(pa.string(), pa.string())),
        ("value", pa.float64()),
        ("unit", pa.string()),
    ]
)


def to_arrow(samples: Sequence[Sample]) -> pa.Table:
    """Figures as rows ``(name: string, labels: map<string, string>, value: float64, unit: string)``.

    A histogram gives four rows: ``_count``, ``_sum``, ``_p50`` and ``_p99``.
    """
    rows: list[tuple[str, list[tuple[str, str]], float | None, str]] = []
    for s in samples:
        labels = list(s.labels.items())
        if isinstance(s.value, Histogram):
            rows.append((f"{s.name}_count", labels, s.value.count, ""))
            rows.append((f"{s.name}_sum", labels, s.value.sum_s, s.unit))
            rows.extend((f"{s.name}_p{q}", labels, s.value.quantile(q / 100), s.unit) for q in (50, 99))
        else:
            rows.append((s.name, labels, s.value, s.unit))
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, METRICS_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=METRICS_SCHEMA)


def to_prometheus(samples: Sequence[Sample]) -> str:
    """Figures in the text format 0.0.4 of Prometheus; ``samples`` of one name must be neighbours."""
    lines: list[str] = []
    for name, family in groupby(samples, key=lambda s: s.name):
        members = list(family)
        lines += [f"# HELP {name} {_escaped(members[0].help)}", f"# TYPE {name} {members[0].kind}"]
        for s in members:
            if isinstance(s.value, Histogram):
                bounds = [*(f"{b:g}" for b in BOUNDS_S), "+Inf"]
                buckets = zip(bounds, s.value.cumulative, strict=True)
                lines += [_line(f"{name}_bucket", {**s.labels, "le": b}, n) for b, n in buckets]
                lines += [
                    _line(f"{name}_sum", s.labels, s.value.sum_s),
                    _line(f"{name}_count", s.labels, s.value.count),
                ]
            else:
                lines.append(_line(name, s.labels, s.value))
    return "\n".join(lines) + "\n"


def _line(name: str, labels: Mapping[str, str], value: float) -> str:
    shown = ",".join(f'{k}="{_escaped(v)}"' for k, v in labels.items())
    return f"{name}{{{shown}}} {value!r}" if shown else f"{name} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _sample(kind: SampleKind, name: str, value: Any, help_: str, unit: str = "", /, **labels: str) -> Iterator[Sample]:
    """One figure, or none if it is not known."""
    if value is not None:
        yield Sample(name=f"statebackend_{name}", kind=kind, help=help_, unit=unit, labels=labels, value=value)


def gauge(name: str, value: float | None, help_: str, unit: str = "", /, **labels: str) -> Iterator[Sample]:
    """One figure that can fall, or none if it is not known."""
    return _sample(SampleKind.GAUGE, name, value, help_, unit, **labels)


def _counter(name: str, value: float, help_: str, unit: str = "", /, **labels: str) -> Iterator[Sample]:
    return _sample(SampleKind.COUNTER, name, value, help_, unit, **labels)


def _of_store(m: StoreMetrics) -> Iterator[Sample]:
    yield from gauge("info", 1, "Identity of the store.", store_id=m.store_id, url=m.url)
    yield from gauge("checkpoint_id", m.checkpoint_id, "Number of the newest checkpoint, 0 before the first.")
    created_s = None if m.checkpoint_created_ms is None else m.checkpoint_created_ms / 1000
    yield from gauge("checkpoint_created_seconds", created_s, "When the newest checkpoint was made.", "seconds")
    yield from gauge("manifest_number", m.manifest_number, "Number of the newest manifest.")
    yield from gauge("writer_epoch", m.writer_epoch, "Fencing token of this writer.")
    yield from gauge("timeline", m.timeline, "Rises with each rollback.")
    yield from _sample(
        SampleKind.HISTOGRAM, "checkpoint_duration_seconds", m.checkpoints, "From barrier to commit.", "seconds"
    )
    yield from _counter("commits_total", m.commits, "Manifests committed by this writer.")
    yield from _counter("commit_conflicts_total", m.conflicts, "Commits that met another one and were applied again.")
    yield from _counter("commit_unknown_total", m.unknown_outcomes, "Commits whose outcome could not be learned.")
    yield from _counter("request_retries_total", m.retries, "Storage requests that were tried again.")
    yield from _counter("write_stalls_total", m.write_stalls, "Times that a writer waited for the storage.")
    yield from _counter(
        "write_stall_seconds_total", m.write_stall_s, "How long writers waited for the storage.", "seconds"
    )
    yield from _counter("objects_collected_total", m.objects_collected, "Objects deleted as garbage.")
    held = "Bytes held in memory."
    for part in ("memtables", "frozen", "blocks", "indexes"):
        yield from gauge("memory_bytes", getattr(m.memory, part), held, "bytes", part=part)
    for kind in ("write", "read", "space"):
        yield from gauge(
            "amplification",
            getattr(m.amplification, kind),
            AMPLIFICATION,
            kind=kind,
        )


def _of_tasks(m: StoreMetrics) -> Iterator[Sample]:
    for t in m.tasks:
        for state in TaskState:
            yield from gauge(
                "task_state", float(t.state is state), "1 for the state it is in.", task=t.task, state=state
            )
        yield from gauge("task_backlog", t.backlog, "Work that waits.", task=t.task)
        yield from _counter("task_completed_total", t.completed, "Runs that succeeded.", task=t.task)
        yield from _counter("task_failures_total", t.failures, "Runs that failed.", task=t.task)
        ended_s = None if t.last_run_ms is None else t.last_run_ms / 1000
        yield from gauge("task_last_run_seconds", ended_s, "When the latest run ended.", "seconds", task=t.task)


def _of_compaction(c: CompactionStats) -> Iterator[Sample]:
    """What this process merged; a compactor elsewhere counts for itself."""
    yield from _counter("compaction_read_bytes_total", c.bytes_in, "Bytes of merged files.", "bytes")
    yield from _counter("compaction_written_bytes_total", c.bytes_out, "Bytes of files made by merges.", "bytes")
    yield from _counter("compaction_rows_total", c.rows_in, "Rows of merged files.")
    yield from _counter("compaction_rows_dropped_total", c.rows_dropped, "Superseded, expired, deleted, reduced rows.")
    yield from _counter("compaction_seconds_total", c.seconds, "Time of merges, from plan to commit.", "seconds")
    yield from _counter("compaction_abandoned_total", c.abandoned, "Merges that another commit overtook.")
    yield from _counter("compaction_superseded_total", c.superseded, "Times that another compactor took the claim.")
    yield from _counter("compaction_claims_total", c.claims, "Times that this process took the claim over.")
    yield from gauge("compaction_backlog_bytes", c.backlog.nbytes, "Bytes of flushed files due to be merged.", "bytes")
    yield from gauge("compaction_backlog_tables", c.backlog.tables, "Tables with merges due.")


def table_samples(tables: Sequence[TableMetrics]) -> Iterator[Sample]:
    """The figures of tables."""
    for t in tables:
        yield from gauge("table_l0_files", t.l0_files, "Flushed files not yet merged.", table=t.name)
        yield from gauge("table_sorted_runs", t.sorted_runs, "Sorted runs.", table=t.name)
        yield from gauge("table_files", t.files, "Files.", table=t.name)
        yield from gauge("table_rows", t.rows, "Rows in files, superseded ones included.", table=t.name)
        yield from gauge("table_bytes", t.bytes, "Bytes of files.", "bytes", table=t.name)
        yield from gauge("table_memtable_rows", t.memtable_rows, "Rows in the MemTable.", table=t.name)
        yield from gauge("table_memtable_bytes", t.memtable_bytes, "Bytes not yet in files.", "bytes", table=t.name)


def _of_caches(m: StoreMetrics) -> Iterator[Sample]:
    for c in m.caches:
        yield from _counter("cache_hits_total", c.hits, "Reads that a cache answered.", cache=c.name)
        yield from _counter("cache_misses_total", c.misses, "Reads that a cache could not answer.", cache=c.name)
        yield from gauge("cache_bytes", c.bytes, "Bytes in a cache.", "bytes", cache=c.name)
        yield from gauge("cache_bytes_max", c.bytes_max, "Limit of a cache.", "bytes", cache=c.name)


def _of_requests(m: StoreMetrics) -> Iterator[Sample]:
    for (operation, kind), c in m.requests.items():
        labels = {"operation": operation, "object": kind}
        yield from _counter("request_errors_total", c.errors, "Storage requests that failed.", **labels)
        yield from _counter("read_bytes_total", c.bytes_read, "Bytes from the storage.", "bytes", **labels)
        yield from _counter("written_bytes_total", c.bytes_written, "Bytes to the storage.", "bytes", **labels)
        yield from _sample(
            SampleKind.HISTOGRAM, "request_duration_seconds", c.latency, "Storage requests.", "seconds", **labels
        )
