"""The object stores of an open store, one around the other::

    storage ← other roots (branches) ← retrying ← counting ← disk cache (optional)

So a request is counted once however often it was tried, and what the disk cache answers is no request.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

from statebackend.disk_cache import DiskCache
from statebackend.manifest_store import Clock
from statebackend.objectstore import ObjectStore, open_object_store
from statebackend.objectstore_caching import DiskCachingObjectStore
from statebackend.objectstore_counting import CountingObjectStore
from statebackend.objectstore_roots import RootedObjectStore, root_opener
from statebackend.objectstore_wrappers import RetryingObjectStore, RetryPolicy
from statebackend.settings import StoreSettings

__all__ = ["ObjectStoreStack"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStoreStack:
    """The layers, each an `ObjectStore`; `top` is the one to use."""

    rooted: RootedObjectStore
    retrying: RetryingObjectStore
    counting: CountingObjectStore
    caching: DiskCachingObjectStore | None = None

    @classmethod
    def open(
        cls,
        url: str,
        executor: Executor,
        settings: StoreSettings,
        clock: Clock,
        rng: random.Random,
        *,
        objects: ObjectStore | None = None,
        open_root: Callable[[str], ObjectStore] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        root_options: Mapping[str, Mapping[str, Any]] | None = None,
        allow_unsafe_create: bool = False,
    ) -> ObjectStoreStack:
        """The layers for the store at ``url``, as in `StateStore.open`; the disk cache is added by `cached`."""
        timeout_s = settings.request_timeout_s
        inner = objects or open_object_store(
            url,
            executor,
            storage_options=storage_options,
            allow_unsafe_create=allow_unsafe_create,
            timeout_s=timeout_s,
        )
        rooted = RootedObjectStore(
            inner, open_root or root_opener(url, executor, storage_options, root_options, timeout_s)
        )
        retrying = RetryingObjectStore(rooted, RetryPolicy(timeout_s=timeout_s), sleep=clock.sleep, rng=rng)
        return cls(rooted=rooted, retrying=retrying, counting=CountingObjectStore(retrying))

    @property
    def top(self) -> ObjectStore:
        """The outermost layer."""
        return self.caching or self.counting

    def cached(self, settings: StoreSettings, executor: Executor, store_id: str) -> ObjectStoreStack:
        """With the disk cache of the settings, if there is one. A copy of a store elsewhere has the same id, so the
        place counts too."""
        if settings.disk_cache_dir is None:
            return self
        identity = f"{store_id} {self.counting.describe()}"
        cache = DiskCache(settings.disk_cache_dir, identity, settings.disk_cache_bytes)
        return replace(self, caching=DiskCachingObjectStore(self.counting, cache, executor))
