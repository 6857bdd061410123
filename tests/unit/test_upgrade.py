"""A job is restored with another program: what differs is told, what the upgrade says is done, once and as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datafusion import Expr, col, lit
from datafusion import functions as f

from operators import DataStream, Job, JobMismatchError, KeyedProcess, StreamContext, Upgrade, ValueState
from statebackend import SchemaChanges, SchemaMismatchError, StateStore, open_state
from statebackend.cli import main
from tests.support.streams import Ledger, LedgerSink

SECOND = 1000
SCHEMA = pa.schema([("t", pa.timestamp("ms")), ("k", pa.string()), ("v", pa.int32())])
N, TOTAL, MEAN = (
    f.count(lit(1)).alias("n"),
    f.sum(col("v")).alias("total"),
    f.avg(col("v")).alias("mean"),
)
Build = Callable[[DataStream], DataStream]


def batch_of(second: int) -> pa.RecordBatch:
    """Four rows of one second."""
    return pa.record_batch(
        [[second * SECOND + 10 * i for i in range(4)], ["a", "b", "a", None], [second, second, 1, 2]], schema=SCHEMA
    )


class Program:
    """One version of a program over one input: windows of ten seconds, called ``w``, into the sink ``out``."""

    def __init__(
        self, state: Path, build: Build, *, upgrade: Upgrade | None = None, name: str = "job", source: str = "events",
        sink: str = "out", hook: Callable[[str], None] | None = None, schema: pa.Schema = SCHEMA,
    ) -> None:  # fmt: skip
        self.ledger = Ledger()
        self._stop_after: int | None = None
        self._job: Job | None = None
        self._schema = schema
        context = StreamContext(name, state=str(state), upgrade=upgrade, hook=hook, checkpoint_interval=None)
        stream = context.from_batches(self._batches, schema, event_time="t", name=source)
        build(stream).sink(LedgerSink(self.ledger), name=sink)
        self.context = context

    def run(self, stop_after: int | None = None) -> list[dict[str, Any]]:
        """Run to the end (twelve seconds and one much later), or stop in order; the rows that were published."""
        self._stop_after = stop_after
        self._job = self.context.job()
        self._job.run()
        return self.ledger.table().to_pylist() if self.ledger.pieces else []

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for second in [*range(12), 30]:
            if second == self._stop_after:
                assert self._job is not None
                self._job.stop()
            yield batch_of(second).cast(self._schema)


def windows(*aggregates: Expr, name: str = "w", where: Expr | None = None) -> Build:
    def build(stream: DataStream) -> DataStream:
        kept = stream if where is None else stream.filter(where)
        return kept.window(["k"], list(aggregates), 10 * SECOND, name=name)

    return build


def by_window(rows: Sequence[dict[str, Any]], *columns: str) -> dict[tuple[int, str | None], tuple[Any, ...]]:
    return {(r["window_start_time"].second, r["k"]): tuple(r[c] for c in columns) for r in rows}


def checkpoint_of(state: Path) -> int:
    with open_state(state) as catalog:
        return int(catalog.checkpoint.checkpoint_id)


def test_the_difference_tells_what_stays_and_goes_and_what_to_write(tmp_path: Path) -> None:
    Program(tmp_path, windows(N, TOTAL)).run(stop_after=5)
    with pytest.raises(JobMismatchError) as refusal:
        Program(tmp_path, windows(N, MEAN, name="w2"), sink="other").run()
    text = str(refusal.value)
    for line in (
        "= events (source): kept",
        "+ w2 (window): in this job, not in the state",
        "- w (window): in the state, not in this job; holds 3 rows, ",
        "rename={'out': 'other'}",
        "drop=['w']",
        "add=['w2']",
        "python -m statebackend savepoint",
    ):
        assert line in text, text
    with pytest.raises(JobMismatchError) as refusal:
        Program(tmp_path, windows(N, MEAN)).run()
    assert "~ w (window): changed; holds 3 rows" in str(refusal.value)
    assert "aggregates[1]: 'sum(v) AS total' -> 'avg(v) AS mean'" in str(refusal.value)
    assert "results ['mean'] start from nothing: of windows that are open they see only rows from here on" in str(
        refusal.value
    )
    assert "change={'w': SchemaChanges(dropped=['total'])}" in str(refusal.value)


def test_what_the_message_says_to_write_is_accepted(tmp_path: Path) -> None:
    Program(tmp_path, windows(N, TOTAL)).run(stop_after=5)
    upgrade = Upgrade(change={"w": SchemaChanges(dropped=["total"])})
    rows = Program(tmp_path, windows(N, MEAN), upgrade=upgrade).run()
    assert by_window(rows, "n", "mean") == {
        (0, "a"): (20, 4.25), (0, "b"): (10, 7.5), (0, None): (10, 2.0),
        (10, "a"): (4, 5.75), (10, "b"): (2, 10.5), (10, None): (2, 2.0),
        (30, "a"): (2, 15.5), (30, "b"): (1, 30.0), (30, None): (1, 2.0),
    }, "of the first window, the mean of seconds 6 to 9"  # fmt: skip


def test_renamed_operators_take_their_state_position_and_watermark_along(tmp_path: Path) -> None:
    whole = Program(tmp_path / "whole", windows(N, TOTAL)).run()
    Program(tmp_path / "state", windows(N, TOTAL)).run(stop_after=5)
    upgrade = Upgrade(rename={"events": "clicks", "w": "per_key", "out": "results"})
    new: dict[str, Any] = {"source": "clicks", "sink": "results", "upgrade": upgrade}
    first = Program(tmp_path / "state", windows(N, TOTAL, name="per_key"), **new)
    rows = first.run(stop_after=8)
    with open_state(tmp_path / "state") as catalog:
        assert catalog.tables == ["per_key"]
        assert set(catalog.checkpoint.job.sources) == {"clicks"}
    rows += Program(tmp_path / "state", windows(N, TOTAL, name="per_key"), **new).run()  # the upgrade may stay
    assert by_window(rows, "n", "total") == by_window(whole, "n", "total")
    assert Program(tmp_path / "state", windows(N, TOTAL, name="per_key"), **{**new, "upgrade": None}).run() == []


def test_operators_that_are_dropped_and_added_start_empty(tmp_path: Path) -> None:
    Program(tmp_path, windows(N)).run(stop_after=5)
    rows = Program(tmp_path, windows(N, name="anew"), upgrade=Upgrade(drop=["w"], add=["anew"], change=["out"])).run()
    assert by_window(rows, "n")[0, "a"] == (8,), "four of ten seconds"
    with open_state(tmp_path) as catalog:
        assert catalog.tables == ["anew"]


def test_an_operator_whose_state_means_something_else_can_only_be_reset(tmp_path: Path) -> None:
    def build(stream: DataStream) -> DataStream:
        return stream.window(["k"], [N], 5 * SECOND, name="w")

    Program(tmp_path, windows(N)).run(stop_after=7)
    for upgrade in (None, Upgrade(change=["w"])):
        with pytest.raises(JobMismatchError, match=r"(?s)cannot keep its state: .*length_ms.*reset=\['w'\]"):
            Program(tmp_path, build, upgrade=upgrade).run()
    rows = Program(tmp_path, build, upgrade=Upgrade(reset=["w"])).run()
    assert by_window(rows, "n")[5, "b"] == (2,), "seconds 8 and 9"
    assert (0, "a") not in by_window(rows, "n")


def test_a_result_that_is_computed_from_something_else_is_not_the_same_result(tmp_path: Path) -> None:
    Program(tmp_path, windows(N, TOTAL)).run(stop_after=5)
    other = windows(N, f.sum(col("v") + lit(1)).alias("total"))
    with pytest.raises(JobMismatchError, match=r"results \['total'\] are computed from something else than before"):
        Program(tmp_path, other, upgrade=Upgrade(change=["w"])).run()


def test_another_filter_applies_from_here_on(tmp_path: Path) -> None:
    Program(tmp_path, windows(N)).run(stop_after=5)
    rows = Program(tmp_path, windows(N, where=col("v") > lit(6)), upgrade=Upgrade(change=["w"])).run()
    assert by_window(rows, "n")[0, "b"] == (6 + 3,)


def test_wider_columns_need_no_upgrade_of_the_window(tmp_path: Path) -> None:
    low = f.min(col("v")).alias("low")
    Program(tmp_path, windows(low)).run(stop_after=5)
    wide = SCHEMA.set(2, pa.field("v", pa.int64()))
    with pytest.raises(JobMismatchError, match=r"(?s)~ events.*v: int32.*v: int64.*change=\['events'\]"):
        Program(tmp_path, windows(low), schema=wide).run()
    rows = Program(tmp_path, windows(low), schema=wide, upgrade=Upgrade(change=["events"])).run()
    assert by_window(rows, "low")[0, "b"] == (0,)


def groups(*aggregates: Expr, emit: str = "upserts", newest_only: bool = False) -> Build:
    def build(stream: DataStream) -> DataStream:
        rows = stream.deduplicate(["k"], keep="last", name="d") if newest_only else stream
        return rows.aggregate([col("k")], list(aggregates), emit=emit, name="g")

    return build


@pytest.mark.parametrize("emit", ["upserts", "changelog", "final"])
def test_groups_take_further_results_which_start_from_nothing(tmp_path: Path, emit: str) -> None:
    Program(tmp_path, groups(N, emit=emit)).run(stop_after=9)
    with pytest.raises(JobMismatchError, match=r"\['low', 'mean'\] start from nothing: of groups that are there"):
        Program(tmp_path, groups(f.min(col("v")).alias("low"), N, MEAN, emit=emit)).run()
    upgrade = Upgrade(change=["g"])
    rows = Program(tmp_path, groups(f.min(col("v")).alias("low"), N, MEAN, emit=emit), upgrade=upgrade).run()
    last = {row["k"]: row for row in rows if row.get("op", "insert") in ("insert", "update-after", "upsert")}
    assert {k: last["b"][k] for k in ("n", "low", "mean")} == {"n": 13, "low": 10, "mean": 17.0}


def test_groups_over_a_changelog_take_none(tmp_path: Path) -> None:
    Program(tmp_path, groups(N, emit="changelog", newest_only=True)).run(stop_after=9)
    with pytest.raises(JobMismatchError, match=r"\['total'\] would have rows taken back that they have never seen"):
        Program(tmp_path, groups(N, TOTAL, emit="changelog", newest_only=True), upgrade=Upgrade(change=["g"])).run()


class Count(KeyedProcess):
    schema = pa.schema([("k", pa.string()), ("n", pa.int64())])
    n = ValueState[int](pa.int64())

    def process(self, row: Any, context: Any) -> Any:
        context[self.n].value = (context[self.n].value or 0) + 1
        yield {"k": context.key[0], "n": context[self.n].value}


class CountAndLast(Count):
    last = ValueState[int](pa.int32())

    def process(self, row: Any, context: Any) -> Any:
        context[self.last].value = row["v"]
        yield from super().process(row, context)


def test_a_function_gets_more_state_and_loses_it_when_that_is_said(tmp_path: Path) -> None:
    def with_function(function: KeyedProcess) -> Build:
        return lambda stream: stream.process("k", function, name="p")

    def newest(rows: Sequence[dict[str, Any]]) -> dict[Any, int]:
        return {row["k"]: row["n"] for row in rows}

    Program(tmp_path, with_function(Count())).run(stop_after=3)
    with pytest.raises(JobMismatchError, match=r"(?s)p:values: \+ last: int32, null in the rows.*change=\['p'\]"):
        Program(tmp_path, with_function(CountAndLast())).run()
    more = Upgrade(change=["p"])
    assert newest(Program(tmp_path, with_function(CountAndLast()), upgrade=more).run(stop_after=6))["a"] == 14
    with pytest.raises(SchemaMismatchError, match="column 'last' is missing"):
        Program(tmp_path, with_function(Count()), upgrade=more).run()
    less = Upgrade(change={"p": SchemaChanges(dropped=["last"])})
    assert newest(Program(tmp_path, with_function(Count()), upgrade=less).run(stop_after=9))["a"] == 20


def test_the_old_program_is_told_that_it_is_older_and_how_to_go_back(tmp_path: Path) -> None:
    Program(tmp_path, windows(N)).run(stop_after=5)
    before = checkpoint_of(tmp_path)
    Program(tmp_path, windows(N, TOTAL), upgrade=Upgrade(change=["w"])).run(stop_after=7)
    with pytest.raises(JobMismatchError) as refusal:
        Program(tmp_path, windows(N)).run()
    assert f"this program is older than the state, which was upgraded after checkpoint {before} (changed w)" in str(
        refusal.value
    )
    assert f"rollback URL --checkpoint {before}" in str(refusal.value)


def test_a_rollback_to_before_the_upgrade_gives_the_state_back_to_the_old_program(tmp_path: Path) -> None:
    whole = Program(tmp_path / "whole", windows(N)).run()
    state = tmp_path / "state"
    Program(state, windows(N)).run(stop_after=5)
    before = checkpoint_of(state)
    Program(state, windows(N, TOTAL, name="x"), upgrade=Upgrade(rename={"w": "x"}, change=["x"])).run(stop_after=8)
    assert main(["rollback", str(state), "--checkpoint", str(before)]) == 0
    assert by_window(Program(state, windows(N)).run(), "n") == by_window(whole, "n")


class CrashError(Exception):
    pass


@pytest.mark.parametrize("step", ["barrier", "drained", "prepared", "handed_over", "committed", "published"])
def test_a_crash_at_any_step_of_the_upgrade_leaves_the_old_state_or_the_new_one(tmp_path: Path, step: str) -> None:
    whole = Program(tmp_path / "whole", windows(N, TOTAL)).run()
    state = tmp_path / "state"
    Program(state, windows(N, TOTAL)).run(stop_after=5)
    before = checkpoint_of(state)
    upgrade = Upgrade(rename={"w": "x"}, change={"x": None})

    def crash(at: str) -> None:
        if at == step:
            raise CrashError

    with pytest.raises(CrashError):
        Program(state, windows(N, TOTAL, MEAN, name="x"), upgrade=upgrade, hook=crash).run()
    with open_state(state) as catalog:
        upgraded = catalog.tables == ["x"]
        assert upgraded or catalog.tables == ["w"]
        assert upgraded == (int(catalog.checkpoint.checkpoint_id) > before)
        assert ("a5" in str(catalog.raw_table(catalog.tables[0]).schema)) is False
    if upgraded:
        rows = Program(state, windows(N, TOTAL, MEAN, name="x")).run()
    else:
        rows = Program(state, windows(N, TOTAL)).run()
    assert by_window(rows, "n", "total") == by_window(whole, "n", "total")


def test_output_that_is_not_published_is_never_left_behind(tmp_path: Path) -> None:
    def crash(at: str) -> None:
        if at == "committed":
            raise CrashError

    with pytest.raises(CrashError):
        Program(tmp_path, windows(N), hook=crash).run()
    with pytest.raises(JobMismatchError, match="out holds output that is not published yet: run the program that"):
        Program(tmp_path, windows(N), sink="elsewhere", upgrade=Upgrade(drop=["out"], add=["elsewhere"])).run()


def test_a_refused_program_changes_nothing(tmp_path: Path) -> None:
    Program(tmp_path, windows(N)).run(stop_after=5)
    before = checkpoint_of(tmp_path)
    with pytest.raises(JobMismatchError, match="a state directory belongs to one job"):
        Program(tmp_path, windows(N), name="trains").run()
    wide = SCHEMA.set(2, pa.field("v", pa.int64()))
    with pytest.raises(JobMismatchError, match="a source cannot be reset"):
        Program(tmp_path, windows(N), schema=wide, upgrade=Upgrade(reset=["events"])).run()
    assert checkpoint_of(tmp_path) == before


def test_a_refused_program_does_not_fence_the_job_that_runs(tmp_path: Path) -> None:
    refused = []

    def try_another(step: str) -> None:
        if step == "published" and not refused:
            with pytest.raises(JobMismatchError) as refusal:
                Program(tmp_path, windows(N, TOTAL)).run()
            refused.append(refusal)

    Program(tmp_path, windows(N)).run(stop_after=3)
    rows = Program(tmp_path, windows(N), hook=try_another).run()
    assert refused
    assert by_window(rows, "n")[0, "a"] == (20,)


def test_an_upgrade_that_cannot_be_meant_is_an_argument_error() -> None:
    with pytest.raises(TypeError, match="collections of operator ids"):
        Upgrade(drop="w")
    with pytest.raises(ValueError, match="two operators are renamed to one"):
        Upgrade(rename={"a": "c", "b": "c"})


def test_a_state_that_no_job_has_written_to_yet_is_taken_over(tmp_path: Path) -> None:
    with StateStore.open(tmp_path) as store:
        store.flush()
    assert by_window(Program(tmp_path, windows(N)).run(), "n")[0, "a"] == (20,)
