"""The manifest protocol without I/O, small enough to try every interleaving.

Writers open the store and commit, a reader looks for the newest manifest, a collector deletes old
ones. Each storage call is one step, between any two of which any other process may act, so a
process may stall (or crash: it never acts again) wherever it likes. A request to create may fail
with or without effect, or take effect at any later time, and is then sent again or given up.

The rules are those of ``statebackend.manifest_store``; `Rules` turns each of them off. What must
hold is judged by ``history``, which no process sees: the manifests that were created under a
number that never existed before. A number created again after it was collected is a *ghost*.

* Every acknowledged opening and commit is in the history: so there is one per number, for ever.
* A manifest enters the history only as the child of the last one and with no lower epoch: so
  nothing acknowledged is lost, and a stale writer commits nothing after its successor opened.
* Two openings never get the same epoch.
* A writer is fenced only if the history holds a higher epoch, and never calls a sound store corrupt.
* A reader that begins by listing finds a manifest of the history that is no older than its question.

The claim of a compactor has no steps of its own here. A merge, a claim and a heartbeat are commits of guests, and the
epoch of the claim is checked in the manifest that the commit is built on, so that what holds for guests decides
it. That files of a superseded epoch go, and are named by nobody afterwards, is what the simulator shows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

__all__ = ["Counterexample", "Explored", "Rules", "Setup", "explore"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The protocol; each field is a rule, or its strength."""

    checks_parent: bool = True
    """After creating N the committer reads N-1 and compares it with what it built on."""
    confirms_listing: bool = True
    """What was listed and then read counts only if it is among the newest two of another listing."""
    rechecks_probe: bool = True
    """What probing found counts only if the manifest where it began is still there."""
    reads_back: bool = True
    """On "exists" the object is read: one's own attempt is a success."""
    reloads_on_conflict: bool = True
    """Another's attempt is a conflict; only a higher epoch is a fence."""
    new_attempt_per_request: bool = True
    """A request that is sent again carries an attempt id of its own."""
    manifests_kept: int = 2
    """The newest ones that the collector never deletes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Commits of each writer after it opened, and how many requests may go wrong.

    ``late``: a request without an answer may still take effect. ``guests`` commit once without
    opening (a savepoint, a merge of files), under the epoch that they find. ``tries``: how often a
    process begins again after a conflict before it gives up.
    """

    commits: tuple[int, ...]
    faults: int = 0
    late: bool = True
    guests: int = 0
    readers: int = 0
    tries: int = 1


class Record(NamedTuple):
    """A manifest; its number is its place."""

    epoch: int
    attempt: int
    parent: int


class Process(NamedTuple):
    """One process between two storage calls; ``next`` is the call that it makes next."""

    next: str
    role: str  # what it is doing: open, commit, guest, look
    epoch: int = 0
    left: int = 0  # commits to do
    tries: int = 0  # before it gives up
    known: tuple[int, Record] | None = None
    candidate: tuple[int, Record] | None = None
    mine: tuple[int, ...] = ()  # attempt ids under which the candidate was sent
    start: tuple[int, Record] | None = None  # where a probe began
    cursor: tuple[int, Record] | None = None  # how far a probe or a walk back came
    listed: int = 0
    asked: int = 0  # newest number when a reader began to look


class World(NamedTuple):
    """Everything: ``history[n-1]`` is manifest n, those below ``oldest`` were collected."""

    history: tuple[Record, ...]
    oldest: int
    ghosts: tuple[tuple[int, Record], ...]
    flights: tuple[tuple[int, Record], ...]  # requests that may still take effect
    processes: tuple[Process, ...]
    faults: int

    def get(self, number: int) -> Record | None:
        if self.oldest <= number <= len(self.history):
            return self.history[number - 1]
        return next((record for n, record in self.ghosts if n == number), None)

    def create(self, number: int, record: Record) -> tuple[World, bool]:
        if self.get(number) is not None:
            return self, False
        if number <= len(self.history):
            return self._replace(ghosts=tuple(sorted((*self.ghosts, (number, record))))), True
        last = self.history[-1]
        if number > len(self.history) + 1 or record.parent != last.attempt:
            raise Violation(f"manifest {number} is not built on the last one of the history")
        if record.epoch < last.epoch:
            raise Violation(f"manifest {number} has epoch {record.epoch} after {last.epoch}")
        return self._replace(history=(*self.history, record)), True


_NOTHING = Record(0, 0, 0)
_NEW = -1  # the id of an attempt that was just made; renumbered after every step
Step: TypeAlias = Iterator[tuple[str, World, Process]]


