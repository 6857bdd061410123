"""What an open store does by itself, again and again: commit new rows, collect garbage.

Each is a coroutine on the store's runtime that ends with the store. A failure is kept for `health`, logged, and the
next turn tries again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future

from statebackend.backend import Checkpoint
from statebackend.early_flush import log_failure
from statebackend.errors import StateStoreError
from statebackend.flusher import MemtableFlusher
from statebackend.garbage_collector import GarbageCollector
from statebackend.logs import context
from statebackend.manifest import Manifest
from statebackend.manifest_store import Clock

__all__ = ["collect_garbage", "commit_new_rows"]

logger = logging.getLogger(__name__)


async def commit_new_rows(
    commit: Callable[[], Future[Checkpoint] | None], flusher: MemtableFlusher, clock: Clock, interval_s: float
) -> None:
    """Call ``commit`` every so many seconds; it gives None when there is nothing to commit."""
    while flusher.fatal is None:
        await clock.sleep(interval_s)
        if (future := commit()) is not None:
            future.add_done_callback(log_failure(flusher))


async def collect_garbage(
    collector: GarbageCollector,
    flusher: MemtableFlusher,
    newest: Callable[[], Manifest],
    clock: Clock,
    interval_s: float,
) -> None:
    """Delete what no kept checkpoint needs, every so many seconds."""
    while flusher.fatal is None:
        await clock.sleep(interval_s)
        fields = context(store_id=flusher.manifest.store_id)
        try:
            plan = await collector.run(newest())
        except StateStoreError as error:
            logger.warning("collecting garbage failed, the next run goes on: %s", error, extra=fields)
        else:
            logger.info("collected %d objects", len(plan.objects), extra=fields)
