"""Reading a store without owning it: its manifests, checkpoints, tables and files.

Nothing is written and nobody is fenced. A manifest that cannot be read is reported with its error
beside those that can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from statebackend.errors import CheckpointNotFoundError, StateStoreError
from statebackend.manifest import Manifest
from statebackend.manifest_store import ManifestStore
from statebackend.objectstore import open_object_store
from statebackend.runtime import IsolatedRuntime

__all__ = ["StoreView", "read_store"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreView:
    """What was found: the newest manifests (newest first) and the SSTables present, by listing."""

    url: str
    numbers: tuple[int, ...]
    manifests: tuple[Manifest, ...]
    unreadable: Mapping[int, StateStoreError]
    sstables: tuple[str, ...]

    @property
    def latest(self) -> Manifest:
        """The manifest that is the store now. Raises the error that kept it from being read."""
        if self.numbers[0] in self.unreadable:
            raise self.unreadable[self.numbers[0]]
        return self.manifests[0]

    @property
    def orphans(self) -> tuple[str, ...]:
        """SSTables that none of the manifests read here names."""
        named = {name for m in self.manifests for name in m.files}
        return tuple(n for n in self.sstables if n not in named)

    def manifest_of(self, checkpoint_id: int) -> Manifest:
        """The manifest that committed a checkpoint. Raises `CheckpointNotFoundError`."""
        for manifest in reversed(self.manifests):
            if manifest.checkpoint_id == checkpoint_id:
                return manifest
        known = sorted({int(m.checkpoint_id) for m in self.manifests if m.checkpoint_id})
        span = f"{known[0]} to {known[-1]}" if known else "none"
        raise CheckpointNotFoundError(f"{self.url}: no checkpoint {checkpoint_id}; there are {span}")


def read_store(url: str, *, manifests_max: int = 1000, storage_options: Mapping[str, Any] | None = None) -> StoreView:
    """Read the newest ``manifests_max`` manifests of the store at ``url``.

    Raises `CheckpointNotFoundError` when there is no store at ``url``.
    """
    with IsolatedRuntime("statestore-view", io_threads=8, cpu_threads=1) as runtime:
        objects = open_object_store(url, runtime.io_executor, storage_options=storage_options, allow_unsafe_create=True)
        return runtime.call(_read(url, ManifestStore(objects), objects, manifests_max), None)


async def _read(url: str, store: ManifestStore, objects: Any, manifests_max: int) -> StoreView:
    while True:
        numbers = sorted(await store.numbers(), reverse=True)
        if not numbers:
            raise CheckpointNotFoundError(f"{url}: no state store here (no manifest below manifest/)")
        found: list[Manifest] = []
        unreadable: dict[int, StateStoreError] = {}
        for number in numbers[:manifests_max]:
            try:
                manifest = await store.read(number)
            except StateStoreError as error:
                unreadable[number] = error
                continue
            if manifest is not None:
                found.append(manifest)
        # The newest two are never collected: what is still one of them was not collected while it was read.
        if numbers[0] >= max(await store.numbers(), default=0) - 1:
            break
    return StoreView(
        url=url,
        numbers=tuple(numbers),
        manifests=tuple(found),
        unreadable=unreadable,
        sstables=tuple(await objects.list("sst/")),
    )
