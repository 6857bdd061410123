"""Branches of a store: what they share, what each owns, and what a crash or a second hand leaves behind."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from statebackend import (
    CheckpointNotFoundError,
    JobState,
    ObjectMissingError,
    StateStore,
    StateStoreError,
    StoreSettings,
    clone,
)
from statebackend.branches import drop_branch, release_parent
from statebackend.cli import main
from statebackend.inspect import read_store
from statebackend.maintenance import collect, create_savepoint, drop_savepoint, explain_object, rollback
from statebackend.manifest import Manifest
from statebackend.verification import verify
from tests.support.faulty_objectstore import CrashedError, FaultPlan, When
from tests.support.places import process
from tests.support.stores import contents, job, put

FEW = StoreSettings(retained_checkpoints=2, l0_files_max=2, block_rows=16, gc_interval_s=None)

UNMERGED = replace(FEW, l0_files_max=100)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store whose newest checkpoint, the fourth, holds ``step`` 3."""
    path = str(tmp_path / "main")
    fill(path, range(4))
    return path


@pytest.fixture
def new(tmp_path: Path) -> str:
    return str(tmp_path / "branch")


def fill(url: str, steps: range, settings: StoreSettings = FEW) -> dict[str, int]:
    with StateStore.open(url, settings) as store:
        for step in steps:
            put(store, **{f"k{step % 5}": step, "step": step})
            store.checkpoint(job(step)).result(10)
        return contents(store)


def state(url: str) -> dict[str, int]:
    with StateStore.open(url, FEW) as store:
        return contents(store)


def latest(url: str) -> Manifest:
    return read_store(url, manifests_max=1).latest


def files(url: str) -> set[str]:
    return {str(p.relative_to(url)) for p in Path(url).rglob("*") if p.is_file()}


def test_a_branch_begins_as_the_checkpoint_and_both_go_on_independently(url: str, new: str) -> None:
    before = state(url)
    sizes = sum((Path(url) / n).stat().st_size for n in files(url) if n.startswith("sst/"))
    first = clone(url, new)
    assert [n for n in files(new) if n.startswith("sst/")] == []
    assert sum((Path(new) / n).stat().st_size for n in files(new)) < sizes
    assert first.store_id != latest(url).store_id
    with StateStore.open(new, FEW) as branch:
        assert branch.store_id == first.store_id
        assert branch.restored is not None
        assert branch.restored.job == job(3)
        assert branch.restored.checkpoint_id == 4
        assert contents(branch) == before
    assert fill(url, range(10, 30)) | {"step": 29} == state(url)
    assert state(new) == before
    there = fill(new, range(50, 70))
    assert state(url)["step"] == 29
    assert state(new) == there
    assert verify(url).problems == verify(new).problems == ()


def test_the_parent_keeps_what_the_branch_reads_whatever_is_merged_and_collected(url: str, new: str) -> None:
    before = state(url)
    clone(url, new)
    needed = {f.removeprefix("root/1/") for f in latest(new).files}
    for round_ in range(3):
        fill(url, range(10 * round_, 10 * round_ + 10))
        collect(url)
        assert needed <= files(url)
    assert not needed & set(latest(url).files), "the parent itself has merged them away"
    (why,) = {explain_object(url, name).partition(": ")[2] for name in needed}
    assert why.startswith(f"is kept: named by branch {latest(new).store_id} at {new}")
    assert state(new) == before


def test_a_branch_owns_what_it_merges_and_never_touches_its_parent(url: str, new: str) -> None:
    clone(url, new)
    there = files(url)
    mine = fill(new, range(100, 130))
    collect(new)
    assert files(url) == there
    assert state(new) == mine
    assert not [n for n in latest(new).files if n.startswith("root/")], "everything was merged into own files"
    assert {n for n in files(new) if n.startswith("root/")} == set()


def test_names_of_a_branch_and_of_its_parent_never_meet(url: str, new: str, tmp_path: Path) -> None:
    """Writer epochs go on from the parent's, and inherited names say where they lie."""
    clone(url, new)
    fill(new, range(4, 6), UNMERGED)
    third = str(tmp_path / "third")
    clone(new, third)
    names = list(latest(third).files)
    assert {n.split("/sst/")[0] for n in names} == {"root/1", "root/2"}
    assert {r.url for r in latest(third).roots.values()} == {url, new}
    fill(third, range(6, 7))
    own = [n.rpartition("/")[2] for n in files(third) if n.startswith("sst/")]
    assert not set(own) & {n.rpartition("/")[2] for n in files(url) | files(new)}


