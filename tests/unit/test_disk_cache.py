"""The local disk cache of a remote store: what it saves, its limit, and that no state of the disk is ever an error."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from statebackend import StateStore, StoreSettings
from statebackend.disk_cache import DiskCache
from statebackend.objectstore_base import PutResult
from statebackend.objectstore_caching import DiskCachingObjectStore
from statebackend.objectstore_counting import CountingObjectStore
from tests.support.stores import World, contents, job, put

NAME = "sst/w1-0-0-1.arrow"
ROOT = Path(__file__).resolve().parents[2]


def files(directory: Path) -> list[Path]:
    return [p for p in directory.rglob("*") if p.is_file()]


def size_of(directory: Path) -> int:
    return sum(p.stat().st_size for p in files(directory))


def settings_with(directory: Path, **more: int) -> StoreSettings:
    return StoreSettings(block_rows=64, disk_cache_dir=directory, gc_interval_s=None, **more)


def filled(world: World, settings: StoreSettings) -> dict[str, int]:
    with world.open(settings=settings) as store:
        for step in range(3):
            put(store, **{f"{step}-{n}": n for n in range(1000)})
            store.checkpoint(job(step)).result(10)
        return contents(store)


def bytes_from_files(store: StateStore) -> int:
    requests = store.metrics().requests
    return sum(c.bytes_read for (_, kind), c in requests.items() if kind in ("flushed", "merged"))


def test_a_second_opening_reads_no_byte_of_a_file_from_the_storage(world: World, tmp_path: Path) -> None:
    expected = filled(world, settings_with(tmp_path / "written"))
    for directory, first in ((tmp_path / "written", False), (tmp_path / "read", True), (tmp_path / "read", False)):
        with world.open(settings=settings_with(directory)) as store:
            assert contents(store) == expected
            assert (bytes_from_files(store) > 0) == first
            disk = {c.name: c for c in store.metrics().caches}["disk"]
            assert disk.hits + disk.misses > 0
            assert (disk.misses > 0) == first


def test_the_bytes_stay_below_the_limit_and_the_most_recently_used_remain(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, "s", 100_000)
    for number in range(300):
        cache.put(NAME, number, bytes(1000))
        assert cache.get(NAME, 0) is not None, "what is used all the time stays"
        assert size_of(tmp_path) <= 100_000
        assert cache.nbytes <= 100_000
    assert size_of(tmp_path) > 80_000
    assert cache.get(NAME, 299) is not None
    assert cache.get(NAME, 1) is None


def test_a_chunk_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, "s", 1000)
    cache.put(NAME, 0, bytes(5000))
    assert size_of(tmp_path) == 0


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap", "unreadable", "directory"])
def test_a_damaged_chunk_is_a_miss_and_is_fetched_again(tmp_path: Path, damage: str) -> None:
    cache = DiskCache(tmp_path, "s", 1 << 20)
    cache.put(NAME, 0, b"zero" * 100)
    cache.put(NAME, 1, b"one!" * 100)
    path = next(p for p in files(tmp_path) if p.name == "0")
    match damage:
        case "flip":
            data = bytearray(path.read_bytes())
            data[200] ^= 1
            path.write_bytes(data)
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "empty":
            path.write_bytes(b"")
        case "swap":
            shutil.copy(path.with_name("1"), path)
        case "unreadable":
            path.unlink()
        case "directory":
            path.unlink()
            path.mkdir()
    assert cache.get(NAME, 0) is None
    assert cache.get(NAME, 1) == b"one!" * 100
    if damage != "directory":
        cache.put(NAME, 0, b"zero" * 100)
        assert cache.get(NAME, 0) == b"zero" * 100


def test_every_flipped_bit_of_a_store_s_cache_goes_unnoticed_by_its_reader(world: World, tmp_path: Path) -> None:
    settings = settings_with(tmp_path)
    expected = filled(world, settings)
    rng = random.Random(5)
    for path in files(tmp_path):
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    with world.open(settings=settings) as store:
        assert contents(store) == expected
        assert bytes_from_files(store) > 0


def test_a_cache_that_vanishes_under_an_open_store_is_a_miss(world: World, tmp_path: Path) -> None:
    settings = settings_with(tmp_path / "cache", cache_bytes=1)
    expected = filled(world, settings)
    with world.open(settings=settings) as store:
        assert contents(store) == expected
        shutil.rmtree(tmp_path / "cache")
        assert contents(store) == expected
        assert bytes_from_files(store) > 0
        assert files(tmp_path / "cache"), "and it is filled again"


def test_a_full_disk_turns_the_cache_off_with_one_warning(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_with(tmp_path)
    original = Path.replace

    def full(self: Path, target: Path) -> Path:
        if self.is_relative_to(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with caplog.at_level(logging.WARNING, "statebackend"):
        expected = filled(world, settings)
    assert expected
    warnings = [r.getMessage() for r in caplog.records if "disk cache" in r.getMessage()]
    assert len(warnings) == 1
    assert "is off: [Errno 28]" in warnings[0]
    assert files(tmp_path) == [], "not even a temporary file"


def test_a_directory_that_cannot_be_made_is_no_error(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert filled(world, settings_with(tmp_path / "file" / "cache"))


def test_temporary_files_of_a_crash_are_removed_after_an_hour(tmp_path: Path) -> None:
    old, young = tmp_path / ".tmp-old", tmp_path / ".tmp-young"
    for path in (old, young):
        path.write_bytes(b"torn")
    os.utime(old, (time.time() - 4000,) * 2)
    DiskCache(tmp_path, "s", 1000).put(NAME, 0, b"x")
    assert not old.exists()
    assert young.exists()


def test_stores_that_share_a_directory_do_not_see_each_other(tmp_path: Path) -> None:
    one, two = World(), World()
    settings = settings_with(tmp_path)
    with one.open(settings=settings) as a, two.open(settings=settings, seed=9) as b:
        put(a, a=1)
        put(b, b=2)
        a.checkpoint(job(1)).result(10)
        b.checkpoint(job(1)).result(10)
    with one.open(settings=settings) as a, two.open(settings=settings) as b:
        assert (contents(a), contents(b)) == ({"a": 1}, {"b": 2})
    one.close()
    two.close()


def test_what_the_collector_deletes_leaves_the_cache(world: World, tmp_path: Path) -> None:
    async def story() -> None:
        with ThreadPoolExecutor(1) as pool:
            store = DiskCachingObjectStore(world.objects, DiskCache(tmp_path, "s", 1 << 20), pool)
            assert await store.put_if_absent(NAME, b"x" * 100) is PutResult.CREATED
            assert files(tmp_path)
            await store.delete(NAME)
            assert not files(tmp_path)

    asyncio.run(story())


@pytest.mark.parametrize("seed", range(10))
def test_any_range_is_what_the_storage_would_have_said(world: World, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = rng.randbytes(rng.randrange(1, 1000))

    async def story() -> None:
        await world.objects.put(NAME, data)
        with ThreadPoolExecutor(2) as pool:
            counting = CountingObjectStore(world.objects)
            cache = DiskCache(tmp_path, "s", 1 << 20)
            store = DiskCachingObjectStore(counting, cache, pool, chunk_bytes=64)
            for _ in range(200):
                start, end = rng.randrange(-50, 1100), rng.choice([None, rng.randrange(-50, 1100)])
                assert await store.get_range(NAME, start, end) == data[start:end]
            whole = await store.get_range(NAME, 0, len(data))
            before = counting.snapshot()
            assert await store.get_range(NAME, 0, len(data)) == whole == data
            assert counting.snapshot() == before, "all of it is on the disk now"

    asyncio.run(story())


def test_missing_neighbours_are_one_request(world: World, tmp_path: Path) -> None:
    async def story() -> None:
        await world.objects.put(NAME, bytes(640))
        with ThreadPoolExecutor(2) as pool:
            counting = CountingObjectStore(world.objects)
            store = DiskCachingObjectStore(counting, DiskCache(tmp_path, "s", 1 << 20), pool, chunk_bytes=64)
            await store.get_range(NAME, 256, 320)
            await store.get_range(NAME, 0, 640)
            found = counting.snapshot()["get_range", "flushed"]
            assert (found.requests, found.bytes_read) == (3, 640)

    asyncio.run(story())


def test_an_object_that_was_cut_short_on_its_way_is_not_kept_so(world: World, tmp_path: Path) -> None:
    class Cutting(CountingObjectStore):
        async def get_range(self, name: str, start: int, end: int | None = None) -> bytes:
            return (await super().get_range(name, start, end))[:-10]

    async def story() -> None:
        await world.objects.put(NAME, bytes(100))
        with ThreadPoolExecutor(1) as pool:
            cache = DiskCache(tmp_path, "s", 1 << 20)
            bad = DiskCachingObjectStore(Cutting(world.objects), cache, pool, chunk_bytes=64)
            assert len(await bad.get_range(NAME, 0, 100)) < 100
            good = DiskCachingObjectStore(world.objects, cache, pool, chunk_bytes=64)
            assert await good.get_range(NAME, 0, 100) == bytes(100)

    asyncio.run(story())


def test_processes_that_share_the_directory_keep_the_limit_and_read_right_bytes(tmp_path: Path) -> None:
    script = f"""
        import random, sys
        from statebackend.disk_cache import DiskCache
        cache, rng = DiskCache({str(tmp_path)!r}, "s", 100_000), random.Random(sys.argv[1])
        for _ in range(800):
            number = rng.randrange(200)
            found = cache.get({NAME!r}, number)
            assert found in (None, bytes([number % 251]) * 1000), "another chunk's bytes"
            if found is None:
                cache.put({NAME!r}, number, bytes([number % 251]) * 1000)
        assert cache.enabled
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    running = [subprocess.Popen([*command, str(n)], cwd=ROOT, stderr=subprocess.PIPE) for n in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert size_of(tmp_path) <= 100_000 * (1 + 1 / 16)
    assert not [p for p in files(tmp_path) if p.name.startswith(".tmp-")]
