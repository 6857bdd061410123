"""Kills a pipeline at every step of the checkpoint protocol and compares what it published with an undisturbed run.

The steps are those of `operators.checkpoint.Hook`, from the poll of a source to the end of a publication. An
undisturbed run counts how often each is met; then, for each of them, at the first, the last and some occurrence in
between, the pipeline is run again from nothing and

* *killed*: everything of that run raises from then on, on every thread, nothing is cut, staged, committed or
  published any more; its successor is killed too, right after it has recovered; the one after that runs to the end;
* or *stalled*: the run stands still at the step, a successor takes over its state and runs to the end, and then the
  first one goes on, as a process does that was only slow. It must find itself fenced, or change nothing.

After each of these the pipeline is run once more, which must publish nothing. Everything happens in this process, so a
check of a small pipeline takes seconds; what an operating system loses with a process that really dies (unsynced
files, half-written ones) it cannot show.
"""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import pyarrow as pa

from operators.context import StreamContext
from operators.report import JobResult
from statebackend import FencedError, MemoryStateBackend, MemoryStateSpace, StateBackend, StateCheck, open_backend

__all__ = [
    "ExactlyOnceError",
    "ExactlyOnceReport",
    "MakePipeline",
    "PublishingSink",
    "ReadOutput",
    "check_exactly_once",
]

MakePipeline: TypeAlias = Callable[[StreamContext, Path], object]
"""Builds the pipeline on the context. The path is a new directory of each trial, kept over its restarts: for the
output, or, by its name, for a place elsewhere."""

ReadOutput: TypeAlias = Callable[[Path], pa.Table | Mapping[str, pa.Table]]
"""What readers see of the output of the trial in this directory: a table, or one for each output."""

_Rows: TypeAlias = Counter[tuple[Any, ...]]

_RECOVERED = "restored"
_NOT_KILLED = ("restoring", _RECOVERED, "idle")
_STALLED = ("poll", "barrier", "prepared", "handed_over", "committed", "publish", "published")
_DIGITS = 9


@runtime_checkable
class PublishingSink(Protocol):
    """A sink that can tell what readers see of its output."""

    def published(self) -> pa.Table:
        """All rows that were published, by this job or earlier runs of it."""


