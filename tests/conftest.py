"""Fixtures shared by all tests."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from tests.support.stores import World

# A shell that starts a command in the background has it ignore Ctrl-C, and every process that it starts as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture(autouse=True)
def no_thread_of_a_store_is_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [
        t.name for t in threading.enumerate() if t not in before and t.name.startswith(("statestore", "memorystate"))
    ]
    assert not left, f"threads left behind: {left}"
