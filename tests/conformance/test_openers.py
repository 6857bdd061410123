"""Many openers of one store: one of them wins each manifest number, whatever the filesystem."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from statebackend import FencedError, JobState, StateStore, StoreSettings
from tests.conformance.conftest import Place
from tests.support.stores import contents, put

OPENERS = 8
SETTINGS = StoreSettings(io_threads=2, cpu_threads=1)


def open_store(place: Place, **options: Any) -> StateStore:
    return StateStore.open(place.url, SETTINGS, storage_options=place.options, **options)


def race(place: Place, rounds: int) -> None:
    """In each round openers start together: each gets a number and an epoch of its own, the last one the store."""
    start = threading.Barrier(OPENERS)

    def opener(_: int) -> StateStore:
        start.wait(60)
        return open_store(place)

    epoch = 0
    with ThreadPoolExecutor(OPENERS) as threads:
        for number in range(rounds):
            stores = list(threads.map(opener, range(OPENERS)))
            try:
                by_epoch = sorted(stores, key=lambda s: s.manifest.writer_epoch)
                epochs = [int(s.manifest.writer_epoch) for s in by_epoch]
                assert epochs == list(range(epoch + 1, epoch + OPENERS + 1)), f"round {number}"
                assert len({s.manifest.number for s in stores}) == OPENERS, f"round {number}"
                assert len({s.store_id for s in stores}) == 1, f"round {number}"
                epoch = epochs[-1]
                put(by_epoch[-1], **{f"round{number}": number})
                with pytest.raises(FencedError):
                    by_epoch[number % (OPENERS - 1)].checkpoint(JobState()).result(30)
                by_epoch[-1].checkpoint(JobState()).result(30)
            finally:
                list(threads.map(lambda s: s.close(5.0), stores))
    with open_store(place) as last:
        assert contents(last) == {f"round{n}": n for n in range(rounds)}


# A round over S3 is some 200 requests, each of which costs s3fs several milliseconds of computing.
ROUNDS = {"local": 100, "memory": 100, "obstore-memory": 100, "s3": 6, "obstore-s3": 12}


@pytest.mark.parametrize(("kind", "rounds"), ROUNDS.items())
def test_of_eight_openers_each_gets_a_number_of_its_own(
    place_of: Callable[[str], Place], kind: str, rounds: int
) -> None:
    race(place_of(kind), rounds)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ROUNDS)
def test_of_eight_openers_each_gets_a_number_of_its_own_for_long(place_of: Callable[[str], Place], kind: str) -> None:
    race(place_of(kind), int(os.environ.get("RACE_ROUNDS", "1000")))