class ExactlyOnceError(AssertionError):
    """What was published differs from what an undisturbed run publishes; the message names the first difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactlyOnceReport:
    """What a check went through.

    ``rows``: published, by output. ``killed`` and ``stalled``: the steps, with the occurrence at which it happened.
    ``missed``: those that a run did not meet although the undisturbed one did, as the timing of a live source may
    have it.
    """

    rows: Mapping[str, int]
    killed: Sequence[tuple[str, int]]
    stalled: Sequence[tuple[str, int]]
    missed: Sequence[tuple[str, int]]

    def __str__(self) -> str:
        """For people."""
        rows = ", ".join(f"{count} rows in {name!r}" for name, count in self.rows.items())
        lines = [f"exactly once: {rows}, the same after"]
        for word, points in (("killed", self.killed), ("stalled", self.stalled), ("not met", self.missed)):
            steps = Counter(step for step, _ in points)
            if steps:
                shown = ", ".join(step if count == 1 else f"{step} ({count} times)" for step, count in steps.items())
                lines.append(f"  {word} at: {shown}")
        return "\n".join(lines)


def check_exactly_once(
    make_pipeline: MakePipeline,
    read: ReadOutput | None = None,
    *,
    checkpoint_every: int = 2,
    times_per_step: int = 3,
    steps: Collection[str] | None = None,
    state: Callable[[Path], str | Path] | None = None,
    append_only: bool = True,
) -> ExactlyOnceReport:
    """Check that crashes and slow processes change nothing of what a pipeline publishes. See the module.

    Args:
        make_pipeline: called as ``make_pipeline(context, directory)`` for every run; reads its sources, builds its
            streams and ends them in sinks. It must not run the context. Sinks should publish at every checkpoint (a
            file sink with ``roll_rows=1``), else little happens between the first row and the last.
        read: called as ``read(directory)``; what a reader sees there. Without it every sink of the pipeline is asked
            for what it ``published()``, as the file sinks can tell.
        checkpoint_every: a checkpoint is taken after so many rounds of batches.
        times_per_step: at how many of its occurrences each step is tried, at most.
        steps: only these; all by default.
        state: called as ``state(directory)``; the URL of the state store of the trial, for instance
            ``directory / "state"``. Without it the state is kept in memory, which is about ten times as fast.
        append_only: whether published rows stay; then what is visible after a kill must be part of the outcome.

    Every source must end; `ends_after` makes one end that does not by itself.

    Raises `ExactlyOnceError` for the first trial whose output differs, is not restored, or goes on after its end;
    `ValueError` if an undisturbed run publishes nothing.
    """
    if checkpoint_every < 1 or times_per_step < 1:
        raise ValueError("checkpoint_every and times_per_step must be at least 1")
    with tempfile.TemporaryDirectory(prefix="exactly-once-") as root:
        check = _Check(make_pipeline, read, Path(root), checkpoint_every, state, append_only)
        counts = check.run_undisturbed()
        if steps is not None and (unknown := set(steps) - counts.keys()):
            raise ValueError(f"an undisturbed run does not meet the steps {sorted(unknown)}; it meets {list(counts)}")
        tried = [step for step in counts if step not in _NOT_KILLED and (steps is None or step in steps)]
        killed = [(step, number) for step in tried for number in _spread(counts[step], times_per_step)]
        stalled = [(step, (counts[step] + 1) // 2) for step in _STALLED if step in tried]
        for point in killed:
            check.kill(point)
        for point in stalled:
            check.stall(point)
        rows = {name: sum(found.values()) for name, found in check.expected.items()}
    met = {point for point in (*killed, *stalled) if point not in check.missed}
    return ExactlyOnceReport(
        rows=rows,
        killed=[point for point in killed if point in met],
        stalled=[point for point in stalled if point in met],
        missed=check.missed,
    )


class _KilledError(Exception):
    """The process is gone."""


@dataclass(slots=True)
class _Life:
    """One process: the steps it has met, and what happens at one of them, which ``meet`` is called for."""

    at: tuple[str, int] | None = None
    meet: Callable[[], None] = lambda: None
    counts: Counter[str] = field(default_factory=Counter)
    met: bool = False
    dead: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def step(self, name: str) -> None:
        """The hook of the job; raises where the process is dead."""
        with self._lock:
            self.counts[name] += 1
            meets = self.at == (name, self.counts[name])
            self.met |= meets
        if meets:
            self.meet()
        if self.dead:
            raise _KilledError(name)

    def die(self) -> None:
        """From now on every step raises."""
        self.dead = True


class _Trial:
    """A state and a directory, through all the lives of one pipeline."""

    def __init__(self, check: _Check, directory: Path) -> None:
        self.directory = directory
        self._check = check
        self._space = MemoryStateSpace()
        directory.mkdir()

    def run(self, life: _Life) -> JobResult | None:
        """One life; None if it was killed. Raises what the job raises."""
        check, rounds, idle = self._check, 0, 0

        def due() -> bool:
            """After so many rounds in which a source had something."""
            nonlocal rounds, idle
            if life.counts["idle"] > idle:
                idle = life.counts["idle"]
                return False
            rounds += 1
            return rounds % check.checkpoint_every == 0

        context = _TrialContext(self._open, due, life.step)
        check.make_pipeline(context, self.directory)
        self.sinks = {node.operator_id: node.sink for node in context.graph.sinks}
        try:
            return context.run()
        except Exception as error:
            if life.dead and _caused_by(error, _KilledError):
                return None
            raise

    def output(self) -> dict[str, _Rows]:
        """What readers see."""
        if self._check.read is not None:
            found = self._check.read(self.directory)
        else:
            found = {name: _published(name, sink) for name, sink in self.sinks.items()}
        tables = {"out": found} if isinstance(found, pa.Table) else found
        return {name: _multiset(table) for name, table in tables.items()}

    def _open(self, udafs: Mapping[str, Any]) -> StateBackend:
        if self._check.state is None:
            return MemoryStateBackend(self._space, udafs=udafs)
        return open_backend(self._check.state(self.directory), udafs=udafs)


class _TrialContext(StreamContext):
    """A context whose state, checkpoints and steps are those of the trial."""

    def __init__(
        self,
        open_state: Callable[[Mapping[str, Any]], StateBackend],
        due: Callable[[], bool],
        step: Callable[[str], None],
    ) -> None:
        super().__init__(
            "check", checkpoint_interval=None, checkpoint_trigger=due, handle_signals=False, worker_threads=1, hook=step
        )
        self._open_state = open_state

    def _open_backend(self, _: StateCheck) -> StateBackend:
        return self._open_state({udaf.name: udaf for udaf in self.udafs})


class _Check:
    """What is the same for all trials."""

    def __init__(
        self,
        make_pipeline: MakePipeline,
        read: ReadOutput | None,
        root: Path,
        checkpoint_every: int,
        state: Callable[[Path], str | Path] | None,
        append_only: bool,
    ) -> None:
        self.make_pipeline = make_pipeline
        self.read = read
        self.checkpoint_every = checkpoint_every
        self.state = state
        self.expected: dict[str, _Rows] = {}
        self.missed: list[tuple[str, int]] = []
        self._root = root
        self._append_only = append_only

    def run_undisturbed(self) -> Counter[str]:
        """What is to be published; returns how often each step was met."""
        trial, life = _Trial(self, self._root / "undisturbed"), _Life()
        trial.run(life)
        self.expected = trial.output()
        if not any(self.expected.values()):
            raise ValueError("an undisturbed run published nothing: the check could not find anything wrong")
        self._run_again(trial, "an undisturbed run")
        return life.counts

    def kill(self, point: tuple[str, int]) -> None:
        """Kill at a step, kill the successor when it has recovered, and let the next one come to the end."""
        story = f"killed at {_words(point)}"
        trial = _Trial(self, self._root / f"killed-{point[0]}-{point[1]}")
        first = _Life(at=point)
        first.meet = first.die
        trial.run(first)
        if not first.met:
            self.missed.append(point)
        self._compare(trial.output(), story, finished=first.met is False)
        second = _Life(at=(_RECOVERED, 1))
        second.meet = second.die
        self._restore(trial, second, story)
        self._compare(trial.output(), f"{story}, and killed again when it had recovered", finished=False)
        self._restore(trial, _Life(), story)
        self._compare(trial.output(), f"{story}, then restarted", finished=True)
        self._run_again(trial, story)

    def stall(self, point: tuple[str, int]) -> None:
        """Stand still at a step until a successor has come to the end, then go on."""
        story = f"stalled at {_words(point)} while a successor ran to the end"
        trial = _Trial(self, self._root / f"stalled-{point[0]}-{point[1]}")
        failed: list[BaseException] = []

        def successor() -> None:
            try:
                self._restore(trial, _Life(), story)
                self._compare(trial.output(), f"{story} (before the first went on)", finished=True)
            except Exception as error:  # noqa: BLE001 - raised again below, from under the job that stalled
                failed.append(error)

        stalled = _Life(at=point, meet=successor)
        try:
            trial.run(stalled)
        except Exception as error:
            if not failed and not _caused_by(error, FencedError):
                raise ExactlyOnceError(
                    f"{story}: the first one then failed instead of being fenced: {error!r}"
                ) from error
        if failed:
            raise failed[0]
        if not stalled.met:
            self.missed.append(point)
        self._compare(trial.output(), f"{story}, then gone on", finished=True)
        self._run_again(trial, story)

    def _restore(self, trial: _Trial, life: _Life, story: str) -> None:
        try:
            trial.run(life)
        except Exception as error:
            raise ExactlyOnceError(f"{story}: it cannot be restored: {error!r}") from error

    def _run_again(self, trial: _Trial, story: str) -> None:
        self._restore(trial, _Life(), story)
        self._compare(trial.output(), f"{story}, and run once more after its end", finished=True)

    def _compare(self, found: Mapping[str, _Rows], story: str, *, finished: bool) -> None:
        if not finished and not self._append_only:
            return
        for name, expected in self.expected.items():
            rows = found.get(name, Counter())
            surplus, missing = rows - expected, expected - rows if finished else Counter()
            if surplus or missing:
                raise ExactlyOnceError(_difference(story, name, expected, rows, surplus, missing))


def _difference(story: str, name: str, expected: _Rows, found: _Rows, surplus: _Rows, missing: _Rows) -> str:
    row = next(iter(surplus or missing))
    rows = f"{sum(surplus.values())} rows too many, {sum(missing.values())} missing"
    first = f"{dict(row)} was published {found[row]} times instead of {expected[row]}"
    return f"{story}: output {name!r} differs from that of an undisturbed run: {rows}; the first of them: {first}"


def _published(name: str, sink: object) -> pa.Table:
    if not isinstance(sink, PublishingSink):
        raise TypeError(f"{name}: a {type(sink).__name__} cannot tell what it published; pass read=")
    return sink.published()


def _spread(count: int, most: int) -> Iterable[int]:
    """So many of the numbers 1 to ``count``, at most, with both ends."""
    if count <= most:
        return range(1, count + 1)
    return sorted({1 + round(i * (count - 1) / max(1, most - 1)) for i in range(most)})


def _words(point: tuple[str, int]) -> str:
    step, number = point
    return f"{step!r} (occurrence {number})"


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


def _multiset(table: pa.Table) -> _Rows:
    """The rows, by column name; floats to nine digits, as the order of merging may differ. NaN equals NaN."""
    return Counter(tuple((name, _plain(value)) for name, value in row.items()) for row in table.to_pylist())


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return "NaN" if value != value else float(f"{value:.{_DIGITS}g}") + 0.0
    if isinstance(value, list):
        return tuple(_plain(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _plain(item)) for key, item in value.items())
    return value
