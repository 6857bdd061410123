"""Saves a store whose newest manifest, or a file that it names, is damaged: goes back to the newest whole state.

`repair` looks from the newest manifest backwards for one that can be read and whose files are there and sound, then at
the copies that savepoints, branches and pins have made. Without ``commit`` it only says what it found. With it, the
state of that manifest becomes a new checkpoint on a new timeline, under the number after the newest, as after a
rollback; whoever owned the store is fenced. Nothing is deleted: what is damaged stays for whoever wants to look at it,
until the collector finds that nobody keeps it.

Invariants:

* A manifest of a newer version is not damage: nothing is repaired over it.
* Epochs, timeline and checkpoint id are above all that the unreadable manifests can have held: each of them can have
  raised one by one at most.
* A copy made after the manifest that is gone back to may be that of a savepoint or a branch of which no readable
  manifest knows; it is kept as a savepoint ``recovered-…``, so that the collector takes nothing from under it.
* Two manifests are written, for the newest two are read by everybody.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from statebackend.errors import CommitConflictError, CorruptionError, ObjectMissingError
from statebackend.ids import AttemptId, CheckpointId, ManifestNumber, WriterEpoch, WriterId
from statebackend.manifest import Manifest, RetainedCheckpoint, Savepoint
from statebackend.manifest_codec import decode_manifest
from statebackend.manifest_store import FenceableManifest, manifest_name, new_id
from statebackend.objectstore import PutResult
from statebackend.settings import StoreSettings
from statebackend.sstable import read_index
from statebackend.toolbox import Options, RootOptions, Toolbox, with_store
from statebackend.verification import verify_file

__all__ = ["RepairReport", "repair"]

_DAMAGE = (CorruptionError, ObjectMissingError)
_COPY = re.compile(r"savepoint/(\d+)-([0-9a-f]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What was found, newest first, and what it is gone back to.

    ``damaged``: what is wrong, by manifest or copy. ``found``: the name of what is whole, ``manifest`` its content;
    None when nothing is. ``recovered``: copies that become savepoints. ``committed``: the checkpoint that was made.
    """

    newest: int
    damaged: Mapping[str, str]
    found: str | None
    manifest: Manifest | None
    recovered: tuple[str, ...] = ()
    committed: CheckpointId | None = None

    @property
    def sound(self) -> bool:
        """Whether the newest manifest is whole, so that there is nothing to repair."""
        return self.found == manifest_name(self.newest)


def repair(
    url: str | os.PathLike[str],
    *,
    commit: bool = False,
    deep: bool = False,
    storage_options: Options = None,
    root_options: RootOptions = None,
) -> RepairReport:
    """Find the newest state of the store at ``url`` that is whole, and with ``commit`` go back to it.

    ``deep``: read every block of every file; else the index of every file, which finds what is missing or cut off.

    Raises `CorruptionError` when ``commit`` is asked for and nothing is whole, `CommitConflictError` when another
    commit came meanwhile, `UnsupportedFormatError` for a store of a newer version.
    """

    async def work(tools: Toolbox) -> RepairReport:
        report = await _look(tools, deep=deep)
        if not commit or report.sound:
            return report
        if report.manifest is None:
            raise CorruptionError(f"{os.fspath(url)}: no manifest and no copy of one is whole")
        return await _go_back(tools, report, report.manifest)

    return with_store(os.fspath(url), storage_options, work, root_options=root_options, allow_unsafe_create=not commit)