def test_a_branch_of_a_branch_reads_through_both_and_keeps_both(url: str, new: str, tmp_path: Path) -> None:
    third = str(tmp_path / "third")
    clone(url, new)
    expected = fill(new, range(4, 6), UNMERGED)
    clone(new, third)
    for store in (url, new):
        fill(store, range(200, 230))
        collect(store)
    assert release_parent(new) is None, "its own branch still reads the files of the grandparent"
    assert state(third) == expected
    assert verify(third).problems == ()
    fill(third, range(300, 330))
    collect(third)
    assert release_parent(third) == new
    collect(new)
    assert release_parent(new) == url
    assert latest(url).branches == {}
    shutil.rmtree(url)
    shutil.rmtree(new)
    assert state(third)["step"] == 329


@pytest.mark.parametrize("kind", ["checkpoint", "savepoint"])
def test_a_branch_can_begin_at_an_older_state(url: str, new: str, kind: str) -> None:
    create_savepoint(url, "then", checkpoint_id=3)
    if kind == "savepoint":
        fill(url, range(10, 20))
        collect(url)
        with pytest.raises(CheckpointNotFoundError, match="checkpoint 3 is not retained"):
            clone(url, new, checkpoint_id=3)
        clone(url, new, savepoint="then")
        drop_savepoint(url, "then")
        collect(url)
    else:
        clone(url, new, checkpoint_id=3)
    assert state(new)["step"] == 2
    assert verify(new).problems == ()


def test_a_branch_does_not_publish_what_its_parent_has_staged(tmp_path: Path, new: str) -> None:
    url = str(tmp_path / "main")
    with StateStore.open(url, FEW) as store:
        put(store, a=1)
        store.checkpoint(JobState(sources={"s": 1}, committables={"sink": [{"roll": 1}]})).result(10)
    clone(url, new)
    with StateStore.open(new, FEW) as branch:
        assert branch.restored is not None
        assert branch.restored.job == JobState(sources={"s": 1})


def test_a_place_that_holds_a_store_is_refused(url: str, new: str) -> None:
    fill(new, range(1))
    with pytest.raises(StateStoreError, match="already"):
        clone(url, new)
    assert latest(url).branches == {}
    with pytest.raises(CheckpointNotFoundError):
        clone(str(Path(url).with_name("nothing")), f"{new}2")
    with pytest.raises(ValueError, match="either"):
        clone(url, f"{new}2", checkpoint_id=1, savepoint="x")
    with pytest.raises(CheckpointNotFoundError, match="no savepoint 'x'"):
        clone(url, f"{new}2", savepoint="x")


def test_a_crash_at_any_call_of_a_clone_leaves_two_sound_stores_and_at_most_a_reservation(
    url: str, tmp_path: Path
) -> None:
    before = state(url)
    seen = set()
    for when in When:
        call = 0
        while True:
            call += 1
            new = str(tmp_path / f"branch-{when.name}-{call}")
            plan = FaultPlan()
            plan.crash(nth=call, when=when)
            with process(plan):
                try:
                    clone(url, new)
                    break
                except CrashedError:
                    pass
            collect(url)
            there = Path(new, "manifest").exists() and bool(list(Path(new, "manifest").iterdir()))
            reserved = [b for b in latest(url).branches.values() if b.url == new]
            seen.add((there, bool(reserved)))
            assert reserved or not there, "a branch never exists without its reservation"
            assert verify(url).problems == ()
            if there:
                assert state(new) == before
            for store_id in latest(url).branches:
                if there:
                    with pytest.raises(StateStoreError, match="still reads files"):
                        drop_branch(url, store_id)
                drop_branch(url, store_id, force=there)
        assert call > 5
        drop_branch(url, next(iter(latest(url).branches)), force=True)
    assert seen == {(False, False), (False, True), (True, True)}


def test_a_clone_that_stalls_while_its_reservation_is_dropped_fails(url: str, new: str) -> None:
    """It is asked for its first manifest after somebody found no store there and dropped the reservation."""
    plan = FaultPlan()
    held = plan.hang("put_if_absent", "manifest/*")
    with process(plan, of="branch"), ThreadPoolExecutor() as pool:
        cloned = pool.submit(clone, url, new)
        held.wait_until_reached()
        plan.clear()
        (store_id,) = latest(url).branches
        drop_branch(url, store_id)
        held.release()
        with pytest.raises(StateStoreError, match="another store was created there"):
            cloned.result(20)
    assert state(new) == {}, "the place holds an empty store"
    assert latest(url).branches == {}


def test_a_reservation_is_kept_while_its_branch_cannot_be_asked(url: str, new: str) -> None:
    clone(url, new)
    (store_id,) = latest(url).branches
    plan = FaultPlan()
    plan.fail("list", times=float("inf"))
    with process(plan, of="branch"), pytest.raises(StateStoreError, match="cannot be asked"):
        drop_branch(url, store_id)
    assert list(latest(url).branches) == [store_id]
    with pytest.raises(StateStoreError, match="no branch 'x'"):
        drop_branch(url, "x")


