"""One compactor of a store at a time: claims, supersedes, stands by, takes over, releases."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from statebackend import StateStore, StoreSettings
from statebackend.compaction_tool import compact
from statebackend.errors import CommitConflictError, CompactorSupersededError, StorageUnavailableError
from statebackend.ids import AttemptId, ManifestNumber, SequenceNumber, StoreId, WriterEpoch, WriterId
from statebackend.inspect import read_store
from statebackend.maintenance import collect
from statebackend.manifest import (
    CompactionCommit,
    CompactorClaim,
    CompactorHeartbeat,
    CompactorRelease,
    Manifest,
    TableState,
)
from statebackend.manifest_store import FenceableManifest
from statebackend.objectstore import Data, FsspecObjectStore, PutResult
from statebackend.schema_history import SchemaHistory
from statebackend.toolbox import Toolbox, with_store
from statebackend.verification import verify
from tests.support.stores import KV, contents, put

QUIET = StoreSettings(compaction="none", l0_files_max=2, gc_interval_s=None)


def manifest(**fields: object) -> Manifest:
    first = Manifest(
        number=ManifestNumber(5), parent_attempt=AttemptId("a4"), store_id=StoreId("s"), writer_epoch=WriterEpoch(1),
        compactor_epoch=3, compactor_id="one", writer_id=WriterId("w"), attempt_id=AttemptId("a5"), created_ms=0,
        low_marks={"w1-0-0": SequenceNumber(4), "c3-0-0": SequenceNumber(7), "c3-1-0": SequenceNumber(2)},
        tables={"kv": TableState(spec=KV, history=SchemaHistory.begin(KV.schema))},
    )  # fmt: skip
    return replace(first, **fields)  # type: ignore[arg-type]


def merge(epoch: int) -> CompactionCommit:
    return CompactionCommit(
        table="kv", timeline=0, epoch=epoch, owner=f"c{epoch}-0-0", sequence=SequenceNumber(9), inputs=(), output=()
    )


def test_a_claim_raises_the_epoch_and_ends_the_marks_of_older_compactors_alone() -> None:
    claimed = CompactorClaim(compactor_id="two").apply(manifest())
    assert (claimed.compactor_epoch, claimed.compactor_id, claimed.writer_epoch) == (4, "two", 1)
    assert claimed.low_marks == {"w1-0-0": 4}


def test_a_superseded_compactor_cannot_commit_what_may_have_been_collected() -> None:
    assert merge(3).apply(manifest()).low_marks["c3-0-0"] == 9
    claimed = CompactorClaim(compactor_id="two").apply(manifest())
    with pytest.raises(CompactorSupersededError, match="epoch 3 is superseded"):
        merge(3).apply(claimed)
    with pytest.raises(CompactorSupersededError):
        CompactorRelease(epoch=3).apply(claimed)


def test_opening_as_writer_supersedes_whoever_compacted() -> None:
    with pytest.raises(CompactorSupersededError):
        merge(3).apply(manifest().opened_by_writer())


def test_after_a_release_nobody_may_commit_before_a_new_claim() -> None:
    released = CompactorRelease(epoch=3).apply(manifest())
    assert (released.compactor_epoch, released.compactor_id) == (4, None)
    for epoch in (3, 5):
        with pytest.raises(CompactorSupersededError):
            merge(epoch).apply(released)


def test_a_claim_over_a_stalled_one_fails_when_that_one_goes_on_after_all() -> None:
    seen = manifest().compaction_progress
    CompactorClaim(compactor_id="two", over=seen).apply(manifest())
    with pytest.raises(CommitConflictError):
        CompactorClaim(compactor_id="two", over=seen).apply(merge(3).apply(manifest()))


def test_a_heartbeat_is_progress_that_decides_nothing_for_any_file() -> None:
    beat = CompactorHeartbeat(epoch=3, owner="c3-2-0")
    once = beat.apply(manifest())
    assert once.low_marks == {**manifest().low_marks, "c3-2-0": 1}
    seen = once.compaction_progress
    assert seen != manifest().compaction_progress
    with pytest.raises(CommitConflictError, match="is at work"):
        CompactorClaim(compactor_id="two", over=seen).apply(beat.apply(once))
    with pytest.raises(CompactorSupersededError):
        beat.apply(CompactorClaim(compactor_id="two").apply(once))


def fill(store: StateStore, files: int, first: int = 0) -> None:
    for step in range(first, first + files):
        put(store, **{f"k{i}": step for i in range(100)}, **{f"n{step}": step})
        store.flush()


def eventually(condition: Callable[[], bool], deadline_s: float = 30.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_a_compactor_elsewhere_merges_beside_a_running_writer_and_releases_its_claim(tmp_path: Path) -> None:
    with StateStore.open(tmp_path, QUIET) as store:
        fill(store, 5)
        summary = compact(str(tmp_path), settings=QUIET)
        assert (summary.stats.runs, summary.superseded, summary.stopped) == (1, False, False)
        assert summary.stats.rows_in - summary.stats.rows_dropped == 105
        latest = read_store(str(tmp_path)).latest
        assert [f.level for f in latest.tables["kv"].files] == [1]
        assert (latest.compactor_id, latest.writer_epoch) == (None, 1)
        fill(store, 1, first=5)  # the writer goes on on top of it
        assert [f.level for f in store.manifest.tables["kv"].files] == [1, 0]
        assert contents(store)["k0"] == 5
    assert not verify(str(tmp_path)).problems


def test_a_run_that_finds_nothing_due_commits_nothing(tmp_path: Path) -> None:
    with StateStore.open(tmp_path, QUIET) as store:
        fill(store, 2)
    before = read_store(str(tmp_path)).latest.number
    assert not compact(str(tmp_path), settings=QUIET).claimed
    assert read_store(str(tmp_path)).latest.number == before


def test_everything_is_merged_into_one_run_per_table_when_asked(tmp_path: Path) -> None:
    with StateStore.open(tmp_path, QUIET) as store:
        fill(store, 2)
        store.table(KV).delete(pa.record_batch({"key": ["k7"]}))
        store.flush()
    summary = compact(str(tmp_path), settings=replace(QUIET, l0_files_max=8), everything=True)
    assert summary.stats.runs == 1
    (file,) = read_store(str(tmp_path)).latest.files.values()
    assert (file.level, file.rows) == (1, 101), "the tombstone is gone, for nothing older remains"
    assert not compact(str(tmp_path), settings=QUIET, everything=True).claimed


def test_the_writer_takes_over_again_when_the_claim_was_released(tmp_path: Path) -> None:
    settings = replace(QUIET, compaction="embedded", compaction_takeover_s=1e6)
    with StateStore.open(tmp_path, settings) as store:
        fill(store, 2)
        compact(str(tmp_path), settings=replace(settings, l0_files_max=1))
        fill(store, 3, first=2)
        eventually(lambda: store._compactor.progress.completed == 1)
        assert store.manifest.compactor_id == store.manifest.writer_id
        assert store._compactor.stats.claims == 1
        assert store.health().ok


def test_the_writer_stands_by_while_another_compactor_holds_the_claim_and_takes_over_from_a_dead_one(
    tmp_path: Path,
) -> None:
    claim_for_ever(tmp_path)
    settings = replace(QUIET, compaction="embedded", compaction_takeover_s=1e6)
    with StateStore.open(tmp_path, settings) as store:
        claim_for_ever(tmp_path)
        fill(store, 5)
        eventually(lambda: store._compactor._watched is not None)
        assert store._compactor.progress.completed == 0
        assert store.manifest.compactor_id == "dead"
    settings = replace(settings, compaction_takeover_s=0.05)
    with StateStore.open(tmp_path, settings) as store:
        claim_for_ever(tmp_path)
        fill(store, 1, first=5)
        eventually(lambda: store._compactor.progress.completed == 1)
        assert store._compactor.stats.claims == 1
        assert contents(store)["k0"] == 5


def claim_for_ever(path: Path) -> None:
    """Another compactor claims the store and dies."""

    async def claim(tools: Toolbox) -> None:
        if await tools.find_latest() is not None:
            await FenceableManifest.init_compactor(tools.manifests, "dead", tools.clock, tools.rng, 5.0)

    with_store(str(path), None, claim)


def test_a_long_merge_elsewhere_renews_its_claim_at_every_step_that_comes_late(tmp_path: Path) -> None:
    """Steps are late here always, or never: the interval of heartbeats is a share of the time to take over."""
    for takeover_s, beats in ((1e-6, True), (1e6, False)):
        url = str(tmp_path / f"{beats}")
        settings = replace(QUIET, block_rows=8, compaction_bytes=700, compaction_takeover_s=takeover_s)
        with StateStore.open(url, settings) as store:
            fill(store, 4)
            before = store.manifest.number
            seen = []
            summary = compact(
                url,
                settings=settings,
                everything=True,
                on_rows=lambda *_, url=url, seen=seen: seen.append(read_store(url).latest.compaction_progress),
            )
            assert summary.stats.runs == 1
            assert len(seen) > 5
            assert len(set(seen)) == (len(seen) if beats else 1)
            commits = read_store(url).latest.number - before
            assert commits == 3 + (len(seen) if beats else 0), "claim, merge, release, and one heartbeat a step"
            assert contents(store)["k0"] == 3


def test_a_merge_elsewhere_that_was_superseded_ends_at_its_next_heartbeat(tmp_path: Path) -> None:
    settings = replace(QUIET, block_rows=8, compaction_bytes=700, compaction_takeover_s=1e-6)
    with StateStore.open(tmp_path, settings) as store:
        fill(store, 4)
        steps = []

        def superseded_after_the_second(*_: object) -> None:
            steps.append(1)
            if len(steps) == 2:
                claim_for_ever(tmp_path)

        summary = compact(str(tmp_path), settings=settings, everything=True, on_rows=superseded_after_the_second)
        assert (summary.superseded, summary.stats.runs, len(steps)) == (True, 0, 2)


def test_a_heartbeat_that_fails_does_not_end_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(QUIET, block_rows=8, compaction_bytes=700, compaction_takeover_s=1e-6)
    write = FenceableManifest.write

    async def refuses_heartbeats(
        self: FenceableManifest, transition: Callable[..., Manifest], deadline: float
    ) -> object:
        if isinstance(getattr(transition, "__self__", None), CompactorHeartbeat):
            raise StorageUnavailableError("not now")
        return await write(self, transition, deadline)

    with StateStore.open(tmp_path, settings) as store:
        fill(store, 4)
        monkeypatch.setattr(FenceableManifest, "write", refuses_heartbeats)
        assert compact(str(tmp_path), settings=settings, everything=True).stats.runs == 1


def test_a_stalled_compactor_ends_quietly_and_its_output_is_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stalls with its output written and not committed; another one claims, the collector takes the output."""
    reached, release = threading.Event(), threading.Event()
    create = FsspecObjectStore.put_if_absent

    async def stall(self: FsspecObjectStore, name: str, data: Data) -> PutResult:
        result = await create(self, name, data)
        if name.startswith("sst/c2-"):
            reached.set()
            await asyncio.get_running_loop().run_in_executor(None, release.wait)
        return result

    monkeypatch.setattr(FsspecObjectStore, "put_if_absent", stall)
    with StateStore.open(tmp_path, QUIET) as store:
        fill(store, 5)
        ended = []
        stalled = threading.Thread(target=lambda: ended.append(compact(str(tmp_path), settings=QUIET)))
        stalled.start()
        assert reached.wait(30)
        other = compact(str(tmp_path), settings=QUIET)
        assert other.stats.runs == 1
        collect(str(tmp_path))
        assert not list(tmp_path.glob("sst/c2-*"))
        release.set()
        stalled.join(30)
        assert ended[0].superseded
        assert ended[0].stats.runs == 0
        fill(store, 1, first=5)
        assert contents(store)["k0"] == 5
    assert not verify(str(tmp_path)).problems