async def _look(tools: Toolbox, *, deep: bool) -> RepairReport:
    numbers = sorted(await tools.manifests.numbers(), reverse=True)
    copies = sorted(await tools.objects.list("savepoint/"), key=_copied_at, reverse=True)
    if not numbers:
        raise CorruptionError(f"{tools.objects.describe()}: no manifest is there")
    damaged: dict[str, str] = {}
    checked: dict[str, str | None] = {}
    for name in [*map(manifest_name, numbers), *copies]:
        try:
            manifest = decode_manifest(await tools.objects.get(name), name)
        except ObjectMissingError:
            continue  # collected meanwhile
        except CorruptionError as error:
            damaged[name] = str(error)
            continue
        tools.rooted.use({number: root.url for number, root in manifest.roots.items()})
        if (problem := await _problem(tools, manifest, checked, deep=deep)) is not None:
            damaged[name] = problem
            continue
        recovered = [c for c in copies if _copied_at(c) >= manifest.number and c not in _named(manifest)]
        return RepairReport(
            newest=numbers[0], damaged=damaged, found=name, manifest=manifest, recovered=tuple(recovered)
        )
    return RepairReport(newest=numbers[0], damaged=damaged, found=None, manifest=None)


async def _problem(tools: Toolbox, manifest: Manifest, checked: dict[str, str | None], *, deep: bool) -> str | None:
    """What is wrong with a file that the manifest names; ``checked`` remembers every file."""
    for state in manifest.tables.values():
        for meta in state.files:
            if meta.name not in checked:
                try:
                    await (verify_file(tools.objects, state, meta) if deep else read_index(tools.objects, meta))
                    checked[meta.name] = None
                except _DAMAGE as error:
                    checked[meta.name] = str(error)
            if (problem := checked[meta.name]) is not None:
                return problem
    return None


async def _go_back(tools: Toolbox, report: RepairReport, manifest: Manifest) -> RepairReport:
    number = ManifestNumber(report.newest + 1)
    highest = await _highest(tools, report, manifest)
    beyond = report.newest - manifest.number + 1
    checkpoint_id = CheckpointId(highest.checkpoint_id + beyond)
    created_ms = max(tools.clock.now_ms(), manifest.created_ms)
    retained = [r for r in manifest.retained if await _is_whole(tools, manifest_name(r.manifest_number))]
    own = RetainedCheckpoint(checkpoint_id=checkpoint_id, manifest_number=number, created_ms=created_ms)
    saved = {}
    for name in report.recovered:
        if (copied := await _read(tools, name)) is not None:
            saved[f"recovered-{name.removeprefix('savepoint/')}"] = Savepoint(
                object_name=name, checkpoint_id=copied.checkpoint_id, created_ms=created_ms
            )
    repaired = replace(
        manifest,
        number=number,
        parent_attempt=AttemptId(""),  # what it is built on cannot be read
        timeline=highest.timeline + beyond,
        writer_epoch=WriterEpoch(highest.writer_epoch + beyond),
        compactor_epoch=highest.compactor_epoch + beyond,
        compactor_id=None,
        writer_id=WriterId(new_id(tools.rng)),
        attempt_id=AttemptId(new_id(tools.rng)),
        checkpoint_id=checkpoint_id,
        created_ms=created_ms,
        low_marks={},
        retained=(*retained, own),
        savepoints={**manifest.savepoints, **saved},
        writer_reads=(number,),
    )
    if await tools.manifests.create(repaired) is PutResult.EXISTS:
        raise CommitConflictError(f"{manifest_name(number)}: another commit came meanwhile: look again")
    await FenceableManifest.init_writer(tools.manifests, tools.clock, tools.rng, StoreSettings().commit_timeout_s)
    return replace(report, committed=checkpoint_id, recovered=tuple(saved))


async def _highest(tools: Toolbox, report: RepairReport, manifest: Manifest) -> Manifest:
    """The newest manifest that can be read, whole or not: what it holds was given, so it is never given again."""
    for number in range(report.newest, manifest.number, -1):
        if (newer := await _read(tools, manifest_name(number))) is not None:
            return newer
    return manifest


async def _read(tools: Toolbox, name: str) -> Manifest | None:
    try:
        return decode_manifest(await tools.objects.get(name), name)
    except _DAMAGE:
        return None


async def _is_whole(tools: Toolbox, name: str) -> bool:
    return await _read(tools, name) is not None


def _named(manifest: Manifest) -> set[str]:
    return {copy.object_name for copy in manifest.copies.values()}


def _copied_at(name: str) -> int:
    match = _COPY.fullmatch(name)
    return -1 if match is None else int(match.group(1))
