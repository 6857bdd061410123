"""Makes DataFusion merge and finalise partial aggregate states, by editing the bytes of a plan.

DataFusion plans ``GROUP BY`` over two partitions as ``Final(Repartition(Partial(input)))``. Its
final node names the groups as plain columns and holds every aggregate. Encoded as protobuf, that
node becomes ``merge(states) -> states`` by setting its mode to *PartialReduce* and ``merge(states)
-> results`` by setting it to *Final*; its input becomes a scan that carries the states as an
Arrow IPC stream. The same wire reader takes the structure of an aggregate expression apart.

Invariants:

* Plan bytes are built in the process that decodes them and are never stored.
* Nothing is pickled: Python functions are found by name in the decoding session.
* Plans are decoded afresh for every call. A decoded scan gives its rows only once.
* States are read in the order they are given, in one partition.

The numbers below belong to DataFusion's ``datafusion.proto``; `AGGREGATE_FIELDS` lists what is
known, and an unknown field is an error instead of a wrong number.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TypeAlias

import pyarrow as pa
from datafusion import ExecutionPlan, SessionContext

__all__ = ["AggregateMode", "StatePlan", "WireFields", "find_node", "read_wire", "write_wire"]

WireFields: TypeAlias = list[tuple[int, "int | bytes"]]
"""The fields of one protobuf message in order: number, and value (bytes for nested messages)."""


class AggregateMode(IntEnum):
    """Values of ``AggregateMode`` in DataFusion's protobuf. DO NOT CHANGE."""

    FINAL = 1
    PARTIAL_REDUCE = 5


# PhysicalPlanNode.aggregate, and the fields of AggregateExecNode.
_NODE_AGGREGATE = 8
_MODE, _INPUT, _OUTPUT_SCHEMA = 3, 4, 14
_SCAN_PARTITIONS = 1
AGGREGATE_FIELDS = frozenset(range(1, 15))


def read_wire(data: bytes) -> WireFields:
    """Split one protobuf message into its fields. Raises `ValueError` on malformed bytes."""
    fields: WireFields = []
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _read_varint(data, at)
            fields.append((number, value))
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"protobuf field {number} has the unknown wire type {kind}")
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, at = _read_varint(data, at)
        if at + size > len(data):
            raise ValueError(f"protobuf field {number} ends after the message")
        fields.append((number, data[at : at + size]))
        at += size
    return fields


def write_wire(fields: Sequence[tuple[int, int | bytes]]) -> bytes:
    """The protobuf message of these fields (varints and length-delimited ones)."""
    parts: list[bytes] = []
    for number, value in fields:
        if isinstance(value, int):
            parts += [_varint(number << 3), _varint(value)]
        else:
            parts += [_varint(number << 3 | 2), _varint(len(value)), value]
    return b"".join(parts)


def find_node(plan: ExecutionPlan, mode: str) -> ExecutionPlan | None:
    """The topmost ``AggregateExec`` of this mode, or None."""
    if plan.display().startswith(f"AggregateExec: mode={mode},"):
        return plan
    return next((found for child in plan.children() if (found := find_node(child, mode))), None)


class StatePlan:
    """One aggregation over its states, to be run in either mode.

    ``final`` is the ``FinalPartitioned`` node of the planned aggregation; ``state_schema`` the
    schema of its states, with the names of its group columns. Raises `ValueError` when the node is
    not encoded as expected.
    """

    def __init__(self, session: SessionContext, final: ExecutionPlan, state_schema: pa.Schema) -> None:
        self._session = session
        self._schema = state_schema
        node = read_wire(final.to_bytes(session))
        if len(node) != 1 or node[0][0] != _NODE_AGGREGATE or not isinstance(node[0][1], bytes):
            raise ValueError("the final aggregation is not encoded as an AggregateExecNode")
        fields = read_wire(node[0][1])
        if unknown := {number for number, _ in fields} - AGGREGATE_FIELDS:
            raise ValueError(f"AggregateExecNode has the unknown fields {sorted(unknown)}")
        self._fields = [field for field in fields if field[0] not in (_MODE, _INPUT, _OUTPUT_SCHEMA)]
        self._scan_number, self._scan_fields = self._empty_scan()

    def run(self, mode: AggregateMode, states: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        """Merge the states (batches of the state schema), in one partition and in their order."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._schema) as writer:
            for batch in states:
                writer.write_batch(batch)
        plan = ExecutionPlan.from_bytes(self._session, self._plan_bytes(mode, sink.getvalue()))
        return [batch.to_pyarrow() for batch in self._session.execute(plan, 0)]

    def _plan_bytes(self, mode: AggregateMode, states: pa.Buffer) -> bytes:
        # The states are large: only their lengths are computed outwards, and all is joined once.
        size = states.size
        rest = write_wire(self._scan_fields)
        head = _varint(_SCAN_PARTITIONS << 3 | 2) + _varint(size)
        for number in (self._scan_number, _INPUT):
            head = _varint(number << 3 | 2) + _varint(len(head) + size + len(rest)) + head
        head = write_wire([(_MODE, int(mode)), *self._fields]) + head
        head = _varint(_NODE_AGGREGATE << 3 | 2) + _varint(len(head) + size + len(rest)) + head
        return b"".join((head, memoryview(states), rest))

    def _empty_scan(self) -> tuple[int, WireFields]:
        scratch = SessionContext()
        empty = pa.RecordBatch.from_arrays([pa.nulls(0, t) for t in self._schema.types], schema=self._schema)
        scratch.register_record_batches("states", [[empty]])
        node = read_wire(scratch.table("states").execution_plan().to_bytes(self._session))
        if len(node) != 1 or not isinstance(node[0][1], bytes):
            raise ValueError("a scan of record batches is not encoded as one node")
        fields = read_wire(node[0][1])
        if [number for number, _ in fields].count(_SCAN_PARTITIONS) != 1:
            raise ValueError("a scan of record batches does not hold one partition")
        return node[0][0], [field for field in fields if field[0] != _SCAN_PARTITIONS]


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("protobuf integer is malformed")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
