"""From nodes to running operators: fuses stateless steps, opens tables, connects outputs.

The pipeline of a job has sources, operators in order (inputs before consumers) and sinks; each
source drives everything downstream of it by pushing one batch and then its watermark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from operators.engine import StatelessPlan, Step
from operators.errors import BadEventTimeError, SchemaError
from operators.graph import Node, Port, SinkNode, SourceNode, StepNode, WindowNode, upstream_id
from operators.runtime import Cursor, Operator, Output, user_error
from operators.sinks.base import Sink
from operators.sources.base import SourceBatch
from operators.watermark import BadEventTime, BadRows, WatermarkTracker
from operators.window_aggregate import WindowAggregate, table_spec
from operators.windows import MAX_WATERMARK
from statebackend import JobState, StateBackend

__all__ = ["Pipeline", "SinkOperator", "SourceDriver", "StatelessOperator", "build_pipeline"]


class SourceDriver:
    """Polls one source, checks what it gives, and pushes it through the pipeline."""

    def __init__(self, node: SourceNode, job: JobState | None, cursor: Cursor, clock: Callable[[], float]) -> None:
        self.operator_id = node.operator_id
        self.source = node.source
        self.output = Output()
        self.bad = Output()
        self.rows_in = 0
        self.position: Any = None if job is None else job.sources.get(node.operator_id)
        self._schema = node.schema
        self._cursor = cursor
        self._tracker = None if node.event_time is None else WatermarkTracker(node.event_time, node.schema, clock)
        if self._tracker is not None and job is not None:
            self._tracker.restore(job.watermarks.get(node.operator_id))

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The rows, and those with a bad event time."""
        return (self.output, self.bad)

    @property
    def watermark(self) -> int | None:
        """How far event time has come."""
        return None if self._tracker is None else self._tracker.watermark

    def open(self) -> None:
        """Seek to the restored position."""
        self.source.open(self.position)

    def push(self, item: SourceBatch | None) -> bool:
        """Push what the source gave; False at the end of the input, after the final watermark.

        Raises `BadEventTimeError` and `SchemaError` for input that cannot be used.
        """
        if item is None:
            self._finish()
            return False
        batch = item.batch
        cursor = self._cursor
        cursor.source, cursor.position, cursor.batches = self.operator_id, item.position, cursor.batches + 1
        self.rows_in += batch.num_rows
        if batch.schema is not self._schema and batch.schema != self._schema:
            raise SchemaError(f"{cursor}: expected columns\n{self._schema}\nfound\n{batch.schema}")
        self._push(batch)
        self.position = item.position
        return True

    def _push(self, batch: pa.RecordBatch) -> None:
        if self._tracker is None:
            self.output.emit(batch)
            return
        watermark = self._tracker.observe(batch)
        if isinstance(watermark, BadRows):
            batch = self._set_aside(watermark)
            watermark = self._tracker.observe(batch)
            assert not isinstance(watermark, BadRows)
        self.output.emit(batch)
        if watermark is not None:
            self._advance(watermark)

    def _set_aside(self, found: BadRows) -> pa.RecordBatch:
        assert self._tracker is not None
        if self._tracker.spec.on_bad is BadEventTime.ERROR:
            raise BadEventTimeError(
                self.operator_id,
                position=self._cursor.position,
                row=found.first_row,
                value=found.value,
                reason=f"column {self._tracker.spec.column!r} {found.reason}",
            )
        self.bad.emit(found.bad)
        return found.good

    def _finish(self) -> None:
        self._advance(MAX_WATERMARK)

    def _advance(self, watermark: int) -> None:
        if self._tracker is not None and self._tracker.advance(watermark):
            self.output.announce(watermark)
            self.output.advance(watermark)


