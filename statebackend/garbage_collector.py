"""Deletes what nobody needs any more, provably and without clocks.

An SSTable may go when no kept manifest names it *and* its owner can never commit it any more: the
owner's epoch is superseded in the newest manifest, or its sequence is at or below the owner's low
mark there. Kept are the newest two manifests, those of the retained checkpoints, those from which the
running writer may read, and the copies of manifests that the newest one names: savepoints, branches, pins.
Manifests go strictly oldest first, so that they are a contiguous suffix. Whether a savepoint or a pin has ended
is decided by a commit alone: what the newest manifest names is kept, however late it is. Files of other stores
are never listed, and so never deleted.

The decision (`plan_collection`, `explain`) is pure; the executor reads, decides the whole plan, and
only then deletes. A crash at any point leaves less to do for the next run.

Why a plan made from manifest L stays right while others commit L+1, L+2, …: what they name is named
by L or by a checkpoint or copy that L keeps (rollback), or is newer than the low marks in L.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from statebackend.errors import CorruptionError
from statebackend.ids import StoreId
from statebackend.logs import context
from statebackend.manifest import Manifest
from statebackend.manifest_codec import decode_manifest
from statebackend.manifest_store import Clock, ManifestStore, SystemClock, manifest_name
from statebackend.objectstore_base import ObjectStore
from statebackend.objectstore_roots import is_inherited
from statebackend.progress import TaskProgress

__all__ = ["CollectionInput", "CollectionPlan", "GarbageCollector", "explain", "kept_manifests", "plan_collection"]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"sst/([wc])(\d+)-(\d+)-(\d+)-(\d+)\.arrow")


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionInput:
    """All that a decision needs.

    ``kept``: manifests whose files stay, by why (``the newest manifest``, ``checkpoint 7``, ``savepoint x``).
    ``in_use``: files that a read of this process is using.
    """

    latest: Manifest
    kept: Mapping[str, Manifest]
    numbers: Sequence[int]
    sstables: Sequence[str]
    savepoint_objects: Sequence[str] = ()
    in_use: Collection[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionPlan:
    """Names of the objects to delete, in the order of deletion."""

    manifests: tuple[str, ...]
    sstables: tuple[str, ...]
    savepoints: tuple[str, ...]

    @property
    def objects(self) -> tuple[str, ...]:
        """Everything, manifests first and oldest first."""
        return self.manifests + self.savepoints + self.sstables


def plan_collection(found: CollectionInput) -> CollectionPlan:
    """What may be deleted."""
    copies = found.latest.copies
    first_kept: int = min(m.number for why, m in found.kept.items() if why not in copies)
    first_kept = min(first_kept, found.latest.number - 1)
    named = {c.object_name for c in copies.values()}
    return CollectionPlan(
        manifests=tuple(manifest_name(n) for n in sorted(found.numbers) if n < first_kept),
        sstables=tuple(n for n in found.sstables if _verdict(found, n)[0]),
        savepoints=tuple(n for n in found.savepoint_objects if n not in named and _superseded(found, n)),
    )


def explain(found: CollectionInput, name: str) -> str:
    """Why an object is kept or goes, in one sentence."""
    if name.startswith("sst/"):
        goes, why = _verdict(found, name)
        present = "" if name in found.sstables else " (there is no such object)"
        return f"{name}{present}: {'goes' if goes else 'is kept'}: {why}"
    if is_inherited(name):
        return f"{name}: is kept: it belongs to a store that this one was branched from"
    for why, copy in found.latest.copies.items():
        if copy.object_name == name:
            return f"{name}: is kept: it is the copy of {why}"
    if name in plan_collection(found).objects:
        return f"{name}: goes: no kept checkpoint needs it"
    if name in found.savepoint_objects:
        return f"{name}: is kept: a commit that is under way may still name it"
    if name in map(manifest_name, found.numbers):
        return f"{name}: is kept: the newest manifests, and all from the oldest retained checkpoint on, stay"
    return f"{name}: there is no such object of this store; names are those of ls and show, as sst/….arrow"


def _verdict(found: CollectionInput, name: str) -> tuple[bool, str]:
    for why, manifest in found.kept.items():
        if name in manifest.files:
            of = f" at {found.latest.branches[StoreId(why[7:])].url}" if why.startswith("branch ") else ""
            return False, f"named by {why}{of} (manifest {manifest.number})"
    if name in found.in_use:
        return False, "a read of this process is using it"
    match = _NAME.fullmatch(name)
    if match is None:
        return False, "not a name that this store gives, so not ours to delete"
    role, epoch, subtask, attempt, sequence = match.group(1), *map(int, match.groups()[1:])
    newest = found.latest.writer_epoch if role == "w" else found.latest.compactor_epoch
    if epoch < newest:
        return True, f"nobody names it, and its owner's epoch {epoch} is superseded by {newest}"
    mark = found.latest.low_marks.get(f"{role}{epoch}-{subtask}-{attempt}", 0)
    if epoch == newest and sequence <= mark:
        return True, f"nobody names it, and its owner has gone past it (sequence {sequence}, low mark {mark})"
    return False, f"its owner may still commit it (sequence {sequence}, low mark {mark})"


def _superseded(found: CollectionInput, name: str) -> bool:
    """A copy can only be named by the manifest after the one in its name, and that number is taken."""
    match = re.fullmatch(r"savepoint/(\d+)-[0-9a-f]+", name)
    return match is not None and int(match.group(1)) < found.latest.number


class GarbageCollector:
    """Collects one store. ``in_use`` tells which files reads of this process hold.

    ``deleted`` objects so far, ``pending`` those that the latest plan has still to delete, ``kept_bytes`` of the files
    that it keeps (None before the first).
    """

    def __init__(
        self,
        objects: ObjectStore,
        manifests: ManifestStore,
        in_use: Callable[[], Collection[str]] = tuple,
        clock: Clock | None = None,
    ) -> None:
        self._objects = objects
        self._manifests = manifests
        self._in_use = in_use
        self.progress = TaskProgress((clock or SystemClock()).now_ms)
        self.deleted = 0
        self.pending = 0
        self.kept_bytes: int | None = None

    async def look(self, latest: Manifest | None = None) -> CollectionInput:
        """Read everything that a decision needs. ``latest``: a manifest from which to look for the newest."""
        # SSTables are listed before the newest manifest is read: what is committed in between is named by it.
        sstables = await self._objects.list("sst/")
        copies = await self._objects.list("savepoint/")
        numbers = await self._manifests.numbers()
        latest = await (self._manifests.latest(latest) if latest is not None else self._manifests.latest_listed())
        if latest is None:
            raise CorruptionError(f"{self._objects.describe()}: no manifest, so nothing can be proven to be garbage")
        return CollectionInput(
            latest=latest,
            kept=await kept_manifests(self._objects, self._manifests, latest),
            numbers=[n for n in numbers if n <= latest.number],
            sstables=sstables,
            savepoint_objects=copies,
            in_use=frozenset(self._in_use()),
        )

    async def run(self, latest: Manifest | None = None) -> CollectionPlan:
        """Collect once; what was deleted. A failure is kept in ``progress`` and raised."""
        with self.progress.run():
            found = await self.look(latest)
            plan = plan_collection(found)
            self.kept_bytes = sum({n: f.size for m in found.kept.values() for n, f in m.files.items()}.values())
            held = frozenset(self._in_use())
            going = [name for name in plan.objects if name not in held]
            self.pending = len(going)
            for name in going:
                await self._objects.delete(name)
                self.deleted += 1
                self.pending -= 1
                logger.debug("deleted", extra=context(store_id=found.latest.store_id, object=name))
        return plan


async def kept_manifests(objects: ObjectStore, manifests: ManifestStore, latest: Manifest) -> dict[str, Manifest]:
    """Every manifest whose files must stay, by why.

    Raises `CorruptionError` or `ObjectMissingError` when one of them is not there: then nothing can be proven.
    """
    kept = {"the newest manifest": latest}
    if latest.number > 1 and (before := await manifests.read(latest.number - 1)) is not None:
        kept["the manifest before the newest"] = before
    wanted = {f"checkpoint {r.checkpoint_id}": r.manifest_number for r in latest.retained}
    wanted |= {f"the writer, which may read from manifest {n}": n for n in latest.writer_reads}
    for why, number in wanted.items():
        if (manifest := await manifests.read(number)) is None:
            raise CorruptionError(f"{manifest_name(number)}: kept for {why}, but does not exist: nothing is deleted")
        kept[why] = manifest
    for why, copy in latest.copies.items():
        kept[why] = decode_manifest(await objects.get(copy.object_name), copy.object_name)
    return kept
