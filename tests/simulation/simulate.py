"""One schedule, decided by one seed: several openings of one store, faults, crashes, and all invariants.

What is checked, and where:

* every acknowledged checkpoint is recovered; tables and positions are of the same checkpoint; the sum
  over the accounts is conserved: at every opening and at every reading (`_Simulation._check_contents`),
* at most one manifest per number is acknowledged, and only what is part of the history:
  `_Simulation._acknowledged`,
* epochs never decrease, every manifest is built on the last, every file that it names exists, nothing
  that is needed is deleted: at every effect on the storage (`SharedObjects`),
* a stale writer does not acknowledge, and nobody is fenced but by a newer writer: at every outcome,
* checkpoints of one process never conflict: `CommitConflictError` is no outcome,
* the collector, savepoints and rollbacks beside them break none of this,
* once faults stop, a writer opens, works, and the numbers of files and manifests fall under their bounds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from statebackend import (
    Checkpoint,
    CheckpointGoneError,
    CheckpointNotFoundError,
    CheckpointReader,
    CommitConflictError,
    CommitUnknownError,
    CorruptionError,
    FencedError,
    ObjectMissingError,
    StateStore,
    StateStoreError,
    StorageUnavailableError,
    StoreClosedError,
    StoreSettings,
    clone,
    maintenance,
    open_checkpoint,
    verification,
)
from statebackend import inspect as store_inspect
from statebackend.compaction_tool import CompactionSummary, ToolCompaction
from statebackend.garbage_collector import GarbageCollector
from statebackend.keys import Hasher
from statebackend.manifest_store import ManifestStore
from statebackend.merge import TableLayout
from statebackend.objectstore_wrappers import RetryingObjectStore
from statebackend.toolbox import open_toolbox
from tests.simulation.job import apply_event, contents, differences, job_state, the_merger
from tests.simulation.runtime import SimulatedClock, SimulatedRuntime, wait_for_first
from tests.simulation.scheduler import Process, Program, Scheduler, SimulationOver, current_process
from tests.simulation.storage import Faults, SharedObjects, SimulatedObjectStore

__all__ = ["FIRST_SHARED", "Profile", "Result", "simulate"]

MAIN = "sim://main"
FIRST_SHARED = 1000
"""From this seed on the store is read under leases and branched, and listings are stale; the schedules of the seeds
before it stay as they were when they were found to meet rare bugs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one run is like; drawn from the seed unless given."""

    faults: Faults
    settings: StoreSettings
    openings: int
    events_max: int
    crash_chance: float
    timer_chance: float
    shared: bool = False

    @classmethod
    def drawn(cls, rng: random.Random, *, shared: bool = False) -> Profile:
        calm = rng.random() < 0.15
        level = 0.0 if calm else rng.choice([0.005, 0.02, 0.06])
        return cls(
            shared=shared,
            faults=Faults(
                error=level,
                lost=level,
                late=level / 2,
                stall=rng.choice([0.0, 0.02, 0.06]),
                outage=0.0 if calm else rng.choice([0.0, 0.004]),
                stale_list=0.2 if shared else 0.0,
            ),
            settings=StoreSettings(
                block_rows=rng.choice([2, 4, 64]),
                compression=None,
                cache_bytes=rng.choice([1, 1 << 20]),
                memory_bytes=rng.choice([600, 3000, 1 << 20]),
                l0_files_max=rng.choice([1, 2, 3]),
                compaction_bytes=rng.choice([100, 40_000]),
                compaction=rng.choice(["embedded", "embedded", "none"]),
                compaction_takeover_s=rng.choice([0.1, 1.0, 20.0]),
                runs_max=rng.choice([3, 8]),
                file_bytes_max=rng.choice([4000, 1 << 20]),
                cpu_threads=rng.choice([1, 3]),
                commit_timeout_s=rng.choice([0.2, 2.0]),
                request_timeout_s=3.0,
                retained_checkpoints=rng.choice([1, 2, 4]),
                gc_interval_s=rng.choice([0.1, 1.0]),
            ),
            openings=rng.randrange(2, 5),
            events_max=rng.choice([6, 12, 20]),
            crash_chance=0.0 if calm else rng.choice([0.0, 0.002, 0.01]),
            timer_chance=rng.choice([0.02, 0.1]),
        )

    @classmethod
    def of_compactors(cls, rng: random.Random) -> Profile:
        """Writers that live long enough to lose the claim to compactors elsewhere, and to take it over again."""
        drawn = cls.drawn(rng)
        settings = replace(drawn.settings, compaction="embedded", l0_files_max=1)
        return replace(drawn, settings=settings, openings=rng.choice([1, 1, 2]), events_max=40, timer_chance=0.1)


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended: ``problem`` None if every property held."""

    seed: int
    problem: str | None
    trace: tuple[str, ...]
    objects: dict[str, bytes]
    counts: dict[str, int]


