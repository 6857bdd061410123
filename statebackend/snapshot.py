"""An open store at one moment, for readers in the same process: what a *live* query sees.

Taking a snapshot copies references under the store's lock: of each table the pieces of its MemTables, its list of files
and its watermark, none of which ever changes. Its cost depends on neither rows nor readers, and whoever writes waits
for that only. What the reader does afterwards, it does on its own threads and, where the store can be opened by its
URL, through a cache and storage connections of its own (``catalog_states.py``).

Invariants:

* All tables are of the same moment. A barrier under way changes nothing: rows that are being flushed are in the
  snapshot as rows, or as the file that took their place, never as both.
* As long as the snapshot is referred to, the collector of this process leaves its files alone, and its rows stay in
  memory; after that nothing of it stays. Nothing is written, and no other process knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from statebackend.backend import JobState
from statebackend.compaction import CompactionPlan
from statebackend.keys import Hasher
from statebackend.manifest import Manifest, TableState
from statebackend.merge import TableLayout
from statebackend.metrics import Sample
from statebackend.settings import StoreSettings
from statebackend.table import LsmTable
from statebackend.table_view import FileHost, TableView

__all__ = ["LiveBackend", "LiveState", "StateSnapshot", "StoreLocation", "with_live_tables"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLocation:
    """Where a store lies, and with which options it is opened; see `StateStore.open`."""

    url: str
    storage_options: Mapping[str, Any] | None = None
    root_options: Mapping[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True, weakref_slot=True, kw_only=True, eq=False)
class StateSnapshot:
    """Every table of an open store at one moment.

    ``manifest``: the newest one, with the files and watermarks of this moment and the job's positions; ``views``: the
    tables that are open. ``location``: None for a store that no URL leads to. ``layout_of`` makes the layout of a table
    that is not open. ``samples``: the store's figures when they are asked for; ``merging``: merges under way.
    """

    url: str
    manifest: Manifest
    views: Mapping[str, TableView]
    location: StoreLocation | None
    settings: StoreSettings
    layout_of: Callable[[TableState], TableLayout]
    samples: Callable[[], list[Sample]]
    merging: tuple[CompactionPlan, ...] = ()

    def view(self, name: str, host: FileHost | None = None) -> TableView:
        """One table; its files are read through ``host``, by default the store's own reads.

        Raises ``KeyError`` when there is none, `SchemaMismatchError` or `UnsupportedAggregateError` when nobody has it
        open and its states cannot be finalised here.
        """
        state = self._state(name)
        view = self.views.get(name)
        if view is None:
            assert host is not None, "a table that is in a manifest is in a store with files"
            return TableView(self.layout_of(state), host, state.files, (), state.watermark)
        return view if host is None else replace(view, host=host)

    def raw_view(self, name: str, host: FileHost | None = None) -> TableView:
        """One table of which partial states are only read as they were written. Raises ``KeyError``."""
        state = self._state(name)
        view = self.views.get(name)
        if view is not None:
            return replace(view, layout=replace(view.layout, merger=None), host=host or view.host)
        assert host is not None, "a table that is in a manifest is in a store with files"
        layout = TableLayout.for_reading(state.spec, Hasher(), state.history)
        return TableView(layout, host, state.files, (), state.watermark)

    def _state(self, name: str) -> TableState:
        if (state := self.manifest.tables.get(name)) is None:
            raise KeyError(f"{self.url}: no table {name!r}; there are {sorted(self.manifest.tables)}")
        return state


@runtime_checkable
class LiveState(Protocol):
    """Whose state can be read while it changes: an open store, or a job that is running."""

    def snapshot(self) -> StateSnapshot:
        """Every table at one moment; from any thread."""


@runtime_checkable
class LiveBackend(Protocol):
    """A `StateBackend` whose state can be read while a job uses it."""

    def snapshot(self, job: JobState | None = None) -> StateSnapshot:
        """Every table at one moment; ``job``: the positions of the job at that moment."""


def with_live_tables(manifest: Manifest, job: JobState, opened: Mapping[str, LsmTable]) -> Manifest:
    """The manifest with the files and watermarks that these tables have now, and the positions of the job."""
    live = {}
    for name, table in opened.items():
        cut = table.cut()
        files = (*table.files, *(meta for _, meta in table.early))
        live[name] = TableState(
            spec=cut.spec, history=cut.history, fingerprint=cut.fingerprint, watermark=cut.watermark, files=files
        )
    return replace(manifest, tables={**manifest.tables, **live}, job=job)
