"""Checks a store: every object that a kept checkpoint names is read, and must be what it is said to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from statebackend.errors import CorruptionError, StateStoreError
from statebackend.keys import Hasher
from statebackend.manifest import Manifest, TableState
from statebackend.manifest_codec import decode_manifest
from statebackend.merge import HASH_COLUMN, TableLayout
from statebackend.objectstore import ObjectStore
from statebackend.retention import needs_roots
from statebackend.sstable import SSTableMeta, read_blocks, read_filter, read_index
from statebackend.toolbox import Options, RootOptions, Toolbox, with_store

__all__ = ["Verdict", "verify", "verify_file"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` checked, and every problem that it found, each naming its object."""

    manifests: int
    files: int
    rows: int
    problems: tuple[str, ...]


def verify(url: str, *, storage_options: Options = None, root_options: RootOptions = None) -> Verdict:
    """Read everything that the kept checkpoints, savepoints, branches and pins name and check it.

    Every reference resolves, in a branch also those into the stores that it was branched from, where it must
    be known as a branch; every checksum agrees, rows are sorted, files of one run do not overlap, counts and
    ranges of hashes and times are as stated.
    """

    async def work(tools: Toolbox) -> Verdict:
        latest = await tools.latest()
        problems: list[str] = []
        kept = await _kept(tools, latest, problems)
        files: dict[str, tuple[TableState, SSTableMeta]] = {}
        for manifest in kept:
            for state in manifest.tables.values():
                files.update({meta.name: (state, meta) for meta in state.files})
        bounds: dict[str, tuple[_Key, _Key]] = {}
        for state, meta in files.values():
            try:
                bounds[meta.name] = await verify_file(tools.objects, state, meta)
            except StateStoreError as error:
                problems.append(str(error))
        for manifest in kept:
            problems += _overlaps(manifest, bounds)
        if any(needs_roots(manifest) for manifest in kept):
            problems += await _parent_problems(tools, latest)
        return Verdict(len(kept), len(files), sum(m.rows for _, m in files.values()), tuple(dict.fromkeys(problems)))

    return with_store(url, storage_options, work, root_options=root_options, allow_unsafe_create=True)


_Key = tuple[int, ...]
"""A place in the physical order of a table: the values of its order columns."""


async def _kept(tools: Toolbox, latest: Manifest, problems: list[str]) -> list[Manifest]:
    kept = [latest]
    for retained in latest.retained:
        try:
            kept.append((await tools.kept(latest, int(retained.checkpoint_id))).manifest)
        except StateStoreError as error:
            problems.append(str(error))
    for why, copy in latest.copies.items():
        try:
            kept.append(decode_manifest(await tools.objects.get(copy.object_name), copy.object_name))
        except StateStoreError as error:
            problems.append(f"{why}: {error}")
    return kept


async def verify_file(objects: ObjectStore, state: TableState, meta: SSTableMeta) -> tuple[_Key, _Key]:
    """Read a file block by block; its first and last place in the order of the table."""
    layout = TableLayout.for_reading(state.spec, Hasher(), state.history)
    index, bloom = await read_index(objects, meta)
    if bloom is None and index.filter_bytes:
        bloom = await read_filter(objects, meta, index)
    rows = 0
    ends: list[_Key] = []
    for number, entry in enumerate(index.entries):
        (block,) = await read_blocks(objects, meta, index, [number], layout)
        block.validate(full=True)
        rows += block.num_rows
        where = f"{meta.name}: block {number}"
        columns = layout.order_columns(block)
        hashes = block.column(HASH_COLUMN).to_numpy()
        if (hashes != layout.hash_of(block)).any():
            raise CorruptionError(f"{where}: a hash is not that of its key")
        known = layout.filter_hashes(block)
        if bloom is not None and known is not None and not bloom.may_hold(known).all():
            raise CorruptionError(f"{where}: the filter denies a key")
        order = np.lexsort(columns[::-1])
        first, last = (tuple(int(c[i]) for c in columns) for i in (0, -1))
        if any((c[order] != c).any() for c in columns) or (ends and first < ends[-1]):
            raise CorruptionError(f"{where} is not sorted")
        ends += [first, last]
        span = int(hashes.min()), int(hashes.max())
        _check_range(where, "hashes", span, (entry["hash_min"], entry["hash_max"]), (meta.hash_min, meta.hash_max))
        if (times := layout.time_range(block)) is not None:
            _check_range(where, "times", times, (entry["time_min"], entry["time_max"]), (meta.time_min, meta.time_max))
    if rows != meta.rows:
        raise CorruptionError(f"{meta.name}: holds {rows} rows, the manifest says {meta.rows}")
    return ends[0], ends[-1]


def _check_range(
    where: str,
    what: str,
    found: tuple[int, int],
    block: tuple[int, int],
    file: tuple[int | None, int | None],
) -> None:
    """The index states the exact range of a block; the manifest one that holds it."""
    low, high = found
    if (low, high) != (int(block[0]), int(block[1])):
        raise CorruptionError(f"{where}: {what} are {low} .. {high}, the index says {block[0]} .. {block[1]}")
    if file[0] is None or file[1] is None or low < file[0] or high > file[1]:
        raise CorruptionError(f"{where}: {what} {low} .. {high} lie outside of {file[0]} .. {file[1]} in the manifest")


def _overlaps(manifest: Manifest, bounds: Mapping[str, tuple[_Key, _Key]]) -> list[str]:
    """Files of one sorted run follow each other; ``bounds`` holds the files that could be read."""
    return [
        f"{after.name}: begins at {bounds[after.name][0]}, before the end {bounds[before.name][1]} of {before.name} "
        f"in the same run {after.run}"
        for state in manifest.tables.values()
        for before, after in pairwise(state.files)
        if before.run is not None
        and before.run == after.run
        and before.name in bounds
        and after.name in bounds
        and bounds[after.name][0] <= bounds[before.name][1]
    ]


async def _parent_problems(tools: Toolbox, latest: Manifest) -> list[str]:
    """What is wrong with the parent of a branch that still reads its files."""
    root = latest.roots[1]
    try:
        parent = await tools.elsewhere(root.url, None).latest()
    except StateStoreError as error:
        return [f"parent of this branch at {root.url}: {error}"]
    if parent.store_id != root.store_id:
        return [f"parent of this branch: {root.url} holds the store {parent.store_id}, expected {root.store_id}"]
    if latest.store_id not in parent.branches:
        return [f"parent of this branch: {root.url} does not keep files for a branch {latest.store_id}"]
    return []
