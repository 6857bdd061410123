"""A backend that is another one, for those who change what opening a table does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from statebackend import Checkpoint, Health, JobState, StateBackend, StateTable, StoredTable, StoreId, TableSpec

__all__ = ["WrappedBackend"]


class WrappedBackend:
    """A `StateBackend` that passes everything on to ``inner``."""

    def __init__(self, inner: StateBackend) -> None:
        self._inner = inner

    @property
    def store_id(self) -> StoreId:
        """That of the backend."""
        return self._inner.store_id

    @property
    def restored(self) -> Checkpoint | None:
        """That of the backend."""
        return self._inner.restored

    def table(self, spec: TableSpec) -> StateTable:
        """A table of the backend."""
        return self._inner.table(spec)

    def stored_tables(self) -> Mapping[str, StoredTable]:
        """Those of the backend."""
        return self._inner.stored_tables()

    def move_tables(self, names: Mapping[str, str | None]) -> None:
        """Move them in the backend."""
        self._inner.move_tables(names)

    def checkpoint(self, job: JobState, prepare: Sequence[Callable[[], None]] = ()) -> Future[Checkpoint]:
        """A checkpoint of the backend."""
        return self._inner.checkpoint(job, prepare)

    def health(self) -> Health:
        """That of the backend."""
        return self._inner.health()

    def close(self, deadline_s: float = 30.0) -> None:
        """Close the backend."""
        self._inner.close(deadline_s)
