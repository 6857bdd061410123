"""What an upgrade leaves open, in words: both plans, what every operator holds, and what to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from operators.graph import JOB
from operators.plan_diff import UPGRADES, PlanDiff, Upgrade, digest_of, kind_of, owner_of, results_of
from statebackend import JobState, StoredTable, TableKind, TableSpec

__all__ = ["Problem", "column_changes", "report", "told"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What an upgrade leaves open: ids that it does not speak of, and why others cannot be.

    ``change``: the results that each of them no longer has.
    """

    rename: Mapping[str, str]
    drop: tuple[str, ...]
    add: tuple[str, ...]
    change: Mapping[str, tuple[str, ...]]
    reset: tuple[str, ...]
    never: tuple[str, ...]

    @classmethod
    def of(cls, diff: PlanDiff, restored: JobState, upgrade: Upgrade) -> Problem:
        """What the upgrade says nothing of, or what it cannot do."""
        alike = diff.likely_renames(upgrade)
        touched = {*diff.removed, *diff.renamed, *diff.changed}
        never = [
            f"{name} holds output that is not published yet: run the program that wrote the state once more and stop "
            "it in order (SIGTERM, Ctrl-C), which publishes it"
            for name in restored.committables
            if restored.committables[name] and name in touched
        ]
        if JOB in diff.changed:
            never.append("the job has another name: a state directory belongs to one job")
        changed = [name for name in diff.changed if name != JOB]
        sources = [name for name in changed if kind_of(diff.new[name]) == "source"]
        never += [
            f"{name} cannot go on, and a source cannot be reset: operators that stay would see its rows again; "
            "drop it and add one of another name"
            for name in sources
            if name in diff.refused or name in upgrade.reset
        ]
        decided = {*upgrade.change, *upgrade.reset}
        return cls(
            rename=alike,
            drop=tuple(name for name in diff.removed if name not in upgrade.drop and name not in alike),
            add=tuple(name for name in diff.added if name not in upgrade.add and name not in alike.values()),
            change={n: _dropped(diff, n) for n in changed if n not in decided and n not in diff.refused},
            reset=tuple(n for n in changed if n in diff.refused and n not in upgrade.reset and n not in sources),
            never=tuple(never),
        )

    @property
    def open(self) -> bool:
        """Whether the state cannot go on yet."""
        return bool(self.drop or self.add or self.change or self.reset or self.never or self.rename)


def column_changes(
    diff: PlanDiff, restored: JobState, stored: Mapping[str, StoredTable], declared: Mapping[str, TableSpec]
) -> dict[str, list[str]]:
    """How the columns of tables differ, in lines, by the (new) id of their operator.

    Of aggregate tables the keys: their other columns follow the results.
    """
    found: dict[str, list[str]] = {}
    for name, table in stored.items():
        owner = owner_of(name, restored.plan)
        now = diff.renamed.get(owner, owner)
        spec = declared.get(now + name[len(owner) :])
        if spec is not None and (lines := _columns(table.spec, spec)):
            found.setdefault(now, []).extend(f"table {spec.name}: {line}" for line in lines)
    return found


def _columns(old: TableSpec, new: TableSpec) -> list[str]:
    was, now = ({f.name: f.type for f in spec.schema if _is_told(spec, f.name)} for spec in (old, new))
    lines = [f"{n}: {was[n]} -> {now[n]}" for n in was if n in now and was[n] != now[n]]
    lines += [f"- {n}: {was[n]}, which SchemaChanges must drop or rename" for n in was if n not in now]
    return lines + [f"+ {n}: {now[n]}, null in the rows that are there" for n in now if n not in was]


def _is_told(spec: TableSpec, column: str) -> bool:
    return spec.kind is not TableKind.AGGREGATE or column in spec.key


def report(
    diff: PlanDiff,
    problem: Problem,
    restored: JobState,
    checkpoint_id: int,
    tables: Mapping[str, StoredTable],
    columns: Mapping[str, Sequence[str]],
) -> str:
    """The message of `JobMismatchError`: both plans operator by operator, and what to write."""
    back = {now: was for was, now in diff.renamed.items()}
    sizes = _sizes(tables, restored.plan)

    def line(mark: str, name: str, described: Any, what: str, *, held: bool = True) -> str:
        size = sizes.get(back.get(name, name)) if held else None
        return f"  {mark} {name} ({kind_of(described)}): {what}{'' if size is None else f'; {size}'}"

    job, this = _job_name(restored.plan), _job_name(diff.new)
    lines = [
        *_older(diff, restored),
        f"the state (checkpoint {checkpoint_id}) was written by job {job!r}, this is job {this!r}; operators differ:",
    ]
    for name in diff.new:
        if name in diff.kept:
            renamed = f"kept, renamed from {back[name]}" if name in back else "kept"
            lines.append(line("=", name, diff.new[name], renamed))
        elif name in diff.changed:
            if name == JOB:
                lines.append("  ~ the job")
            else:
                why = diff.refused.get(name)
                what = "changed" if why is None else f"changed, and cannot keep its state: {why}"
                lines.append(line("~", name, diff.new[name], what))
            more = [*diff.changed[name], *columns.get(name, ()), *_added_results(diff, name)]
            lines += [f"      {difference}" for difference in more]
        elif name in diff.added:
            lines.append(line("+", name, diff.new[name], "in this job, not in the state", held=False))
    lines += [line("-", name, diff.old[name], "in the state, not in this job") for name in diff.removed]
    lines += [f"  ! {why}" for why in problem.never]
    return "\n".join([*lines, *_what_to_write(problem)])


