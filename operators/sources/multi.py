"""Several sources of one schema, read side by side as the splits of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa

from operators.errors import SchemaError
from operators.sources.base import IDLE, Idle, Position, Source, SourceBatch

__all__ = ["MultiSource"]


class MultiSource:
    """Reads each of ``sources`` (by split name) in turn, a batch each; a split that is paused is passed over.

    Event time is followed per split, so that one split may be far behind the others without its rows being
    late. The position holds that of every split, and whose turn is next: a restored job reads in the same order.
    Names must be the same when a job is restored.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        if not sources:
            raise ValueError("several splits: at least one source is needed")
        self._sources = dict(sources)
        self._names = list(self._sources)
        self._schema = next(iter(self._sources.values())).schema
        for name, source in self._sources.items():
            if source.schema != self._schema:
                raise SchemaError(f"split {name!r}: expected columns\n{self._schema}\nfound\n{source.schema}")
        self._positions: dict[str, Position] = {}
        self._turn = 0
        self._ended: set[str] = set()
        self._paused: frozenset[str] = frozenset()

    @property
    def schema(self) -> pa.Schema:
        """The schema that all splits have."""
        return self._schema

    @property
    def total_rows(self) -> int | None:
        """Rows of all splits, if all are known."""
        totals = [source.total_rows for source in self._sources.values()]
        return None if None in totals else sum(t for t in totals if t is not None)

    @property
    def splits(self) -> frozenset[str]:
        """The splits that have not ended."""
        return frozenset(self._names) - self._ended

    def describe(self) -> Mapping[str, Any]:
        """The splits."""
        return {"kind": "splits", "splits": {name: dict(s.describe()) for name, s in self._sources.items()}}

    def pause(self, splits: frozenset[str]) -> None:
        """Pass these over until the next call."""
        self._paused = splits

    def open(self, position: Position | None) -> None:
        """Start every split at its position."""
        found = position or {"turn": 0, "splits": {}, "ended": []}
        self._turn, self._ended = found["turn"], set(found["ended"])
        self._positions = dict(found["splits"])
        for name, source in self._sources.items():
            if name not in self._ended:
                source.open(self._positions.get(name))

    def poll(self) -> SourceBatch | Literal[Idle.IDLE] | None:
        """The next batch of the split whose turn it is, of those that are not paused and have something."""
        for _ in range(len(self._names)):
            name = self._names[self._turn]
            self._turn = (self._turn + 1) % len(self._names)
            if name in self._ended or name in self._paused:
                continue
            item = self._sources[name].poll()
            if item is None:
                self._ended.add(name)
            elif item is not IDLE:
                self._positions[name] = item.position
                return SourceBatch(item.batch, self._position(), name)
        return IDLE if self.splits else None

    def close(self) -> None:
        """Close every split."""
        for source in self._sources.values():
            source.close()

    def _position(self) -> Position:
        return {"turn": self._turn, "splits": dict(self._positions), "ended": sorted(self._ended)}
