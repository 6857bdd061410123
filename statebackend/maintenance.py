"""What one does to a store from outside a job: collect, verify, savepoints, rollback.

Every function opens the store at a URL for the duration of the call. Collection and savepoints do not
fence a running job: they work beside it, and its next commit is applied on top of theirs. A rollback
opens as writer, so that a job which still runs is fenced.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from statebackend.errors import CheckpointNotFoundError, CommitConflictError, CorruptionError, StateStoreError
from statebackend.garbage_collector import CollectionPlan, GarbageCollector, explain, plan_collection
from statebackend.ids import CheckpointId
from statebackend.keys import Hasher
from statebackend.manifest import Manifest, RollbackCommit, Savepoint, SavepointCommit, TableState
from statebackend.manifest_codec import decode_manifest, encode_manifest
from statebackend.manifest_store import Clock, FenceableManifest, ManifestStore, SystemClock, manifest_name, new_id
from statebackend.merge import HASH_COLUMN, TableLayout
from statebackend.objectstore import ObjectStore, PutResult, open_object_store
from statebackend.objectstore_wrappers import RetryingObjectStore
from statebackend.runtime import IsolatedRuntime
from statebackend.settings import StoreSettings
from statebackend.sstable import SSTableMeta, read_blocks, read_index

__all__ = [
    "Verdict",
    "collect",
    "create_savepoint",
    "drop_savepoint",
    "explain_object",
    "rollback",
    "verify",
]

_T = TypeVar("_T")
Options = Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` checked, and every problem that it found, each naming its object."""

    manifests: int
    files: int
    rows: int
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Tools:
    """The collaborators of one call."""

    objects: ObjectStore
    manifests: ManifestStore
    clock: Clock
    rng: random.Random

    async def latest(self) -> Manifest:
        """The newest manifest. Raises `CheckpointNotFoundError` where there is no store."""
        latest = await self.manifests.latest_listed()
        if latest is None:
            raise CheckpointNotFoundError(f"{self.objects.describe()}: no state store here")
        return latest


def collect(url: str, *, dry_run: bool = False, storage_options: Options = None) -> CollectionPlan:
    """Delete what no checkpoint needs; with ``dry_run`` only say what would go."""

    async def work(tools: _Tools) -> CollectionPlan:
        await tools.latest()
        collector = GarbageCollector(tools.objects, tools.manifests)
        return plan_collection(await collector.look()) if dry_run else await collector.run()

    return _with_store(url, storage_options, work)


def explain_object(url: str, name: str, *, storage_options: Options = None) -> str:
    """Why an object of the store is kept or goes."""

    async def work(tools: _Tools) -> str:
        await tools.latest()
        return explain(await GarbageCollector(tools.objects, tools.manifests).look(), name)

    return _with_store(url, storage_options, work)


def create_savepoint(
    url: str,
    name: str,
    *,
    checkpoint_id: int | None = None,
    expires_ms: int | None = None,
    storage_options: Options = None,
) -> Savepoint:
    """Keep a retained checkpoint (default: the newest) under a name until it is dropped or expires.

    The copy is made first, then a manifest names it. ``expires_ms``: epoch milliseconds.
    Raises `CheckpointNotFoundError` when the checkpoint is not retained, `ValueError` when the name is taken.
    """
    if not name:
        raise ValueError("a savepoint needs a name")

    async def work(tools: _Tools) -> Savepoint:
        for _ in range(100):  # a job that commits all the time may come first now and then
            latest = await tools.latest()
            if name in latest.savepoints:
                raise ValueError(f"{url}: there is a savepoint {name!r} already")
            wanted = int(latest.checkpoint_id) if checkpoint_id is None else checkpoint_id
            target = await _retained(tools, latest, wanted)
            savepoint = Savepoint(
                object_name=f"savepoint/{latest.number}-{new_id(tools.rng)}",
                checkpoint_id=CheckpointId(wanted),
                created_ms=tools.clock.now_ms(),
                expires_ms=expires_ms,
            )
            await _create(tools.objects, savepoint.object_name, encode_manifest(target))
            commit = SavepointCommit(name=name, savepoint=savepoint, copied_at=latest.number)
            try:
                await _commit(tools, latest, commit.apply)
            except CommitConflictError:
                continue
            return savepoint
        raise CommitConflictError(f"{url}: other commits came first a hundred times; try again")

    return _with_store(url, storage_options, work)


