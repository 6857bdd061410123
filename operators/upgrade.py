"""What becomes of a state when the program that goes on from it has other operators than the one that wrote it.

Two plans are compared by operator ids (`PlanDiff`), and an `Upgrade`, which the user writes, says what the differences
mean. From the restored job, its tables, the new plan and the upgrade `decide` makes a `Migration`, or raises
`JobMismatchError`, which shows both plans side by side, what every operator holds, and the upgrade to write.

A migration is committed as one: names of tables, their columns, positions and the new plan are one checkpoint, the
first of the new program, on a new timeline. Killed before it, the state is as it was; after it, the old program is told
that it is older than the state, for every plan keeps what became of it (`UPGRADES`).

Invariants:

* Nothing is dropped, renamed, started empty or kept under another description unless the upgrade says so.
* Entries of an upgrade that the state has gone through are passed over, so they can stay in the program.
* Output that is staged and not yet published is never left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from operators.errors import JobMismatchError, OperatorError
from operators.graph import JOB, Node
from operators.pipeline import build_pipeline
from operators.plan_diff import UPGRADES, PlanDiff, Upgrade, digest_of, identity_of, owner_of
from operators.runtime import BuildContext, Cursor, Operator
from operators.upgrade_report import Problem, column_changes, report, told
from operators.wrapped_backend import WrappedBackend
from statebackend import (
    JobState,
    MemoryStateBackend,
    SchemaChanges,
    StateBackend,
    StateStoreError,
    StateTable,
    StoredTable,
    TableSpec,
)

__all__ = ["ChangedTables", "Migration", "decide", "declared_tables", "with_past_of"]

_UPGRADES_MAX = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """How a state becomes that of another plan. ``job``: where it goes on, under the new ids; ``plan``: with its past.

    ``tables``: new names by old ones, None for a table that goes.
    """

    job: JobState
    tables: Mapping[str, str | None]
    plan: Mapping[str, Any]
    summary: str


def decide(
    restored: JobState,
    checkpoint_id: int,
    tables: Mapping[str, StoredTable],
    plan: Mapping[str, Any],
    upgrade: Upgrade | None,
    declared: Callable[[], Mapping[str, TableSpec]] = dict,
) -> Migration | None:
    """What it takes to go on from ``restored`` with ``plan``; None when they are of one program.

    ``declared``: the tables of the new program, as far as they are known before it runs; asked for the report alone.
    Raises `JobMismatchError` for differences that ``upgrade`` does not speak of or that cannot be.
    """
    wanted = upgrade or Upgrade()
    diff = PlanDiff.of(restored.plan, plan, wanted.rename)
    if diff.empty:
        return None
    problem = Problem.of(diff, restored, wanted)
    if problem.open:
        columns = column_changes(diff, restored, tables, declared())
        raise JobMismatchError(report(diff, problem, restored, checkpoint_id, tables, columns))
    reset = [name for name in diff.changed if name in wanted.reset]
    owners = {name: owner_of(name, restored.plan) for name in tables}
    gone = {*diff.removed, *reset}
    moves: dict[str, str | None] = {}
    for name, owner in owners.items():
        now = diff.renamed.get(owner, owner)
        if owner and now in gone:
            moves[name] = None
        elif now != owner:
            moves[name] = now + name[len(owner) :]
    entry = {
        "checkpoint": checkpoint_id,
        "before": digest_of(restored.plan),
        "renamed": dict(diff.renamed),
        "dropped": list(diff.removed),
        "added": list(diff.added),
        "changed": [name for name in diff.changed if name not in reset],
        "reset": reset,
    }
    past = [*restored.plan.get(JOB, {}).get(UPGRADES, ()), entry][-_UPGRADES_MAX:]
    job = JobState(
        sources={diff.renamed.get(k, k): v for k, v in restored.sources.items() if diff.renamed.get(k, k) not in gone},
        watermarks=dict(_moved_watermarks(restored, diff.renamed, gone)),
        committables={k: v for k, v in restored.committables.items() if k not in gone},
        plan=_with_past(plan, past),
    )
    return Migration(job=job, tables=moves, plan=job.plan, summary=told(entry))


def with_past_of(restored: JobState, plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """The plan of a program that goes on unchanged, with what the state has gone through."""
    return _with_past(plan, restored.plan.get(JOB, {}).get(UPGRADES, ()))


def declared_tables(nodes: Sequence[Node], clock: Callable[[], float]) -> dict[str, TableSpec]:
    """The tables that the operators of a job open; those of sinks are not known before they run.

    Empty where the operators cannot be built without their state.
    """
    empty = MemoryStateBackend()
    workers = ThreadPoolExecutor(1)
    context = BuildContext(backend=empty, job=None, workers=workers, cursor=Cursor(), clock=clock)
    operators: Sequence[Operator] = ()
    try:
        operators = build_pipeline(nodes, context).operators
        return {name: table.spec for name, table in empty.tables.items()}
    except (OperatorError, StateStoreError, ValueError):
        return {}
    finally:
        for operator in operators:
            operator.close()
        workers.shutdown()
        empty.close()


class ChangedTables(WrappedBackend):
    """A backend whose tables are opened with what an upgrade says of their columns."""

    def __init__(self, inner: StateBackend, changes: Mapping[str, SchemaChanges]) -> None:
        super().__init__(inner)
        self._changes = changes

    def table(self, spec: TableSpec) -> StateTable:
        """The table; what is said of columns that it does not have is passed over."""
        changes = self._changes.get(owner_of(spec.name, self._changes))
        if changes is not None:
            defaults = {name: value for name, value in changes.defaults.items() if name in spec.schema.names}
            dropped = [name for name in changes.dropped if name not in spec.schema.names]
            spec = replace(spec, changes=replace(changes, defaults=defaults, dropped=dropped))
        return super().table(spec)


def _moved_watermarks(
    restored: JobState, renamed: Mapping[str, str], gone: Collection[str]
) -> Iterator[tuple[str, int]]:
    """Watermarks under the new ids; those of the splits of a source are called ``id/split``."""
    for name, watermark in restored.watermarks.items():
        operator_id, slash, split = name.partition("/")
        now = renamed.get(operator_id, operator_id)
        if now not in gone:
            yield f"{now}{slash}{split}", watermark


def _with_past(plan: Mapping[str, Any], past: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {**plan, JOB: {**identity_of(plan), **({UPGRADES: list(past)} if past else {})}}