def _older(diff: PlanDiff, restored: JobState) -> list[str]:
    """Whether this program is one that the state was upgraded from."""
    mine = digest_of(diff.new)
    for entry in reversed(restored.plan.get(JOB, {}).get(UPGRADES, ())):
        if entry.get("before") == mine:
            at = entry["checkpoint"]
            return [
                f"this program is older than the state, which was upgraded after checkpoint {at} ({told(entry)}): run",
                "the newer program; or go back, while that checkpoint or a savepoint of it is kept:",
                f"  python -m statebackend rollback URL --checkpoint {at}",
            ]
    return []


def _what_to_write(problem: Problem) -> list[str]:
    if problem.never:
        return ["use another state directory, or do first what the lines with ! say"]
    rename, drop, add, reset = problem.rename, problem.drop, problem.add, problem.reset
    said = {
        f"rename={dict(rename)!r},  # the same under other names; or drop and add them": rename,
        f"drop={list(drop)!r},  # their state goes": drop,
        f"add={list(add)!r},  # they start empty, with rows from here on": add,
        f"change={_changes_to_write(problem.change)},  # what changed applies to rows from here on": problem.change,
        f"reset={list(reset)!r},  # they start empty: what they hold cannot be kept": reset,
    }
    return [
        "use another state directory, or say what became of them, beside what the upgrade says already:",
        "  StreamContext(..., upgrade=Upgrade(",
        *(f"      {line}" for line, ids in said.items() if ids),
        "  ))",
        "before that, python -m statebackend savepoint URL --name NAME keeps a way back",
    ]


def _changes_to_write(change: Mapping[str, tuple[str, ...]]) -> str:
    if not any(change.values()):
        return repr(list(change))
    said = {n: f"SchemaChanges(dropped={list(dropped)!r})" if dropped else "None" for n, dropped in change.items()}
    return "{" + ", ".join(f"{name!r}: {what}" for name, what in said.items()) + "}"


def told(entry: Mapping[str, Any]) -> str:
    """An upgrade in words."""
    renamed = ", ".join(f"{was} -> {now}" for was, now in entry.get("renamed", {}).items())
    words = [f"renamed {renamed}"] if renamed else []
    words += [f"{w} {', '.join(entry[w])}" for w in ("dropped", "added", "changed", "reset") if entry.get(w)]
    return "; ".join(words)


def _sizes(tables: Mapping[str, StoredTable], plan: Mapping[str, Any]) -> dict[str, str]:
    """What every operator holds, in words; nothing is said of those without tables."""
    rows: dict[str, list[StoredTable]] = {}
    for name, table in tables.items():
        rows.setdefault(owner_of(name, plan), []).append(table)
    found = {}
    for owner, held in rows.items():
        if all(t.rows is not None for t in held):
            bytes_ = sum(t.bytes or 0 for t in held)
            found[owner] = f"holds {sum(t.rows or 0 for t in held):,} rows, {bytes_:,} bytes"
    return found


def _added_results(diff: PlanDiff, name: str) -> list[str]:
    """What is new among the results of an operator that keeps its state."""
    if name in diff.refused:
        return []
    was = results_of(diff.old[name])
    new = [result for result in results_of(diff.new[name]) if result not in was]
    where = "groups that are there" if kind_of(diff.new[name]) == "aggregate" else "windows that are open"
    return [f"results {new} start from nothing: of {where} they see only rows from here on"] if new else []


def _dropped(diff: PlanDiff, name: str) -> tuple[str, ...]:
    """The results that an operator no longer has."""
    now = results_of(diff.new[name])
    return tuple(result for result in results_of(diff.old[name]) if result not in now)


def _job_name(plan: Mapping[str, Any]) -> str:
    return str(plan.get(JOB, {}).get("name", "?"))
