"""Stores by URL in one memory, for tests with several of them: whatever opens a URL meets the same planned faults.

::

    with Places() as places, places.process(plan):
        StateStore.open("memory://main") ...     # the store, tools, readers and roots of branches, all with the plan
    ...
        list(places.names("memory://main"))
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from fsspec.implementations.memory import MemoryFileSystem

from statebackend.objectstore import FsspecObjectStore, ObjectStore, open_object_store
from tests.support.faulty_objectstore import CrashedError, FaultPlan, FaultyObjectStore

_DOORS = ("objectstore_stack", "toolbox", "objectstore_roots", "inspect")
"""Modules that open an object store by its URL."""


class Process:
    """The object stores that one process has opened; a crash in one of them is the end of all."""

    def __init__(self, plan: FaultPlan) -> None:
        self.plan = plan
        self.stores: list[FaultyObjectStore] = []

    @property
    def crashed(self) -> CrashedError | None:
        """The crash that ended the process, if one did."""
        return next((s.crashed for s in self.stores if s.crashed), None)

    def open(self, inner: ObjectStore) -> ObjectStore:
        store = _OfProcess(inner, self)
        self.stores.append(store)
        return store


class _OfProcess(FaultyObjectStore):
    def __init__(self, inner: ObjectStore, process: Process) -> None:
        super().__init__(inner, process.plan)
        self._process = process

    def _raise_if_crashed(self) -> None:
        if (error := self._process.crashed) is not None:
            raise CrashedError(str(error))


@contextmanager
def process(plan: FaultPlan | None = None, of: str = "", places: Places | None = None) -> Iterator[Process]:
    """What is opened by URLs that contain ``of`` meets the faults of the plan; ``places``: not where it says."""
    running = Process(plan or FaultPlan())

    def opened(url: str, *args: Any, **options: Any) -> ObjectStore:
        inner = open_object_store(url, *args, **options) if places is None else places.objects(url)
        return running.open(inner) if of in str(url) else inner

    with ExitStack() as stack:
        for door in _DOORS:
            stack.enter_context(mock.patch(f"statebackend.{door}.open_object_store", opened))
        yield running


class Places:
    """Object stores in a memory of their own, by URL."""

    def __init__(self) -> None:
        self._fs = MemoryFileSystem(skip_instance_cache=True)
        self._fs.store, self._fs.pseudo_dirs = {}, [""]
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="places")

    def objects(self, url: str) -> ObjectStore:
        """The objects at a URL such as ``memory://main``."""
        return FsspecObjectStore(self._fs, f"/{url.partition('://')[2]}", self._pool)

    def names(self, url: str, prefix: str = "") -> list[str]:
        """Names of the objects there."""
        return asyncio.run(self.objects(url).list(prefix))

    def snapshot(self) -> dict[str, bytes]:
        """All objects by path, to be given to `restore`."""
        return {path: file.getvalue() for path, file in self._fs.store.items()}

    def restore(self, objects: dict[str, bytes]) -> None:
        """Make the memory what it was at a snapshot."""
        self._fs.store.clear()
        self._fs.pseudo_dirs[:] = [""]
        for path, data in objects.items():
            self._fs.pipe_file(path, data)

    def __enter__(self) -> Places:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