def simulate(seed: int, profile: Profile | None = None) -> Result:
    """Run the schedule of this seed."""
    return _Simulation(seed, profile).run()


class _Simulation:
    def __init__(self, seed: int, profile: Profile | None) -> None:
        rng = random.Random(seed)
        self._seed = seed
        self._profile = profile or Profile.drawn(rng, shared=seed >= FIRST_SHARED)
        self._rng = rng
        p = self._profile
        self._scheduler = Scheduler(random.Random(rng.getrandbits(64)), p.timer_chance, p.crash_chance)
        self._clock = SimulatedClock(self._scheduler)
        self._shared = SharedObjects(self._scheduler, p.faults)
        self._branches: dict[str, SharedObjects] = {}
        self._acked = (0, 0)  # timeline and position
        self._opening: Process | None = None
        self._over = False
        self._counts = dict.fromkeys(
            ("acknowledged", "openings", "fenced", "unknown", "compactions", "recovered", "reads"), 0
        )
        self._counts |= dict.fromkeys(("compactions elsewhere", "superseded", "taken over"), 0)

    def run(self) -> Result:
        scheduler = self._scheduler
        with ExitStack() as stack:
            stack.enter_context(mock.patch("statebackend.store.IsolatedRuntime", self._make_runtime))
            stack.enter_context(mock.patch("statebackend.memory_budget.wait", wait_for_first))
            stack.enter_context(mock.patch("statebackend.merge.StateMerger.from_declaration", the_merger))
            stack.enter_context(mock.patch("statebackend.toolbox.IsolatedRuntime", self._make_runtime))
            stack.enter_context(mock.patch("statebackend.checkpoint_reader.IsolatedRuntime", self._make_runtime))
            stack.enter_context(mock.patch("statebackend.objectstore_roots.open_object_store", self._open_objects))
            stack.enter_context(mock.patch("statebackend.toolbox.open_object_store", self._open_objects))
            stack.enter_context(mock.patch("statebackend.toolbox.SystemClock", return_value=self._clock))
            stack.enter_context(mock.patch("statebackend.toolbox.random.SystemRandom", self._make_random))
            try:
                for number in range(self._profile.openings):
                    delay = 0 if number == 0 else self._rng.randrange(1200)
                    scheduler.at(None, "start", self._starter(f"writer{number + 1}", self._writer), delay)
                others = {
                    "reader": self._reader,
                    "collector": self._collector,
                    "operator": self._operator,
                }
                if self._profile.shared:
                    others |= {"analyst": self._analyst, "brancher": self._brancher}
                for name, program in others.items():
                    scheduler.at(None, "start", self._starter(name, program), self._rng.randrange(300))
                for name in ("compactor1", "compactor2"):
                    scheduler.at(None, "start", self._starter(name, self._compactor), self._rng.randrange(1200))
                scheduler.run_until(lambda: not scheduler.busy() and not scheduler.events)
                self._heal()
                scheduler.start("last", self._last_writer)
                scheduler.run_until(lambda: not scheduler.busy())
            except SimulationOver:
                pass
        for error in scheduler.loop.unseen_failures():
            if not isinstance(error, SimulationOver):
                scheduler.fail(f"a failure that nobody sees: {error!r}")
        self._over = True
        for process in scheduler.processes:
            process.dead = True
            if process.program is not None and not process.running:
                process.program.close()
        counts = {**self._counts, "ghosts": self._shared.ghosts, "deleted": self._shared.deleted}
        counts |= {"manifests": len(self._shared.history), "steps": scheduler.step}
        return Result(self._seed, scheduler.problem, tuple(scheduler.trace), self._shared.objects, counts)

    # --- programs ---

    def _writer(self, process: Process) -> Program:
        """A job: restore, check, go through events with checkpoints, end or close."""
        rng = random.Random(self._rng.getrandbits(64))
        yield None
        store = self._open(process, rng)
        if store is None:
            return
        position = self._restored(process, store)
        futures: list[Future[Checkpoint]] = []
        try:
            self._check_contents(process, store, position)
            for at in range(position, position + rng.randrange(1, self._profile.events_max + 1)):
                yield None
                apply_event(store, at)
                if rng.random() < 0.4:
                    times = rng.choice([1, 1, 2])  # side by side, as two callers of flush would
                    futures += [self._checkpoint(process, store, at + 1) for _ in range(times)]
                    if rng.random() < 0.5:
                        yield futures[-1].done
                if rng.random() < 0.15:
                    self._check_contents(process, store, at + 1)
            if rng.random() < 0.7:
                yield lambda: all(f.done() for f in futures)
            if rng.random() < 0.5:
                yield lambda: not store._compactor.running  # perhaps it stands by, and takes over in the end
        except (StorageUnavailableError, FencedError, CorruptionError, ObjectMissingError) as error:
            self._judge(process, store, error)
        self._counts["compactions"] += store._compactor.progress.completed
        self._counts["taken over"] += store._compactor.stats.claims
        store.close()

    def _reader(self, process: Process) -> Program:
        """Looks at the store again and again, owning nothing."""
        rng = random.Random(self._rng.getrandbits(64))
        runtime, objects = self._tools(process, rng)
        for _ in range(8):
            yield None
            newest = len(self._shared.history)
            try:
                view = runtime.call(store_inspect._read(MAIN, ManifestStore(objects), objects, 5))
                latest = view.latest
            except (StorageUnavailableError, CheckpointNotFoundError):
                continue
            except StateStoreError as error:
                self._scheduler.fail(f"a reader sees {error!r}")
                return
            self._counts["reads"] += 1
            if view.numbers[0] < newest:
                self._scheduler.fail(f"a reader sees {view.numbers[0]} as the newest manifest, {newest} was there")
            if latest.attempt_id not in {m.attempt_id for m in self._shared.history}:
                self._scheduler.fail(f"a reader believes in manifest {latest.number}, which is not in the history")

    def _collector(self, process: Process) -> Program:
        """Collects garbage beside the writers, as an operator would."""
        rng = random.Random(self._rng.getrandbits(64))
        runtime, objects = self._tools(process, rng)
        for _ in range(6):
            yield None
            try:
                runtime.call(GarbageCollector(objects, ManifestStore(objects)).run())
            except StateStoreError as error:
                self._scheduler.note(process, f"collection ends with {type(error).__name__}: {error}")

    def _compactor(self, process: Process) -> Program:
        """Claims the merges from outside, once or for a while, and is stopped, superseded or killed."""
        rng = random.Random(self._rng.getrandbits(64))
        for _ in range(rng.randrange(1, 4)):
            yield None
            self._opening = process
            runtime = self._make_runtime("compactor")
            follow = rng.random() < 0.5
            work = ToolCompaction(
                open_toolbox(runtime, MAIN), runtime, self._profile.settings, {},
                follow=follow, everything=rng.random() < 0.3,
            )  # fmt: skip
            if rng.random() < 0.3:  # a Python function of the aggregation is not at hand there
                work._layouts._build = lambda state: TableLayout.for_reading(state.spec, Hasher())  # type: ignore[method-assign]
            running = runtime.submit(work.run)
            for _ in range(rng.randrange(400)):
                yield None
            if follow and rng.random() < 0.2:
                self._scheduler.crash(process)
            if follow or rng.random() < 0.2:
                runtime.submit(work.stop)
            yield running.done
            self._merged(process, running)

    def _merged(self, process: Process, running: Future[CompactionSummary]) -> None:
        error = running.exception()
        self._scheduler.note(process, f"ends compacting: {error!r}" if error else f"ends with {running.result()}")
        if error is None:
            self._counts["compactions elsewhere"] += running.result().stats.runs
            self._counts["superseded"] += running.result().superseded
        elif not isinstance(
            error, StorageUnavailableError | CommitUnknownError | CheckpointNotFoundError | ObjectMissingError
        ):
            self._scheduler.fail(f"{process.name} gets {error!r}")

    def _operator(self, process: Process) -> Program:
        """Makes and drops savepoints and rolls back, beside whatever is running."""
        rng = random.Random(self._rng.getrandbits(64))
        self._counts["rollbacks"] = self._counts["savepoints"] = 0
        for number in range(rng.randrange(1, 4)):
            yield None
            self._opening = process
            try:
                maintenance.create_savepoint(MAIN, f"s{number}")
                self._counts["savepoints"] += 1
                self._scheduler.note(process, f"made savepoint s{number}")
                yield None
                if rng.random() < 0.4:
                    self._opening = process
                    manifest = maintenance.rollback(MAIN, savepoint=f"s{number}")
                    self._scheduler.note(process, f"rolled back to s{number} with manifest {manifest.number}")
                    self._counts["rollbacks"] += 1
                elif rng.random() < 0.5:
                    self._opening = process
                    maintenance.drop_savepoint(MAIN, f"s{number}")
            except (StorageUnavailableError, CommitUnknownError, CommitConflictError, CheckpointNotFoundError) as error:
                self._scheduler.note(process, f"gets {type(error).__name__}: {error}")
            except (FencedError, ObjectMissingError) as error:  # a writer came after; somebody dropped it meanwhile
                self._scheduler.note(process, f"gets {type(error).__name__}: {error}")
            except ValueError as error:
                self._scheduler.note(process, f"gets {error}")

    def _analyst(self, process: Process) -> Program:
        """Reads a checkpoint under a lease while the job goes on."""
        rng = random.Random(self._rng.getrandbits(64))
        self._counts["pinned reads"] = self._counts["pins gone"] = 0
        for _ in range(2):
            yield None
            self._opening = process
            reader = None
            try:
                reader = open_checkpoint(MAIN, lease_s=rng.choice([0.05, 1.0, 60.0]), cache_bytes=1)
                position = int(reader.checkpoint.job.sources["events"])
                for _ in range(rng.randrange(1, 12)):
                    yield None
                    if (wrong := differences(contents(_ByName(reader)), position)) is not None:
                        self._scheduler.fail(f"{process.name}, at pinned position {position}: {wrong}")
                    self._counts["pinned reads"] += 1
            except CheckpointGoneError as error:
                self._scheduler.note(process, f"gets {error}")
                self._counts["pins gone"] += 1
                lease = reader._lease if reader is not None else None
                if lease is not None and lease._gone is not None and lease._pin_id in self._shared.history[-1].pins:
                    self._scheduler.fail(f"{process.name} is told that pin {lease._pin_id} has ended, and it has not")
            except ObjectMissingError as error:
                self._scheduler.fail(f"{process.name} reads under a lease: {error!r}")
            except (StorageUnavailableError, CommitUnknownError, CommitConflictError, CheckpointNotFoundError) as error:
                self._scheduler.note(process, f"gets {type(error).__name__}: {error}")
            if reader is not None:
                reader.close()

    def _brancher(self, process: Process) -> Program:
        """Branches the store off a checkpoint, works there, and comes back to it after a while."""
        rng = random.Random(self._rng.getrandbits(64))
        self._counts["branches"] = self._counts["branch checks"] = 0
        url = "sim://branch"
        for _ in range(2):
            yield None
            try:
                self._opening = process
                clone(MAIN, url)
                self._counts["branches"] += 1
                break
            except StateStoreError as error:
                self._scheduler.note(process, f"gets {type(error).__name__}: {error}")
        position = None
        for _ in range(3 if self._at(url).history else 0):
            yield None
            try:
                self._opening = process
                store = StateStore.open(
                    url, self._profile.settings, objects=self._open_objects(url), open_root=self._open_objects,
                    clock=self._clock, rng=self._make_random(),
                )  # fmt: skip
            except StateStoreError as error:
                self._scheduler.note(process, f"cannot open the branch: {error!r}")
                continue
            restored = _position(store)
            if position is not None and restored < position:
                self._scheduler.fail(f"the branch is at {restored}; {position} was acknowledged")
            try:
                self._check_contents(process, store, restored)
                self._counts["branch checks"] += 1
                for at in range(restored, restored + rng.randrange(3)):
                    apply_event(store, at)
                    store.checkpoint(job_state(at + 1)).result()
                    position = at + 1
                    yield None
                self._check_contents(process, store, max(restored, position or 0))
            except (StorageUnavailableError, CommitUnknownError) as error:
                self._scheduler.note(process, f"gets {type(error).__name__}: {error}")
            except StateStoreError as error:
                self._scheduler.fail(f"{process.name} in the branch: {error!r}")
            store.close()

    def _last_writer(self, process: Process) -> Program:
        """Faults have stopped: everything works, and what has piled up is cleared away."""
        rng = random.Random(self._seed)
        store = self._open(process, rng, replace(self._profile.settings, compaction="embedded"))
        if store is None:
            self._scheduler.fail("no writer can open the store although faults have stopped")
            return
        position = self._restored(process, store)
        self._check_contents(process, store, position)
        for at in range(position, position + 4):
            apply_event(store, at)
            self._checkpoint(process, store, at + 1).result()
            yield None
        self._check_contents(process, store, position + 4)
        compacting = [store._runtime.submit(store._compactor.run_if_due)]
        yield compacting[0].done
        yield lambda: not store._compactor.running
        self._scheduler.run_until(lambda: not store._compactor.running, process)
        store._runtime.call(store._collector.run(store.manifest))
        self._check_bounds(store)
        self._counts["compactions"] += store._compactor.progress.completed
        self._counts["taken over"] += store._compactor.stats.claims
        store.close()
        self._opening = process
        if (verdict := verification.verify(MAIN)).problems:
            self._scheduler.fail(f"verify finds {verdict.problems}")
        again = self._open(process, rng)
        assert again is not None
        self._check_contents(process, again, self._restored(process, again))
        again.close()

    # --- steps of programs ---

    def _open(self, process: Process, rng: random.Random, settings: StoreSettings | None = None) -> StateStore | None:
        acked, seen = self._acked, len(self._shared.history)
        timeline = self._shared.timeline
        self._opening = process
        objects = SimulatedObjectStore(self._shared, process, random.Random(rng.getrandbits(64)))
        try:
            store = StateStore.open(
                MAIN,
                settings or self._profile.settings,
                objects=objects,
                clock=self._clock,
                rng=random.Random(rng.getrandbits(64)),
            )
        except (StorageUnavailableError, CommitUnknownError) as error:
            self._scheduler.note(process, f"cannot open: {type(error).__name__}")
            return None
        except StateStoreError as error:
            self._scheduler.fail(f"{process.name} cannot open: {error!r}")
            raise SimulationOver from error
        self._counts["openings"] += 1
        epoch, writer = store._flusher._fenceable.epoch, store._flusher._fenceable._writer_id
        self._scheduler.note(process, f"opened with epoch {epoch} at {store.restored and store.restored.checkpoint_id}")
        if not any(m.writer_id == writer and m.writer_epoch == epoch for m in self._shared.history[seen:]):
            self._scheduler.fail(f"{process.name} opened with epoch {epoch}, but its manifest is not in the history")
        position = _position(store)
        if acked[0] == timeline == self._shared.timeline and position < acked[1]:
            self._scheduler.fail(f"{process.name} recovered position {position}; {acked[1]} was acknowledged before")
        self._counts["recovered"] += position > 0
        return store

    def _restored(self, process: Process, store: StateStore) -> int:
        position = _position(store)
        watermark = store.restored.job.watermarks["events"] if store.restored else 0
        if watermark != position:
            self._scheduler.fail(f"{process.name} restored position {position} with watermark {watermark}")
        return position

    def _checkpoint(self, process: Process, store: StateStore, position: int) -> Future[Checkpoint]:
        self._scheduler.note(process, f"asks for a checkpoint at {position}")
        future = store.checkpoint(job_state(position))
        future.add_done_callback(lambda done: self._outcome(process, store, position, done))
        return future

    def _outcome(self, process: Process, store: StateStore, position: int, future: Future[Checkpoint]) -> None:
        if future.cancelled() or process.dead or self._over:
            return
        error = future.exception()
        if error is None:
            self._acknowledged(process, store, position, future.result())
        else:
            self._judge(process, store, error)

    def _acknowledged(self, process: Process, store: StateStore, position: int, checkpoint: Checkpoint) -> None:
        self._scheduler.note(process, f"checkpoint {checkpoint.checkpoint_id} at {position} is ACKNOWLEDGED")
        writer = store._flusher._fenceable._writer_id
        for manifest in reversed(self._shared.history):
            if manifest.checkpoint_id == checkpoint.checkpoint_id and manifest.writer_id == writer:
                if manifest.job.sources["events"] != position:
                    self._scheduler.fail(f"checkpoint {checkpoint.checkpoint_id} holds another position")
                if manifest.timeline == self._shared.timeline:
                    self._acked = max(self._acked, (manifest.timeline, position))
                self._counts["acknowledged"] += 1
                return
        self._scheduler.fail(
            f"{process.name} acknowledged checkpoint {checkpoint.checkpoint_id} at {position}, "
            "which is not in the history"
        )

    def _judge(self, process: Process, store: StateStore, error: BaseException) -> None:
        """Whether this error may happen now."""
        self._scheduler.note(process, f"gets {type(error).__name__}: {error}")
        epoch = store._flusher._fenceable.epoch
        superseded = self._shared.history[-1].writer_epoch > epoch
        if isinstance(error, FencedError):
            self._counts["fenced"] += 1
            if not superseded:
                self._scheduler.fail(f"{process.name} is fenced with epoch {epoch}, and no newer writer has opened")
        elif isinstance(error, CommitUnknownError):
            self._counts["unknown"] += 1
        elif isinstance(error, ObjectMissingError) and superseded:
            return  # the files of a stale reader may have been collected
        elif not isinstance(error, StorageUnavailableError | StoreClosedError):
            self._scheduler.fail(f"{process.name} gets {error!r}")

    def _check_contents(self, process: Process, store: StateStore, position: int) -> None:
        if (wrong := differences(contents(store), position)) is not None:
            self._scheduler.fail(f"{process.name}: {wrong}")
            raise SimulationOver(wrong)

    def _check_bounds(self, store: StateStore) -> None:
        settings, objects = self._profile.settings, self._shared.objects
        manifests = [n for n in objects if n.startswith("manifest/")]
        span = len(self._shared.history) - min(r.manifest_number for r in store.manifest.retained) + 1
        if len(manifests) > max(span, 2):
            self._scheduler.fail(f"{len(manifests)} manifests are left, {span} are needed")
        for name, state in store.manifest.tables.items():
            if (fresh := sum(f.level == 0 for f in state.files)) > settings.l0_files_max:
                self._scheduler.fail(f"table {name} has {fresh} flushed files, the bound is {settings.l0_files_max}")

    # --- wiring ---

    def _heal(self) -> None:
        self._scheduler.note(None, "--- faults stop ---")
        self._shared.faults = Faults()
        self._scheduler.crash_chance = self._scheduler.timer_chance = 0.0

    def _starter(self, name: str, program: Callable[[Process], Program]) -> Callable[[], None]:
        return lambda: self._start(name, program)

    def _start(self, name: str, program: Callable[[Process], Program]) -> None:
        self._scheduler.start(name, program)

    def _make_runtime(self, name: str, **_: Any) -> SimulatedRuntime:
        assert self._opening is not None
        return SimulatedRuntime(self._scheduler, self._opening)

    def _open_objects(self, url: str, *_: Any, **__: Any) -> SimulatedObjectStore:
        process = current_process.get() or self._opening
        assert process is not None
        return SimulatedObjectStore(self._at(url), process, self._make_random())

    def _at(self, url: str) -> SharedObjects:
        if url == MAIN:
            return self._shared
        new = SharedObjects(self._scheduler, self._shared.faults, parent=self._shared)
        return self._branches.setdefault(url, new)

    def _make_random(self) -> random.Random:
        return random.Random(self._rng.getrandbits(64))

    def _tools(self, process: Process, rng: random.Random) -> tuple[SimulatedRuntime, RetryingObjectStore]:
        inner = SimulatedObjectStore(self._shared, process, random.Random(rng.getrandbits(64)))
        retrying = RetryingObjectStore(inner, sleep=self._clock.sleep, rng=random.Random(rng.getrandbits(64)))
        return SimulatedRuntime(self._scheduler, process), retrying


class _ByName:
    """A reader with the face of a store, as far as `contents` needs it."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def table(self, spec: Any) -> Any:
        return self._reader.table(spec.name)


def _position(store: StateStore) -> int:
    return int(store.restored.job.sources["events"]) if store.restored else 0
