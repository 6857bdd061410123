"""Jobs that die or are stopped between batches again and again, and what they have published in the end.

The measure of recovery is equality: `survive` runs the same pipeline over the same batches, crashes and stops it at
random batches, takes checkpoints at random batches, restores it, and returns everything that the exactly-once sinks
published; with ``crashes=0`` it is the undisturbed run to compare with. `run_through` does the same to a pipeline of
one input at chosen batches. Both run the job once more after its end, which must publish nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from operators import DataStream, Job, StreamContext
from statebackend import MemoryStateBackend, MemoryStateSpace, StateBackend, StateStore, StoreSettings
from tests.support.streams import Ledger, LedgerSink

__all__ = ["Build", "CrashError", "Pipeline", "random_fate", "run_through", "survive"]

Pipeline = Callable[[Mapping[str, DataStream]], Mapping[str, DataStream]]
"""Builds the streams whose rows are published, by name, from the inputs by name."""

Build = Callable[[DataStream], DataStream]
"""The same with one input and one output."""


class CrashError(Exception):
    """The process is gone."""


class _RandomFate:
    """Decides at every batch whether to take a checkpoint first, to be stopped after it, or to die."""

    def __init__(
        self, rng: random.Random, crashes: int, stops: int, checkpoint_chance: float, incident_chance: float
    ) -> None:
        self.crashes = crashes
        self.stops = stops
        self._rng = rng
        self._chance = checkpoint_chance
        self._incident_chance = incident_chance

    def before(self, number: int, job: Job) -> None:
        if self._rng.random() < self._chance:
            job.checkpoint()
        if self.stops and self._rng.random() < self._incident_chance:
            self.stops -= 1
            job.stop()
        if self.crashes and self._rng.random() < self._incident_chance:
            self.crashes -= 1
            raise CrashError


class _PlannedFate:
    """Dies before these batches, one after the other, and takes checkpoints after those."""

    def __init__(self, crashes: Sequence[int], checkpoints: Collection[int]) -> None:
        self.crashes = list(crashes)
        self._checkpoints = checkpoints

    def before(self, number: int, job: Job) -> None:
        if self.crashes and number == self.crashes[0]:
            self.crashes.pop(0)
            raise CrashError(str(number))
        if number in self._checkpoints:
            job.checkpoint()


def survive(
    pipeline: Pipeline,
    inputs: Mapping[str, Sequence[pa.RecordBatch]],
    *,
    seed: int = 0,
    crashes: int = 3,
    stops: int = 0,
    checkpoint_chance: float = 0.3,
    incident_chance: float = 0.08,
    directory: Path | str | None = None,
    event_time: str | None = "t",
    udafs: Sequence[Any] = (),
    clock: Callable[[], float] = time.time,
    **read: Any,
) -> dict[str, pa.Table]:
    """What the pipeline publishes over these inputs, by output.

    ``directory``: keep the state in an LSM store there (small blocks and files), a path or a URL, else in memory.
    ``incident_chance``: of a crash and of a stop, at each batch. ``read``: further arguments of ``from_batches``. Every
    input needs at least one batch.
    """
    fate = _RandomFate(random.Random(seed), crashes, stops, checkpoint_chance, incident_chance)
    return _live(
        pipeline,
        inputs,
        fate,
        open_state=_opener(directory, udafs),
        settings={"worker_threads": 2, "udafs": udafs, "clock": clock},
        read={"event_time": event_time, **read},
    )


def run_through(
    build: Build,
    batches: Sequence[pa.RecordBatch],
    *,
    disorder_ms: int = 0,
    crashes: Sequence[int] = (),
    checkpoints: Collection[int] = (),
    open_state: Callable[[], StateBackend] | None = None,
    event_time: str | None = "t",
) -> pa.Table:
    """What is published in all, when the process dies before each of the batches ``crashes`` and is started again.

    ``checkpoints``: the batches before which one is asked for; it is taken after that batch.
    """
    fate = _PlannedFate(crashes, checkpoints)
    published = _live(
        lambda streams: {"out": build(streams["rows"])},
        {"rows": batches},
        fate,
        open_state=open_state or _opener(None, ()),
        settings={},
        read={"event_time": event_time, "max_disorder": disorder_ms} if event_time else {},
    )
    assert not fate.crashes, f"it did not die before the batches {fate.crashes}"
    return published["out"]


def random_fate(seed: int, batches: int) -> tuple[list[int], set[int]]:
    """Crashes and checkpoints at random places, for `run_through`."""
    rng = random.Random(seed)
    crashes = sorted(rng.sample(range(batches), min(3, batches)))
    return crashes, {n for n in range(batches) if rng.random() < 0.4}


def _live(
    pipeline: Pipeline,
    inputs: Mapping[str, Sequence[pa.RecordBatch]],
    fate: _RandomFate | _PlannedFate,
    *,
    open_state: Callable[[], StateBackend],
    settings: Mapping[str, Any],
    read: Mapping[str, Any],
) -> dict[str, pa.Table]:
    """Life after life up to the end of the inputs, and one more."""
    ledgers: dict[str, Ledger] = {}
    schemas: dict[str, pa.Schema] = {}

    def one_life() -> bool:
        """Whether it came to the end."""
        state = open_state()
        context = StreamContext("restarted", state=state, checkpoint_interval=None, **settings)
        jobs: list[Job] = []
        streams = {
            name: context.from_batches(_reader(batches, fate, jobs), batches[0].schema, name=name, **read)
            for name, batches in inputs.items()
        }
        for name, stream in pipeline(streams).items():
            stream.sink(LedgerSink(ledgers.setdefault(name, Ledger())), name=f"out-{name}")
            schemas[name] = stream.schema
        jobs.append(context.job())
        try:
            return jobs[0].run().outcome == "finished"
        except CrashError:
            return False
        finally:
            state.close()

    while not one_life():
        pass
    published = {name: set(ledger.pieces) for name, ledger in ledgers.items()}
    assert one_life()
    assert published == {name: set(ledger.pieces) for name, ledger in ledgers.items()}, "it went on after its end"
    return {n: ledger.table() if ledger.pieces else schemas[n].empty_table() for n, ledger in ledgers.items()}


def _opener(directory: Path | str | None, udafs: Sequence[Any]) -> Callable[[], StateBackend]:
    named = {udaf.name: udaf for udaf in udafs}
    space = MemoryStateSpace()
    settings = StoreSettings(block_rows=64, l0_files_max=2, compaction_bytes=20_000, gc_interval_s=None)

    def opened() -> StateBackend:
        if directory is None:
            return MemoryStateBackend(space, udafs=named)
        return StateStore.open(str(directory), settings, udafs=named)

    return opened


def _reader(
    batches: Sequence[pa.RecordBatch], fate: _RandomFate | _PlannedFate, jobs: Sequence[Job]
) -> Callable[[int], Iterator[pa.RecordBatch]]:
    def read(start: int) -> Iterator[pa.RecordBatch]:
        for number in range(start, len(batches)):
            fate.before(number, jobs[0])
            yield batches[number]

    return read
