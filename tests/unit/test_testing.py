"""The harness for users' tests: its example runs, a kill loses and replays, the clock is the test's."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datafusion import col, lit
from datafusion import functions as f

from operators import KeyedProcess, ProcessContext, UserFunctionError, ValueState
from operators.testing import StreamHarness
from operators.testing import harness as harness_module

SCHEMA = pa.schema([("at", pa.timestamp("ms")), ("user", pa.string())])


def clicks(stream: Any) -> Any:
    return stream.window("user", f.count(lit(1)).alias("n"), 10_000, name="w")


def rows(*times_users: tuple[int, str]) -> list[dict[str, Any]]:
    return [{"at": time, "user": user} for time, user in times_users]


def test_the_example_of_the_module_runs() -> None:
    assert harness_module.__doc__ is not None
    code = harness_module.__doc__.partition("::\n")[2].partition("\n`StreamHarness.output`")[0]
    exec(textwrap.dedent(code), {"pa": pa, "f": f, "lit": lit, "StreamHarness": StreamHarness})


@pytest.mark.parametrize("where", ["memory", "files"])
def test_a_kill_loses_what_came_after_the_checkpoint_and_the_replay_brings_it_again(where: str, tmp_path: Path) -> None:
    state = None if where == "memory" else str(tmp_path)
    with StreamHarness(clicks, SCHEMA, event_time="at", state=state) as harness:
        harness.push(rows((0, "a"), (1, "b")))
        harness.checkpoint()
        harness.push(rows((11_000, "a")))
        before = harness.output()
        assert sorted((r["user"], r["n"]) for r in before) == [("a", 1), ("b", 1)]
        harness.kill()
        assert sorted(map(repr, harness.output())) == sorted(map(repr, before))
        harness.kill(replay=False)
        assert harness.output() == []
        assert harness.state("w").num_rows == 2
        harness.finish()
        assert len(harness.output()) == 2


def test_what_was_committed_stays_and_is_not_emitted_again() -> None:
    with StreamHarness(clicks, SCHEMA, event_time="at") as harness:
        harness.push(rows((0, "a"), (11_000, "a")))
        harness.checkpoint()
        harness.kill()
        assert [r["n"] for r in harness.output()] == [1]
        harness.finish()
        assert [r["n"] for r in harness.output()] == [1, 1]


def test_several_inputs_and_outputs_have_names() -> None:
    def both(left: Any, right: Any) -> Any:
        merged = left.union(right)
        return {"all": merged, "late": merged.window([], f.count(lit(1)).alias("n"), 10).late_rows()}

    with StreamHarness(both, {"left": SCHEMA, "right": SCHEMA}, event_time="at") as harness:
        harness.push(rows((100, "a")), "left")
        harness.push(pa.Table.from_pylist(rows((50, "b")), schema=SCHEMA), "right")
        harness.advance_watermark(90, "right")
        harness.push(rows((10, "c")), "right")
        assert [r["user"] for r in harness.output("all")] == ["a", "b", "c"]
        assert [r["user"] for r in harness.output("late")] == ["c"]
        with pytest.raises(ValueError, match=r"name one of \['left', 'right'\]"):
            harness.push(rows((1, "x")))


class Reminder(KeyedProcess):
    schema = pa.schema([("user", pa.string()), ("visits", pa.int64())])
    visits = ValueState[int](pa.int64())

    def process(self, row: Mapping[str, Any], context: ProcessContext) -> None:
        if row["user"] == "bad":
            raise ValueError("bad user")
        context[self.visits].value = (context[self.visits].value or 0) + 1
        context.set_processing_timer(1_000_000_000_000 + 5_000)

    def on_processing_timer(self, time_ms: int, context: ProcessContext) -> Iterator[Mapping[str, Any]]:
        yield {"user": context.key[0], "visits": context[self.visits].value}


def test_the_clock_is_that_of_the_test_and_goes_on_over_a_kill() -> None:
    def remind(stream: Any) -> Any:
        return stream.process(col("user"), Reminder(), name="p")

    with StreamHarness(remind, SCHEMA, start_s=1_000_000_000.0) as harness:
        harness.push(rows((0, "a"), (0, "a")))
        harness.checkpoint()
        harness.advance_clock(4.0)
        assert harness.output() == []
        harness.kill()
        assert harness.state_tables() == ["p:processing_timers", "p:timers", "p:values"]
        assert harness.state("p:values").to_pylist() == [{"user": "a", "visits": 2}]
        harness.advance_clock(2.0)
        assert harness.output() == [{"user": "a", "visits": 2}]
        assert harness.now_s == 1_000_000_006.0
        with pytest.raises(UserFunctionError, match="bad user"):
            harness.push(rows((1, "bad")))
        with pytest.raises(ValueError, match="no state table 'nope'"):
            harness.state("nope")
    with pytest.raises(RuntimeError, match="closed"):
        harness.output()
