"""A compactor outside of the job: how its lanes end."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import pytest

from statebackend.compaction_tool import ToolCompaction
from statebackend.errors import CompactorSupersededError


def test_when_several_lanes_are_superseded_at_once_none_of_their_failures_is_left_unseen() -> None:
    unseen: list[Any] = []

    async def superseded() -> None:
        raise CompactorSupersededError("another one took over")

    async def refreshed() -> None:
        return None

    async def follow() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
        rounds = [0]

        async def run_if_due() -> None:
            # The lane of the first round ends together with that of the second.
            rounds[0] += 1
            if rounds[0] == 1:
                await second.wait()
            else:
                second.set()
            await superseded()

        second = asyncio.Event()

        async def sleep(_: float) -> None:
            for _ in range(5):
                await asyncio.sleep(0)
            if rounds[0] == 1:
                return
            for _ in range(5):
                await asyncio.sleep(0)

        tool = ToolCompaction.__new__(ToolCompaction)
        tool._everything, tool._follow = False, True
        tool._tools = SimpleNamespace(url="memory://x", clock=SimpleNamespace(sleep=sleep))  # type: ignore[assignment]
        compactor, committer = SimpleNamespace(run_if_due=run_if_due), SimpleNamespace(refresh=refreshed)
        with pytest.raises(CompactorSupersededError):
            await tool._work(compactor, committer)  # type: ignore[arg-type]
        assert rounds[0] == 2

    asyncio.run(follow())
    gc.collect()
    assert unseen == []
