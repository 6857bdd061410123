"""Filters never deny a key that was added, seldom claim one that was not, and are not trusted when damaged."""

from __future__ import annotations

import numpy as np
import pytest

from statebackend.bloom import BloomFilter
from statebackend.errors import CorruptionError


def hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 64, count, dtype=np.uint64)


@pytest.mark.parametrize("bits", [1, 10, 64])
@pytest.mark.parametrize("count", [0, 1, 25, 26, 40_000])
def test_a_key_that_was_added_is_never_denied(count: int, bits: int) -> None:
    bloom = BloomFilter.of(hashes(count), bits)
    assert bloom.may_hold(hashes(count)).all()
    assert all(bloom.may_hold_one(int(h)) for h in hashes(count)[:500])


def test_an_empty_filter_denies_every_key() -> None:
    assert not BloomFilter.of(hashes(0), 10).may_hold(hashes(1000)).any()


@pytest.mark.parametrize("count", [5_000, 100_000])
def test_at_ten_bits_per_key_two_missing_keys_in_a_hundred_are_the_limit(count: int) -> None:
    bloom = BloomFilter.of(hashes(count), 10)
    assert bloom.nbytes <= count * 10 / 8 + 32
    assert bloom.may_hold(hashes(100_000, seed=1)).mean() < 0.02


def test_hashes_that_share_their_high_bits_fill_the_whole_filter() -> None:
    """A file of a sorted run holds one range of hashes."""
    bloom = BloomFilter.of(hashes(50_000) >> np.uint64(12), 10)
    assert bloom.may_hold(hashes(100_000, seed=1) >> np.uint64(12)).mean() < 0.02


def test_one_hash_and_many_are_answered_alike() -> None:
    bloom = BloomFilter.of(hashes(3000), 4)
    probes = hashes(3000, seed=1)
    assert bloom.may_hold(probes).tolist() == [bloom.may_hold_one(int(h)) for h in probes]


def test_equal_hashes_count_once() -> None:
    assert BloomFilter.of(np.repeat(hashes(100), 1000), 10).nbytes == BloomFilter.of(hashes(100), 10).nbytes


def test_a_filter_comes_back_and_every_damaged_byte_is_found() -> None:
    bloom = BloomFilter.of(hashes(60), 10)
    data = bloom.encode()
    again = BloomFilter.decode(data, "sst/x.arrow")
    assert again.may_hold(hashes(60)).all()
    assert again.nbytes == bloom.nbytes
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(CorruptionError, match=r"sst/x\.arrow"):
            BloomFilter.decode(bytes(damaged), "sst/x.arrow")
