"""A harness for tests of streams: push rows, move event time and the clock, checkpoint, kill, restore, look.

Nothing runs by itself and nothing waits: the test is the source and the clock. ::

    def clicks(stream):
        return stream.window("user", f.count(lit(1)).alias("n"), 10_000)

    schema = pa.schema([("at", pa.timestamp("ms")), ("user", pa.string())])
    with StreamHarness(clicks, schema, event_time="at") as harness:
        harness.push([{"at": 1_000, "user": "ada"}, {"at": 2_000, "user": "ada"}])
        assert harness.output() == []
        harness.checkpoint()
        harness.push([{"at": 3_000, "user": "bob"}])
        harness.kill()                        # what came after the checkpoint is lost, and replayed
        harness.advance_watermark(10_000)
        assert sorted(row["n"] for row in harness.output()) == [1, 2]
        assert harness.state("in.window-user-10000").num_rows == 0

`StreamHarness.output` shows what an exactly-once sink would have published in the end: what was emitted after the last
checkpoint is forgotten by a kill, and comes again with the replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
from datafusion import AggregateUDF

from operators.context import StreamContext
from operators.graph import SinkNode, describe_plan
from operators.pipeline import Pipeline, build_pipeline
from operators.runtime import BuildContext, Cursor
from operators.sinks.base import Guarantee, Prepared, SinkContext, conform
from operators.source_driver import SourceDriver
from operators.sources import SourceBatch
from operators.stream import DataStream
from operators.wrapped_backend import WrappedBackend
from statebackend import (
    Checkpoint,
    JobState,
    MemoryStateBackend,
    MemoryStateSpace,
    StateBackend,
    StateTable,
    TableSpec,
    open_backend,
)

__all__ = ["Build", "StreamHarness"]

Build: TypeAlias = Callable[..., DataStream | Mapping[str, DataStream]]
"""Builds what is tested from the inputs: the streams in the order of their names' declaration, as arguments."""

Rows: TypeAlias = pa.RecordBatch | pa.Table | Sequence[Mapping[str, Any]]

_INPUT = "in"
_OUTPUT = "out"


@dataclass(slots=True)
class _Running:
    """One life of the stream under test."""

    backend: _Recorded
    pipeline: Pipeline
    drivers: Mapping[str, SourceDriver]
    outputs: Mapping[str, _Collector]
    plan: Mapping[str, Any]


