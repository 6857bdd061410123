"""Decides when this process merges, commits what it merged, and counts; the merging is `compaction_merge`'s.

At most one compactor of a store holds the claim: its epoch is the newest ``compactor_epoch`` of the
manifest. Opening as writer claims for the compactor inside the writer (the *embedded* one); one elsewhere
claims by a commit of its own. The loser finds out at its next commit, abandons what it merged, and
ends quietly; an embedded one stands by instead, and claims again when the claim was released, or when
merges were due and the manifest showed no progress of the claim for ``compaction_takeover_s``. A merge that
takes longer shows progress by *heartbeats*: small commits, made while rows are being merged, never by a timer alone.

A failed merge is kept for `health` and tried again after the next commit; it harms nobody, for its
output is named by no manifest. Two merges may go on at once, at most one of them large, so that small
ones need not wait for it.

Invariants:

* Nothing is committed under an epoch that was superseded: the collector may have taken its files.
* Each lane has an owner name of its own, so that a commit decides only what its own lane wrote.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from statebackend.compaction import CompactionBacklog, CompactionPlan, backlog, plan_compaction
from statebackend.compaction_merge import Lane, RunMerger
from statebackend.errors import (
    CommitConflictError,
    CommitUnknownError,
    CompactorSupersededError,
    ObjectMissingError,
    SchemaMismatchError,
    StateStoreError,
    StorageUnavailableError,
    UnsupportedAggregateError,
    UnsupportedFormatError,
)
from statebackend.ids import SequenceNumber
from statebackend.keys import Hasher
from statebackend.logs import context
from statebackend.manifest import (
    CompactionCommit,
    CompactionProgress,
    CompactorClaim,
    CompactorHeartbeat,
    Manifest,
    TableState,
)
from statebackend.manifest_store import Clock
from statebackend.merge import TableLayout
from statebackend.progress import TaskProgress
from statebackend.settings import StoreSettings
from statebackend.tables import TableKind

if TYPE_CHECKING:
    from datafusion.user_defined import AggregateUDF

__all__ = [
    "LANES",
    "SUPERSEDED_EXIT_CODE",
    "CompactionLayouts",
    "CompactionStats",
    "Compactor",
    "ManifestCommitter",
]

SUPERSEDED_EXIT_CODE = 3
"""Of a compactor's process that ended because another one claimed the store: leave it so."""

LANES = 2
"""Merges at once."""

_POLL_S_MAX = 5.0
_HEARTBEAT_S_MAX = 60.0
"""A long merge commits one this often, or four times per ``compaction_takeover_s`` if that is more often."""

logger = logging.getLogger(__name__)