class Violation(Exception):  # noqa: N818
    """A property that does not hold."""


@dataclass(frozen=True, slots=True)
class Counterexample:
    """What is wrong and the steps that lead there."""

    problem: str
    steps: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([self.problem, *(f"  {i:2}. {s}" for i, s in enumerate(self.steps, 1))])


@dataclass(frozen=True, slots=True)
class Explored:
    states: int
    counterexample: Counterexample | None


def explore(rules: Rules, setup: Setup, *, symmetry: bool = True, states_max: int = 3_000_000) -> Explored:
    """Every state that can be reached, breadth first, until a property is violated.

    ``symmetry``: worlds that differ only in which process is which are one; a counterexample then
    does not tell the processes apart.
    """
    first = World((Record(1, 1, 0),), 1, (), (), _processes(setup), setup.faults)
    came_from: dict[World, tuple[World, str] | None] = {first: None}
    queue = deque([first])
    model = _Model(rules, setup)
    while queue:
        world = queue.popleft()
        try:
            for label, after in model.steps(world):
                following = _forget(after, symmetry=symmetry)
                if following not in came_from:
                    came_from[following] = (world, label)
                    queue.append(following)
        except Violation as violation:
            return Explored(len(came_from), _explain(came_from, world, model.doing, str(violation)))
        assert len(came_from) <= states_max, "make the setup smaller"
    return Explored(len(came_from), None)


def _processes(setup: Setup) -> tuple[Process, ...]:
    writers = [Process("asleep", "open", left=commits, tries=setup.tries) for commits in setup.commits]
    guests = [Process("asleep", "guest", tries=setup.tries)] * setup.guests
    return (*writers, *guests, *[Process("asleep", "look")] * setup.readers)


def _forget(world: World, *, symmetry: bool) -> World:
    """The same world without what can no longer make a difference.

    That is collected history that nobody has in hand, which id an attempt has, and (if wanted) which
    process is which.
    """
    history, oldest, ghosts, flights, processes, faults = world
    if symmetry:
        processes = tuple(sorted(processes, key=_shape))
    if oldest > 1:
        held = {pair[0] for p in processes for pair in (p.candidate, p.cursor) if pair is not None}
        gone = (r if n in held else _NOTHING for n, r in enumerate(history[: oldest - 1], 1))
        history = (*gone, *history[oldest - 1 :])
    ids = _Renumbered({0: 0})

    def record(old: Record) -> Record:
        return Record(old.epoch, ids[old.attempt], ids[old.parent])

    def place(pair: tuple[int, Record] | None) -> tuple[int, Record] | None:
        return None if pair is None else (pair[0], record(pair[1]))

    history = tuple(map(record, history))
    renamed = []
    for p in processes:
        mine = tuple(sorted(ids[a] for a in p.mine))
        new = (place(p.known), place(p.candidate), mine, place(p.start), place(p.cursor))
        renamed.append(Process(p.next, p.role, p.epoch, p.left, p.tries, *new, p.listed, p.asked))
    ghosts = tuple((n, record(r)) for n, r in ghosts)
    flights = tuple(sorted((n, record(r)) for n, r in flights))
    return World(history, oldest, ghosts, flights, tuple(renamed), faults)


class _Renumbered(dict[int, int]):
    def __missing__(self, key: int) -> int:
        self[key] = new = len(self)
        return new


def _shape(process: Process) -> tuple[object, ...]:
    """What a process is doing, without ids."""
    pairs = (process.known, process.candidate, process.start, process.cursor)
    numbers = tuple(0 if p is None else p[0] for p in pairs)
    return (
        process.next,
        process.role,
        process.epoch,
        process.left,
        process.tries,
        process.listed,
        process.asked,
        *numbers,
    )


def _explain(came_from: dict[World, tuple[World, str] | None], world: World, last: str, problem: str) -> Counterexample:
    labels = [last]
    while (origin := came_from[world]) is not None:
        world, label = origin
        labels.append(label)
    return Counterexample(problem, tuple(reversed(labels)))


