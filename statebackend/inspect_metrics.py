"""What can be known of a store from outside: sizes, amplification, what is kept and what is orphaned, as figures.

Nothing is written and nobody is fenced. Names are those of an open store's figures where they mean the same, see
``metrics.py``.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

from statebackend.errors import ObjectMissingError
from statebackend.garbage_collector import CollectionInput, GarbageCollector
from statebackend.manifest import Manifest
from statebackend.manifest_codec import encode_manifest
from statebackend.metrics import AMPLIFICATION, Sample, gauge, table_samples
from statebackend.objectstore_base import ObjectStore
from statebackend.observer import table_metrics
from statebackend.toolbox import Options, Toolbox, with_store

__all__ = ["inspect_metrics", "look_metrics"]


def inspect_metrics(url: str, *, storage_options: Options = None) -> list[Sample]:
    """Figures of the store at ``url``, those of one name together.

    Orphans are SSTables that no kept manifest names: garbage, or of a checkpoint under way. Raises
    `CheckpointNotFoundError` when there is no store, `CorruptionError` when a kept manifest cannot be read.
    """
    return with_store(url, storage_options, look_metrics, allow_unsafe_create=True)


async def look_metrics(tools: Toolbox) -> list[Sample]:
    """The figures of `inspect_metrics`, of a store that is open for a tool."""
    await tools.latest()  # or there is no store
    found = await GarbageCollector(tools.objects, tools.manifests).look()
    named = {name for manifest in found.kept.values() for name in manifest.files}
    orphans = [name for name in found.sstables if name not in named]
    sizes = await asyncio.gather(*(_size(tools.objects, name) for name in orphans))
    samples = [
        *_identity(found.latest, tools.objects.describe(), tools.clock.now_ms()),
        *_kept(found),
        *gauge("orphan_files", len(orphans), "SSTables that no kept manifest names."),
        *gauge("orphan_bytes", sum(sizes), "Their bytes.", "bytes"),
        *_tables(found.latest),
    ]
    return sorted(samples, key=lambda s: s.name)


def _identity(latest: Manifest, url: str, now_ms: int) -> Iterator[Sample]:
    yield from gauge("info", 1, "Identity of the store.", store_id=latest.store_id, url=url)
    yield from gauge("checkpoint_id", latest.checkpoint_id, "Number of the newest checkpoint, 0 before the first.")
    if (checkpoint := latest.checkpoint) is not None:
        age_s = (now_ms - checkpoint.created_ms) / 1000
        yield from gauge("checkpoint_created_seconds", checkpoint.created_ms / 1000, "When it was made.", "seconds")
        yield from gauge("checkpoint_age_seconds", age_s, "How long ago that was, by the clock here.", "seconds")
    yield from gauge("manifest_number", latest.number, "Number of the newest manifest.")
    yield from gauge("manifest_bytes", len(encode_manifest(latest)), "Bytes of the newest manifest.", "bytes")
    yield from gauge("writer_epoch", latest.writer_epoch, "Fencing token of the newest writer.")
    yield from gauge("compactor_epoch", latest.compactor_epoch, "Fencing token of the newest compactor.")
    claimed = float(latest.compactor_id is not None)
    yield from gauge("compactor_claimed", claimed, "1 while a compactor holds the claim to merge.")
    yield from gauge("timeline", latest.timeline, "Rises with each rollback.")


def _kept(found: CollectionInput) -> Iterator[Sample]:
    latest = found.latest
    kept = {n: f.size for m in found.kept.values() for n, f in m.files.items()}
    live = sum(f.size for f in latest.files.values())
    yield from gauge("manifests", len(found.numbers), "Manifests that are present.")
    yield from gauge("sstables", len(found.sstables), "SSTables that are present.")
    for kind, copies in (("retained", latest.retained), ("savepoint", latest.savepoints), ("branch", latest.branches)):
        yield from gauge("kept_checkpoints", len(copies), "What keeps old states.", kind=kind)
    yield from gauge("kept_checkpoints", len(latest.pins), "What keeps old states.", kind="pin")
    yield from gauge("live_bytes", live, "Bytes of the files of the newest manifest.", "bytes")
    yield from gauge("kept_bytes", sum(kept.values()), "Bytes of the files of all kept manifests.", "bytes")
    yield from gauge("amplification", sum(kept.values()) / live if live else None, AMPLIFICATION, kind="space")


def _tables(latest: Manifest) -> Iterator[Sample]:
    tables = [table_metrics(name, state, None) for name, state in sorted(latest.tables.items())]
    pieces = max((t.l0_files + t.sorted_runs for t in tables), default=0)
    yield from gauge("amplification", pieces, AMPLIFICATION, kind="read")
    yield from (s for s in table_samples(tables) if "memtable" not in s.name)  # that only its writer knows
    for name, state in sorted(latest.tables.items()):
        for level, files in sorted(Counter(f.level for f in state.files).items()):
            yield from gauge("table_level_files", files, "Files of one level.", table=name, level=str(level))


async def _size(objects: ObjectStore, name: str) -> int:
    """Bytes of an object, asking for single bytes: the storage seam knows no sizes. 0 if it is gone meanwhile."""

    async def reaches(size: int) -> bool:
        return bool(await objects.get_range(name, size - 1, size))

    low, high = 0, 1 << 16
    try:
        while await reaches(high):
            low, high = high, 2 * high
        while high - low > 1:  # it has at least low bytes, and fewer than high
            middle = (low + high) // 2
            low, high = (middle, high) if await reaches(middle) else (low, middle)
    except ObjectMissingError:
        return 0
    return low
