"""Runs a stream with checkpoints and crashes between chosen batches, in this process."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence

import pyarrow as pa

from operators import DataStream, Job, StreamContext
from statebackend import MemoryStateBackend, MemoryStateSpace, StateBackend
from tests.support.streams import Ledger, LedgerSink

Build = Callable[[DataStream], DataStream]


class CrashError(Exception):
    """Stands for the end of the process."""


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
    space, ledger = MemoryStateSpace(), Ledger()
    opener = open_state or (lambda: MemoryStateBackend(space))
    times = {"max_disorder": disorder_ms, "event_time": event_time} if event_time else {}
    # A job that is run again after its end must do nothing.
    for crash in [*crashes, None, None]:
        backend = opener()
        context = StreamContext("crashing", state=backend, checkpoint_interval=None)

        jobs: list[Job] = []

        def read(start: int, crash: int | None = crash, jobs: list[Job] = jobs) -> Iterator[pa.RecordBatch]:
            for number in range(start, len(batches)):
                if number == crash:
                    raise CrashError(str(number))
                if number in checkpoints:
                    jobs[0].checkpoint()
                yield batches[number]

        stream = context.from_batches(read, batches[0].schema, name="rows", **times)
        build(stream).sink(LedgerSink(ledger), name="out")
        jobs.append(context.job())
        try:
            jobs[0].run()
            assert crash is None
        except CrashError:
            assert crash is not None
        finally:
            backend.close()
    return ledger.table()


def random_fate(seed: int, batches: int) -> tuple[list[int], set[int]]:
    """Crashes and checkpoints at random places."""
    rng = random.Random(seed)
    crashes = sorted(rng.sample(range(batches), min(3, batches)))
    return crashes, {n for n in range(batches) if rng.random() < 0.4}
