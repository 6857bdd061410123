"""Merges the files of a store from outside of the process that writes it: once, or for as long as one likes.

The compactor claims the store by a commit beside the running writer, which it neither fences nor stops:
the writer's own compactor stands by meanwhile. When it ends, however it is asked to, it releases the claim; when
it is killed, the writer's compactor takes over after a time without progress.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from statebackend.cache import BlockCache, BlockReader, CachePool
from statebackend.compaction import CompactionPlan, backlog, merge_all
from statebackend.compaction_merge import RunMerger, let_go
from statebackend.compactor import LANES, CompactionLayouts, CompactionStats, Compactor
from statebackend.errors import (
    CommitUnknownError,
    CompactorSupersededError,
    StorageUnavailableError,
)
from statebackend.keys import Hasher
from statebackend.manifest import CompactorRelease, Manifest
from statebackend.manifest_store import Clock, FenceableManifest, manifest_name, new_id
from statebackend.runtime import IsolatedRuntime
from statebackend.settings import StoreSettings
from statebackend.toolbox import Options, RootOptions, Toolbox, open_toolbox

if TYPE_CHECKING:
    from datafusion.user_defined import AggregateUDF

__all__ = ["CompactionSummary", "ToolCompaction", "compact"]

_INTERVAL_S = 1.0
"""How often a compactor that follows a store looks for new flushed files: one small request each time."""

OnRows = Callable[[CompactionPlan, int], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactionSummary:
    """What a compactor did until it ended.

    ``claimed``: it found something to do; ``superseded``: it ended because another compactor claimed the store;
    ``stopped``: it was asked to end before it was done.
    """

    stats: CompactionStats
    claimed: bool
    superseded: bool
    stopped: bool


def compact(
    url: str,
    *,
    follow: bool = False,
    everything: bool = False,
    settings: StoreSettings | None = None,
    storage_options: Options = None,
    root_options: RootOptions = None,
    udafs: Mapping[str, AggregateUDF] | None = None,
    on_rows: OnRows | None = None,
    until: Callable[[], object] | None = None,
) -> CompactionSummary:
    """Merge what is due in the store at ``url``.

    ``follow``: go on until stopped, else end when nothing is due any more. ``everything``: merge every table into
    one run, due or not, first. ``udafs``: Python aggregate functions by name; the states of tables that
    need others are kept unreduced. ``on_rows`` is told of merged input rows, on another thread. ``until``: a
    blocking call, on a thread of its own, whose return asks the compactor to end. So does Ctrl-C (or whatever
    else raises ``KeyboardInterrupt`` here); a second one aborts without releasing the claim.

    Raises `CheckpointNotFoundError` where there is no store, and what made the last merge fail.
    """
    settings = settings or StoreSettings()
    with IsolatedRuntime("statestore-compact", settings.io_threads, settings.cpu_threads) as runtime:
        tools = open_toolbox(runtime, url, storage_options, root_options)
        work = ToolCompaction(
            tools, runtime, settings, udafs or {}, follow=follow, everything=everything, on_rows=on_rows
        )
        running = runtime.submit(work.run)

        def wait_for_the_end() -> None:
            assert until is not None
            until()
            if not running.done():
                runtime.submit(work.stop)

        if until is not None:
            threading.Thread(target=wait_for_the_end, name="statestore-compact-until", daemon=True).start()
        try:
            return running.result()
        except KeyboardInterrupt:
            runtime.submit(work.stop)
            return running.result()


class ToolCompaction:
    """One run of a compactor outside of the writer; its coroutines run on ``runtime``."""

    def __init__(
        self,
        tools: Toolbox,
        runtime: IsolatedRuntime,
        settings: StoreSettings,
        udafs: Mapping[str, AggregateUDF],
        *,
        follow: bool,
        everything: bool,
        on_rows: OnRows | None = None,
    ) -> None:
        self._tools = tools
        self._settings = settings
        self._layouts = CompactionLayouts(Hasher(), udafs)
        self._follow = follow
        self._everything = everything
        self._on_rows = on_rows
        reader = BlockReader(tools.objects, BlockCache(CachePool(0)))
        self._merger = RunMerger(tools.objects, reader, runtime, settings, tools.clock, tools.rng)
        self._stop = asyncio.Event()

    async def stop(self) -> None:
        """Ask `run` to end: merges under way are abandoned, the claim is released."""
        self._stop.set()

    async def run(self) -> CompactionSummary:
        """Claim, merge, release. Raises what made the last merge fail, or kept it from claiming."""
        latest = await self._tools.latest()
        if not self._follow and not self._plans(latest) and not backlog(latest, self._settings).tables:
            return CompactionSummary(stats=CompactionStats(), claimed=False, superseded=False, stopped=False)
        tools, timeout_s = self._tools, self._settings.commit_timeout_s
        compactor_id = new_id(tools.rng)
        claim = await FenceableManifest.init_compactor(tools.manifests, compactor_id, tools.clock, tools.rng, timeout_s)
        committer = _GuestCommitter(claim, tools.clock, timeout_s)
        compactor = Compactor(
            compactor_id, committer, self._merger, self._settings, tools.clock, self._layouts.of, _ignore,
            stands_by=False, on_rows=self._on_rows,
        )  # fmt: skip
        logger.info("compactor %s claimed %s with epoch %d", compactor_id, tools.url, claim.epoch)
        superseded = False
        try:
            done = await self._until_stopped(self._work(compactor, committer))
        except CompactorSupersededError as error:
            logger.info("%s: ends, %s", tools.url, error)
            superseded, done = True, True
        except Exception:
            await self._release(committer, claim.epoch)
            raise
        if not superseded:
            await self._release(committer, claim.epoch)
        if done and not self._follow and compactor.progress.last_error is not None:
            raise compactor.progress.last_error
        return CompactionSummary(stats=compactor.stats, claimed=True, superseded=superseded, stopped=not done)

    def _plans(self, manifest: Manifest) -> list[CompactionPlan]:
        found = (merge_all(manifest, name) for name in manifest.tables) if self._everything else ()
        return [plan for plan in found if plan is not None]

    async def _work(self, compactor: Compactor, committer: _GuestCommitter) -> None:
        if self._everything:
            await compactor.merge_now(self._plans(await committer.refresh()))
        if not self._follow:
            await _all(*(compactor.run_if_due() for _ in range(LANES)))
            return
        lanes: set[asyncio.Task[None]] = set()
        try:
            while True:
                try:
                    await committer.refresh()
                except StorageUnavailableError as error:
                    logger.warning("%s: cannot look for new files, to be tried again: %s", self._tools.url, error)
                lanes.add(asyncio.create_task(compactor.run_if_due()))
                await self._tools.clock.sleep(_INTERVAL_S)
                for task in [task for task in lanes if task.done()]:
                    lanes.discard(task)  # the others are looked at below, should this one raise
                    task.result()
        finally:
            let_go(lanes)

    async def _until_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Whether the work ended by itself."""
        tasks = working, stopping = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
            return working.done()
        finally:
            let_go([task for task in tasks if not task.done()])
            del stopping

    async def _release(self, committer: _GuestCommitter, epoch: int) -> None:
        try:
            await committer.write_manifest_safely(CompactorRelease(epoch=epoch).apply)
        except CompactorSupersededError:
            return
        except (StorageUnavailableError, CommitUnknownError) as error:
            logger.warning("%s: the claim could not be released, it ends by itself: %s", self._tools.url, error)


class _GuestCommitter:
    """Commits for a compactor beside a running writer: on top of the newest manifest, one at a time."""

    def __init__(self, claim: FenceableManifest, clock: Clock, timeout_s: float) -> None:
        self._claim = claim
        self._clock = clock
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()

    @property
    def manifest(self) -> Manifest:
        return self._claim.manifest

    async def refresh(self) -> Manifest:
        async with self._turn:
            return await self._claim.load()

    async def write_manifest_safely(self, transition: Callable[[Manifest], Manifest]) -> Manifest:
        deadline = self._clock.monotonic() + self._timeout_s
        async with self._turn:
            while True:
                await self._claim.load()
                if (manifest := await self._claim.write(transition, deadline)) is not None:
                    return manifest
                if self._clock.monotonic() > deadline:
                    raise StorageUnavailableError(
                        f"{manifest_name(self.manifest.number + 1)}: other commits came first for {self._timeout_s:g} s"
                    )


async def _all(*work: Coroutine[Any, Any, None]) -> None:
    """Wait for all; the first failure ends the others."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        let_go(tasks)


def _ignore(_: Manifest) -> None:
    """Nobody reads from the files here."""
