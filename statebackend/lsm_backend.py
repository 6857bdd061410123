"""The LSM store as a `StateBackend`, and the registry in which third parties add their own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, cast

from statebackend.backend import StateBackend
from statebackend.settings import StoreSettings
from statebackend.store import StateStore

if TYPE_CHECKING:
    from datafusion.user_defined import AggregateUDF

__all__ = ["backend_names", "open_backend", "open_lsm"]

_GROUP = "statebackend.backends"


def open_lsm(
    url: str,
    *,
    udafs: Mapping[str, AggregateUDF] | None = None,
    settings: StoreSettings | None = None,
    **options: Any,
) -> StateStore:
    """Open the LSM store at ``url``; the entry point ``lsm``. ``options`` as in `StateStore.open`."""
    return StateStore.open(url, settings, udafs=udafs, **options)


def backend_names() -> list[str]:
    """Names of the registered backends (entry points in the group ``statebackend.backends``)."""
    return sorted({e.name for e in entry_points(group=_GROUP)})


def open_backend(url: str | os.PathLike[str], backend: str = "lsm", **options: Any) -> StateBackend:
    """Open a state backend by name.

    A backend is registered by an entry point in the group ``statebackend.backends`` whose object is
    called as ``open(url, *, udafs=..., **options)`` and returns a `StateBackend`.
    Raises `ValueError` for an unknown name.
    """
    for entry in entry_points(group=_GROUP):
        if entry.name == backend:
            return cast("StateBackend", entry.load()(os.fspath(url), **options))
    raise ValueError(f"no state backend {backend!r} is installed; there are {backend_names()}")
