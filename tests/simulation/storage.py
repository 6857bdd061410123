"""Shared objects in memory, with everything that a storage may do to a request, and what must always hold.

A request arrives at some time after it was sent, once, or not at all; its answer may get lost; a
request without an answer may take effect much later, also after its sender died. `History` sees
every effect and judges it: it knows the manifests that were created under a number that never existed
before, which no process knows.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from statebackend.errors import ObjectMissingError, StorageUnavailableError
from statebackend.manifest import Manifest
from statebackend.manifest_codec import decode_manifest
from statebackend.objectstore import Data, PutResult
from tests.simulation.scheduler import Process, Scheduler

__all__ = ["Faults", "SharedObjects", "SimulatedObjectStore"]


@dataclass(slots=True, kw_only=True)
class Faults:
    """Chances that something happens to one request."""

    error: float = 0.0
    lost: float = 0.0
    late: float = 0.0
    stall: float = 0.0
    outage: float = 0.0
    slow_answer: float = 0.2
    stale_list: float = 0.0
    """That a listing still shows what was deleted, as the contract of `ObjectStore.list` allows."""


@dataclass
class SharedObjects:
    """All objects, and the history of manifests that nobody can forge."""

    scheduler: Scheduler
    faults: Faults
    objects: dict[str, bytes] = field(default_factory=dict)
    history: list[Manifest] = field(default_factory=list)
    ghosts: int = 0
    deleted: int = 0
    parent: SharedObjects | None = None
    """Where the files of a branch lie that its manifests name below ``root/1/``."""
    gone: list[str] = field(default_factory=list)

    @property
    def timeline(self) -> int:
        """How often the store was rolled back."""
        return self.history[-1].timeline if self.history else 0

    # --- effects ---

    def get_range(self, name: str, start: int, end: int | None) -> bytes:
        if name not in self.objects:
            raise ObjectMissingError(f"no object {name}")
        return self.objects[name][start:end]

    def put(self, name: str, data: bytes) -> None:
        self.objects[name] = data

    def put_if_absent(self, name: str, data: bytes) -> PutResult:
        if name in self.objects:
            return PutResult.EXISTS
        self.objects[name] = data
        if name.startswith("manifest/"):
            self._judge(decode_manifest(data, name))
        return PutResult.CREATED

    def list(self, prefix: str, *, stale: bool = False) -> list[str]:
        names = {*self.objects, *self.gone[-30:]} if stale else self.objects
        return sorted(n for n in names if n.startswith(prefix))

    def delete(self, name: str) -> None:
        if name not in self.objects:
            return
        data = self.objects.pop(name)
        self.deleted += 1
        self.gone.append(name)
        if name.startswith("manifest/"):
            manifest = decode_manifest(data, name)
            if manifest is not None and manifest.number > len(self.history) - 2:
                self.scheduler.fail(f"{name}: one of the newest two manifests was deleted")
        elif name in _copies(self.history[-1]):
            self.scheduler.fail(f"{name} was deleted, but {_copies(self.history[-1])[name]} is that copy")
        elif (why := self._needed(name)) is not None:
            self.scheduler.fail(f"{name} was deleted, but {why} names it")

    # --- what must hold ---

    def _judge(self, manifest: Manifest) -> None:
        """A manifest was created: does it continue the history?"""
        fail = self.scheduler.fail
        if manifest.number <= len(self.history):
            self.ghosts += 1
            return
        if missing := [n for n in manifest.files if not self._has(n)]:
            fail(f"manifest {manifest.number} names {missing}, which do not exist")
        if lost := [why for name, why in _copies(manifest).items() if name not in self.objects]:
            fail(f"manifest {manifest.number} names copies for {lost}, which do not exist")
        if self.history:
            last = self.history[-1]
            if manifest.parent_attempt != last.attempt_id:
                fail(f"manifest {manifest.number} is not built on manifest {last.number}")
            for what in ("writer_epoch", "compactor_epoch", "timeline", "checkpoint_id"):
                if getattr(manifest, what) < getattr(last, what):
                    fail(f"manifest {manifest.number}: {what} decreases")
        self.history.append(manifest)

    def _needed(self, name: str) -> str | None:
        newest = self.history[-1]
        kept = {newest.number, newest.number - 1, *(r.manifest_number for r in newest.retained), *newest.writer_reads}
        for number in sorted(kept, reverse=True):
            if number and name in self.history[number - 1].files:
                return f"manifest {number}"
        for copy, why in _copies(newest).items():
            if name in decode_manifest(self.objects[copy], copy).files:
                return why
        return None

    def _has(self, name: str) -> bool:
        if (there := name.removeprefix("root/1/")) != name:
            return self.parent is not None and there in self.parent.objects
        return name in self.objects


def _copies(manifest: Manifest) -> dict[str, str]:
    """Copies that a manifest names, by their object, and what for."""
    return {
        **{s.object_name: f"savepoint {name}" for name, s in manifest.savepoints.items()},
        **{b.object_name: f"branch {name}" for name, b in manifest.branches.items()},
        **{p.object_name: f"pin {name}" for name, p in manifest.pins.items()},
    }


class SimulatedObjectStore:
    """The shared objects as one process reaches them."""

    def __init__(self, shared: SharedObjects, process: Process, rng: random.Random) -> None:
        self._shared = shared
        self._process = process
        self._scheduler = shared.scheduler
        self._rng = rng

    async def get(self, name: str) -> bytes:
        return await self._send("get", name, lambda: self._shared.get_range(name, 0, None))

    async def get_range(self, name: str, start: int, end: int | None = None) -> bytes:
        return await self._send("get_range", name, lambda: self._shared.get_range(name, start, end))

    async def put(self, name: str, data: Data) -> None:
        copy = bytes(memoryview(data))
        await self._send("put", name, lambda: self._shared.put(name, copy), write=True)

    async def put_if_absent(self, name: str, data: Data) -> PutResult:
        copy = bytes(memoryview(data))
        return await self._send("create", name, lambda: self._shared.put_if_absent(name, copy), write=True)

    async def list(self, prefix: str) -> list[str]:
        chance = self._shared.faults.stale_list
        stale = chance > 0 and self._rng.random() < chance
        return await self._send("list", prefix, lambda: self._shared.list(prefix, stale=stale))

    async def delete(self, name: str) -> None:
        await self._send("delete", name, lambda: self._shared.delete(name), write=True)

    def describe(self) -> str:
        return "simulated"

    async def _send(self, op: str, name: str, effect: Callable[[], Any], *, write: bool = False) -> Any:
        answer = self._scheduler.loop.create_future()
        if not self._process.dead:
            faults = self._shared.faults
            if self._rng.random() < faults.outage:
                self._process.outage_until = self._scheduler.step + self._rng.randrange(10, 120)
            delay = self._rng.randrange(20, 400) if self._rng.random() < faults.stall else 0
            label = f"{op} {name}"
            self._scheduler.at(None, label, lambda: self._arrive(label, effect, answer, write), delay)
        return await answer

    def _arrive(self, label: str, effect: Callable[[], Any], answer: Any, write: bool) -> None:
        if self._process.dead and not write:
            return
        outcome = self._outcome(write)
        if outcome == "late":
            self._scheduler.note(self._process, f"{label}: no answer, and it is under way")
            self._respond(answer, None, StorageUnavailableError(f"{label}: no answer"))
            delay = self._rng.randrange(20, 400)
            self._scheduler.at(None, label, lambda: self._land(label, effect), delay)
            return
        if outcome == "error":
            self._scheduler.note(self._process, f"{label}: fails")
            self._respond(answer, None, StorageUnavailableError(f"{label}: injected"))
            return
        result, error = _attempt(effect)
        self._scheduler.note(self._process, f"{label}{_shown(result, error)}{', answer lost' * (outcome == 'lost')}")
        if outcome == "lost":
            error = StorageUnavailableError(f"{label}: the answer was lost")
        if self._rng.random() < self._shared.faults.slow_answer:
            self._scheduler.at(self._process, label, lambda: self._respond(answer, result, error))
        else:
            self._respond(answer, result, error)

    def _land(self, label: str, effect: Callable[[], Any]) -> None:
        result, error = _attempt(effect)
        self._scheduler.note(self._process, f"{label} arrives late{_shown(result, error)}")

    def _outcome(self, write: bool) -> str:
        faults = self._shared.faults
        if self._scheduler.step < self._process.outage_until:
            return self._rng.choice(["error", "lost", "late"] if write else ["error", "lost"])
        chance = self._rng.random()
        for outcome, share in (("error", faults.error), ("lost", faults.lost), ("late", faults.late if write else 0)):
            if chance < share:
                return outcome
            chance -= share
        return "ok"

    def _respond(self, answer: Any, result: Any, error: Exception | None) -> None:
        if answer.done() or self._process.dead:
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)


def _attempt(effect: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return effect(), None
    except ObjectMissingError as error:
        return None, error


def _shown(result: Any, error: Exception | None) -> str:
    if error is not None:
        return ": missing"
    return f": {result.value}" if isinstance(result, PutResult) else ""
