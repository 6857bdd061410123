"""Makes a source that never ends one that does, so that a test comes to an end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa

from operators.sources import IDLE, Position, Source, SourceBatch, SplitSource
from operators.sources.base import Idle

__all__ = ["ends_after"]


def ends_after(source: Source, rows: int) -> Source:
    """The source, which ends when so many rows have come, those before the position it was opened at among them."""
    return _EndingSplits(source, rows) if isinstance(source, SplitSource) else _Ending(source, rows)


class _Ending:
    def __init__(self, source: Source, rows: int) -> None:
        self._source = source
        self._rows = rows
        self._passed = 0

    @property
    def schema(self) -> pa.Schema:
        return self._source.schema

    @property
    def total_rows(self) -> int:
        return self._rows

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "ending", "source": dict(self._source.describe())}

    def open(self, position: Position | None) -> None:
        self._passed = 0 if position is None else position["rows"]
        self._source.open(None if position is None else position["position"])

    def poll(self) -> SourceBatch | Literal[Idle.IDLE] | None:
        if self._passed >= self._rows:
            return None
        item = self._source.poll()
        if item is None or item is IDLE:
            return item
        self._passed += item.batch.num_rows
        return SourceBatch(item.batch, {"rows": self._passed, "position": item.position}, item.split)

    def close(self) -> None:
        self._source.close()


class _EndingSplits(_Ending):
    _source: SplitSource

    @property
    def splits(self) -> frozenset[str]:
        return self._source.splits

    def pause(self, splits: frozenset[str]) -> None:
        self._source.pause(splits)
