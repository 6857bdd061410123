"""Reading and writing the protobuf form of plans."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest
from datafusion import SessionContext, col, lit
from datafusion import functions as f

from statebackend.plan_surgery import AggregateMode, StatePlan, find_node, read_wire, write_wire
from statebackend.prepared import new_session


def test_fields_survive_writing_and_reading() -> None:
    chance = random.Random(3)
    for _ in range(200):
        fields: list[tuple[int, int | bytes]] = [
            (
                chance.randint(1, 300),
                chance.choice([chance.randint(0, 2**63), chance.randbytes(chance.randint(0, 300))]),
            )
            for _ in range(chance.randint(0, 6))
        ]
        assert read_wire(write_wire(fields)) == fields


@pytest.mark.parametrize(
    "data",
    [b"\x08", b"\x0a\x05abc", b"\x80" * 11, b"\x0b", b"\x09\x00"],
    ids=["cut", "short", "endless", "group", "fixed"],
)
def test_malformed_bytes_are_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="protobuf"):
        read_wire(data)


def test_reading_agrees_with_what_datafusion_writes() -> None:
    data = f.count(col("x"), distinct=True).to_bytes(SessionContext())
    assert write_wire(read_wire(data)) == data


def test_only_an_aggregation_can_be_made_a_merge() -> None:
    session = new_session(2)
    rows = pa.record_batch({"k": [1], "v": [2]})
    session.register_record_batches("t", [[rows], [rows]])
    with pytest.raises(ValueError, match="AggregateExecNode"):
        StatePlan(session, session.table("t").select(col("k") + lit(1)).execution_plan(), rows.schema)


def test_a_final_node_runs_as_merge_and_as_final_over_the_states_it_is_given() -> None:
    session = new_session(2)
    rows = pa.record_batch({"k": [1, 1, 2], "v": [2.0, 4.0, 7.0]})
    session.register_record_batches("t", [[rows], [rows]])
    plan = session.table("t").aggregate([col("k")], [f.avg(col("v")).alias("a")]).execution_plan()
    final = find_node(plan, "FinalPartitioned")
    assert final is not None
    assert find_node(plan, "Single") is None
    states = pa.record_batch({"k": [1, 2, 1], "n": pa.array([2, 1, 3], pa.uint64()), "s": [6.0, 7.0, 24.0]})
    merge = StatePlan(session, final, states.schema)
    for _ in range(2):
        reduced = pa.Table.from_batches(merge.run(AggregateMode.PARTIAL_REDUCE, [states]))
        assert sorted(zip(*(c.to_pylist() for c in reduced.columns), strict=True)) == [(1, 5, 30.0), (2, 1, 7.0)]
        result = pa.Table.from_batches(merge.run(AggregateMode.FINAL, [states.slice(0, 2), states.slice(2)]))
        assert sorted(zip(*(c.to_pylist() for c in result.columns), strict=True)) == [(1, 6.0), (2, 7.0)]
    assert merge.run(AggregateMode.FINAL, []) == []
