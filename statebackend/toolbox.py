"""What every tool needs: one store opened for the duration of a call, without owning it.

A tool commits as a guest: on top of the newest manifest, under the epoch of whoever owns the store, so that
a running job is not fenced and its next commit is applied on top. It never commits beside a newer owner, for
it builds on the newest manifest or not at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

from statebackend.errors import CheckpointNotFoundError, CommitConflictError, CorruptionError, ObjectMissingError
from statebackend.ids import CheckpointId
from statebackend.manifest import Branch, Manifest, Pin, Savepoint
from statebackend.manifest_codec import decode_manifest, encode_manifest
from statebackend.manifest_store import Clock, FenceableManifest, ManifestStore, SystemClock, manifest_name, new_id
from statebackend.objectstore import PutResult, open_object_store
from statebackend.objectstore_roots import RootedObjectStore, absolute_url, options_of_root, root_opener
from statebackend.objectstore_wrappers import RetryingObjectStore
from statebackend.retention import CopyCommit, DropCommit, KeptCheckpoint
from statebackend.runtime import IsolatedRuntime
from statebackend.settings import StoreSettings

__all__ = ["CopyOf", "Options", "RootOptions", "Toolbox", "guest_commit", "open_toolbox", "with_store"]

_T = TypeVar("_T")
_C = TypeVar("_C", bound=Savepoint | Branch | Pin)
_C_co = TypeVar("_C_co", bound=Savepoint | Branch | Pin, covariant=True)
Options: TypeAlias = Mapping[str, Any] | None
RootOptions: TypeAlias = Mapping[str, Mapping[str, Any]] | None

_TRIES = 100
"""A job that commits all the time may come first now and then."""


class CopyOf(Protocol[_C_co]):
    """Makes the reference to a copy: called with its object name, the checkpoint's id and the time now."""

    def __call__(self, *, object_name: str, checkpoint_id: CheckpointId, created_ms: int) -> _C_co: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolbox:
    """One store and the collaborators of one call. ``elsewhere`` opens another store on the same runtime.

    Without options of its own that one gets those that `options_of_root` gives it.
    """

    url: str
    objects: RetryingObjectStore
    rooted: RootedObjectStore
    manifests: ManifestStore
    clock: Clock
    rng: random.Random
    elsewhere: Callable[[str, Options], Toolbox]

    async def find_latest(self) -> Manifest | None:
        """The newest manifest, whose roots are from now on those of ``objects``; None where there is no store."""
        latest = await self.manifests.latest_listed()
        if latest is not None:
            self.rooted.use({number: root.url for number, root in latest.roots.items()})
        return latest

    async def latest(self) -> Manifest:
        """The newest manifest. Raises `CheckpointNotFoundError` where there is no store."""
        if (latest := await self.find_latest()) is None:
            raise CheckpointNotFoundError(f"{self.objects.describe()}: no state store here")
        return latest

    async def kept(
        self, latest: Manifest, checkpoint_id: int | None = None, savepoint: str | None = None
    ) -> KeptCheckpoint:
        """A retained checkpoint (default: the newest) or a savepoint.

        Raises `CheckpointNotFoundError` when ``latest`` does not keep it.
        """
        if savepoint is not None:
            if savepoint not in latest.savepoints:
                raise CheckpointNotFoundError(
                    f"{self.objects.describe()}: no savepoint {savepoint!r}; there are {sorted(latest.savepoints)}"
                )
            name = latest.savepoints[savepoint].object_name
            copied = decode_manifest(await self.objects.get(name), name)
            return KeptCheckpoint(manifest=copied, savepoint=savepoint, object_name=name)
        wanted = int(latest.checkpoint_id) if checkpoint_id is None else checkpoint_id
        number = {int(r.checkpoint_id): r.manifest_number for r in latest.retained}.get(wanted)
        manifest = await self.manifests.read(number) if number is not None else None
        if manifest is None:
            retained = [int(r.checkpoint_id) for r in latest.retained]
            raise CheckpointNotFoundError(
                f"{self.objects.describe()}: checkpoint {wanted} is not retained; retained are {retained}"
            )
        return KeptCheckpoint(manifest=manifest)

    async def all_kept(self) -> list[KeptCheckpoint]:
        """Every checkpoint that the store keeps now: the retained ones and the savepoints, oldest first.

        What is let go of while it is read is left out.
        """
        latest = await self.latest()
        wanted: list[tuple[int | None, str | None]] = [(int(r.checkpoint_id), None) for r in latest.retained]
        wanted += [(None, name) for name in latest.savepoints]
        found = []
        for checkpoint_id, savepoint in wanted:
            with suppress(CheckpointNotFoundError, ObjectMissingError):
                found.append(await self.kept(latest, checkpoint_id, savepoint))
        return sorted(found, key=lambda kept: kept.checkpoint_id)

    async def keep_copy(
        self,
        name: str,
        copy_of: CopyOf[_C],
        *,
        checkpoint_id: int | None = None,
        savepoint: str | None = None,
        check: Callable[[Manifest], None] = lambda _: None,
    ) -> tuple[_C, KeptCheckpoint]:
        """Copy the manifest of a kept checkpoint, then commit a reference to the copy under ``name``.

        ``check`` may refuse, given the manifest that is built on. Raises `CheckpointNotFoundError`.
        """
        for _ in range(_TRIES):
            latest = await self.latest()
            check(latest)
            kept = await self.kept(latest, checkpoint_id, savepoint)
            copy = copy_of(
                object_name=f"savepoint/{latest.number}-{new_id(self.rng)}",
                checkpoint_id=kept.checkpoint_id,
                created_ms=max(self.clock.now_ms(), latest.created_ms),
            )
            await self.create(copy.object_name, encode_manifest(kept.manifest))
            commit = CopyCommit(name=name, copy=copy, of=kept, copied_at=latest.number)
            try:
                await self.commit(latest, commit.apply)
            except CommitConflictError:
                continue
            return copy, kept
        raise self._outrun()

    async def drop_copy(self, object_name: str) -> None:
        """Commit that nobody names the copy any more, then delete it."""
        await self.commit_safely(DropCommit(object_name).apply)
        await self.objects.delete(object_name)

    async def commit(self, latest: Manifest, transition: Callable[[Manifest], Manifest]) -> Manifest:
        """Commit on top of ``latest``, as a guest; see `guest_commit`."""
        return await guest_commit(self.manifests, latest, transition, self.clock, self.rng)

    async def commit_safely(self, transition: Callable[[Manifest], Manifest]) -> Manifest:
        """Commit on top of the newest manifest, again whenever another commit came first."""
        for _ in range(_TRIES):
            latest = await self.latest()
            try:
                return await self.commit(latest, transition)
            except CommitConflictError:
                continue
        raise self._outrun()

    async def create(self, name: str, data: bytes) -> None:
        """Create an object; one of the same bytes is as good. Raises `CorruptionError` for other bytes."""
        if await self.objects.put_if_absent(name, data) is PutResult.EXISTS and await self.objects.get(name) != data:
            raise CorruptionError(f"{name}: exists with other bytes")

    def _outrun(self) -> CommitConflictError:
        return CommitConflictError(f"{self.url}: other commits came first {_TRIES} times; try again")


