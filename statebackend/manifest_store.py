"""Publishes manifests: the one place where a change to the store becomes visible.

Manifest N+1 is created only if absent, so of two racing writers one wins. `ManifestStore` reads,
probes and creates numbers; `FenceableManifest` is one owner's view: it carries the owner's epoch,
applies transitions, and tells a conflict, a fence and a lost response apart.

Invariants:

* A manifest is never rewritten; numbers grow by one.
* Every file that a manifest names was completely written before the manifest was.
* An owner commits only while its epoch is the newest; a higher one means `FencedError` to a writer,
  `CompactorSupersededError` to a compactor, which fences no writer and is fenced by none.
* "Exists" is no verdict: the object is read back, and one's own attempt is a success. A request
  whose outcome is unknown is repeated under the same number, so that one of them can succeed at most.
  Each has an attempt id of its own: should the first one arrive when the number was collected, it is
  not taken for the second one, on which others have built.
* What was listed and then read counts only if it is among the newest two of another listing: so it
  was not collected and created again by a stalled writer in between.
* A manifest reached by probing counts only if the one where the probe began is still there
  afterwards. A created manifest counts only if its parent is still the one it was built on. Both
  are void when numbers were collected meanwhile; then a listing decides.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from enum import Enum

from statebackend.errors import (
    CheckpointNotFoundError,
    CommitUnknownError,
    CompactorSupersededError,
    CorruptionError,
    FencedError,
    ObjectMissingError,
    StorageUnavailableError,
)
from statebackend.ids import AttemptId, ManifestNumber, StoreId, WriterEpoch, WriterId
from statebackend.manifest import CompactorClaim, Manifest
from statebackend.manifest_codec import decode_manifest, encode_manifest
from statebackend.objectstore_base import ObjectStore, PutResult, needs_operator

__all__ = ["Clock", "FenceableManifest", "ManifestStore", "SystemClock", "before_first", "manifest_name", "new_id"]

Transition = Callable[[Manifest], Manifest]


class Clock:
    """Wall-clock and monotonic time and sleeping, passed in so that tests can hold them still."""

    def now_ms(self) -> int:
        """Wall-clock time in epoch milliseconds."""
        raise NotImplementedError

    def monotonic(self) -> float:
        """Seconds of a clock that never goes back."""
        raise NotImplementedError

    def sleep(self, seconds: float) -> Awaitable[None]:
        """Wait without blocking the event loop."""
        raise NotImplementedError


class SystemClock(Clock):
    """The clock of this machine."""

    def now_ms(self) -> int:  # noqa: D102
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:  # noqa: D102
        return time.monotonic()

    def sleep(self, seconds: float) -> Awaitable[None]:  # noqa: D102
        return asyncio.sleep(seconds)


def new_id(rng: random.Random) -> str:
    """A random identity of 96 bits in hex."""
    return f"{rng.getrandbits(96):024x}"


def manifest_name(number: int) -> str:
    """Object name of a manifest; sorted by name is sorted by number."""
    return f"manifest/{number:020d}.manifest"


class ManifestStore:
    """Reads, finds and creates manifests; holds no opinion on who may."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def describe(self) -> str:
        """Where the store is, for messages."""
        return self._objects.describe()

    async def read(self, number: int) -> Manifest | None:
        """Manifest ``number``, or None if there is none. Raises `CorruptionError`."""
        name = manifest_name(number)
        try:
            data = await self._objects.get(name)
        except ObjectMissingError:
            return None
        manifest = decode_manifest(data, name)
        if manifest.number != number:
            raise CorruptionError(f"{name}: holds manifest {manifest.number}, expected {number}")
        return manifest

    async def create(self, manifest: Manifest) -> PutResult:
        """Create the manifest if its number is free."""
        return await self._objects.put_if_absent(manifest_name(manifest.number), encode_manifest(manifest))

    async def numbers(self) -> list[int]:
        """All numbers present, by listing; not for the hot path."""
        names = await self._objects.list("manifest/")
        stems = [n.removeprefix("manifest/").removesuffix(".manifest") for n in names if n.endswith(".manifest")]
        return sorted(int(s) for s in stems if s.isdigit())

    async def latest_listed(self) -> Manifest | None:
        """The newest manifest, by listing, or None in an empty store."""
        found: Manifest | None = None
        while numbers := await self.numbers():
            # The newest two are never collected. What is still one of them after it was read never was,
            # so it is not what a stalled writer created under a number that was collected meanwhile.
            if found is not None and found.number >= numbers[-1] - 1:
                return found
            found = await self.read(numbers[-1])
        return None

    async def latest(self, known: Manifest) -> Manifest:
        """The newest manifest, probing the numbers after ``known``."""
        newest = known
        while (following := await self.read(newest.number + 1)) is not None:
            newest = following
        # Also when nothing was found: the numbers after a manifest that was collected may be gone as well.
        still = await self.read(known.number)
        if still is not None and still.attempt_id == known.attempt_id:
            return newest
        # The probe may have met a number that a stalled writer created after it was collected.
        listed = await self.latest_listed()
        if listed is None:
            raise CorruptionError(f"{manifest_name(known.number)}: all manifests of the store are gone")
        return listed