def test_one_crowded_table_that_cannot_be_merged_keeps_no_other_waiting(tmp_path: Path) -> None:
    other = replace(KV, name="other")
    with StateStore.open(tmp_path, QUIET) as store:
        for step in range(5):
            put(store, k=step)
            store.table(other).write(pa.record_batch({"key": ["a"], "value": [step]}, schema=KV.schema))
            store.flush()
        broken = store.manifest.tables["other"].files[0].name
    (tmp_path / broken).write_bytes(b"not an SSTable")
    with pytest.raises(Exception, match=r"truncated|checksum"):
        compact(str(tmp_path), settings=QUIET)
    latest = read_store(str(tmp_path)).latest
    assert [f.level for f in latest.tables["kv"].files] == [1]
    assert latest.compactor_id is None


def test_a_writer_keeps_reading_what_a_compactor_and_a_collector_elsewhere_replaced_meanwhile(tmp_path: Path) -> None:
    """Its view may be older than everything retained: a merge of its own after its last checkpoint."""
    settings = replace(QUIET, compaction="embedded", cache_bytes=1, retained_checkpoints=1)
    with StateStore.open(tmp_path, settings) as store:
        put(store, **{f"large{i}": i for i in range(5000)})
        fill(store, 3)
        eventually(lambda: store._compactor.progress.completed == 1)
        fill(store, 3, first=3)
        eventually(lambda: store._compactor.progress.completed == 2)
        assert len({f.run for f in store.manifest.tables["kv"].files}) == 2
        assert compact(str(tmp_path), settings=settings, everything=True).stats.runs == 1
        claim_for_ever(tmp_path)  # two more manifests: what the writer reads is named by none of the newest
        claim_for_ever(tmp_path)
        collect(str(tmp_path))
        assert contents(store)["k0"] == 5
