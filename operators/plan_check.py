"""Whether a state directory belongs to this job: a pure comparison of two plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from operators.errors import JobMismatchError
from operators.graph import INPUT, JOB
from statebackend import JobState

__all__ = ["check_plan", "plan_differences"]


def check_plan(restored: JobState, plan: Mapping[str, Any], *, accept_changes: bool) -> None:
    """Raise `JobMismatchError`, with a readable difference, unless ``plan`` can go on from ``restored``.

    With ``accept_changes`` operators may be new (they start empty), gone (their state stays unread), or read
    their input through other stateless verbs (rows from now on); an operator that is itself changed, and a
    sink that is gone with output not yet published, are still refused.
    """
    old = restored.plan
    added = [name for name in plan if name not in old]
    gone = [name for name in old if name not in plan]
    both = [name for name in plan if name in old]
    changed = [name for name in both if plan_differences(_itself(old[name]), _itself(plan[name]))]
    other_input = [name for name in both if name not in changed and plan_differences(old[name], plan[name])]
    unpublished = [name for name in gone if restored.committables.get(name)]
    if not changed and not unpublished and (accept_changes or not (added or gone or other_input)):
        return
    lines = [f"the state was written by job {_job_name(old)!r}, this is job {_job_name(plan)!r}; operators differ:"]
    for name in (*changed, *other_input):
        lines.append(f"  ~ {'the job' if name == JOB else name}")
        lines += [f"      {line}" for line in plan_differences(old[name], plan[name])]
    lines += [f"  - {name} ({_kind(old[name])}): in the state, not in this job" for name in gone]
    lines += [f"  + {name} ({_kind(plan[name])}): in this job, not in the state" for name in added]
    lines += [f"  ! {name}: holds output that is not published yet" for name in unpublished]
    if changed or unpublished:
        lines.append("use another state directory, or the job that wrote this one")
    else:
        lines.append(
            "name operators as before, use another state directory, or pass accept_plan_changes=True: "
            "new operators start empty, the state of missing ones is left alone, other verbs apply from here on"
        )
    raise JobMismatchError("\n".join(lines))


def plan_differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two descriptions differ, one line each: ``path: old -> new``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        return [
            line
            for name in names
            for line in plan_differences(old.get(name), new.get(name), f"{path}.{name}" if path else str(name))
        ]
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        if len(old) == len(new):
            pairs = enumerate(zip(old, new, strict=True))
            return [line for i, (a, b) in pairs for line in plan_differences(a, b, f"{path}[{i}]")]
        return [f"{path}: {len(old)} items -> {len(new)} items: {list(old)!r} -> {list(new)!r}"]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def _itself(described: Any) -> Any:
    """An operator without what it reads."""
    return {k: v for k, v in described.items() if k != INPUT} if isinstance(described, Mapping) else described


def _job_name(plan: Mapping[str, Any]) -> str:
    return str(plan.get(JOB, {}).get("name", "?"))


def _kind(described: Any) -> str:
    return str(described.get("operator", "?")) if isinstance(described, Mapping) else "?"