class _Role(Enum):
    """What an owner is to the store; a guest owns nothing and commits once beside the writer."""

    WRITER = "writer"
    COMPACTOR = "compactor"
    GUEST = "guest"


class FenceableManifest:
    """The manifest as one owner sees it: every commit carries and checks its epoch.

    A compactor and a guest commit beside a running writer: its epoch, id and marks stay as they are.
    Only one task may call `commit` at a time (the flusher's); two tasks of one process that
    commit side by side would meet each other's numbers.
    """

    def __init__(
        self,
        store: ManifestStore,
        manifest: Manifest,
        writer_id: WriterId,
        clock: Clock,
        rng: random.Random,
        timeout_s: float,
        role: _Role = _Role.GUEST,
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._writer_id = writer_id
        self._role = role
        self._epoch: int = manifest.writer_epoch
        self._committed = manifest.number  # the last one that this owner is known to have written
        self._clock = clock
        self._rng = rng
        self._timeout_s = timeout_s

    @classmethod
    async def init_writer(
        cls, store: ManifestStore, clock: Clock, rng: random.Random, timeout_s: float
    ) -> tuple[FenceableManifest, Manifest]:
        """Take the store over: create the next manifest with the next writer epoch.

        Returns the owner's view and the manifest that was found (the state to restore from).
        Older writers find the higher epoch at their next commit and are fenced.
        """
        writer_id = WriterId(new_id(rng))
        deadline = clock.monotonic() + timeout_s
        found = await store.latest_listed()
        while True:
            base = found if found is not None else before_first(StoreId(new_id(rng)), writer_id)
            candidate = base.next(
                writer_id=writer_id, attempt_id=AttemptId(new_id(rng)), created_ms=clock.now_ms()
            ).opened_by_writer()
            view = cls(store, base, writer_id, clock, rng, timeout_s, _Role.WRITER)
            if (published := await view._publish(candidate, deadline)) is not None:
                view._manifest, view._epoch, view._committed = published, published.writer_epoch, published.number
                return view, base
            found = await store.latest_listed()

    @classmethod
    async def init_compactor(
        cls, store: ManifestStore, compactor_id: str, clock: Clock, rng: random.Random, timeout_s: float
    ) -> FenceableManifest:
        """Claim the merges of the store: commit the next compactor epoch beside whoever writes.

        Older compactors find the higher epoch at their next commit and end.
        Raises `CheckpointNotFoundError` where there is no store, `StorageUnavailableError` when others
        commit first until the deadline, `CommitUnknownError`.
        """
        deadline = clock.monotonic() + timeout_s
        while True:
            if (latest := await store.latest_listed()) is None:
                raise CheckpointNotFoundError(f"{store.describe()}: no state store here")
            view = cls(store, latest, latest.writer_id, clock, rng, timeout_s, _Role.COMPACTOR)
            claimed = await view.write(CompactorClaim(compactor_id=compactor_id).apply, deadline)
            if claimed is not None:
                view._epoch = claimed.compactor_epoch
                return view
            if clock.monotonic() > deadline:
                raise StorageUnavailableError(f"{store.describe()}: other commits came first for {timeout_s:g} s")

    @property
    def manifest(self) -> Manifest:
        """The newest manifest that this owner knows."""
        return self._manifest

    @property
    def epoch(self) -> int:
        """The fencing token of this owner."""
        return self._epoch

    async def load(self) -> Manifest:
        """Find the newest manifest and check the fence.

        Raises `FencedError` when a newer writer owns the store, to a compactor `CompactorSupersededError`
        when another one claimed it.
        """
        found = self._manifest = await self._store.latest(self._manifest)
        if self._role is _Role.COMPACTOR and found.compactor_epoch > self._epoch:
            raise CompactorSupersededError(
                f"{manifest_name(found.number)}: compactor {found.compactor_id or '(none)'} has epoch "
                f"{found.compactor_epoch}; epoch {self._epoch} is superseded"
            )
        if self._role is _Role.WRITER and found.writer_epoch > self._epoch:
            raise FencedError(
                f"{manifest_name(found.number)}: writer {found.writer_id} opened the store with "
                f"epoch {found.writer_epoch}; this writer has epoch {self._epoch} and must stop"
            )
        return found

    async def write(self, transition: Transition, deadline: float) -> Manifest | None:
        """One attempt: apply the transition to the known manifest and create the next number.

        None when the number was taken by another commit: load, then try again. Raises
        `CommitUnknownError` when the outcome could not be learned until ``deadline``, and whatever the
        transition raises (`CommitConflictError` when what it was planned for is no longer there).
        """
        base = self._manifest
        writer_id = self._writer_id if self._role is _Role.WRITER else base.writer_id
        following = base.next(
            writer_id=writer_id, attempt_id=AttemptId(new_id(self._rng)), created_ms=self._clock.now_ms()
        )
        if self._role is _Role.WRITER:
            # Until it learns that this commit succeeded, the writer reads what its last one names.
            following = replace(following, writer_reads=(self._committed, following.number))
        published = await self._publish(transition(following), deadline)
        if published is not None:
            self._manifest, self._committed = published, published.number
        return published

    async def _publish(self, candidate: Manifest, deadline: float) -> Manifest | None:
        """Create ``candidate``; what is now part of the store's history, or None if another took the number.

        It is the candidate under one of the attempt ids with which it was sent.
        """
        pause = 0.02
        sent: dict[AttemptId, Manifest] = {}
        while True:
            sent[candidate.attempt_id] = candidate
            try:
                result = await self._store.create(candidate)
                if result is PutResult.EXISTS:
                    present = await self._store.read(candidate.number)
                    if present is None or present.attempt_id not in sent:
                        return None
                    candidate = sent[present.attempt_id]
                return candidate if await self._is_history(candidate) else None
            except StorageUnavailableError as error:
                if needs_operator(error) and len(sent) == 1:
                    raise
                # The request may have taken effect, now or later. It is sent again under the same
                # number: whichever arrives first wins, and both are ours.
                if self._clock.monotonic() + pause > deadline:
                    raise CommitUnknownError(
                        f"{manifest_name(candidate.number)}: no answer in {self._timeout_s:g} s, the commit may or "
                        f"may not have happened: {error}"
                    ) from error
                await self._clock.sleep(pause * (0.5 + self._rng.random()))
                pause = min(pause * 2, 2.0)
                candidate = replace(candidate, attempt_id=AttemptId(new_id(self._rng)))

    async def _is_history(self, candidate: Manifest) -> bool:
        """Whether a manifest that was just created continues the history it was built on.

        A writer that stalled before creating N, while others passed N and N was collected, creates
        it "successfully": then N-1 is gone as well, for the oldest are collected first.
        """
        if not candidate.parent_attempt:
            return True
        parent = await self._store.read(candidate.number - 1)
        if parent is not None:
            return parent.attempt_id == candidate.parent_attempt
        # The newest two manifests are never collected, so somebody must have gone past this number.
        newest = await self._store.latest_listed()
        if newest is None or newest.number <= candidate.number:
            raise CorruptionError(
                f"{manifest_name(candidate.number - 1)}: the manifest that {manifest_name(candidate.number)} is built "
                "on is gone and none is newer: the store was deleted or damaged under its writer"
            )
        while newest.number > candidate.number:
            before = await self._store.read(newest.number - 1)
            if before is None or before.attempt_id != newest.parent_attempt:
                return False
            newest = before
        return newest.attempt_id == candidate.attempt_id


def before_first(store_id: StoreId, writer_id: WriterId) -> Manifest:
    """The manifest before the first: never written."""
    return Manifest(
        number=ManifestNumber(0),
        parent_attempt=AttemptId(""),
        store_id=store_id,
        writer_epoch=WriterEpoch(0),
        writer_id=writer_id,
        attempt_id=AttemptId(""),
        created_ms=0,
    )
