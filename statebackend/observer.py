"""Gathers the figures of an open store from its parts, see ``metrics.py``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from statebackend.backend import Health, Value
from statebackend.cache import BlockReader
from statebackend.compactor import Compactor
from statebackend.compactor_process import CompactorProcess
from statebackend.flusher import MemtableFlusher
from statebackend.garbage_collector import GarbageCollector
from statebackend.manifest import Manifest, TableState
from statebackend.metrics import (
    Amplification,
    BackgroundStatus,
    CacheMetrics,
    MemoryMetrics,
    StoreMetrics,
    TableMetrics,
    TaskState,
)
from statebackend.objectstore_counting import OperationCount
from statebackend.objectstore_stack import ObjectStoreStack
from statebackend.progress import TaskProgress
from statebackend.settings import StoreSettings
from statebackend.table import LsmTable

__all__ = ["StoreObserver", "table_metrics"]


@dataclass(slots=True, kw_only=True)
class StoreObserver:
    """Reads the parts of one store; writes nothing but the stalls that it is told of."""

    settings: StoreSettings
    stack: ObjectStoreStack
    reader: BlockReader
    flusher: MemtableFlusher
    compactor: Compactor
    collector: GarbageCollector
    compactor_process: CompactorProcess | None = None
    write_stalls: int = field(default=0, init=False)
    write_stall_s: float = field(default=0.0, init=False)

    def stalled(self, seconds: float) -> None:
        """A writer waited for the storage."""
        self.write_stalls += 1
        self.write_stall_s += seconds

    def health(self, metrics: StoreMetrics, *, closed: bool) -> Health:
        """Whether the background work is well, with the figures that matter most."""
        tasks = (self.flusher.progress, self.compactor.progress, self.collector.progress)
        error = self.flusher.fatal or next((t.last_error for t in tasks if t.last_error is not None), None)
        process = self.compactor_process
        if process is not None:
            error = error or process.last_error
        details: dict[str, Value] = {
            "checkpoint_id": metrics.checkpoint_id,
            "manifest_number": metrics.manifest_number,
            "memtable_rows": sum(t.memtable_rows for t in metrics.tables),
            "frozen_memtables": metrics.task("flusher").backlog,
            "memory_bytes": metrics.memory.memtables,
            "files": sum(t.files for t in metrics.tables),
            "cache_bytes": metrics.memory.blocks + metrics.memory.indexes,
            "index_bytes": metrics.memory.indexes,
            "commits": metrics.commits,
            "flush_failures": metrics.task("flusher").failures,
            "compactions": metrics.task("compactor").completed,
            "compaction_failures": metrics.task("compactor").failures,
            "objects_collected": metrics.objects_collected,
        }
        if process is not None:
            details |= {"compactor_pid": process.pid, "compactor_starts": process.starts}
        return Health(ok=error is None and not closed, error=error, details=details)

    def metrics(self, manifest: Manifest, opened: Mapping[str, LsmTable]) -> StoreMetrics:
        """A snapshot; ``opened`` are the tables in use. The store's lock is held."""
        checkpoint = manifest.checkpoint
        tables = tuple(
            table_metrics(name, manifest.tables.get(name), opened.get(name))
            for name in sorted({*opened, *manifest.tables})
        )
        requests = self.stack.counting.snapshot()
        frozen = sum(f.nbytes for t in opened.values() for f in t.frozen)
        return StoreMetrics(
            store_id=manifest.store_id,
            url=self.stack.top.describe(),
            checkpoint_id=int(manifest.checkpoint_id),
            checkpoint_created_ms=checkpoint.created_ms if checkpoint is not None else None,
            manifest_number=int(manifest.number),
            writer_epoch=int(manifest.writer_epoch),
            timeline=manifest.timeline,
            tasks=tuple(self._tasks(tables, opened)),
            tables=tables,
            caches=tuple(self._caches()),
            memory=MemoryMetrics(
                memtables=sum(t.memory_bytes for t in opened.values()),
                frozen=frozen,
                blocks=self.reader.cache.nbytes - self.reader.index_bytes,
                indexes=self.reader.index_bytes,
            ),
            amplification=_amplification(tables, requests, self.collector.kept_bytes, manifest),
            requests=requests,
            retries=self.stack.retrying.retries,
            checkpoints=self.flusher.durations.snapshot(),
            commits=self.flusher.commits,
            conflicts=self.flusher.conflicts,
            unknown_outcomes=self.flusher.unknown_outcomes,
            write_stalls=self.write_stalls,
            write_stall_s=self.write_stall_s,
            objects_collected=self.collector.deleted,
            compaction=self.compactor.stats,
        )

    def _tasks(self, tables: tuple[TableMetrics, ...], opened: Mapping[str, LsmTable]) -> Iterator[BackgroundStatus]:
        crowded = sum(max(0, t.l0_files - self.settings.l0_files_max) for t in tables)
        yield _status("flusher", self.flusher.progress, sum(len(t.frozen) for t in opened.values()), self.flusher.fatal)
        yield _status("compactor", self.compactor.progress, crowded)
        yield _status("collector", self.collector.progress, self.collector.pending)

    def _caches(self) -> Iterator[CacheMetrics]:
        cache = self.reader.cache
        hits, misses = cache.requests
        yield CacheMetrics(name="block", hits=hits, misses=misses, bytes=cache.nbytes, bytes_max=cache.bytes_max)
        if (disk := self.stack.caching) is not None:
            yield CacheMetrics(
                name="disk",
                hits=disk.hits,
                misses=disk.misses,
                bytes=disk.cache.nbytes,
                bytes_max=disk.cache.bytes_max,
            )


