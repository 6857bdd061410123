"""Branches: a new store that begins as a checkpoint of another and reads its files where they are.

1. The parent keeps the checkpoint: a copy of its manifest, then a commit that names it and the branch.
2. The first manifest of the branch is created, if there is no store at its URL.

A crash between the two leaves a reservation without a store, which `drop_branch` takes back. It creates an empty
store at the URL first, unless there is one: so a clone that is still under way, however slow, fails, and a branch
never exists without its reservation. What the branch flushes and merges is its own; it never writes to
its parent, but for giving back the reservation when nothing that it keeps lies there any more.

The parent's reservation holds for branches of branches too: it stays while the branch keeps anything for its own.
"""

from __future__ import annotations

import os
from functools import partial

from statebackend.errors import StateStoreError
from statebackend.garbage_collector import kept_manifests
from statebackend.ids import AttemptId, StoreId, WriterId
from statebackend.manifest import Branch, Manifest
from statebackend.manifest_store import before_first, new_id
from statebackend.objectstore_roots import absolute_url
from statebackend.retention import ReleaseCommit, first_manifest_of_branch, needs_roots
from statebackend.toolbox import Options, RootOptions, Toolbox, with_store

__all__ = ["clone", "drop_branch", "release_parent"]


def clone(
    url: str | os.PathLike[str],
    new_url: str | os.PathLike[str],
    *,
    checkpoint_id: int | None = None,
    savepoint: str | None = None,
    storage_options: Options = None,
    new_storage_options: Options = None,
) -> Manifest:
    """Branch a new store at ``new_url`` off a retained checkpoint (default: the newest) or a savepoint.

    No data is copied: the new store reads the files where they are, and the old one keeps them for it. Both go
    on independently. The new store has an id of its own and begins with the tables and positions of the
    checkpoint, without what the old one has staged for its sinks. Returns its first manifest.

    ``storage_options`` are for ``url``, ``new_storage_options`` for ``new_url``; by default the same, if both are
    reached by the same protocol.
    Raises `CheckpointNotFoundError` when the checkpoint is not kept, `StateStoreError` when there is a store at
    ``new_url`` already, ``ValueError`` when both a checkpoint and a savepoint are named.
    """
    if checkpoint_id is not None and savepoint is not None:
        raise ValueError("name either a checkpoint or a savepoint")
    target = absolute_url(new_url)

    async def work(tools: Toolbox) -> Manifest:
        child = tools.elsewhere(target, new_storage_options)
        if await child.manifests.numbers() or await child.objects.list("sst/"):
            raise StateStoreError(f"{target}: there is a store already")
        store_id = StoreId(new_id(tools.rng))
        branch, kept = await tools.keep_copy(
            store_id, partial(Branch, url=target), checkpoint_id=checkpoint_id, savepoint=savepoint
        )
        manifest = first_manifest_of_branch(
            kept.manifest,
            tools.url,
            store_id=store_id,
            writer_id=WriterId(new_id(tools.rng)),
            attempt_id=AttemptId(new_id(tools.rng)),
            created_ms=branch.created_ms,
        )
        if not await _create_first(child, manifest):
            await tools.drop_copy(branch.object_name)
            raise StateStoreError(f"{target}: another store was created there meanwhile")
        return manifest

    return with_store(os.fspath(url), storage_options, work)


def drop_branch(
    url: str,
    store_id: str,
    *,
    force: bool = False,
    storage_options: Options = None,
    branch_storage_options: Options = None,
) -> None:
    """Keep nothing for this branch any more.

    Refused with `StateStoreError` when the branch still names files of this store, or cannot be asked, unless
    ``force``: then it loses them. An empty store is left where a branch was reserved, but never created.
    ``branch_storage_options``: by default those of this store, as in `clone`.
    """

    async def work(tools: Toolbox) -> None:
        branch = (await tools.latest()).branches.get(StoreId(store_id))
        if branch is None:
            raise StateStoreError(f"{url}: no branch {store_id!r}")
        if not force:
            try:
                needed = await _needs_parent(tools.elsewhere(branch.url, branch_storage_options), StoreId(store_id))
            except StateStoreError as error:
                message = f"branch {store_id} at {branch.url} cannot be asked, so it stays: {error}"
                raise StateStoreError(message) from error
            if needed:
                raise StateStoreError(f"branch {store_id} at {branch.url} still reads files of {url}, so it stays")
        await tools.drop_copy(branch.object_name)

    with_store(url, storage_options, work)


def release_parent(url: str, *, storage_options: Options = None, root_options: RootOptions = None) -> str | None:
    """Give the reservation in the parent back if nothing that this branch keeps lies there; the parent's URL then.

    None when the store is no branch, or still needs its parent. The parent first, so that a crash between
    the two leaves the rest to the next call. Raises `StateStoreError` when the parent cannot be written to.
    """

    async def work(tools: Toolbox) -> str | None:
        latest = await tools.latest()
        if not latest.roots:
            return None
        kept = await kept_manifests(tools.objects, tools.manifests, latest)
        if any(needs_roots(manifest) for manifest in kept.values()):
            return None
        root = latest.roots[1]
        parent = tools.elsewhere(root.url, None)
        found = await parent.find_latest()
        if found is not None and found.store_id == root.store_id and latest.store_id in found.branches:
            await parent.drop_copy(found.branches[latest.store_id].object_name)
        await tools.commit_safely(ReleaseCommit().apply)
        return root.url

    return with_store(url, storage_options, work, root_options=root_options)


async def _needs_parent(child: Toolbox, store_id: StoreId) -> bool:
    """Whether the branch keeps anything that lies in another store; it can never be created after the answer no."""
    latest = await child.find_latest()
    if latest is None:
        empty = before_first(StoreId(new_id(child.rng)), WriterId(new_id(child.rng))).next(
            writer_id=WriterId(new_id(child.rng)),
            attempt_id=AttemptId(new_id(child.rng)),
            created_ms=child.clock.now_ms(),
        )
        if await _create_first(child, empty.opened_by_writer()):
            return False
        latest = await child.latest()
    if latest.store_id != store_id:
        return False
    kept = await kept_manifests(child.objects, child.manifests, latest)
    return any(needs_roots(manifest) for manifest in kept.values())


async def _create_first(tools: Toolbox, manifest: Manifest) -> bool:
    """Create manifest 1 of a new store; False if there is another one.

    "Created" alone is no proof: a call that stalled may create it after a store that began meanwhile collected its own.
    """
    await tools.manifests.create(manifest)
    latest = await tools.find_latest()
    return latest is not None and latest.store_id == manifest.store_id