class StatelessOperator:
    """Runs a fused chain of stateless steps on each batch."""

    def __init__(self, operator_id: str, steps: Sequence[Step], cursor: Cursor) -> None:
        self.operator_id = operator_id
        self.rows_in = 0
        self.plan = StatelessPlan(steps)
        self.output = Output()
        self._cursor = cursor

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The rows after the steps."""
        return (self.output,)

    @property
    def watermark(self) -> None:
        """It keeps none."""
        return

    def process(self, batch: pa.RecordBatch) -> None:
        """Evaluate the expressions; raises `UserFunctionError` when that fails."""
        try:
            results = self.plan.run(batch)
        except Exception as error:
            raise user_error(self.operator_id, self._cursor, error) from error
        for result in results:
            self.output.emit(result)

    def announce(self, watermark: int) -> None:
        """Hand it on."""
        self.output.announce(watermark)

    def on_watermark(self, watermark: int) -> None:
        """Hand it on."""
        self.output.advance(watermark)

    def begin_drain(self) -> None:
        """Nothing is held back."""

    def drain(self) -> None:
        """Nothing is held back."""


class SinkOperator:
    """The end of a stream."""

    def __init__(self, node: SinkNode, cursor: Cursor) -> None:
        self.operator_id = node.operator_id
        self.rows_in = 0
        self.schema = node.schema
        self.sink: Sink = node.sink
        self._cursor = cursor

    @property
    def outputs(self) -> tuple[Output, ...]:
        """None."""
        return ()

    @property
    def watermark(self) -> None:
        """It keeps none."""
        return

    def process(self, batch: pa.RecordBatch) -> None:
        """Write the batch."""
        try:
            self.sink.write(batch)
        except Exception as error:
            raise user_error(self.operator_id, self._cursor, error) from error

    def announce(self, watermark: int) -> None:
        """Sinks do not look at event time."""

    def on_watermark(self, watermark: int) -> None:
        """Sinks do not look at event time."""

    def begin_drain(self) -> None:
        """See `drain`."""

    def drain(self) -> None:
        """What a sink holds back it stages itself, when the checkpoint is prepared."""


@dataclass(slots=True)
class Pipeline:
    """Everything that runs in one job."""

    sources: list[SourceDriver] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    sinks: list[SinkOperator] = field(default_factory=list)

    def drain(self) -> None:
        """Write all that operators hold back, inputs before consumers."""
        for operator in self.operators:
            operator.begin_drain()
        for operator in self.operators:
            operator.drain()

    def positions(self) -> dict[str, Any]:
        """The next position of every source that has begun."""
        return {s.operator_id: s.position for s in self.sources if s.position is not None}

    def watermarks(self) -> dict[str, int]:
        """How far event time has come at every operator that depends on it."""
        sources = {s.operator_id: s.watermark for s in self.sources}
        found = {**sources, **{o.operator_id: o.watermark for o in self.operators}}
        return {operator_id: watermark for operator_id, watermark in found.items() if watermark is not None}


def build_pipeline(
    nodes: Sequence[Node],
    *,
    backend: StateBackend,
    job: JobState | None,
    workers: Executor,
    cursor: Cursor,
    clock: Callable[[], float],
) -> Pipeline:
    """Operators for the nodes (inputs first), restored from ``job`` if it is given."""
    return _Builder(nodes, backend, job, workers, cursor, clock).build()


class _Builder:
    def __init__(
        self,
        nodes: Sequence[Node],
        backend: StateBackend,
        job: JobState | None,
        workers: Executor,
        cursor: Cursor,
        clock: Callable[[], float],
    ) -> None:
        self._nodes = nodes
        self._backend = backend
        self._job = job
        self._workers = workers
        self._cursor = cursor
        self._clock = clock
        self._pipeline = Pipeline()
        self._outputs: dict[int, tuple[Output, ...]] = {}
        self._consumers = Counter(
            (id(node.input.node), node.input.index) for node in nodes if not isinstance(node, SourceNode)
        )
        self._step_ids: Counter[str] = Counter()

    def build(self) -> Pipeline:
        for node in self._nodes:
            if isinstance(node, SourceNode):
                driver = SourceDriver(node, self._job, self._cursor, self._clock)
                self._pipeline.sources.append(driver)
                self._outputs[id(node)] = driver.outputs
            elif isinstance(node, StepNode):
                if not self._is_fused(node):
                    self._add_steps(node)
            else:
                operator = self._window(node) if isinstance(node, WindowNode) else self._sink(node)
                self._connect(node, node.input, operator)
        return self._pipeline

    def _is_fused(self, node: StepNode) -> bool:
        """Whether the one consumer is a step too, which then runs this one."""
        if self._consumers[id(node), 0] != 1:
            return False
        return any(isinstance(n, StepNode) and n.input.node is node for n in self._nodes)

    def _add_steps(self, last: StepNode) -> None:
        chain, first = [last.step], last
        while isinstance(before := first.input.node, StepNode) and self._is_fused(before):
            chain.insert(0, before.step)
            first = before
        base = f"{upstream_id(last.input)}:{'+'.join(step.label.split('(')[0] for step in chain)}"
        self._step_ids[base] += 1
        count = self._step_ids[base]
        operator_id = base if count == 1 else f"{base}#{count}"
        self._connect(last, first.input, StatelessOperator(operator_id, chain, self._cursor))

    def _window(self, node: WindowNode) -> Operator:
        watermarks: Mapping[str, int] = {} if self._job is None else self._job.watermarks
        return WindowAggregate(
            node.operator_id,
            windows=node.windows,
            aggregation=node.aggregation,
            input_schema=node.input_schema,
            event_time=node.event_time,
            table=self._backend.table(table_spec(node.operator_id, node.aggregation)),
            watermark=watermarks.get(node.operator_id),
            workers=self._workers,
            cursor=self._cursor,
        )

    def _sink(self, node: SinkNode) -> Operator:
        operator = SinkOperator(node, self._cursor)
        self._pipeline.sinks.append(operator)
        return operator

    def _connect(self, node: Node, source: Port, operator: Operator) -> None:
        self._outputs[id(source.node)][source.index].targets.append(operator)
        self._outputs[id(node)] = operator.outputs
        self._pipeline.operators.append(operator)