def drop_savepoint(url: str, name: str, *, storage_options: Options = None) -> None:
    """Drop the name first, then the copy. Raises `CheckpointNotFoundError` when there is no such savepoint."""

    async def work(tools: _Tools) -> None:
        for _ in range(100):
            latest = await tools.latest()
            if name not in latest.savepoints:
                raise CheckpointNotFoundError(f"{url}: no savepoint {name!r}; there are {sorted(latest.savepoints)}")
            commit = SavepointCommit(name=name, savepoint=None, copied_at=latest.number)
            try:
                await _commit(tools, latest, commit.apply)
            except CommitConflictError:
                continue
            await tools.objects.delete(latest.savepoints[name].object_name)
            return
        raise CommitConflictError(f"{url}: other commits came first a hundred times; try again")

    _with_store(url, storage_options, work)


def rollback(
    url: str, *, checkpoint_id: int | None = None, savepoint: str | None = None, storage_options: Options = None
) -> Manifest:
    """Make an older checkpoint or a savepoint the state from which a job starts; older writers are fenced.

    The old state becomes a new checkpoint on a new timeline; nothing is lost until retention takes it.
    Raises `CheckpointNotFoundError` when the target is not kept, ``ValueError`` unless exactly one is given.
    """
    if (checkpoint_id is None) == (savepoint is None):
        raise ValueError("name either a checkpoint or a savepoint")
    settings = StoreSettings()

    async def work(tools: _Tools) -> Manifest:
        await _target(tools, await tools.latest(), checkpoint_id, savepoint)  # before anybody is fenced
        fenceable, found = await FenceableManifest.init_writer(
            tools.manifests, tools.clock, tools.rng, settings.commit_timeout_s
        )
        target = await _target(tools, found, checkpoint_id, savepoint)
        commit = RollbackCommit(target=target, retained_max=settings.retained_checkpoints)
        deadline = tools.clock.monotonic() + settings.commit_timeout_s
        while (manifest := await fenceable.write(commit.apply, deadline)) is None:
            await fenceable.load()
        return manifest

    return _with_store(url, storage_options, work)


def verify(url: str, *, storage_options: Options = None) -> Verdict:
    """Read everything that the kept checkpoints name and check it.

    Every reference resolves, every checksum agrees, rows are sorted, counts and ranges are as stated.
    """

    async def work(tools: _Tools) -> Verdict:
        latest = await tools.latest()
        problems: list[str] = []
        kept = await _kept(tools, latest, problems)
        files: dict[str, tuple[TableState, SSTableMeta]] = {}
        for manifest in kept:
            for state in manifest.tables.values():
                files.update({meta.name: (state, meta) for meta in state.files})
        for state, meta in files.values():
            try:
                await _verify_file(tools.objects, state, meta)
            except StateStoreError as error:
                problems.append(str(error))
        return Verdict(len(kept), len(files), sum(m.rows for _, m in files.values()), tuple(problems))

    return _with_store(url, storage_options, work)


def _with_store(url: str, options: Options, work: Callable[[_Tools], Coroutine[Any, Any, _T]]) -> _T:
    with IsolatedRuntime("statestore-tools", io_threads=8, cpu_threads=1) as runtime:
        objects = RetryingObjectStore(open_object_store(url, runtime.io_executor, storage_options=options))
        tools = _Tools(objects, ManifestStore(objects), SystemClock(), random.SystemRandom())
        return runtime.call(work(tools))


