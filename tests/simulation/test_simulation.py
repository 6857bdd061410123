"""A fixed number of schedules of the whole store; every property holds in each, and each replays exactly."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from functools import cache

import pytest

from tests.simulation.simulate import FIRST_SHARED, Profile, simulate

SEEDS = 200
SHARED_SEEDS = 60
CHUNK = 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What remains of a schedule."""

    problem: str | None
    tail: str
    counts: dict[str, int]


@cache  # two tests look at the same schedules
def outcome(seed: int, *, compactors: bool = False) -> Outcome:
    result = simulate(seed, Profile.of_compactors(random.Random(seed)) if compactors else None)
    return Outcome(result.problem, "\n".join(result.trace[-40:]), result.counts)


@pytest.mark.parametrize("first", [*range(0, SEEDS, CHUNK), *range(FIRST_SHARED, FIRST_SHARED + SHARED_SEEDS, CHUNK)])
def test_every_property_holds_in_every_schedule(first: int) -> None:
    for seed in range(first, first + CHUNK):
        result = outcome(seed)
        assert result.problem is None, f"replay: python -m tests.simulation --seed {seed}\n{result.tail}"


@pytest.mark.parametrize("first", range(0, 40, CHUNK))
def test_every_property_holds_beside_compactors_that_come_and_go(first: int) -> None:
    for seed in range(first, first + CHUNK):
        result = outcome(seed, compactors=True)
        assert result.problem is None, f"seed {seed}: {result.problem}\n{result.tail}"


def test_the_same_seed_gives_the_same_schedule_and_the_same_bytes() -> None:
    for seed in (3, 4, 5):
        once, twice = simulate(seed), simulate(seed)
        assert once.trace == twice.trace
        assert once.objects == twice.objects


def test_schedules_meet_what_they_are_for() -> None:
    """Conflicts, fences, unknown outcomes, merges, collections, rollbacks and stalled writers all happen."""
    counts: dict[str, int] = {}
    schedules = [
        *map(outcome, (*range(40), *range(FIRST_SHARED, FIRST_SHARED + 10))),
        *(outcome(seed, compactors=True) for seed in range(40)),
    ]
    for schedule in schedules:
        for what, count in schedule.counts.items():
            counts[what] = counts.get(what, 0) + count
    assert all(counts.values()), counts
    assert counts["acknowledged"] > 200
    assert counts["recovered"] > 80


@pytest.mark.soak
def test_many_more_schedules() -> None:
    first, seeds = 10_000, int(os.environ.get("SEEDS", "20000"))
    failed = {seed: p for seed in range(first, first + seeds) if (p := simulate(seed).problem) is not None}
    assert not failed, f"replay: python -m tests.simulation --seed {next(iter(failed))}\n{failed}"
