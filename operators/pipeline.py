"""From nodes to running operators: fuses stateless steps, opens tables, connects outputs.

The pipeline of a job has sources, operators in order (inputs before consumers) and sinks; each
source drives everything downstream of it by pushing one batch and then its watermark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from operators.changelog import settle
from operators.engine import StatelessPlan, Step
from operators.graph import Node, SinkNode, SourceNode, StepNode, upstream_id
from operators.runtime import BaseOperator, BuildContext, Cursor, Edge, Inputs, Operator, Output, user_error
from operators.sinks.base import Sink
from operators.source_driver import SourceDriver
from statebackend import PreparedPlan

__all__ = ["ChangelogFilter", "Pipeline", "SinkOperator", "StatelessOperator", "build_pipeline"]


class StatelessOperator(BaseOperator):
    """Runs a fused chain of stateless steps on each batch."""

    def __init__(self, operator_id: str, steps: Sequence[Step], cursor: Cursor) -> None:
        super().__init__(operator_id)
        self.plan = StatelessPlan(steps)
        self._cursor = cursor

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Evaluate the expressions; raises `UserFunctionError` when that fails."""
        try:
            results = self.plan.run(batch)
        except Exception as error:
            raise user_error(self.operator_id, self._cursor, error) from error
        for result in results:
            self.output.emit(result)


class ChangelogFilter(BaseOperator):
    """Keeps rows of a changelog so that what is left is one too; see `settle`."""

    def __init__(self, operator_id: str, step: Step, cursor: Cursor) -> None:
        super().__init__(operator_id)
        self._mask = PreparedPlan(step.input_schema, lambda _, frame: step.apply(frame))
        self._cursor = cursor

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Evaluate the predicate; raises `UserFunctionError` when that fails."""
        try:
            masks = [result.column(0) for result in self._mask.run([batch])]
        except Exception as error:
            raise user_error(self.operator_id, self._cursor, error) from error
        keep = pc.fill_null(pa.chunked_array(masks, pa.bool_()), False).to_numpy()
        if keep.any():
            self.output.emit(settle(batch, keep))


class SinkOperator(BaseOperator):
    """The end of a stream. Sinks do not look at event time, and stage what they hold back themselves."""

    def __init__(self, node: SinkNode, cursor: Cursor) -> None:
        super().__init__(node.operator_id)
        self.schema = node.schema
        self.sink: Sink = node.sink
        self._cursor = cursor

    @property
    def outputs(self) -> tuple[Output, ...]:
        """None."""
        return ()

    def process(self, batch: pa.RecordBatch, _index: int = 0, /) -> None:
        """Write the batch."""
        try:
            self.sink.write(batch)
        except Exception as error:
            raise user_error(self.operator_id, self._cursor, error) from error


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

    def on_processing_time(self, now_ms: int) -> None:
        """Tell the operators that care what the wall clock shows."""
        for operator in self.operators:
            if operator.uses_processing_time:
                operator.on_processing_time(now_ms)

    def positions(self) -> dict[str, Any]:
        """The next position of every source that has begun."""
        return {s.operator_id: s.position for s in self.sources if s.position is not None}

    def watermarks(self) -> dict[str, int]:
        """How far event time has come at every operator that depends on it."""
        found = {o.operator_id: o.watermark for o in self.operators}
        known = {operator_id: watermark for operator_id, watermark in found.items() if watermark is not None}
        for source in self.sources:
            known.update(source.watermarks())
        return known


def build_pipeline(nodes: Sequence[Node], context: BuildContext) -> Pipeline:
    """Operators for the nodes (inputs first), restored."""
    return _Builder(nodes, context).build()


class _Builder:
    def __init__(self, nodes: Sequence[Node], context: BuildContext) -> None:
        self._nodes = nodes
        self._context = context
        self._pipeline = Pipeline()
        self._outputs: dict[int, tuple[Output, ...]] = {}
        self._consumers = Counter((id(port.node), port.index) for node in nodes for port in node.inputs)
        self._step_ids: Counter[str] = Counter()

    def build(self) -> Pipeline:
        for node in self._nodes:
            if isinstance(node, SourceNode):
                driver = SourceDriver(node, self._context)
                self._pipeline.sources.append(driver)
                self._outputs[id(node)] = driver.outputs
            elif isinstance(node, StepNode):
                if not self._is_fused(node):
                    self._add_steps(node)
            elif isinstance(node, SinkNode):
                sink = SinkOperator(node, self._context.cursor)
                self._pipeline.sinks.append(sink)
                self._connect(node, node, sink)
            else:
                self._connect(node, node, node.build(self._context))
        return self._pipeline

    def _is_fused(self, node: StepNode) -> bool:
        """Whether the one consumer is a step too, which then runs this one; filters of a changelog run alone."""
        if self._consumers[id(node), 0] != 1 or node.step.mask:
            return False
        return any(isinstance(n, StepNode) and n.input.node is node and not n.step.mask for n in self._nodes)

    def _add_steps(self, last: StepNode) -> None:
        chain, first = [last.step], last
        while isinstance(before := first.input.node, StepNode) and self._is_fused(before):
            chain.insert(0, before.step)
            first = before
        base = f"{upstream_id(last.input)}:{'+'.join(step.label.split('(')[0] for step in chain)}"
        self._step_ids[base] += 1
        count = self._step_ids[base]
        operator_id = base if count == 1 else f"{base}#{count}"
        cursor = self._context.cursor
        operator = (
            ChangelogFilter(operator_id, last.step, cursor)
            if last.step.mask
            else StatelessOperator(operator_id, chain, cursor)
        )
        self._connect(last, first, operator)

    def _connect(self, node: Node, reader: Node, operator: Operator) -> None:
        """Feed the operator of ``node`` with the inputs of ``reader`` (the first of a fused chain)."""
        inputs = Inputs(operator, len(reader.inputs))
        for index, port in enumerate(reader.inputs):
            self._outputs[id(port.node)][port.index].targets.append(Edge(inputs, index))
        self._outputs[id(node)] = operator.outputs
        self._pipeline.operators.append(operator)