class _Model:
    """All steps that are possible in a world; one method per storage call, named by `Process.next`."""

    def __init__(self, rules: Rules, setup: Setup) -> None:
        self._rules = rules
        self._setup = setup
        self.doing = ""

    def steps(self, world: World) -> Iterator[tuple[str, World]]:
        if world.oldest <= len(world.history) - self._rules.manifests_kept:
            yield f"the collector deletes {world.oldest}", world._replace(oldest=world.oldest + 1)
        for ghost in world.ghosts:
            yield f"the collector deletes {ghost[0]} again", world._replace(ghosts=_without(world.ghosts, ghost))
        for flight in world.flights:
            landed, created = world._replace(flights=_without(world.flights, flight)).create(*flight)
            yield f"a late request to create {flight[0]} arrives{'' if created else ', in vain'}", landed
        processes = world.processes
        for who, process in enumerate(processes):
            if process.next == "end" or process in processes[:who]:
                continue  # of processes that are alike one is enough
            self.doing = name = f"{_NAMES[process.role]} {who}"
            for label, after, new in getattr(self, f"_{process.next}")(world, who, process):
                yield f"{name} {label}", after._replace(processes=(*processes[:who], new, *processes[who + 1 :]))

    # --- finding the newest manifest: list, read, probe, check where the probe began ---

    def _asleep(self, world: World, who: int, process: Process) -> Step:
        yield from self._list(world, who, process._replace(asked=len(world.history)))

    def _list(self, world: World, who: int, process: Process) -> Step:
        newest = len(world.history)
        if process.cursor is not None and process.cursor[0] >= newest - 1:
            self.doing += f" lists, the newest is {newest}"
            yield f"lists, the newest is {newest}: confirmed", world, self._found(world, process)
        else:
            yield f"lists, the newest is {newest}", world, process._replace(next="read", listed=newest, cursor=None)

    def _read(self, world: World, who: int, process: Process) -> Step:
        record = world.get(process.listed)
        if record is None:
            yield f"reads {process.listed}: gone", world, process._replace(next="list", listed=0)
            return
        here = (process.listed, record)
        new = process._replace(next="list", listed=0, cursor=here)
        yield f"reads {here[0]}", world, new if self._rules.confirms_listing else self._found(world, new)

    def _probe(self, world: World, who: int, process: Process) -> Step:
        assert process.cursor is not None
        number = process.cursor[0] + 1
        if (record := world.get(number)) is not None:
            yield f"probes {number}", world, process._replace(cursor=(number, record))
        elif process.cursor == process.start or not self._rules.rechecks_probe:
            yield f"probes {number}: absent", world, self._found(world, process)
        else:
            yield f"probes {number}: absent", world, process._replace(next="recheck")

    def _recheck(self, world: World, who: int, process: Process) -> Step:
        assert process.start is not None
        number, record = process.start
        present = world.get(number)
        if present is not None and present.attempt == record.attempt:
            yield f"finds {number} still there", world, self._found(world, process)
        else:
            yield f"finds {number} gone", world, process._replace(next="list", start=None, cursor=None)

    def _found(self, world: World, process: Process) -> Process:
        """``cursor`` is the newest manifest as far as this process can know."""
        assert process.cursor is not None
        number, record = newest = process.cursor
        process = process._replace(start=None, cursor=None, listed=0)
        if process.role == "look":
            if world.history[number - 1] != record:
                raise Violation(f"a reader believes in a manifest {number} that is not in the history")
            if number < process.asked:
                raise Violation(f"a reader takes {number} for the newest, but {process.asked} was there before")
            return process._replace(next="end", asked=0)
        if process.candidate is not None:  # it looks for the history that its candidate may be part of
            if number <= process.candidate[0]:
                raise Violation(f"a sound store is called corrupt: {number} is found to be the newest")
            return process._replace(next="walk", cursor=newest)
        if process.role == "commit" and record.epoch > process.epoch:
            return self._fenced(world, process)
        return self._commit(world, process, newest)

    # --- committing: create, read back, check the parent, walk back from the newest ---

    def _commit(self, world: World, process: Process, known: tuple[int, Record]) -> Process:
        epoch = known[1].epoch + 1 if process.role == "open" else known[1].epoch
        candidate = (known[0] + 1, Record(epoch, _NEW, known[1].attempt))
        return process._replace(next="create", known=known, candidate=candidate, mine=(_NEW,), asked=0)

    def _create(self, world: World, who: int, process: Process) -> Step:
        assert process.candidate is not None
        number, _ = process.candidate
        after, created = world.create(*process.candidate)
        following = "verify" if created else "read_back"
        yield f"creates {number}{'' if created else ': exists'}", after, process._replace(next=following)
        if not world.faults:
            return
        outcomes = [(f"cannot create {number}", world)]
        if created:
            outcomes.append((f"creates {number} and gets no answer", after))
        if self._setup.late:
            flights = tuple(sorted((*world.flights, process.candidate)))
            outcomes.append((f"gets no answer, its request to create {number} is under way", _with(world, flights)))
        for label, then in outcomes:
            then = then._replace(faults=world.faults - 1)
            yield f"{label}; it sends it again", then, self._sent_again(then, process)
            if process.role == "commit":
                yield f"{label}; it gives up and commits anew", then, _reload(process)

    def _sent_again(self, world: World, process: Process) -> Process:
        if not self._rules.new_attempt_per_request:
            return process
        assert process.candidate is not None
        number, record = process.candidate
        return process._replace(
            candidate=(number, record._replace(attempt=_NEW)),
            mine=(*process.mine, _NEW),
        )

    def _read_back(self, world: World, who: int, process: Process) -> Step:
        assert process.candidate is not None
        number, _ = process.candidate
        present = world.get(number)
        if not self._rules.reads_back:
            self.doing += f" takes {number} for a newer writer's"
            yield f"takes {number} for a newer writer's", world, self._fenced(world, process)
        elif present is not None and present.attempt in process.mine:
            yield f"reads {number}: its own", world, process._replace(next="verify", candidate=(number, present))
        else:
            yield f"reads {number}: not its own", world, self._conflict(world, process)

    def _verify(self, world: World, who: int, process: Process) -> Step:
        assert process.candidate is not None
        number, record = process.candidate
        parent = world.get(number - 1) if self._rules.checks_parent else Record(0, record.parent, 0)
        if parent is None:
            yield f"finds {number - 1} gone", world, process._replace(next="list")
        elif parent.attempt == record.parent:
            self.doing += f" acknowledges {number}"
            yield f"acknowledges {number}", world, self._acknowledged(world, process)
        else:
            yield f"finds another {number - 1}", world, self._conflict(world, process)

    def _walk(self, world: World, who: int, process: Process) -> Step:
        assert process.candidate is not None
        assert process.cursor is not None
        number, record = process.cursor
        before = world.get(number - 1)
        if before is None or before.attempt != record.parent:
            yield f"walks back to {number}, not further", world, self._conflict(world, process)
        elif number - 1 > process.candidate[0]:
            yield f"walks back to {number - 1}", world, process._replace(cursor=(number - 1, before))
        elif before.attempt == process.candidate[1].attempt:
            self.doing += f" walks back and acknowledges {number - 1}"
            yield f"walks back and acknowledges {number - 1}", world, self._acknowledged(world, process)
        else:
            yield f"walks back to {number - 1}: not its own", world, self._conflict(world, process)

    # --- outcomes ---

    def _acknowledged(self, world: World, process: Process) -> Process:
        assert process.candidate is not None
        number, record = process.candidate
        if world.history[number - 1].attempt != record.attempt:
            raise Violation(f"a commit of {number} is acknowledged that is not in the history")
        left = process.left - (process.role == "commit")
        if process.role == "guest" or not left:
            return _ended(process)
        process = Process("create", "commit", epoch=record.epoch, left=left, tries=self._setup.tries)
        return self._commit(world, process, (number, record))

    def _conflict(self, world: World, process: Process) -> Process:
        if process.role == "commit" and not self._rules.reloads_on_conflict:
            self.doing += " takes a conflict for a fence"
            return self._fenced(world, process)
        if not process.tries:
            return _ended(process)
        process = process._replace(tries=process.tries - 1)
        if process.role != "commit":
            return process._replace(next="list", known=None, candidate=None, mine=(), cursor=None)
        return _reload(process)

    def _fenced(self, world: World, process: Process) -> Process:
        if world.history[-1].epoch <= process.epoch:
            raise Violation(f"the writer of epoch {process.epoch} is fenced, and no newer writer opened the store")
        return _ended(process)


_NAMES = {"open": "writer", "commit": "writer", "guest": "guest", "look": "reader"}


def _reload(process: Process) -> Process:
    """Look for the newest manifest, from the last one known, before the next attempt."""
    return process._replace(
        next="probe", candidate=None, mine=(), known=None, start=process.known, cursor=process.known
    )


def _ended(process: Process) -> Process:
    return Process("end", process.role)


def _without(pairs: tuple[tuple[int, Record], ...], pair: tuple[int, Record]) -> tuple[tuple[int, Record], ...]:
    at = pairs.index(pair)
    return pairs[:at] + pairs[at + 1 :]


def _with(world: World, flights: tuple[tuple[int, Record], ...]) -> World:
    return world._replace(flights=flights)
