"""The simulator finds planted bugs: each is put in by replacing a method, and a few schedules must notice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest

from statebackend import compaction_merge, compactor, flusher, garbage_collector, manifest, manifest_store
from statebackend.errors import CommitConflictError, FencedError
from statebackend.ids import AttemptId, CheckpointId, ManifestNumber, SequenceNumber, StoreId, WriterEpoch, WriterId
from statebackend.manifest import CompactionCommit, Manifest, RetainedCheckpoint
from statebackend.objectstore import PutResult
from statebackend.retention import KeptCheckpoint, RollbackCommit
from statebackend.schema_history import SchemaHistory
from statebackend.sstable import SSTableMeta
from statebackend.store import StateStore
from tests.simulation import scheduler
from tests.simulation.job import SEEN
from tests.simulation.simulate import Profile, simulate

Bug = Callable[[], Any]


def sstable_after_its_manifest() -> Any:
    upload = flusher.upload_sstable
    running: set[asyncio.Task[None]] = set()

    async def hurried(*args: Any) -> None:
        running.add(asyncio.get_running_loop().create_task(upload(*args)))

    return mock.patch.object(flusher, "upload_sstable", hurried)


def conflict_taken_for_a_fence() -> Any:
    write = manifest_store.FenceableManifest.write

    async def fenced(self: Any, transition: Any, deadline: float) -> Any:
        written = await write(self, transition, deadline)
        if written is None:
            raise FencedError("somebody took the number")
        return written

    return mock.patch.object(manifest_store.FenceableManifest, "write", fenced)


def lost_response_taken_for_a_fence() -> Any:
    write = manifest_store.FenceableManifest.write

    async def not_read_back(self: Any, transition: Any, deadline: float) -> Any:
        create = manifest_store.ManifestStore.create

        async def creates(_: Any, candidate: Any) -> PutResult:
            if (result := await create(self._store, candidate)) is PutResult.EXISTS:
                raise FencedError("the number exists, so another writer must have taken it")
            return result

        with mock.patch.object(self._store, "create", creates.__get__(self._store)):
            return await write(self, transition, deadline)

    return mock.patch.object(manifest_store.FenceableManifest, "write", not_read_back)


def deleted_number_committed_again() -> Any:
    async def trusted(self: Any, candidate: Any) -> bool:
        return True

    return mock.patch.object(manifest_store.FenceableManifest, "_is_history", trusted)


def probe_trusted_without_another_look() -> Any:
    async def probes(self: Any, known: Any) -> Any:
        newest = known
        while (following := await self.read(newest.number + 1)) is not None:
            newest = following
        return newest

    return mock.patch.object(manifest_store.ManifestStore, "latest", probes)


def files_added_twice_after_an_unknown_outcome() -> Any:
    apply = manifest.CheckpointCommit.apply

    def forgets_its_mark(self: Any, onto: Any) -> Any:
        return apply(self, replace(onto, low_marks={k: v for k, v in onto.low_marks.items() if k != self.owner}))

    return mock.patch.object(manifest.CheckpointCommit, "apply", forgets_its_mark)


def tombstone_dropped_too_early() -> Any:
    def merge(layout: Any, pieces: Any, plan: Any) -> Any:
        return layout.merge(pieces, watermark=plan.watermark, drop_tombstones=True)

    return mock.patch.object(compaction_merge, "_merge_pieces", merge)


def expired_row_resurrected_by_a_merge() -> Any:
    apply = manifest.CompactionCommit.apply

    def puts_back_the_table(self: Any, onto: Any) -> Any:
        after = apply(self, onto)
        state = replace(after.tables[self.table], watermark=None)
        return replace(after, tables={**after.tables, self.table: state})

    return mock.patch.object(manifest.CompactionCommit, "apply", puts_back_the_table)


def expired_row_dropped_with_an_older_one_below() -> Any:
    """By ttl every row is judged alone, so that a merge lets go of the one that hides an older one."""
    merge = compaction_merge._merge_pieces

    def merges(layout: Any, pieces: Any, plan: Any) -> Any:
        alive = [p.filter(pa.array(~layout.expired(p, plan.watermark))) for p in pieces]
        return merge(layout, alive if layout.spec.ttl_field is not None else pieces, plan)

    return mock.patch.object(compaction_merge, "_merge_pieces", merges)


def merge_by_the_live_watermark() -> Any:
    run = compactor.Compactor._run

    async def runs(self: Any, plan: Any, lane: Any, epoch: int) -> None:
        store = self._layout_of.__self__
        if isinstance(store, StateStore) and plan.table in store._tables:
            plan = replace(plan, watermark=store._tables[plan.table].watermark)
        await run(self, plan, lane, epoch)

    return mock.patch.object(compactor.Compactor, "_run", runs)


def collector_without_the_low_mark() -> Any:
    verdict = garbage_collector._verdict

    def hasty(found: Any, name: str) -> tuple[bool, str]:
        goes, why = verdict(found, name)
        return goes or why.startswith("its owner may still commit it"), why

    return mock.patch.object(garbage_collector, "_verdict", hasty)


def early_flush_below_the_low_mark() -> Any:
    """The mark is the last sequence allotted when the manifest is made, not the last before the barrier."""
    apply = manifest.CheckpointCommit.apply
    init = flusher.MemtableFlusher.__init__
    stores: dict[str, StateStore] = {}

    def inits(self: Any, *args: Any) -> None:
        init(self, *args)
        stores[self.owner] = args[-1].__self__

    def marks(self: Any, onto: Any) -> Any:
        after = apply(self, onto)
        return replace(after, low_marks={**after.low_marks, self.owner: stores[self.owner]._sequence})

    patches = ExitStack()
    patches.enter_context(mock.patch.object(flusher.MemtableFlusher, "__init__", inits))
    patches.enter_context(mock.patch.object(manifest.CheckpointCommit, "apply", marks))
    return patches


def early_flush_leaves_older_rows_in_memory() -> Any:
    """What a failed checkpoint has uploaded stays a MemTable, which reads as newer than the early file."""

    async def skips(self: Any, frozen: Any, layout: Any, on_upload: Any) -> None:
        await self._clock.sleep(0.5)  # it frees nothing: a writer tries until its time is up
        async with self._turn:
            for one in frozen:
                if one.sequence > self._committed_mark and one.sequence not in self._uploaded:
                    encoded = await self._flush_one(one, layout, one.watermark)
                    on_upload(one, None if encoded is None else encoded.meta, encoded)

    return mock.patch.object(flusher.MemtableFlusher, "flush_early", skips)


def collector_without(kind: str) -> Any:
    kept = garbage_collector.kept_manifests

    async def forgets(*args: Any) -> dict[str, Manifest]:
        return {why: manifest for why, manifest in (await kept(*args)).items() if not why.startswith(kind)}

    return mock.patch.object(garbage_collector, "kept_manifests", forgets)


BUGS: dict[str, tuple[Bug, str, range]] = {
    "a manifest is written before its SSTable": (sstable_after_its_manifest, "do not exist", range(10)),
    "a conflict is taken for a fence": (conflict_taken_for_a_fence, "is fenced", range(100)),
    "a lost response is taken for a fence": (lost_response_taken_for_a_fence, "is fenced", range(100)),
    "a deleted manifest number is committed again": (
        deleted_number_committed_again,
        "not in the history",
        range(86, 286),
    ),
    "a probed manifest is trusted without another look": (
        probe_trusted_without_another_look,
        "not in the history",
        range(4, 104),
    ),
    "files are added again after an unknown outcome": (
        files_added_twice_after_an_unknown_outcome,
        "table log",
        range(54, 254),
    ),
    "a merge brings expired rows back": (expired_row_resurrected_by_a_merge, "extra", range(50)),
    "a merge brings a row back that an expired one hid": (
        expired_row_dropped_with_an_older_one_below,
        "table leases",
        range(23, 123),
    ),
    "a merge drops by the live watermark": (merge_by_the_live_watermark, "missing", range(70, 270)),
    "the collector ignores the low mark": (collector_without_the_low_mark, "do not exist", range(100)),
    "the collector ignores branches": (lambda: collector_without("branch "), "but branch", range(1000, 1100)),
    "the collector ignores pins": (lambda: collector_without("pin "), "but pin", range(1051, 1151)),
    "an early flush is below the low mark": (early_flush_below_the_low_mark, "missing", range(200)),
    "an early flush leaves older rows in memory": (early_flush_leaves_older_rows_in_memory, "extra", range(20, 220)),
}


def compactor_without_the_epoch_check() -> Any:
    return mock.patch.object(manifest, "_check_claim")


def claim_never_taken_over_again() -> Any:
    async def waits_for_ever(self: Any, over: Any) -> None:
        await self._clock.sleep(1.0)

    patches = ExitStack()
    patches.enter_context(mock.patch.object(compactor.Compactor, "_claim", waits_for_ever))
    patches.enter_context(mock.patch.object(scheduler, "STEPS_MAX", 10_000))
    return patches


def heartbeat_under_the_name_of_a_lane() -> Any:
    apply = manifest.CompactorHeartbeat.apply

    def beats(self: Any, onto: Any) -> Any:
        return apply(replace(self, owner=f"c{self.epoch}-0-0"), onto)

    return mock.patch.object(manifest.CompactorHeartbeat, "apply", beats)


def one_low_mark_for_all_lanes() -> Any:
    return mock.patch.object(manifest.CompactionCommit, "apply", _marks_every_lane(manifest.CompactionCommit.apply))


def _marks_every_lane(apply: Any) -> Any:
    def marks(self: Any, onto: Any) -> Any:
        after = apply(self, onto)
        lanes = {f"c{self.epoch}-{lane}-0": 1 << 30 for lane in range(compactor.LANES)}
        return replace(after, low_marks={**after.low_marks, **lanes})

    return marks


def collector_ignores_what_the_writer_reads() -> Any:
    kept = garbage_collector.kept_manifests

    async def fewer(objects: Any, manifests: Any, latest: Any) -> Any:
        return await kept(objects, manifests, replace(latest, writer_reads=()))

    return mock.patch.object(garbage_collector, "kept_manifests", fewer)


def beside_compactors(seed: int) -> Profile:
    return Profile.of_compactors(random.Random(seed))


def with_stalls(seed: int) -> Profile:
    """Many requests stall, and what is garbage goes at once."""
    profile = beside_compactors(seed)
    return replace(
        profile, faults=replace(profile.faults, stall=0.15), settings=replace(profile.settings, gc_interval_s=0.1)
    )


COMPACTION_BUGS: dict[str, tuple[Bug, str, Callable[[int], Profile], range]] = {
    "a compactor commits under an epoch that was superseded": (
        compactor_without_the_epoch_check,
        "sst/c",  # named and gone, or gone while it is named
        with_stalls,
        range(10, 110),
    ),
    "a tombstone is dropped too early": (tombstone_dropped_too_early, "table", beside_compactors, range(70, 120)),
    "a claim is never taken over again": (claim_never_taken_over_again, "never ends", beside_compactors, range(13, 53)),
    "a merge decides for the files of another one": (
        one_low_mark_for_all_lanes,
        "do not exist",
        beside_compactors,
        range(69, 169),
    ),
    "a heartbeat decides for the files of a lane": (
        heartbeat_under_the_name_of_a_lane,
        "do not exist",
        beside_compactors,
        range(100, 150),
    ),
    "the collector takes what the writer may read": (
        collector_ignores_what_the_writer_reads,
        "was deleted, but manifest",
        beside_compactors,
        range(10, 110),
    ),
}


@pytest.mark.parametrize(("bug", "problem", "profile", "seeds"), COMPACTION_BUGS.values(), ids=COMPACTION_BUGS.keys())
def test_the_simulator_finds_a_planted_bug_of_compactors(
    bug: Bug, problem: str, profile: Callable[[int], Profile], seeds: range
) -> None:
    found: list[str] = []
    for seed in seeds:
        with bug():
            if (violated := simulate(seed, profile(seed)).problem) is not None:
                found.append(violated)
                if problem in violated:
                    return
    pytest.fail(f"not found in {len(seeds)} schedules; others were: {found}")


@pytest.mark.parametrize(("bug", "problem", "seeds"), BUGS.values(), ids=BUGS.keys())
def test_the_simulator_finds_a_planted_bug(bug: Bug, problem: str, seeds: range) -> None:
    found: list[str] = []
    for seed in seeds:
        with bug():
            if (violated := simulate(seed).problem) is not None:
                found.append(violated)
                if problem in violated:
                    return
    pytest.fail(f"not found in {len(seeds)} schedules; others were: {found}")


def test_a_merge_that_a_rollback_overtook_is_abandoned() -> None:
    """Its inputs may be there again after the rollback, but so may be the rows that it dropped by a later watermark."""
    state = manifest.TableState(
        spec=SEEN,
        history=SchemaHistory.begin(SEEN.schema),
        watermark=10,
        files=tuple(sstable(n, 0, 20) for n in (1, 2)),
    )
    before = Manifest(
        number=ManifestNumber(5), parent_attempt=AttemptId("a4"), store_id=StoreId("s"), writer_epoch=WriterEpoch(1),
        writer_id=WriterId("w"), attempt_id=AttemptId("a5"), created_ms=0, tables={"seen": state},
        checkpoint_id=CheckpointId(3),
        retained=(RetainedCheckpoint(checkpoint_id=CheckpointId(3), manifest_number=ManifestNumber(4), created_ms=0),),
    )  # fmt: skip
    target = replace(before, tables={"seen": replace(state, watermark=None)})
    merged = CompactionCommit(
        table="seen", timeline=0, epoch=0, owner="c1-0-0", sequence=SequenceNumber(1), inputs=state.files,
        output=(sstable(3, 10, 20),),
    )  # fmt: skip
    after = RollbackCommit(target=KeptCheckpoint(manifest=target)).apply(before)
    assert merged.apply(before).tables["seen"].files == merged.output
    with pytest.raises(CommitConflictError, match="rolled back"):
        merged.apply(after)
    lost = replace(merged, timeline=after.timeline).apply(after)  # what would be without the rule
    assert lost.tables["seen"].watermark is None
    assert min(f.time_min for f in lost.tables["seen"].files) == 10


def sstable(sequence: int, time_min: int, time_max: int) -> SSTableMeta:
    return SSTableMeta(
        name=f"sst/w1-0-0-{sequence}.arrow", level=0, run=None, sequence=sequence, rows=1, size=100, tail_bytes=10,
        tail_checksum=0, hash_min=0, hash_max=9, time_min=time_min, time_max=time_max,
    )  # fmt: skip
