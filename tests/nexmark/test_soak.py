"""All combinations at a larger size, in processes that are killed with SIGKILL: `make soak`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from operators.nexmark.dataset import DatasetSettings, write_dataset
from operators.nexmark.model import NexmarkConfig
from operators.nexmark.queries import QUERIES
from tests.nexmark.running import assert_equals_reference

EVENTS = int(os.environ.get("NEXMARK_EVENTS", "1000000"))
CHECKPOINT_EVENTS = EVENTS // 12
PER_SECOND = 5_000


@pytest.fixture(scope="module", params=["ordered", "disordered"])
def events(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = NexmarkConfig(
        seed=11,
        base_time_ms=1_436_918_400_000 - 60_000,
        events_per_second=PER_SECOND,
        disorder_events=1 if request.param == "ordered" else 3 * PER_SECOND,
    )
    directory = tmp_path_factory.mktemp("events") / request.param
    write_dataset(directory, config, DatasetSettings(events=EVENTS, file_events=EVENTS // 3 + 1))
    return directory


@pytest.mark.soak
@pytest.mark.parametrize("kills", [0, 3])
@pytest.mark.parametrize("parallelism", [1, 2])
@pytest.mark.parametrize("query", QUERIES)
def test_every_query_equals_the_batch_computation(
    query: str, parallelism: int, kills: int, events: Path, tmp_path: Path
) -> None:
    generator = random.Random(f"{query} {parallelism} {kills}")
    places = ["--input", str(events), "--state", str(tmp_path / "state"), "--output", str(tmp_path / "out")]
    options = ["--parallelism", str(parallelism), "--checkpoint-events", str(CHECKPOINT_EVENTS)]
    command = [sys.executable, "-m", "operators", "nexmark", "run", query, *places, *options]
    for at in sorted(generator.sample(range(2 * CHECKPOINT_EVENTS, EVENTS), kills)):
        killed = subprocess.run([*command, "--kill-after-events", str(at)], capture_output=True, check=False)
        # Restored beyond this point, because an earlier run came that far before it was killed, it just ends.
        assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr.decode()
    last = subprocess.run(command, capture_output=True, check=False)
    assert last.returncode == 0, last.stderr.decode()
    report = json.loads(last.stdout.splitlines()[-1])
    assert report["events"] == EVENTS
    assert (report["restored_from"] is not None) == (kills > 0)
    assert_equals_reference(query, events, tmp_path)