def _status(task: str, progress: TaskProgress, backlog: int, fatal: BaseException | None = None) -> BackgroundStatus:
    error = fatal or progress.last_error
    state = TaskState.RUNNING if progress.running else TaskState.IDLE if error is None else TaskState.FAILED
    return BackgroundStatus(
        task=task,
        state=state,
        last_error=None if error is None else f"{type(error).__name__}: {error}",
        backlog=backlog,
        completed=progress.completed,
        failures=progress.failures,
        last_run_ms=progress.last_run_ms,
    )


def table_metrics(name: str, state: TableState | None, opened: LsmTable | None) -> TableMetrics:
    """Figures of one table of which at least one is given: its state in a manifest, the open table."""
    early = [meta for _, meta in opened.early] if opened is not None else []
    named = opened.files if opened is not None else state.files if state is not None else ()
    files = [*named, *early]
    spec = opened.spec if opened is not None else state.spec if state is not None else None
    assert spec is not None, "a table is in the manifest or was opened"
    return TableMetrics(
        name=name,
        kind=spec.kind.value,
        l0_files=sum(f.level == 0 for f in files),
        sorted_runs=len({f.run for f in files if f.run is not None}),
        files=len(files),
        rows=sum(f.rows for f in files),
        bytes=sum(f.size for f in files),
        memtable_rows=opened.memtable.rows if opened is not None else 0,
        memtable_bytes=opened.memory_bytes if opened is not None else 0,
        watermark=opened.watermark if opened is not None else state.watermark if state is not None else None,
    )


def _amplification(
    tables: tuple[TableMetrics, ...],
    requests: Mapping[tuple[str, str], OperationCount],
    kept_bytes: int | None,
    manifest: Manifest,
) -> Amplification:
    written = sum(c.bytes_written for c in requests.values())
    flushed = sum(c.bytes_written for (_, kind), c in requests.items() if kind == "flushed")
    live = sum(f.size for f in manifest.files.values())
    return Amplification(
        write=written / flushed if flushed else None,
        read=max((t.l0_files + t.sorted_runs for t in tables), default=0),
        space=kept_bytes / live if kept_bytes is not None and live else None,
    )
