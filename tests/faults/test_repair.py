"""A damaged newest manifest or file, and the way back to the newest state that is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from statebackend import CorruptionError, FencedError, JobState, StateStore, StoreSettings
from statebackend.branches import clone
from statebackend.cli import main
from statebackend.maintenance import create_savepoint
from statebackend.repair import repair
from statebackend.verification import verify
from tests.support.stores import contents, put

SETTINGS = StoreSettings(compaction="none", gc_interval_s=None)


class Disk:
    """A store on the disk, whose objects can be damaged."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root / "main")

    def names(self) -> list[str]:
        main = self.root / "main"
        return [str(path.relative_to(main)) for path in main.rglob("*") if path.is_file()]

    def manifests(self) -> list[str]:
        return sorted(name for name in self.names() if name.startswith("manifest/"))

    def damage(self, name: str, at: int = 40) -> None:
        """Turn a byte round; again, and it is whole."""
        path = self.root / "main" / name
        data = bytearray(path.read_bytes())
        data[at] ^= 0xFF
        path.chmod(0o644)
        path.write_bytes(data)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def job(step: int) -> JobState:
    return JobState(sources={"source": step})


def fill(disk: Disk, steps: int = 3) -> None:
    with StateStore.open(disk.url, SETTINGS) as store:
        for step in range(1, steps + 1):
            put(store, a=step, **{f"k{step}": step})
            store.checkpoint(job(step)).result()


def test_a_damaged_newest_manifest_is_told_and_gone_behind_when_that_is_asked_for(disk: Disk) -> None:
    fill(disk)
    before, damaged = disk.manifests()[-2:]
    disk.damage(damaged)
    with pytest.raises(CorruptionError):
        StateStore.open(disk.url, SETTINGS)
    report = repair(disk.url)
    assert (report.sound, report.committed) == (False, None)
    assert list(report.damaged) == [damaged]
    assert report.found == before
    assert disk.manifests()[-1] == damaged, "looking changes nothing"
    committed = repair(disk.url, commit=True).committed
    assert committed is not None
    assert committed > 3, "an id that the damaged manifest may have given is not given again"
    assert repair(disk.url).sound
    assert verify(disk.url).problems == ()
    with StateStore.open(disk.url, SETTINGS) as store:
        assert store.restored is not None
        assert store.restored.job == job(2)
        assert contents(store) == {"a": 2, "k1": 1, "k2": 2}
        put(store, after=1)
        store.checkpoint(job(3)).result()


def test_a_sound_store_is_left_alone(disk: Disk) -> None:
    fill(disk)
    names = set(disk.names())
    assert repair(disk.url, commit=True).sound
    assert set(disk.names()) == names


@pytest.mark.parametrize("deep", [False, True])
def test_a_damaged_file_is_gone_behind(disk: Disk, deep: bool) -> None:
    fill(disk)
    with StateStore.open(disk.url, SETTINGS) as store:
        file = store.manifest.tables["kv"].files[-1]
    if deep:
        disk.damage(file.name, at=file.size - file.tail_bytes - 1)
        assert repair(disk.url).sound, "the index alone does not tell"
    else:
        (disk.root / "main" / file.name).unlink()
    report = repair(disk.url, commit=True, deep=deep)
    assert report.committed is not None
    with StateStore.open(disk.url, SETTINGS) as store:
        assert contents(store) == {"a": 2, "k1": 1, "k2": 2}
    assert repair(disk.url, deep=True).sound


def test_whoever_wrote_the_damaged_manifest_is_fenced(disk: Disk) -> None:
    fill(disk)
    with StateStore.open(disk.url, SETTINGS) as writer:
        put(writer, b=1)
        writer.checkpoint(job(4)).result()
        last = disk.manifests()[-1]
        disk.damage(last)
        repair(disk.url, commit=True)
        disk.damage(last)
        with pytest.raises(FencedError):
            writer.checkpoint(job(5)).result()


def test_a_copy_of_which_only_the_damaged_manifest_tells_is_kept(disk: Disk) -> None:
    fill(disk)
    create_savepoint(disk.url, "before")
    clone(disk.url, disk.root / "branch")
    disk.damage(disk.manifests()[-1])
    report = repair(disk.url, commit=True)
    assert len(report.recovered) == 1
    with StateStore.open(disk.url, SETTINGS) as store:
        assert set(store.manifest.savepoints) == {"before", *report.recovered}
        for step in range(4, 20):
            put(store, a=step)
            store.checkpoint(job(step)).result()
        store._runtime.call(store._collector.run(store.manifest))
    with StateStore.open(disk.root / "branch", SETTINGS) as branch:
        assert contents(branch) == {"a": 3, "k1": 1, "k2": 2, "k3": 3}


def test_without_a_whole_manifest_the_copies_of_savepoints_are_the_last_resort(disk: Disk) -> None:
    fill(disk, 2)
    create_savepoint(disk.url, "before")
    for name in disk.manifests():
        disk.damage(name)
    found = repair(disk.url).found
    assert found is not None
    assert found.startswith("savepoint/")
    repair(disk.url, commit=True)
    with StateStore.open(disk.url, SETTINGS) as store:
        assert contents(store) == {"a": 2, "k1": 1, "k2": 2}


def test_nothing_whole_is_said_and_nothing_is_made(disk: Disk) -> None:
    fill(disk, 1)
    for name in disk.manifests():
        disk.damage(name)
    assert repair(disk.url).manifest is None
    with pytest.raises(CorruptionError, match="no manifest and no copy of one is whole"):
        repair(disk.url, commit=True)


def test_the_command_looks_first_and_says_what_to_do(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    fill(disk)
    disk.damage(disk.manifests()[-1])
    assert main(["verify", disk.url]) == 1
    assert f"python -m statebackend repair {disk.url} tells what is whole" in capsys.readouterr().err
    assert main(["repair", disk.url]) == 1
    said = capsys.readouterr().out
    assert "the state of checkpoint 2" in said
    assert f"repair {disk.url} --commit goes back to it: rows since then come again from the sources" in said
    assert main(["repair", disk.url, "--commit"]) == 0
    assert "a job that was running is fenced" in capsys.readouterr().out
    assert main(["repair", disk.url]) == 0
    assert "is whole: nothing to repair" in capsys.readouterr().out
