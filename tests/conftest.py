"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tests.support.kafka import REQUIRED, KafkaBroker, KafkaMissingError, shared_broker
from tests.support.postgres import REQUIRED as POSTGRES_REQUIRED
from tests.support.postgres import PostgresMissingError, PostgresServer, postgres_server
from tests.support.stores import World

# A shell that starts a command in the background has it ignore Ctrl-C, and every process that it starts as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """A real broker, one for all processes of the run. Skipped where it cannot be started, unless it is required."""
    base = tmp_path_factory.getbasetemp()
    try:
        # Every worker of a run has a folder of its own in that of the run.
        with shared_broker((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kafka") as broker:
            yield broker
    except KafkaMissingError as error:
        if os.environ.get(REQUIRED):
            pytest.fail(f"{error} ({REQUIRED} is set)")
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real server. Skipped where it cannot be started, unless it is required."""
    try:
        with postgres_server() as server:
            yield server
    except PostgresMissingError as error:
        if os.environ.get(POSTGRES_REQUIRED):
            pytest.fail(f"{error} ({POSTGRES_REQUIRED} is set)")
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def no_thread_of_a_store_is_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [
        t.name for t in threading.enumerate() if t not in before and t.name.startswith(("statestore", "memorystate"))
    ]
    assert not left, f"threads left behind: {left}"