async def guest_commit(
    manifests: ManifestStore,
    latest: Manifest,
    transition: Callable[[Manifest], Manifest],
    clock: Clock,
    rng: random.Random,
) -> Manifest:
    """Commit on top of ``latest`` beside a running writer, whose epoch stays.

    Raises `CommitConflictError` when another commit came first, and what the transition raises.
    """
    timeout_s = StoreSettings().commit_timeout_s
    guest = FenceableManifest(manifests, latest, latest.writer_id, clock, rng, timeout_s)
    manifest = await guest.write(transition, clock.monotonic() + timeout_s)
    if manifest is None:
        raise CommitConflictError(f"{manifest_name(latest.number + 1)}: another commit came first")
    return manifest


def open_toolbox(
    runtime: IsolatedRuntime,
    url: str,
    storage_options: Options = None,
    root_options: RootOptions = None,
    *,
    allow_unsafe_create: bool = False,
    clock: Clock | None = None,
) -> Toolbox:
    """The tools for the store at ``url``, on a runtime that the caller closes; nothing is read yet."""
    own = open_object_store(
        url, runtime.io_executor, storage_options=storage_options, allow_unsafe_create=allow_unsafe_create
    )
    rooted = RootedObjectStore(own, root_opener(url, runtime.io_executor, storage_options, root_options))
    clock, rng = clock or SystemClock(), random.SystemRandom()
    objects = RetryingObjectStore(rooted, sleep=clock.sleep, rng=rng)

    def elsewhere(other: str, options: Options = None) -> Toolbox:
        given = options_of_root(other, url, storage_options, root_options) if options is None else options
        return open_toolbox(runtime, other, given, root_options, clock=clock)

    return Toolbox(
        url=absolute_url(url),
        objects=objects,
        rooted=rooted,
        manifests=ManifestStore(objects),
        clock=clock,
        rng=rng,
        elsewhere=elsewhere,
    )


def with_store(
    url: str,
    options: Options,
    work: Callable[[Toolbox], Coroutine[Any, Any, _T]],
    *,
    root_options: RootOptions = None,
    allow_unsafe_create: bool = False,
) -> _T:
    """Open the store at ``url`` on a runtime of its own, do the work, close."""
    with IsolatedRuntime("statestore-tools", io_threads=8, cpu_threads=1) as runtime:
        tools = open_toolbox(runtime, url, options, root_options, allow_unsafe_create=allow_unsafe_create)
        return runtime.call(work(tools))