def test_what_a_branch_does_not_need_any_more_is_given_back(url: str, new: str) -> None:
    clone(url, new)
    assert release_parent(new) is None, "its first checkpoint still reads the parent's files"
    fill(new, range(100, 130))
    collect(new)
    assert release_parent(new) == url
    assert release_parent(new) is None
    assert latest(new).roots == {}
    assert latest(url).branches == {}
    shutil.rmtree(url)
    assert state(new)["step"] == 129
    assert verify(new).problems == ()


def test_a_crash_at_any_call_of_a_release_leaves_the_rest_to_the_next_one(url: str, tmp_path: Path) -> None:
    for when in When:
        call = 0
        while True:
            call += 1
            new = str(tmp_path / f"branch-{when.name}-{call}")
            clone(url, new)
            fill(new, range(100, 115))
            collect(new)
            plan = FaultPlan()
            plan.crash(nth=call, when=when)
            with process(plan):
                try:
                    assert release_parent(new) == url
                    break
                except CrashedError:
                    pass
            assert verify(new).problems == ()
            assert state(new)["step"] == 114
            release_parent(new)
            assert latest(new).roots == {}
            assert latest(url).branches == {}
        assert call > 5


def test_a_branch_whose_parent_was_deleted_names_the_file_and_the_store(url: str, new: str) -> None:
    clone(url, new)
    shutil.rmtree(url)
    with StateStore.open(new, FEW) as branch, pytest.raises(ObjectMissingError) as error:
        contents(branch)
    assert "root/1/sst/" in str(error.value)
    assert f"{url}, from which this store was branched" in str(error.value)
    problems = verify(new).problems
    assert any("root/1/sst/" in p for p in problems)
    assert any("parent of this branch" in p for p in problems)


def test_verify_tells_when_the_parent_no_longer_keeps_files_for_a_branch(url: str, new: str) -> None:
    clone(url, new)
    (store_id,) = latest(url).branches
    drop_branch(url, store_id, force=True)
    (problem,) = verify(new).problems
    assert f"{url} does not keep files for a branch {store_id}" in problem


def test_verify_tells_when_another_store_stands_where_the_parent_was(url: str, new: str) -> None:
    clone(url, new)
    shutil.rmtree(url)
    fill(url, range(4))
    assert any("expected" in p and latest(new).roots[1].store_id in p for p in verify(new).problems)


def test_a_branch_is_rolled_back_and_saved_like_any_store(url: str, new: str) -> None:
    before = state(url)
    clone(url, new)
    create_savepoint(new, "begin")
    fill(new, range(100, 130))
    collect(new)
    assert release_parent(new) is None, "its savepoint reads the parent's files"
    rollback(new, savepoint="begin")
    assert state(new) == before
    assert verify(new).problems == ()


def test_a_rollback_whose_savepoint_is_dropped_meanwhile_is_refused(url: str) -> None:
    """Its files may be collected before the rollback's manifest names them."""
    create_savepoint(url, "old", checkpoint_id=3)
    fill(url, range(10, 20))
    plan = FaultPlan()
    held = plan.hang("put_if_absent", "manifest/*", nth=2)
    with ThreadPoolExecutor() as pool:
        with process(plan):
            done = pool.submit(rollback, url, savepoint="old")
            held.wait_until_reached()
        drop_savepoint(url, "old")
        collect(url)
        held.release()
        with pytest.raises(CheckpointNotFoundError, match="dropped meanwhile"):
            done.result(20)
    assert verify(url).problems == ()


def test_a_branch_commit_that_another_overtook_copies_again(url: str, new: str) -> None:
    plan = FaultPlan()
    held = plan.hang("put_if_absent", "manifest/*")
    with StateStore.open(url, FEW) as store, ThreadPoolExecutor() as pool:
        with process(plan, of="main"):
            cloned = pool.submit(clone, url, new)
            held.wait_until_reached()
        put(store, more=1)
        store.checkpoint(job(5)).result(10)
        held.release()
        assert cloned.result(20).checkpoint_id == 5, "it is the newest checkpoint when the branch is committed"
    collect(url)
    assert len([n for n in files(url) if n.startswith("savepoint/")]) == 1


def test_branches_from_the_shell(url: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clone", url, new, "--checkpoint", "4"]) == 0
    store_id = latest(new).store_id
    assert main(["branches", url]) == 0
    assert main(["ls", url]) == 0
    assert main(["ls", new]) == 0
    assert main(["show", new]) == 0
    out = capsys.readouterr().out
    assert out.count(store_id) >= 4
    assert f"branched off {url}" in out
    assert "root/1/sst/" in out
    assert main(["gc", url, "--explain", f"{latest(url).branches[store_id].object_name}"]) == 0
    assert f"the copy of branch {store_id}" in capsys.readouterr().out
    assert main(["branches", url, "--drop", store_id]) == 1
    fill(new, range(100, 130))
    assert main(["gc", new]) == 0
    assert f"nothing of {url} is needed any more" in capsys.readouterr().out
    assert latest(url).branches == {}
