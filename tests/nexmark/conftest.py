"""Events for the tests of this directory, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from operators.nexmark.dataset import DatasetSettings, write_dataset
from operators.nexmark.model import NexmarkConfig

EVENTS = 30_000
PER_SECOND = 500  # so that a minute of event time passes
HOUR_MS = 3_600_000
NEAR_MIDNIGHT = 1_436_918_400_000 - 30_000
"""Half a minute before the next day, and in the night of q14."""
DISORDER = 1_500
"""Three seconds, within the watermark's delay of four."""


def _write(directory: Path, config: NexmarkConfig) -> Path:
    write_dataset(directory, config, DatasetSettings(events=EVENTS, file_events=11_000, group_events=4_000))
    return directory


@pytest.fixture(scope="session")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Events in the order of their times."""
    config = NexmarkConfig(seed=1, base_time_ms=NEAR_MIDNIGHT, events_per_second=PER_SECOND)
    return _write(tmp_path_factory.mktemp("events") / "ordered", config)


@pytest.fixture(scope="session")
def disordered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Times that go back by up to three seconds, from seven to eight in the morning."""
    base = NEAR_MIDNIGHT + 8 * HOUR_MS
    config = NexmarkConfig(seed=2, base_time_ms=base, events_per_second=PER_SECOND, disorder_events=DISORDER)
    return _write(tmp_path_factory.mktemp("events") / "disordered", config)