class ManifestCommitter(Protocol):
    """Commits for one owner; the flusher for the embedded compactor."""

    @property
    def manifest(self) -> Manifest:
        """The newest manifest that this owner knows."""

    async def refresh(self) -> Manifest:
        """Find the newest manifest. Raises the error of a fenced or superseded owner."""

    async def write_manifest_safely(self, transition: Callable[[Manifest], Manifest]) -> Manifest:
        """Commit, applying the transition again whenever another commit came first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactionStats:
    """What one compactor did so far, and what is due.

    ``runs`` committed merges; ``abandoned`` ones that another commit overtook; ``superseded`` how often another
    compactor claimed the store; ``claims`` how often this one did. Bytes are those of files, ``rows_dropped``
    counts superseded, expired and deleted rows and merged states; ``seconds`` from the plan to the commit.
    """

    runs: int = 0
    abandoned: int = 0
    superseded: int = 0
    claims: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    rows_in: int = 0
    rows_dropped: int = 0
    seconds: float = 0.0
    merging: int = 0
    backlog: CompactionBacklog = field(default_factory=CompactionBacklog)


class CompactionLayouts:
    """Layouts of tables by what the manifest says of them, so that a table need not be open to be merged."""

    def __init__(self, hasher: Hasher, udafs: Mapping[str, AggregateUDF]) -> None:
        self._hasher = hasher
        self._udafs = udafs
        self._known: dict[str, tuple[TableState, TableLayout]] = {}

    def of(self, state: TableState) -> TableLayout:
        """The layout of a table of the manifest.

        States that cannot be reduced here (a Python function that is not at hand, another fingerprint) are
        kept as they are: several rows of one key remain, which reads merge anyway.
        """
        name = state.spec.name
        known = self._known.get(name)
        if known is None or not _same_columns(known[0], state):
            known = self._known[name] = (state, self._build(state))
        return known[1]

    def _build(self, state: TableState) -> TableLayout:
        unmerged = TableLayout.for_reading(state.spec, self._hasher, state.history)
        if state.spec.kind is not TableKind.AGGREGATE:
            return unmerged
        try:
            layout = TableLayout.of(state.spec, self._hasher, self._udafs, state.history)
        except (UnsupportedAggregateError, UnsupportedFormatError, SchemaMismatchError, ValueError) as error:
            logger.warning("table %r: its states are kept unreduced by merges here: %s", state.spec.name, error)
            return unmerged
        if state.fingerprint is not None and layout.fingerprint != state.fingerprint:
            logger.warning(
                "table %r: its states are kept unreduced by merges here: they have layout %s, this DataFusion makes %s",
                state.spec.name, state.fingerprint, layout.fingerprint,
            )  # fmt: skip
            return unmerged
        return layout


def _same_columns(a: TableState, b: TableState) -> bool:
    return (a.spec, a.history, a.fingerprint) == (b.spec, b.history, b.fingerprint)


class Compactor:
    """Merges flushed files of one store in the background.

    ``compactor_id``: what the manifest calls the holder of its claim, of this compactor alone. ``stands_by``:
    whether it waits its turn when another one holds the claim, else it raises `CompactorSupersededError`.
    ``layout_of`` gives the layout of a table of the manifest, ``on_commit`` is told every manifest that this
    compactor commits, ``on_rows`` how many input rows of a plan were merged by a step.
    """

    def __init__(
        self,
        compactor_id: str,
        committer: ManifestCommitter,
        merger: RunMerger,
        settings: StoreSettings,
        clock: Clock,
        layout_of: Callable[[TableState], TableLayout],
        on_commit: Callable[[Manifest], None],
        *,
        stands_by: bool = True,
        on_rows: Callable[[CompactionPlan, int], None] | None = None,
    ) -> None:
        # Constant after construction.
        self._id = compactor_id
        self._committer = committer
        self._merger = merger
        self._settings = settings
        self._clock = clock
        self._layout_of = layout_of
        self._on_commit = on_commit
        self._stands_by = stands_by
        self._on_rows = on_rows
        # State below belongs to the runtime's thread.
        self._lanes = tuple(Lane(number=n) for n in range(LANES))
        self._failed: dict[str, StateStoreError] = {}
        self._watched: tuple[CompactionProgress, float] | None = None
        self._shown_at = clock.monotonic()
        self._stats = CompactionStats()
        self.progress = TaskProgress(clock.now_ms)

    @property
    def stats(self) -> CompactionStats:
        """What was done so far, and what is due by the newest manifest known."""
        merging = sum(lane.plan is not None for lane in self._lanes)
        return replace(self._stats, merging=merging, backlog=backlog(self._committer.manifest, self._settings))

    @property
    def merging(self) -> tuple[CompactionPlan, ...]:
        """The merges under way here; for any thread."""
        plans = (lane.plan for lane in self._lanes)
        return tuple(plan for plan in plans if plan is not None)

    @property
    def running(self) -> bool:
        """Whether a merge, or the wait for a turn, is under way."""
        return any(lane.taken for lane in self._lanes)

    async def run_if_due(self) -> None:
        """Merge until nothing is due. Every call works in a lane of its own; without a free one it does nothing.

        Raises `CompactorSupersededError` when another one holds the claim and this one does not stand by.
        """
        self._failed.clear()
        if self._watched is not None and self.running:
            return  # somebody waits for the turn already
        await self._work(self._next_plan)

    async def merge_now(self, plans: Sequence[CompactionPlan]) -> None:
        """Carry out these plans, whether due or not; what another commit overtook is abandoned."""
        left = iter(plans)
        await self._work(lambda: next(left, None))

    async def _work(self, next_plan: Callable[[], CompactionPlan | None]) -> None:
        lane = next((lane for lane in self._lanes if not lane.taken), None)
        if lane is None:
            return
        lane.taken = True
        try:
            while (plan := next_plan()) is not None:
                if (epoch := await self._turn()) is not None:
                    await self._run(plan, lane, epoch)
        except StateStoreError as error:
            if isinstance(error, CompactorSupersededError):
                raise
            logger.warning("no turn to merge, the next commit tries again: %s", error, extra=self._fields())
            self.progress.failed(error)
        finally:
            lane.taken = False
            if not self.running:
                self._watched = None

    def _next_plan(self) -> CompactionPlan | None:
        others = [lane.plan for lane in self._lanes if lane.plan is not None]
        small = self._settings.file_bytes_max
        return plan_compaction(
            self._committer.manifest,
            self._settings,
            busy={f.name for plan in others for f in plan.inputs},
            skipped=self._failed,
            bytes_max=small if any(plan.nbytes > small for plan in others) else None,
        )

    # --- the claim ---

    async def _turn(self) -> int | None:
        """The epoch to merge under, or None after having waited for a turn: look again what is due."""
        found = self._committer.manifest.compaction_progress
        if found.compactor_id == self._id:
            self._watched = None
            return found.epoch
        if not self._stands_by:
            self._count(superseded=1)
            raise CompactorSupersededError(f"compactor {found.compactor_id or '(none)'} claimed epoch {found.epoch}")
        now = self._clock.monotonic()
        if self._watched is None or self._watched[0] != found:
            self._watched = (found, now)
        if found.compactor_id is None or now - self._watched[1] >= self._settings.compaction_takeover_s:
            await self._claim(found)
        else:
            await self._clock.sleep(min(self._settings.compaction_takeover_s / 4, _POLL_S_MAX))
            await self._committer.refresh()
        return None

    async def _claim(self, over: CompactionProgress) -> None:
        claim = CompactorClaim(compactor_id=self._id, over=over)
        try:
            manifest = await self._committer.write_manifest_safely(claim.apply)
        except CommitConflictError:
            return  # it went on, or another one was first
        logger.info(
            "compactor %s takes over from %s with epoch %d",
            self._id, over.compactor_id or "nobody", manifest.compactor_epoch, extra=self._fields(),
        )  # fmt: skip
        self._count(claims=1)
        self._on_commit(manifest)

    # --- one merge ---

    async def _run(self, plan: CompactionPlan, lane: Lane, epoch: int) -> None:
        began = self._clock.monotonic()
        lane.begin(plan, epoch)
        try:
            with self.progress.run(CommitConflictError, CompactorSupersededError):
                commit = await self._merge(plan, lane)
                manifest = await self._committer.write_manifest_safely(commit.apply)
        except (CommitConflictError, CompactorSupersededError) as error:
            logger.info("compaction abandoned: %s", error, extra=self._fields(plan))
            self._count(abandoned=1, superseded=isinstance(error, CompactorSupersededError))
            if isinstance(error, CompactorSupersededError) and not self._stands_by:
                raise
            return  # plan again on the newer manifest, if it is still this compactor's turn
        except StateStoreError as error:
            logger.warning("compaction failed, the next commit tries again: %s", error, extra=self._fields(plan))
            self._failed[plan.table] = error
            return
        finally:
            lane.plan = None
        if self._failed:  # this success says nothing of other tables
            self.progress.last_error = next(iter(self._failed.values()))
        self._on_commit(manifest)
        self._merged(plan, commit, self._clock.monotonic() - began)

    async def _merge(self, plan: CompactionPlan, lane: Lane) -> CompactionCommit:
        if (state := self._committer.manifest.tables.get(plan.table)) is None:
            raise CommitConflictError(f"compaction of {plan.table!r}: there is no such table any more")
        try:
            merged = await self._merger.merge(plan, self._layout_of(state), lane, partial(self._step, plan, lane.epoch))
        except ObjectMissingError as error:
            # Another compactor may have replaced an input, and the collector have taken it.
            manifest = await self._committer.refresh()
            if all(f.name in manifest.files for f in plan.inputs):
                raise
            raise CommitConflictError(f"compaction of {plan.table!r}: {error}") from error
        return CompactionCommit(
            table=plan.table,
            timeline=plan.timeline,
            epoch=lane.epoch,
            owner=lane.owner,
            sequence=SequenceNumber(lane.sequence),
            inputs=plan.inputs,
            output=merged,
        )

    async def _step(self, plan: CompactionPlan, epoch: int, rows: int) -> None:
        """Some rows were merged: go on only while there is a point in it."""
        now = self._committer.manifest.compaction_progress
        if now.epoch != epoch:
            raise CompactorSupersededError(f"compactor {now.compactor_id or '(none)'} claimed epoch {now.epoch}")
        if self._on_rows is not None:
            self._on_rows(plan, rows)
        if not self._stands_by:
            await self._heartbeat(epoch)

    async def _heartbeat(self, epoch: int) -> None:
        """Show whoever waits for the claim that this merge is at work, once in a while."""
        now = self._clock.monotonic()
        if now - self._shown_at < min(self._settings.compaction_takeover_s / 4, _HEARTBEAT_S_MAX):
            return
        self._shown_at = now
        beat = CompactorHeartbeat(epoch=epoch, owner=f"c{epoch}-{LANES}-0")
        try:
            await self._committer.write_manifest_safely(beat.apply)
        except (StorageUnavailableError, CommitUnknownError) as error:
            logger.warning("no heartbeat, the merge goes on: %s", error, extra=self._fields())

    def _merged(self, plan: CompactionPlan, commit: CompactionCommit, took: float) -> None:
        rows = sum(f.rows for f in plan.inputs)
        written = sum(f.size for f in commit.output)
        self._count(
            runs=1,
            bytes_in=plan.nbytes,
            bytes_out=written,
            rows_in=rows,
            rows_dropped=rows - sum(f.rows for f in commit.output),
            seconds=took,
        )
        logger.info(
            "merged %d files, %d bytes into %d files, %d bytes in %.3f s",
            len(plan.inputs), plan.nbytes, len(commit.output), written, took, extra=self._fields(plan, took),
        )  # fmt: skip

    def _fields(self, plan: CompactionPlan | None = None, took: float | None = None) -> dict[str, Any]:
        table = None if plan is None else plan.table
        return context(store_id=self._committer.manifest.store_id, table=table, duration_s=took)

    def _count(self, **more: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})
