"""Old states that stay: copies of manifests for savepoints, branches and pins, and going back to one of them.

All three are the same thing: a copy of the manifest of a kept checkpoint, made first, and then named by a
commit. The copy counts only as part of the very next manifest, so that an unnamed one is garbage as soon as that
number is taken; and the checkpoint must still be kept in the manifest that the commit is applied to, so that
its files have never been out of sight of the collector.

The values here are pure; ``toolbox.py`` carries them out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from statebackend.errors import CheckpointGoneError, CheckpointNotFoundError, CommitConflictError
from statebackend.ids import AttemptId, CheckpointId, ManifestNumber, StoreId, WriterId
from statebackend.manifest import Branch, Manifest, Pin, RetainedCheckpoint, Root, Savepoint, TableState
from statebackend.objectstore_roots import inherited_name, is_inherited

__all__ = [
    "CopyCommit",
    "DropCommit",
    "KeptCheckpoint",
    "ReleaseCommit",
    "RenewalCommit",
    "RollbackCommit",
    "first_manifest_of_branch",
    "needs_roots",
]

Copy: TypeAlias = Savepoint | Branch | Pin


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptCheckpoint:
    """A checkpoint that can be gone back to, and why it is kept: as one of the last, or by a savepoint.

    ``manifest`` is the one that committed it; ``object_name`` the copy of it, if a savepoint is meant.
    """

    manifest: Manifest
    savepoint: str | None = None
    object_name: str | None = None

    @property
    def checkpoint_id(self) -> CheckpointId:
        """Which checkpoint it is."""
        return self.manifest.checkpoint_id

    def require_kept_in(self, manifest: Manifest) -> None:
        """Raise `CheckpointNotFoundError` unless ``manifest`` still keeps it for the same reason."""
        if self.savepoint is not None:
            found = manifest.savepoints.get(self.savepoint)
            if found is None or found.object_name != self.object_name:
                raise CheckpointNotFoundError(f"savepoint {self.savepoint!r} was dropped meanwhile")
        elif self.checkpoint_id not in {r.checkpoint_id for r in manifest.retained}:
            raise CheckpointNotFoundError(
                f"checkpoint {self.checkpoint_id} is not retained any more; retained are "
                f"{[int(r.checkpoint_id) for r in manifest.retained]}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyCommit:
    """Name a durable copy of the manifest of ``of``. ``copied_at``: the newest number when the copy was made."""

    name: str
    copy: Copy
    of: KeptCheckpoint
    copied_at: ManifestNumber

    def apply(self, manifest: Manifest) -> Manifest:
        """The manifest that names the copy.

        Raises `CheckpointNotFoundError` when the checkpoint is no longer kept, for its files may be gone,
        and `CommitConflictError` when another commit came after the copy, for the copy may be gone.
        """
        if manifest.number != self.copied_at + 1:
            raise CommitConflictError(f"copy {self.copy.object_name}: another commit came first: copy again")
        self.of.require_kept_in(manifest)
        match self.copy:
            case Savepoint():
                return replace(manifest, savepoints={**manifest.savepoints, self.name: self.copy})
            case Branch():
                return replace(manifest, branches={**manifest.branches, StoreId(self.name): self.copy})
            case Pin():
                return replace(manifest, pins={**manifest.pins, self.name: self.copy})


@dataclass(frozen=True, slots=True)
class DropCommit:
    """Name a copy no longer; it is deleted after that."""

    object_name: str

    def apply(self, manifest: Manifest) -> Manifest:
        """The manifest without it; unchanged if it does not name it."""
        gone = self.object_name
        return replace(
            manifest,
            savepoints={k: c for k, c in manifest.savepoints.items() if c.object_name != gone},
            branches={k: c for k, c in manifest.branches.items() if c.object_name != gone},
            pins={k: c for k, c in manifest.pins.items() if c.object_name != gone},
        )


@dataclass(frozen=True, slots=True)
class RenewalCommit:
    """Let a pin live until ``expires_ms``, if it still does."""

    pin: str
    expires_ms: int

    def apply(self, manifest: Manifest) -> Manifest:
        """The manifest with the later end. Raises `CheckpointGoneError` when the pin has ended."""
        if (pin := manifest.pins.get(self.pin)) is None:
            raise CheckpointGoneError(f"pin {self.pin} has ended with manifest {manifest.number - 1} or before")
        later = replace(pin, expires_ms=max(pin.expires_ms, self.expires_ms))
        return replace(manifest, pins={**manifest.pins, self.pin: later})


@dataclass(frozen=True, slots=True)
class ReleaseCommit:
    """In a branch: no kept manifest names a file of another store, and none ever will. Forget the roots."""

    def apply(self, manifest: Manifest) -> Manifest:
        """The manifest of a store that stands on its own."""
        assert not needs_roots(manifest), "only a branch without inherited files is released"
        return replace(manifest, roots={})


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackCommit:
    """Go back to ``target``: history stays linear, the old state becomes a new checkpoint on a new timeline.

    To be applied by a new writer, so that nobody who built on the undone commits can go on. Retained
    checkpoints stay, the undone ones among them, until the job's next ones push them out.
    """

    target: KeptCheckpoint

    def apply(self, manifest: Manifest) -> Manifest:
        """The manifest that holds the tables and positions of ``target`` again.

        Raises `CheckpointNotFoundError` when the target is kept no longer: its files may be gone.
        """
        self.target.require_kept_in(manifest)
        checkpoint_id = CheckpointId(manifest.checkpoint_id + 1)
        kept = RetainedCheckpoint(
            checkpoint_id=checkpoint_id, manifest_number=manifest.number, created_ms=manifest.created_ms
        )
        return replace(
            manifest,
            timeline=manifest.timeline + 1,
            checkpoint_id=checkpoint_id,
            tables=self.target.manifest.tables,
            job=self.target.manifest.job,
            retained=(*manifest.retained, kept),
        )


def needs_roots(manifest: Manifest) -> bool:
    """Whether a file that the manifest names lies in another store."""
    return any(is_inherited(name) for name in manifest.files)


def first_manifest_of_branch(
    parent: Manifest, url: str, *, store_id: StoreId, writer_id: WriterId, attempt_id: AttemptId, created_ms: int
) -> Manifest:
    """Manifest 1 of a store that begins as ``parent``, a manifest of the store at ``url``.

    Epochs go on from the parent's, so that names of files, runs and owners differ from inherited ones.
    What the parent has staged for its sinks is the parent's to publish: the branch begins without committables.
    """

    def inherited(state: TableState) -> TableState:
        return replace(state, files=tuple(replace(f, name=inherited_name(f.name)) for f in state.files))

    number = ManifestNumber(1)
    retained = RetainedCheckpoint(checkpoint_id=parent.checkpoint_id, manifest_number=number, created_ms=created_ms)
    return Manifest(
        number=number,
        parent_attempt=AttemptId(""),
        store_id=store_id,
        writer_epoch=parent.writer_epoch,
        compactor_epoch=parent.compactor_epoch,
        writer_id=writer_id,
        attempt_id=attempt_id,
        checkpoint_id=parent.checkpoint_id,
        created_ms=created_ms,
        tables={name: inherited(state) for name, state in parent.tables.items()},
        job=replace(parent.job, committables={}),
        retained=(retained,),
        roots={1: Root(url=url, store_id=parent.store_id)} | {n + 1: root for n, root in parent.roots.items()},
    )
