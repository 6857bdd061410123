"""A stream joined with what a configuration stream says at present.

Every configuration row replaces the one of its key. A row of the main stream gets the configuration that holds when it
comes: the order of arrival counts, not event time (for that there is `asof_join`). Rounds of polling are part of a
checkpoint's order, so a replay sees the same order.

Invariants:

* The table has one row per configuration key.
* Event time is that of the main stream; the configuration never holds it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from operators.changelog import Updates, retracts, upserted
from operators.graph import Port, StateNote
from operators.runtime import BaseOperator, BuildContext
from statebackend import TableKind, TableSpec

__all__ = ["Broadcast", "BroadcastNode"]

_CONFIGURATION = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BroadcastNode:
    """Input 0: the rows; input 1: the configuration, one row per key. ``on``: the key columns, in both.

    ``inner``: rows without configuration are left out. ``updates``: how the configuration corrects itself.
    """

    operator_id: str
    inputs: tuple[Port, ...]
    schema: pa.Schema
    configuration: pa.Schema
    on: tuple[str, ...]
    inner: bool
    updates: Updates | None
    output_names: tuple[str, ...] = ("",)

    @property
    def label(self) -> str:
        """For `explain`."""
        return f"broadcast join {self.operator_id} on {', '.join(self.on)}"

    @property
    def state(self) -> tuple[StateNote, ...]:
        """The configuration."""
        return (StateNote(self.operator_id, "one row per configuration key", bounded=False),)

    def describe(self) -> Mapping[str, Any]:
        """What must agree when a job is restored."""
        return {"operator": "broadcast join", "on": list(self.on), "configuration": str(self.configuration)}

    def build(self, context: BuildContext) -> Broadcast:
        """The operator, restored."""
        return Broadcast(self, context)


class Broadcast(BaseOperator):
    """The operator."""

    def __init__(self, node: BroadcastNode, context: BuildContext) -> None:
        super().__init__(node.operator_id)
        self._node = node
        self._columns = [name for name in node.configuration.names if name not in node.on]
        self._keys = pa.schema([node.configuration.field(name) for name in node.on])
        self._table = context.backend.table(
            TableSpec(name=node.operator_id, schema=node.configuration, key=node.on, kind=TableKind.UPSERT)
        )

    @property
    def untimed_inputs(self) -> frozenset[int]:
        """Nobody waits for the event time of the configuration."""
        return frozenset([_CONFIGURATION])

    def process(self, batch: pa.RecordBatch, index: int, /) -> None:
        """Keep a configuration, or join rows with it."""
        if index == _CONFIGURATION:
            self._configure(batch)
            return
        keys = pa.RecordBatch.from_arrays([batch.column(name) for name in self._node.on], schema=self._keys)
        found = self._table.lookup(keys)
        known = found.hit
        for column in keys.columns:
            if column.null_count:
                known = pc.and_(known, column.is_valid())
        added = [pc.if_else(known, found.batch.column(n), None) for n in self._columns]
        joined = pa.RecordBatch.from_arrays([*batch.columns, *added], schema=self._node.schema)
        self.output.emit(joined.filter(known) if self._node.inner else joined)

    def _configure(self, batch: pa.RecordBatch) -> None:
        if self._node.updates is not None and self._node.updates.changelog:
            gone = batch.filter(pa.array(retracts(batch)))
            if gone.num_rows:
                self._table.delete(gone.select(list(self._node.on)))
            batch = upserted(batch)
        if batch.num_rows:
            self._table.write(pa.RecordBatch.from_arrays(batch.columns, schema=self._node.configuration))
