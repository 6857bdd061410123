"""Every interleaving of the manifest protocol, and what goes wrong without each of its rules."""

from __future__ import annotations

import os

import pytest

from tests.model.manifest_protocol import Rules, Setup, explore

SOUND = {
    "two writers": Setup(commits=(2, 3), tries=2),
    "two writers and a request that fails, is lost or late": Setup(commits=(1, 1), faults=1),
    "two writers and a reader": Setup(commits=(1, 1), readers=1),
    "three writers": Setup(commits=(0, 0, 1)),
    "a writer, something that commits beside it, and a fault": Setup(commits=(2,), guests=1, faults=1),
    "a writer and two that commit beside it": Setup(commits=(1,), guests=2),
}

LARGE = {
    "three writers": Setup(commits=(1, 1, 1)),
    "three writers that keep trying": Setup(commits=(0, 0, 1), tries=2),
    "two writers and two faults": Setup(commits=(1, 2), faults=2),
    "two writers and one that commits beside them": Setup(commits=(1, 1), guests=1),
    "two writers, a reader and a fault": Setup(commits=(1, 1), readers=1, faults=1),
}


@pytest.mark.parametrize("setup", SOUND.values(), ids=SOUND.keys())
def test_no_interleaving_breaks_the_protocol(setup: Setup) -> None:
    explored = explore(Rules(), setup)
    assert explored.counterexample is None, explored.counterexample
    assert explored.states > 1000, "the setup does not explore anything"


@pytest.mark.soak
@pytest.mark.parametrize("setup", LARGE.values(), ids=LARGE.keys())
def test_no_interleaving_of_three_processes_breaks_the_protocol(setup: Setup) -> None:
    explored = explore(Rules(), setup, states_max=int(os.environ.get("STATES", "5_000_000")))
    print(f"{explored.states} states")
    assert explored.counterexample is None, explored.counterexample


@pytest.mark.parametrize(
    ("rules", "setup", "problem"),
    [
        pytest.param(
            Rules(checks_parent=False), Setup(commits=(0, 2)), "not in the history", id="a deleted number comes back"
        ),
        pytest.param(
            Rules(rechecks_probe=False), Setup(commits=(2, 3), faults=1), "not in the history", id="a probe is trusted"
        ),
        pytest.param(
            Rules(confirms_listing=False),
            Setup(commits=(0, 2), readers=1),
            "reader believes",
            id="a listing is trusted",
        ),
        pytest.param(
            Rules(reloads_on_conflict=False), Setup(commits=(2,), faults=1), "is fenced", id="a conflict is a fence"
        ),
        pytest.param(
            Rules(reads_back=False), Setup(commits=(1,), faults=1), "is fenced", id="a lost response is a fence"
        ),
        pytest.param(
            Rules(new_attempt_per_request=False),
            Setup(commits=(1, 3), faults=1),
            "not in the history",
            id="two requests share an attempt id",
        ),
        pytest.param(
            Rules(manifests_kept=1), Setup(commits=(1, 2)), "called corrupt", id="the parent of the newest is collected"
        ),
    ],
)
def test_without_any_one_of_its_rules_the_protocol_breaks(rules: Rules, setup: Setup, problem: str) -> None:
    found = explore(rules, setup).counterexample
    assert found is not None
    assert problem in found.problem, found
    assert len(found.steps) > 3
