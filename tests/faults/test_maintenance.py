"""Collection, savepoints, rollback and verification, beside a running writer and across crashes."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pyarrow as pa
import pytest

from statebackend import CheckpointNotFoundError, FencedError, StateStore, StoreSettings
from statebackend.errors import CorruptionError
from statebackend.garbage_collector import GarbageCollector, plan_collection
from statebackend.maintenance import collect, create_savepoint, drop_savepoint, explain_object, rollback
from statebackend.manifest_store import ManifestStore, manifest_name
from statebackend.verification import verify
from tests.support.faulty_objectstore import CrashedError, FaultPlan, FaultyObjectStore
from tests.support.stores import KV, World, contents, job, put

FEW = StoreSettings(retained_checkpoints=2, l0_files_max=2, block_rows=16, gc_interval_s=None)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "db")


def fill(store: StateStore, steps: range) -> None:
    for step in steps:
        put(store, **{f"k{step % 5}": step, "step": step})
        store.checkpoint(job(step)).result(10)


def names(world: World, prefix: str) -> list[str]:
    return asyncio.run(world.objects.list(prefix))


def state_of(world: World) -> dict[str, int]:
    with world.open(seed=99) as store:
        return contents(store)


def collector(world: World, plan: FaultPlan | None = None) -> GarbageCollector:
    objects = FaultyObjectStore(world.objects, plan or FaultPlan())
    return GarbageCollector(objects, ManifestStore(objects))


def test_a_long_run_stays_bounded(world: World) -> None:
    with world.open(settings=FEW) as store:
        counts = []
        for round_ in range(6):
            fill(store, range(round_ * 20, round_ * 20 + 20))
            asyncio.run(collector(world).run())
            counts.append((len(names(world, "manifest/")), len(names(world, "sst/"))))
        assert max(m for m, _ in counts) <= 8, counts
        assert max(s for _, s in counts) <= 12, counts
        expected = contents(store)
    assert state_of(world) == expected


def test_the_running_store_collects_by_itself(world: World) -> None:
    settings = StoreSettings(retained_checkpoints=1, l0_files_max=1, gc_interval_s=0.02)
    with world.open(settings=settings) as store:
        for step in range(60):
            fill(store, range(step, step + 1))
            assert contents(store)["step"] == step
        assert store.health().details["objects_collected"] > 0
        assert store.health().ok, store.health()


def test_every_kept_checkpoint_is_readable_after_every_collection(world: World) -> None:
    with world.open(settings=FEW) as store:
        for step in range(15):
            fill(store, range(step, step + 1))
            asyncio.run(collector(world).run())
            live = asyncio.run(collector(world).look())
            present = set(names(world, "sst/"))
            for why, manifest in live.kept.items():
                assert set(manifest.files) <= present, why


def test_a_crash_at_any_call_of_a_collection_leaves_a_store_that_works(world: World) -> None:
    with world.open(settings=FEW) as store:
        fill(store, range(12))
        expected = contents(store)
    call = 0
    while True:
        call += 1
        plan = FaultPlan()
        plan.crash(nth=call)
        try:
            asyncio.run(collector(world, plan).run())
            break
        except CrashedError:
            live = asyncio.run(collector(world).look())
            for manifest in live.kept.values():
                assert set(manifest.files) <= set(live.sstables)
    assert call > 5
    assert plan_collection(asyncio.run(collector(world).look())).objects == ()
    assert state_of(world) == expected


def test_what_a_running_writer_may_still_commit_is_never_collected(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan, settings=FEW) as store:
        fill(store, range(3))
        put(store, fresh=1)
        held = plan.hang("put_if_absent", "manifest/*")
        future = store.checkpoint(job(3))
        held.wait_until_reached()
        uploaded = [n for n in names(world, "sst/") if n not in store.manifest.files]
        assert uploaded
        asyncio.run(collector(world).run())
        assert uploaded[-1] in names(world, "sst/")
        held.release()
        future.result(10)
        assert contents(store)["fresh"] == 1
    assert state_of(world)["fresh"] == 1


def test_the_orphans_of_a_fenced_writer_go(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan, seed=1, settings=FEW) as old:
        put(old, a=1)
        held = plan.hang("put_if_absent", "manifest/*")
        future = old.checkpoint(job(1))
        held.wait_until_reached()
        with world.open(seed=2, settings=FEW) as new:
            assert names(world, "sst/") == ["sst/w1-0-0-1.arrow"]
            asyncio.run(collector(world).run())
            assert names(world, "sst/") == []
            held.release()
            with pytest.raises(FencedError):
                future.result(10)
            fill(new, range(2))


def test_a_missing_manifest_of_a_kept_checkpoint_stops_the_collection(world: World) -> None:
    with world.open(settings=FEW) as store:
        fill(store, range(5))
        number = int(store.manifest.retained[0].manifest_number)
    asyncio.run(world.objects.delete(manifest_name(number)))
    before = names(world, "")
    with pytest.raises(CorruptionError, match=manifest_name(number)):
        asyncio.run(collector(world).run())
    assert names(world, "") == before


def test_a_savepoint_outlives_retention_and_can_be_rolled_back_to(url: str) -> None:
    with StateStore.open(url, FEW) as store:
        fill(store, range(3))
        then = contents(store)
        savepoint = create_savepoint(url, "before")  # beside the running job, which is not fenced
        fill(store, range(3, 12))
        assert contents(store) != then
    collect(url)
    assert verify(url).problems == ()
    assert rollback(url, savepoint="before").timeline == 1
    with StateStore.open(url, FEW) as store:
        assert contents(store) == then
        assert store.restored is not None
        assert store.restored.job == job(2)
        assert store.restored.checkpoint_id > 12, "ids are never used twice"
        fill(store, range(100, 103))
    drop_savepoint(url, "before")
    collect(url)
    assert not (Path(url) / savepoint.object_name).exists()
    assert verify(url).problems == ()
    with pytest.raises(CheckpointNotFoundError, match="no savepoint 'before'"):
        drop_savepoint(url, "before")


def test_a_rollback_to_a_retained_checkpoint_fences_the_job(url: str) -> None:
    with StateStore.open(url, FEW) as store:
        fill(store, range(1, 5))
        rollback(url, checkpoint_id=3)
        put(store, more=1)
        with pytest.raises(FencedError):
            store.checkpoint(job(9)).result(10)
    with StateStore.open(url, FEW) as again:
        assert contents(again)["step"] == 3
    with pytest.raises(CheckpointNotFoundError, match="checkpoint 1 is not retained"):
        rollback(url, checkpoint_id=1)
    with pytest.raises(ValueError, match="either"):
        rollback(url)


def test_every_retained_checkpoint_can_be_gone_back_to_and_forward_again(url: str) -> None:
    """A rollback takes no retained checkpoint away, the undone ones neither."""
    many = StoreSettings(retained_checkpoints=15, l0_files_max=2, gc_interval_s=None)
    with StateStore.open(url, many) as store:
        fill(store, range(15))
    for step in (2, 14, 0):
        rollback(url, checkpoint_id=step + 1)
        collect(url)
        with StateStore.open(url, many) as store:
            assert contents(store)["step"] == step
            assert store.restored is not None
            assert store.restored.job == job(step)
            assert len(store.manifest.retained) > 15
    assert verify(url).problems == ()
    with StateStore.open(url, many) as store:
        fill(store, range(20, 21))
        assert len(store.manifest.retained) == 15


def test_savepoints_expire_by_their_time(url: str) -> None:
    with StateStore.open(url, FEW) as store:
        fill(store, range(2))
        create_savepoint(url, "short", expires_ms=1)
        create_savepoint(url, "long")
        with pytest.raises(ValueError, match="already"):
            create_savepoint(url, "long")
        fill(store, range(2, 4))
        assert sorted(store.manifest.savepoints) == ["long"]


def test_a_dry_run_deletes_nothing_and_every_verdict_has_a_reason(url: str) -> None:
    with StateStore.open(url, FEW) as store:
        fill(store, range(12))
    before = sorted(p.name for p in Path(url).rglob("*") if p.is_file())
    planned = collect(url, dry_run=True)
    assert sorted(p.name for p in Path(url).rglob("*") if p.is_file()) == before
    assert planned.objects
    assert "goes: nobody names it" in explain_object(url, planned.sstables[0])
    assert "goes: no kept checkpoint needs it" in explain_object(url, planned.manifests[0])
    assert "named by" in explain_object(url, next(iter(store.manifest.files)))
    assert "not a name that this store gives" in explain_object(url, "sst/mine.arrow")
    assert collect(url) == planned


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_verify_finds_every_kind_of_damage_and_names_the_file(url: str, damage: str) -> None:
    with StateStore.open(url, FEW) as store:
        store.table(KV).write(
            pa.record_batch({"key": [f"{i}" for i in range(100)], "value": range(100)}, schema=KV.schema)
        )
        store.checkpoint(job(1)).result(10)
        name = next(iter(store.manifest.files))
    assert verify(url).problems == ()
    path = Path(url) / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[random.Random(0).randrange(len(data) // 2, len(data))] ^= 4
        path.write_bytes(data if damage == "flip" else data[:-20])
    (problem,) = verify(url).problems
    assert name in problem