class StreamHarness:
    """See the module.

    Args:
        build: makes the stream (or several, by name) from the input stream (or streams, in order).
        inputs: the schema of the one input, or schemas by input name.
        event_time: the event time column of the inputs, None for none.
        max_disorder: how far behind the latest event time a row may come and not be late, as in `StreamContext`.
        state: URL of a state store, None to keep the state in memory.
        start_s: what the clock shows at first, seconds since the epoch.
        udafs: Python aggregate functions that windows use.
    """

    def __init__(
        self,
        build: Build,
        inputs: pa.Schema | Mapping[str, pa.Schema],
        *,
        event_time: str | None = None,
        max_disorder: int = 0,
        state: str | None = None,
        start_s: float = 1_700_000_000.0,
        udafs: Sequence[AggregateUDF] = (),
    ) -> None:
        self._build = build
        self._inputs = {_INPUT: inputs} if isinstance(inputs, pa.Schema) else dict(inputs)
        self._event_time = event_time
        self._max_disorder = max_disorder
        self._state = state
        self._udafs = tuple(udafs)
        self._space = MemoryStateSpace()
        self._workers = ThreadPoolExecutor(1, thread_name_prefix="harness")
        self._now_s = start_s
        self._committed: dict[str, list[pa.RecordBatch]] = {}
        self._since: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._run: _Running | None = None
        self._start()

    # -- what happens

    def push(self, rows: Rows, input: str | None = None) -> None:  # noqa: A002 - what it is called
        """A batch of rows comes: Arrow, or a list of dicts. ``input``: its name, where there are several."""
        name = self._named(input)
        schema = self._inputs[name]
        if isinstance(rows, pa.Table):
            batches = rows.to_batches()
        elif isinstance(rows, pa.RecordBatch):
            batches = [rows]
        else:
            batches = [pa.RecordBatch.from_pylist([dict(row) for row in rows], schema=schema)]
        self._do(self._push, name, batches)

    def advance_watermark(self, time_ms: int, input: str | None = None) -> None:  # noqa: A002
        """Event time reaches ``time_ms`` (epoch milliseconds) without a row; at all inputs unless one is named."""
        self._do(self._advance, [self._named(input)] if input is not None else list(self._inputs), time_ms)

    def advance_clock(self, seconds: float) -> None:
        """The wall clock goes on, and operators that care are told."""
        self._now_s += seconds
        self._tick()

    def finish(self) -> None:
        """All inputs end: windows close, timers fire, what waits for the end comes out."""
        self._do(self._finish)

    def checkpoint(self) -> Checkpoint:
        """Take a checkpoint; what was emitted up to now is published for good."""
        run = self._alive()
        run.pipeline.drain()
        state = JobState(sources=dict.fromkeys(run.drivers, 0), watermarks=run.pipeline.watermarks(), plan=run.plan)
        checkpoint = run.backend.checkpoint(state).result()
        for name, sink in run.outputs.items():
            self._committed.setdefault(name, []).extend(sink.batches)
            sink.batches.clear()
        self._since.clear()
        return checkpoint

    def kill(self, *, replay: bool = True) -> None:
        """The process dies at once, and a new one restores the last checkpoint.

        With ``replay`` the rows and watermarks since come again, as from a source that is read from its position. The
        clock goes on as it was.
        """
        self._stop()
        again, self._since = self._since, []
        self._start()
        if replay:
            for action, arguments in again:
                self._do(action, *arguments)
        self._tick()

    # -- what one sees

    def output(self, name: str = _OUTPUT) -> list[dict[str, Any]]:
        """All rows of an output so far, as dicts; see `output_table`."""
        rows: list[dict[str, Any]] = self.output_table(name).to_pylist()
        return rows

    def output_table(self, name: str = _OUTPUT) -> pa.Table:
        """All rows of an output so far, in the order in which they came."""
        sink = self._alive().outputs[name]
        return pa.Table.from_batches([*self._committed.get(name, ()), *sink.batches], schema=sink.schema)

    def state(self, table: str) -> pa.Table:
        """The live rows of a state table (see `state_tables` for their names)."""
        run = self._alive()
        run.pipeline.drain()
        if table not in run.backend.tables:
            raise ValueError(f"no state table {table!r}; there are {self.state_tables()}")
        found = run.backend.tables[table]
        return pa.Table.from_batches(found.scan(), schema=found.spec.schema)

    def state_tables(self) -> list[str]:
        """The names of all state tables."""
        return sorted(self._alive().backend.tables)

    @property
    def now_s(self) -> float:
        """What the clock shows, seconds since the epoch."""
        return self._now_s

    def close(self) -> None:
        """End without a checkpoint."""
        if self._run is not None:
            self._stop()
        self._workers.shutdown()

    def __enter__(self) -> StreamHarness:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- one life

    def _start(self) -> None:
        context = StreamContext(udafs=self._udafs)
        streams = [
            context.from_batches(
                [], schema, event_time=self._event_time, max_disorder=self._max_disorder, future_limit=None, name=name
            )
            for name, schema in self._inputs.items()
        ]
        built = self._build(*streams)
        named = {_OUTPUT: built} if isinstance(built, DataStream) else dict(built)
        outputs = {name: _Collector(stream.schema) for name, stream in named.items()}
        for name, stream in named.items():
            stream.sink(outputs[name], name=f"harness.{name}")
        backend = _Recorded(self._open_backend())
        restored = backend.restored
        nodes = context.graph.nodes()
        pipeline = build_pipeline(
            nodes,
            BuildContext(
                backend=backend,
                job=None if restored is None else restored.job,
                workers=self._workers,
                cursor=Cursor(),
                clock=lambda: self._now_s,
            ),
        )
        drivers = {driver.operator_id: driver for driver in pipeline.sources}
        for driver in drivers.values():
            driver.position = None
            driver.open()
        plan = describe_plan("harness", [n for n in nodes if not isinstance(n, SinkNode)])
        self._run = _Running(backend, pipeline, drivers, outputs, plan)

    def _stop(self) -> None:
        run, self._run = self._alive(), None
        for operator in run.pipeline.operators:
            operator.close()
        run.backend.close()

    def _open_backend(self) -> StateBackend:
        udafs = {udaf.name: udaf for udaf in self._udafs}
        if self._state is None:
            return MemoryStateBackend(self._space, udafs=udafs)
        return open_backend(self._state, udafs=udafs)

    # -- actions, which a kill repeats

    def _do(self, action: Callable[..., None], *arguments: Any) -> None:
        self._since.append((action, arguments))
        action(*arguments)

    def _push(self, name: str, batches: Iterable[pa.RecordBatch]) -> None:
        for batch in batches:
            self._driver(name).push(SourceBatch(batch, None))

    def _advance(self, names: Sequence[str], time_ms: int) -> None:
        for name in names:
            self._driver(name).advance_to(time_ms)

    def _tick(self) -> None:
        self._alive().pipeline.on_processing_time(int(self._now_s * 1000))

    def _finish(self) -> None:
        for name in self._inputs:
            self._driver(name).push(None)

    def _driver(self, name: str) -> SourceDriver:
        return self._alive().drivers[name]

    def _named(self, name: str | None) -> str:
        if name is None and len(self._inputs) == 1:
            (name,) = self._inputs
        if name is None or name not in self._inputs:
            raise ValueError(f"input {name!r}: name one of {sorted(self._inputs)}")
        return name

    def _alive(self) -> _Running:
        if self._run is None:
            raise RuntimeError("the harness is closed")
        return self._run


class _Collector:
    """Keeps what it is given until a checkpoint takes it away."""

    guarantee = Guarantee.EXACTLY_ONCE

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.batches: list[pa.RecordBatch] = []

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "harness"}

    def open(self, context: SinkContext, committables: Sequence[Any]) -> None:
        """The harness opens no sinks."""

    def write(self, batch: pa.RecordBatch) -> None:
        self.batches.append(conform("harness", self.schema, batch))

    def prepare(self, checkpoint_id: int, *, final: bool) -> Prepared:  # noqa: ARG002
        return Prepared()

    def publish(self, committables: Sequence[Any]) -> None:
        """The harness publishes at its checkpoints."""

    def close(self) -> None:
        """Nothing is held."""


class _Recorded(WrappedBackend):
    """A backend that remembers its tables."""

    def __init__(self, inner: StateBackend) -> None:
        super().__init__(inner)
        self.tables: dict[str, StateTable] = {}

    def table(self, spec: TableSpec) -> StateTable:
        self.tables[spec.name] = super().table(spec)
        return self.tables[spec.name]
