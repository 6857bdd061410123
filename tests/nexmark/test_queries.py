"""Every query says what DuckDB says in batch: uninterrupted, after crashes, with disorder, with one thread and two."""

from __future__ import annotations

from pathlib import Path

import pytest

from operators.nexmark.queries import QUERIES
from tests.nexmark.conftest import EVENTS
from tests.nexmark.running import assert_equals_reference, run, run_with_crashes

CHECKPOINT_EVENTS = 4_000
CRASHES = [9_000, 21_000]


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_equals_the_batch_computation(query: str, ordered: Path, tmp_path: Path) -> None:
    report = run(query, ordered, tmp_path, parallelism=1)
    assert_equals_reference(query, ordered, tmp_path)
    assert report.events == EVENTS
    assert report.restored_from is None


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_over_disordered_events_equals_it_after_crashes(query: str, disordered: Path, tmp_path: Path) -> None:
    options = {"checkpoint_events": CHECKPOINT_EVENTS, "checkpoint_interval_s": None, "batch_rows": 700}
    report = run_with_crashes(query, disordered, tmp_path, CRASHES, parallelism=2, **options)
    assert_equals_reference(query, disordered, tmp_path)
    assert report.events == EVENTS
