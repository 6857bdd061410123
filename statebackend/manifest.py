"""The manifest: an immutable value that *is* the store, and its pure transitions.

A manifest lists every table with its files and watermark, the job's positions, and the epochs that
fence stale owners. Every change to the store is a function from one manifest to the next; nothing
here does I/O, and a transition may be applied again to a newer manifest after a conflict.

Invariants:

* Numbers grow by one; a manifest names the attempt it was built on (``parent_attempt``).
* Epochs, checkpoint ids, low marks and table watermarks never decrease. Low marks of a superseded
  epoch mean nothing and go.
* A file whose sequence is at or below the writer's low mark is never added: it already was.
* The writer adds flushed files, tables, versions of their schemas, watermarks and the job state, and gives tables
  other names together with a new timeline; a
  compaction replaces a contiguous group of files by one run, under the newest compactor epoch only, and
  touches nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import dropwhile
from typing import Any, TypeVar

from statebackend import display
from statebackend.backend import Checkpoint, JobState, StoredTable
from statebackend.errors import CommitConflictError, CompactorSupersededError
from statebackend.ids import AttemptId, CheckpointId, ManifestNumber, SequenceNumber, StoreId, WriterEpoch, WriterId
from statebackend.schema_history import SchemaHistory
from statebackend.sstable import SSTableMeta
from statebackend.tables import TableSpec

__all__ = [
    "Branch",
    "CheckpointCommit",
    "CompactionCommit",
    "CompactionProgress",
    "CompactorClaim",
    "CompactorHeartbeat",
    "CompactorRelease",
    "Manifest",
    "Pin",
    "RetainedCheckpoint",
    "Root",
    "Savepoint",
    "TableCut",
    "TableMoves",
    "TableState",
]


NO_CHECKPOINT = CheckpointId(0)

_Leased = TypeVar("_Leased", "Savepoint", "Pin")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableState:
    """One table in one manifest.

    ``files`` are ordered from oldest to newest; those of level 0 were flushed, the others
    belong to sorted runs that compactions wrote; files of one run do not overlap. Rows with a time
    (or ttl) below ``watermark`` are dead. ``history`` holds the schema of ``spec`` and all earlier ones, so that it
    can read every file.
    """

    spec: TableSpec
    history: SchemaHistory
    fingerprint: str | None = None
    watermark: int | None = None
    files: tuple[SSTableMeta, ...] = ()

    @property
    def stored(self) -> StoredTable:
        """What there is of it, for people."""
        return StoredTable(spec=self.spec, rows=sum(f.rows for f in self.files), bytes=sum(f.size for f in self.files))

    def expired(self, watermark: int | None) -> TableState:
        """Move the watermark and let go of the files that lie wholly below it.

        Where rows hide older ones (see `TableSpec.expires_by_row`), only of the oldest: a file that goes before an
        older one would show again what it hides.
        """
        marks = [w for w in (watermark, self.watermark) if w is not None]
        if not marks:
            return self
        newest = max(marks)
        if self.spec.expires_by_row:
            alive = tuple(f for f in self.files if not f.expired(newest))
        else:
            alive = tuple(dropwhile(lambda f: f.expired(newest), self.files))
        return replace(self, watermark=newest, files=alive)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCut:
    """What a barrier says of one table, beside its rows."""

    spec: TableSpec
    history: SchemaHistory
    fingerprint: str | None
    watermark: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetainedCheckpoint:
    """A checkpoint that stays restorable: the manifest that holds it, and what it took to write it.

    ``rows_written`` and ``bytes_written`` of its SSTables; ``duration_ms`` from the barrier until everything but the
    manifest was durable. All zero for one that was not cut at a barrier (a rollback, the first of a branch).
    """

    checkpoint_id: CheckpointId
    manifest_number: ManifestNumber
    created_ms: int
    rows_written: int = 0
    bytes_written: int = 0
    duration_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Savepoint:
    """A named copy of a manifest that is kept until it is dropped or expires.

    ``object_name`` is where the copy lies; ``expires_ms`` epoch milliseconds, or None for never.
    """

    object_name: str
    checkpoint_id: CheckpointId
    created_ms: int
    expires_ms: int | None = None


@dataclass(frozen=True, slots=True)
class CompactionProgress:
    """Who may compact, and how far it came: unchanged means that nothing was committed by the claim.

    ``epoch`` is the newest compactor epoch, ``compactor_id`` its holder (None: released), ``mark`` the
    sum of its low marks, which grows with every commit, be it of a merge or a heartbeat.
    """

    epoch: int
    compactor_id: str | None
    mark: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A store at ``url`` that began as a checkpoint of this one and reads the files of that checkpoint here.

    ``object_name``: a copy of the manifest from which it began; the collector keeps all that it names.
    """

    object_name: str
    checkpoint_id: CheckpointId
    created_ms: int
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A lease on a checkpoint that somebody reads, in the form of a copy of its manifest.

    It ends with the first commit of a checkpoint whose time is at or after ``expires_ms``, unless it is renewed before.
    """

    object_name: str
    checkpoint_id: CheckpointId
    created_ms: int
    expires_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """Another store whose files this one reads, since it was branched from it, directly or by way of others."""

    url: str
    store_id: StoreId


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The whole store at one moment. ``checkpoint_id`` is 0 before the first checkpoint.

    Three kinds of copies of manifests keep old states beyond ``retained``: ``savepoints`` by their name,
    ``branches`` by the id of the store that was branched off, and ``pins`` by a random id. In a branch,
    ``roots`` tells where inherited files lie; root 1 is the parent, where this store is one of the ``branches``.

    ``compactor_id`` holds the claim to ``compactor_epoch``, None after a release. ``writer_reads``: the
    manifests from whose files the running writer may read, its last two commits; guests (compactors
    elsewhere, savepoints) leave it as it is, so that the collector keeps what the writer has not let go of.
    """

    number: ManifestNumber
    parent_attempt: AttemptId
    store_id: StoreId
    timeline: int = 0
    writer_epoch: WriterEpoch
    compactor_epoch: int = 0
    compactor_id: str | None = None
    writer_id: WriterId
    attempt_id: AttemptId
    checkpoint_id: CheckpointId = NO_CHECKPOINT
    created_ms: int
    low_marks: Mapping[str, SequenceNumber] = field(default_factory=dict)
    tables: Mapping[str, TableState] = field(default_factory=dict)
    job: JobState = field(default_factory=JobState)
    retained: tuple[RetainedCheckpoint, ...] = ()
    savepoints: Mapping[str, Savepoint] = field(default_factory=dict)
    branches: Mapping[StoreId, Branch] = field(default_factory=dict)
    pins: Mapping[str, Pin] = field(default_factory=dict)
    roots: Mapping[int, Root] = field(default_factory=dict)
    writer_reads: tuple[ManifestNumber, ...] = ()

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The latest checkpoint, as a user sees it, or None before the first."""
        if not self.checkpoint_id:
            return None
        last = self.retained[-1] if self.retained else None
        return Checkpoint(
            checkpoint_id=self.checkpoint_id,
            manifest_number=self.number if last is None else last.manifest_number,
            created_ms=self.created_ms if last is None else last.created_ms,
            job=self.job,
            bytes_written=0 if last is None else last.bytes_written,
            rows_written=0 if last is None else last.rows_written,
            duration_s=0.0 if last is None else last.duration_ms / 1000,
        )

    @property
    def files(self) -> dict[str, SSTableMeta]:
        """Every file that this manifest names, by name."""
        return {f.name: f for t in self.tables.values() for f in t.files}

    @property
    def copies(self) -> dict[str, Savepoint | Branch | Pin]:
        """Every copy of a manifest that this one names, by why it is kept: ``savepoint x``, ``branch …``, ``pin …``."""
        kinds: tuple[tuple[str, Mapping[Any, Savepoint | Branch | Pin]], ...] = (
            ("savepoint", self.savepoints),
            ("branch", self.branches),
            ("pin", self.pins),
        )
        return {f"{kind} {name}": copy for kind, named in kinds for name, copy in named.items()}

    @property
    def leases(self) -> tuple[Savepoint | Pin, ...]:
        """The copies that may end by their time."""
        return (*self.savepoints.values(), *self.pins.values())

    def without_expired(self) -> Manifest:
        """Without the savepoints and pins whose time was up when this manifest was made."""

        def alive(named: Mapping[str, _Leased]) -> dict[str, _Leased]:
            return {k: c for k, c in named.items() if c.expires_ms is None or c.expires_ms > self.created_ms}

        return replace(self, savepoints=alive(self.savepoints), pins=alive(self.pins))

    @property
    def compaction_progress(self) -> CompactionProgress:
        """Who may compact, and how far it came."""
        prefix = f"c{self.compactor_epoch}-"
        mark = sum(mark for owner, mark in self.low_marks.items() if owner.startswith(prefix))
        return CompactionProgress(self.compactor_epoch, self.compactor_id, mark)

    def next(self, *, writer_id: WriterId, attempt_id: AttemptId, created_ms: int) -> Manifest:
        """This manifest under the next number, built on this attempt."""
        return replace(
            self,
            number=ManifestNumber(self.number + 1),
            parent_attempt=self.attempt_id,
            writer_id=writer_id,
            attempt_id=attempt_id,
            created_ms=created_ms,
        )

    def opened_by_writer(self) -> Manifest:
        """A new writer takes over: from now on the older one is fenced, and whoever compacted is superseded.

        Their marks mean nothing any more; the claim to compact is the new writer's.
        """
        return replace(
            self,
            writer_epoch=WriterEpoch(self.writer_epoch + 1),
            compactor_epoch=self.compactor_epoch + 1,
            compactor_id=self.writer_id,
            low_marks={},
            writer_reads=(self.number,),
        )

    def with_compactor(self, compactor_id: str | None) -> Manifest:
        """The next compactor epoch, held by ``compactor_id`` or by nobody: the older one can commit no more."""
        marks = {owner: mark for owner, mark in self.low_marks.items() if not owner.startswith("c")}
        return replace(self, compactor_epoch=self.compactor_epoch + 1, compactor_id=compactor_id, low_marks=marks)

    def _repr_html_(self) -> str:
        return display.manifest(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableMoves:
    """Tables get other names, or go (None); decided on ``timeline``, which ends with it, so that it happens once.

    Whatever was planned with the old names (a merge elsewhere) is of an ended timeline and abandoned.
    """

    timeline: int
    names: Mapping[str, str | None]

    @classmethod
    def of(cls, manifest: Manifest, names: Mapping[str, str | None], where: str) -> TableMoves:
        """Raises ``ValueError`` for a table that is not there, and for two tables of one name."""
        if missing := [name for name in names if name not in manifest.tables]:
            raise ValueError(f"{where}: no tables {missing}; there are {sorted(manifest.tables)}")
        moved = [new for name in manifest.tables if (new := names.get(name, name)) is not None]
        if twice := sorted({name for name in moved if moved.count(name) > 1}):
            raise ValueError(f"{where}: two tables would be called {twice}")
        return cls(timeline=manifest.timeline, names=dict(names))

    def apply(self, manifest: Manifest) -> Manifest:
        """The manifest with the tables moved, on the next timeline; unchanged once that was done."""
        if manifest.timeline != self.timeline:
            return manifest
        tables = {}
        for name, state in manifest.tables.items():
            new = self.names.get(name, name)
            if new is not None:
                tables[new] = state if new == name else replace(state, spec=replace(state.spec, name=new))
        return replace(manifest, timeline=manifest.timeline + 1, tables=tables)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCommit:
    """One barrier, ready to be committed: the files flushed for it and everything else it says.

    ``owner`` names the writer in ``low_marks``; ``low_mark`` is the last sequence frozen before
    the barrier; ``tables`` the tables known at the barrier; ``duration_ms`` from there until ``files`` were durable;
    ``moves`` what became of older tables first.
    """

    checkpoint_id: CheckpointId
    owner: str
    low_mark: SequenceNumber
    job: JobState
    tables: Mapping[str, TableCut]
    files: Mapping[str, Sequence[SSTableMeta]]
    retained_max: int
    duration_ms: int = 0
    moves: TableMoves | None = None

    def apply(self, manifest: Manifest) -> Manifest:
        """The manifest with this checkpoint; unchanged when it already holds it."""
        if manifest.checkpoint_id >= self.checkpoint_id:
            return manifest
        if self.moves is not None:
            manifest = self.moves.apply(manifest)
        marked = manifest.low_marks.get(self.owner, 0)
        tables = dict(manifest.tables)
        for name, cut in self.tables.items():
            old = tables.get(name, TableState(spec=cut.spec, history=cut.history, fingerprint=cut.fingerprint))
            new = tuple(f for f in self.files.get(name, ()) if f.sequence > marked)
            declared = replace(old, spec=cut.spec, history=cut.history, fingerprint=cut.fingerprint)
            state = replace(declared, files=old.files + new)
            tables[name] = state.expired(cut.watermark)
        written = [f for files in self.files.values() for f in files]
        kept = RetainedCheckpoint(
            checkpoint_id=self.checkpoint_id,
            manifest_number=manifest.number,
            created_ms=manifest.created_ms,
            rows_written=sum(f.rows for f in written),
            bytes_written=sum(f.size for f in written),
            duration_ms=self.duration_ms,
        )
        return replace(
            manifest.without_expired(),
            checkpoint_id=self.checkpoint_id,
            low_marks={**manifest.low_marks, self.owner: self.low_mark},
            tables=tables,
            job=self.job,
            retained=(*manifest.retained, kept)[-self.retained_max :],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactionCommit:
    """Replace ``inputs`` (contiguous, oldest first) of one table by the files of one run.

    ``output`` is empty when nothing of the inputs is alive. ``epoch`` is that of the compactor, ``owner``
    the name of the one of its lanes that merged: everything that this lane wrote up to ``sequence`` is
    decided with this commit.
    """

    table: str
    timeline: int
    epoch: int
    owner: str
    sequence: SequenceNumber
    inputs: tuple[SSTableMeta, ...]
    output: tuple[SSTableMeta, ...]

    def apply(self, manifest: Manifest) -> Manifest:
        """The manifest with the files replaced; inputs that expired meanwhile are not missed.

        Raises `CompactorSupersededError` when another compactor holds the claim: then the collector
        may have taken the output, which no manifest must name any more. Raises `CommitConflictError` when
        the timeline changed or an input is gone: the output is then abandoned, for somebody else
        replaced or dropped the inputs.
        """
        _check_claim(manifest, self.epoch)
        state = manifest.tables.get(self.table)
        if state is None or manifest.timeline != self.timeline:
            raise CommitConflictError(f"compaction of {self.table!r}: the store was rolled back or replaced")
        names = [f.name for f in state.files]
        wanted = [f.name for f in self.inputs if f.name in names or not f.expired(state.watermark)]
        at = names.index(wanted[0]) if wanted and wanted[0] in names else 0
        if names[at : at + len(wanted)] != wanted:
            raise CommitConflictError(f"compaction of {self.table!r}: its inputs are no longer in the manifest")
        output = self.output if wanted else ()
        files = state.files[:at] + output + state.files[at + len(wanted) :]
        return replace(
            manifest,
            low_marks={**manifest.low_marks, self.owner: self.sequence},
            tables={**manifest.tables, self.table: replace(state, files=files)},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactorClaim:
    """``compactor_id`` claims the merges of the store: the next compactor epoch is its own.

    ``over``: the claim that was found released or without progress, for a compactor that waits its turn;
    None: whoever holds it is superseded.
    """

    compactor_id: str
    over: CompactionProgress | None = None

    def apply(self, manifest: Manifest) -> Manifest:
        """The manifest with the claim.

        Raises `CommitConflictError` when the claim that was to be superseded changed hands or made progress.
        """
        now = manifest.compaction_progress
        if self.over is not None and now != self.over:
            raise CommitConflictError(f"compactor {now.compactor_id or '(none)'} has epoch {now.epoch} and is at work")
        return manifest.with_compactor(self.compactor_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactorHeartbeat:
    """The compactor of ``epoch`` is at work on a merge; ``owner`` is a name of its own under which no file is written.

    Its low mark counts heartbeats, so that the progress of the claim goes on and nothing is decided for any file.
    """

    epoch: int
    owner: str

    def apply(self, manifest: Manifest) -> Manifest:
        """The manifest with one more heartbeat. Raises `CompactorSupersededError` when another holds the claim."""
        _check_claim(manifest, self.epoch)
        beats = SequenceNumber(manifest.low_marks.get(self.owner, 0) + 1)
        return replace(manifest, low_marks={**manifest.low_marks, self.owner: beats})


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactorRelease:
    """The compactor of ``epoch`` has ended: the next epoch is nobody's, and what it left behind may be collected."""

    epoch: int

    def apply(self, manifest: Manifest) -> Manifest:
        """The manifest without a claim. Raises `CompactorSupersededError` when there is nothing to release."""
        _check_claim(manifest, self.epoch)
        return manifest.with_compactor(None)


def _check_claim(manifest: Manifest, epoch: int) -> None:
    if manifest.compactor_epoch != epoch:
        raise CompactorSupersededError(
            f"compactor {manifest.compactor_id or '(none)'} has epoch {manifest.compactor_epoch} in manifest "
            f"{manifest.number}; epoch {epoch} is superseded"
        )