async def _commit(tools: _Tools, latest: Manifest, transition: Callable[[Manifest], Manifest]) -> None:
    """Commit on top of ``latest`` beside a running writer, whose epoch stays.

    Raises `CommitConflictError` when another commit came first.
    """
    settings = StoreSettings()
    guest = FenceableManifest(
        tools.manifests, latest, latest.writer_id, tools.clock, tools.rng, settings.commit_timeout_s
    )
    if await guest.write(transition, tools.clock.monotonic() + settings.commit_timeout_s) is None:
        raise CommitConflictError(f"{manifest_name(latest.number + 1)}: another commit came first")


async def _create(objects: ObjectStore, name: str, data: bytes) -> None:
    if await objects.put_if_absent(name, data) is PutResult.EXISTS and await objects.get(name) != data:
        raise CorruptionError(f"{name}: exists with other bytes")


async def _retained(tools: _Tools, latest: Manifest, checkpoint_id: int) -> Manifest:
    number = {int(r.checkpoint_id): r.manifest_number for r in latest.retained}.get(checkpoint_id)
    manifest = await tools.manifests.read(number) if number is not None else None
    if manifest is None:
        kept = [int(r.checkpoint_id) for r in latest.retained]
        raise CheckpointNotFoundError(
            f"{tools.objects.describe()}: checkpoint {checkpoint_id} is not retained; retained are {kept}"
        )
    return manifest


async def _target(tools: _Tools, latest: Manifest, checkpoint_id: int | None, savepoint: str | None) -> Manifest:
    if checkpoint_id is not None:
        return await _retained(tools, latest, checkpoint_id)
    assert savepoint is not None
    if savepoint not in latest.savepoints:
        raise CheckpointNotFoundError(
            f"{tools.objects.describe()}: no savepoint {savepoint!r}; there are {sorted(latest.savepoints)}"
        )
    name = latest.savepoints[savepoint].object_name
    return decode_manifest(await tools.objects.get(name), name)


async def _kept(tools: _Tools, latest: Manifest, problems: list[str]) -> list[Manifest]:
    kept = [latest]
    for retained in latest.retained:
        try:
            kept.append(await _retained(tools, latest, int(retained.checkpoint_id)))
        except StateStoreError as error:
            problems.append(str(error))
    for name in latest.savepoints:
        try:
            kept.append(await _target(tools, latest, None, name))
        except StateStoreError as error:
            problems.append(str(error))
    return kept


async def _verify_file(objects: ObjectStore, state: TableState, meta: SSTableMeta) -> None:
    layout = TableLayout.for_reading(state.spec, Hasher())
    index = await read_index(objects, meta)
    rows = 0
    previous: tuple[int, ...] | None = None
    for number in range(len(index.entries)):
        (block,) = await read_blocks(objects, meta, index, [number], layout.stored)
        block.validate(full=True)
        rows += block.num_rows
        columns = layout.order_columns(block)
        if (block.column(HASH_COLUMN).to_numpy() != layout.hash_of(block)).any():
            raise CorruptionError(f"{meta.name}: block {number}: a hash is not that of its key")
        order = np.lexsort(columns[::-1])
        first, last = (tuple(int(c[i]) for c in columns) for i in (0, -1))
        if any((c[order] != c).any() for c in columns) or (previous is not None and first < previous):
            raise CorruptionError(f"{meta.name}: block {number} is not sorted")
        previous = last
        times = layout.times(block)
        low, high = (meta.time_min, meta.time_max) if times is not None else (None, None)
        if times is not None and (low is None or high is None or times.min() < low or times.max() > high):
            raise CorruptionError(f"{meta.name}: block {number}: times outside of {low} .. {high}")
    if rows != meta.rows:
        raise CorruptionError(f"{meta.name}: holds {rows} rows, the manifest says {meta.rows}")
