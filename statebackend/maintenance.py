"""What one does to a store from outside a job: collect, savepoints, rollback.

Every function opens the store at a URL for the duration of the call. Collection and savepoints do not
fence a running job: they work beside it, and its next commit is applied on top of theirs. A rollback
opens as writer, so that a job which still runs is fenced.

``storage_options`` go to the store at the URL.
"""

from __future__ import annotations

from functools import partial

from statebackend.errors import CheckpointNotFoundError
from statebackend.garbage_collector import CollectionPlan, GarbageCollector, explain, plan_collection
from statebackend.manifest import Manifest, Savepoint
from statebackend.manifest_store import FenceableManifest
from statebackend.retention import RollbackCommit
from statebackend.settings import StoreSettings
from statebackend.toolbox import Options, Toolbox, with_store

__all__ = ["collect", "create_savepoint", "drop_savepoint", "explain_object", "rollback"]


def collect(url: str, *, dry_run: bool = False, storage_options: Options = None) -> CollectionPlan:
    """Delete what no checkpoint needs; with ``dry_run`` only say what would go.

    Savepoints and pins whose time is up are dropped first, by a commit.
    """

    async def work(tools: Toolbox) -> CollectionPlan:
        latest = await tools.latest()
        collector = GarbageCollector(tools.objects, tools.manifests)
        if dry_run:
            return plan_collection(await collector.look())
        if any(c.expires_ms is not None and c.expires_ms <= tools.clock.now_ms() for c in latest.leases):
            await tools.commit_safely(Manifest.without_expired)
        return await collector.run()

    return with_store(url, storage_options, work)


def explain_object(url: str, name: str, *, storage_options: Options = None) -> str:
    """Why an object of the store is kept or goes."""

    async def work(tools: Toolbox) -> str:
        await tools.latest()
        return explain(await GarbageCollector(tools.objects, tools.manifests).look(), name)

    return with_store(url, storage_options, work)


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

    def check(latest: Manifest) -> None:
        if name in latest.savepoints:
            raise ValueError(f"{url}: there is a savepoint {name!r} already")

    async def work(tools: Toolbox) -> Savepoint:
        savepoint, _ = await tools.keep_copy(
            name, partial(Savepoint, expires_ms=expires_ms), checkpoint_id=checkpoint_id, check=check
        )
        return savepoint

    return with_store(url, storage_options, work)


def drop_savepoint(url: str, name: str, *, storage_options: Options = None) -> None:
    """Drop the name first, then the copy. Raises `CheckpointNotFoundError` when there is no such savepoint."""

    async def work(tools: Toolbox) -> None:
        latest = await tools.latest()
        if name not in latest.savepoints:
            raise CheckpointNotFoundError(f"{url}: no savepoint {name!r}; there are {sorted(latest.savepoints)}")
        await tools.drop_copy(latest.savepoints[name].object_name)

    with_store(url, storage_options, work)


def rollback(
    url: str, *, checkpoint_id: int | None = None, savepoint: str | None = None, storage_options: Options = None
) -> Manifest:
    """Make an older checkpoint or a savepoint the state from which a job starts; older writers are fenced.

    The old state becomes a new checkpoint on a new timeline; nothing is lost until the next checkpoints of a job do
    what their retention says.
    Raises `CheckpointNotFoundError` when the target is not kept, ``ValueError`` unless exactly one is given.
    """
    if (checkpoint_id is None) == (savepoint is None):
        raise ValueError("name either a checkpoint or a savepoint")
    settings = StoreSettings()

    async def work(tools: Toolbox) -> Manifest:
        await tools.kept(await tools.latest(), checkpoint_id, savepoint)  # before anybody is fenced
        fenceable, found = await FenceableManifest.init_writer(
            tools.manifests, tools.clock, tools.rng, settings.commit_timeout_s
        )
        target = await tools.kept(found, checkpoint_id, savepoint)
        commit = RollbackCommit(target=target)
        deadline = tools.clock.monotonic() + settings.commit_timeout_s
        while (manifest := await fenceable.write(commit.apply, deadline)) is None:
            await fenceable.load()
        return manifest

    return with_store(url, storage_options, work)
