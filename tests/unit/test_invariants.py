"""The table of what must hold names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
NAMES = [*(f"I{n}" for n in range(1, 15)), "ttl", "evolution", "upgrades", "branches", "pins", "claims"]
ROW = re.compile(r"^\| (I\d+|[a-z]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
NODE = re.compile(r"`([\w/]+\.py)::(\w+)`")


def rows() -> dict[str, list[tuple[str, str]]]:
    text = (ROOT / "statebackend" / "ARCHITECTURE.md").read_text()
    return {name: found for name, _, tests in ROW.findall(text) if (found := NODE.findall(tests))}


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


def test_every_invariant_is_in_the_table() -> None:
    assert list(rows()) == NAMES


@pytest.mark.parametrize("invariant", NAMES)
def test_every_invariant_is_held_by_tests_that_exist(invariant: str) -> None:
    named = rows()[invariant]
    assert named
    for file, test in named:
        assert (TESTS / file).exists(), file
        assert test in names_in(TESTS / file), f"{file} has no {test}"
