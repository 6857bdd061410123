"""A job that dies between batches again and again, and what it has published in the end.

The measure of recovery is equality: `survive` runs the same pipeline over the same batches, crashes it at random
batches, takes checkpoints at random batches, restores it, and returns everything that the exactly-once sinks
published; with ``crashes=0`` it is the undisturbed run to compare with.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from operators import DataStream, StreamContext
from statebackend import MemoryStateBackend, MemoryStateSpace, StateStore, StoreSettings
from tests.support.streams import Ledger, LedgerSink

__all__ = ["CrashError", "Pipeline", "survive"]

Pipeline = Callable[[Mapping[str, DataStream]], Mapping[str, DataStream]]
"""Builds the streams whose rows are published, by name, from the inputs by name."""


class CrashError(Exception):
    """The process is gone."""


class _Fate:
    """Decides at every batch whether to take a checkpoint first, and whether to die."""

    def __init__(self, rng: random.Random, crashes: int, checkpoint_chance: float) -> None:
        self.crashes = crashes
        self.job: Any = None
        self._rng = rng
        self._chance = checkpoint_chance

    def before_a_batch(self) -> None:
        if self._rng.random() < self._chance:
            self.job.checkpoint()
        if self.crashes and self._rng.random() < 0.08:
            self.crashes -= 1
            raise CrashError


def survive(
    pipeline: Pipeline,
    inputs: Mapping[str, Sequence[pa.RecordBatch]],
    *,
    seed: int = 0,
    crashes: int = 3,
    checkpoint_chance: float = 0.3,
    directory: Path | None = None,
    event_time: str | None = "t",
    udafs: Sequence[Any] = (),
    clock: Callable[[], float] = time.time,
    **read: Any,
) -> dict[str, pa.Table]:
    """What the pipeline publishes over these inputs, by output.

    ``directory``: keep the state in an LSM store there (small blocks and files), else in memory. ``read``: further
    arguments of ``from_batches``. Every input needs at least one batch.
    """
    rng = random.Random(seed)
    fate = _Fate(rng, crashes, checkpoint_chance)
    space = MemoryStateSpace()
    ledgers: dict[str, Ledger] = {}
    schemas: dict[str, pa.Schema] = {}
    while True:
        state = _opened(space, directory, udafs)
        context = StreamContext(state=state, checkpoint_interval=None, worker_threads=2, udafs=udafs, clock=clock)
        streams = {
            name: context.from_batches(
                _reader(batches, fate), batches[0].schema, event_time=event_time, name=name, **read
            )
            for name, batches in inputs.items()
        }
        for name, stream in pipeline(streams).items():
            stream.sink(LedgerSink(ledgers.setdefault(name, Ledger())), name=f"out-{name}")
            schemas[name] = stream.schema
        fate.job = context.job()
        try:
            fate.job.run()
        except CrashError:
            continue
        finally:
            state.close()
        return {n: ledger.table() if ledger.pieces else schemas[n].empty_table() for n, ledger in ledgers.items()}


def _opened(space: MemoryStateSpace, directory: Path | None, udafs: Sequence[Any]) -> Any:
    named = {udaf.name: udaf for udaf in udafs}
    if directory is None:
        return MemoryStateBackend(space, udafs=named)
    settings = StoreSettings(block_rows=64, l0_files_max=2, compaction_rows=500, gc_interval_s=None)
    return StateStore.open(str(directory), settings, udafs=named)


def _reader(batches: Sequence[pa.RecordBatch], fate: _Fate) -> Callable[[int], Iterator[pa.RecordBatch]]:
    def read(start: int) -> Iterator[pa.RecordBatch]:
        for batch in batches[start:]:
            fate.before_a_batch()
            yield batch

    return read
