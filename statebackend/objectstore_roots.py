"""The objects of a store and, in a branch, those of the stores that it was branched from.

A manifest names a file by its object name, ``sst/…``, or, if it lies in another store, by that name below
``root/<number>/``; the manifest's ``roots`` say where each number is. `RootedObjectStore` takes such names,
so that whatever reads files (the block cache, a merge, `verify`) need not know of branches.

Invariants:

* Nothing is ever written or deleted below another root.
* A name below a root means the same object for as long as the branch lives.
"""

# ruff: noqa: D102  (the methods of a store are documented in `ObjectStore`)
from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

from statebackend.errors import ObjectMissingError
from statebackend.objectstore import open_object_store
from statebackend.objectstore_base import Data, ObjectStore, PutResult

__all__ = ["RootedObjectStore", "absolute_url", "inherited_name", "is_inherited", "options_of_root", "root_opener"]

_INHERITED = re.compile(r"root/(\d+)/(.+)")

RootOptions = Mapping[str, Mapping[str, Any]]


def inherited_name(name: str) -> str:
    """How a branch names a file that its parent names ``name``: one root further away."""
    number, own = _split(name)
    return f"root/{number + 1}/{own}"


def is_inherited(name: str) -> bool:
    """Whether the object lies in a store that this one was branched from."""
    return name.startswith("root/")


def absolute_url(url: str | os.PathLike[str]) -> str:
    """The URL in a form that means the same in every working directory."""
    text = os.fspath(url)
    return text if "://" in text else os.path.abspath(text)  # noqa: PTH100  (never resolves links)


def root_opener(
    url: str,
    executor: Executor,
    storage_options: Mapping[str, Any] | None,
    root_options: RootOptions | None,
    timeout_s: float = 30.0,
) -> Callable[[str], ObjectStore]:
    """Opens other roots for a store at ``url``.

    ``root_options``: the storage options of other roots by their URL; a root that is not in it gets those
    of the store itself if it is reached by the same protocol, else none. Nothing is ever written there.
    """

    def open_root(root: str) -> ObjectStore:
        options = options_of_root(root, url, storage_options, root_options)
        return open_object_store(root, executor, storage_options=options, allow_unsafe_create=True, timeout_s=timeout_s)

    return open_root


def options_of_root(
    root: str, url: str, storage_options: Mapping[str, Any] | None, root_options: RootOptions | None
) -> Mapping[str, Any] | None:
    """The storage options of another store, as in `root_opener`."""
    alike = _protocol(root) == _protocol(url)
    return (root_options or {}).get(root, storage_options if alike else None)


class RootedObjectStore:
    """See the module. ``open_root`` opens another store by its URL, when its first object is asked for."""

    def __init__(self, own: ObjectStore, open_root: Callable[[str], ObjectStore]) -> None:
        self._own = own
        self._open_root = open_root
        self._urls: Mapping[int, str] = {}
        self._opened: dict[int, ObjectStore] = {}

    def use(self, urls: Mapping[int, str]) -> None:
        """Where the roots are, as the manifest says."""
        if urls != self._urls:
            self._urls, self._opened = dict(urls), {}

    async def get(self, name: str) -> bytes:
        return await self.get_range(name, 0) if is_inherited(name) else await self._own.get(name)

    async def get_range(self, name: str, start: int, end: int | None = None) -> bytes:
        if not is_inherited(name):
            return await self._own.get_range(name, start, end)
        number, there = _split(name)
        try:
            return await self._root(number, name).get_range(there, start, end)
        except ObjectMissingError as error:
            raise ObjectMissingError(
                f"{name}: does not exist in {self._urls[number]}, from which this store was branched: "
                f"that store was deleted, moved or replaced ({error})"
            ) from error

    async def put(self, name: str, data: Data) -> None:
        await self._own.put(_owned(name), data)

    async def put_if_absent(self, name: str, data: Data) -> PutResult:
        return await self._own.put_if_absent(_owned(name), data)

    async def list(self, prefix: str) -> list[str]:
        return await self._own.list(_owned(prefix))

    async def delete(self, name: str) -> None:
        await self._own.delete(_owned(name))

    def describe(self) -> str:
        return self._own.describe()

    def _root(self, number: int, name: str) -> ObjectStore:
        if number not in self._urls:
            raise ObjectMissingError(f"{name}: the manifest knows no root {number}")
        if number not in self._opened:
            self._opened[number] = self._open_root(self._urls[number])
        return self._opened[number]


def _split(name: str) -> tuple[int, str]:
    """Number of the root (0: the store itself) and name of the object there."""
    match = _INHERITED.fullmatch(name)
    return (int(match.group(1)), match.group(2)) if match else (0, name)


def _owned(name: str) -> str:
    if is_inherited(name):
        raise ValueError(f"{name}: belongs to another store, which a branch only reads")
    return name


def _protocol(url: str) -> str:
    return url.partition("://")[0] if "://" in url else "file"
