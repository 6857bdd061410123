"""Nexmark events that are made while they are read, for ever or so many, as fast as may be or at a given rate.

Position and identity are those of the events: kind, configuration, and how many events of the whole stream (of all
kinds) lie before. At a rate, event n of a run is due n / rate seconds after the first one that it reads; a run that
was restored begins anew to count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import pyarrow as pa

from operators.nexmark.generator import generate
from operators.nexmark.model import SCHEMAS, Kind, NexmarkConfig
from operators.sources import IDLE, Position, SourceBatch
from operators.sources.base import Idle

__all__ = ["NexmarkSource"]


class NexmarkSource:
    """Events of one kind.

    Args:
        kind: person, auction or bid.
        columns: all by default.
        config: seed, first time and rate of event time.
        events: of all kinds, after which the source ends; None: it does not.
        events_per_second: of all kinds, by the clock; None: as fast as they are taken. With the event time's own rate
            (``config.events_per_second``) the stream runs in real time.
        batch_events: events of all kinds that one batch covers.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        kind: Kind | str,
        columns: Sequence[str] | None = None,
        *,
        config: NexmarkConfig | None = None,
        events: int | None = None,
        events_per_second: float | None = None,
        batch_events: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if events_per_second is not None and not 0 < events_per_second < float("inf"):
            raise ValueError(f"events_per_second must be positive, or None, not {events_per_second}")
        if batch_events < 1 or (events is not None and events < 0):
            raise ValueError("batch_events must be at least 1, events not negative")
        self._kind = Kind(kind)
        full = SCHEMAS[self._kind]
        self._columns = None if columns is None else tuple(columns)
        self._schema = full if columns is None else pa.schema([full.field(name) for name in columns])
        self._config = config or NexmarkConfig()
        self._events = events
        self._rate = events_per_second
        self._batch_events = batch_events
        self._clock = clock
        self._next = 0
        self._first = 0
        self._began: float | None = None

    @property
    def schema(self) -> pa.Schema:
        """The columns asked for."""
        return self._schema

    @property
    def total_rows(self) -> None:
        """Not counted."""
        return

    def describe(self) -> Mapping[str, Any]:
        """Kind, columns and configuration: the same events come from the same ones."""
        return {"kind": f"nexmark-{self._kind}", "columns": self._schema.names, "config": asdict(self._config)}

    def open(self, position: Position | None) -> None:
        """Start after so many events."""
        self._next = self._first = 0 if position is None else int(position["events"])
        self._began = None

    def poll(self) -> SourceBatch | Literal[Idle.IDLE] | None:
        """The next batch, when its last event is due."""
        end = self._next + self._batch_events
        if self._events is not None:
            end = min(end, self._events)
        if end <= self._next:
            return None
        if self._rate is not None:
            now = self._clock()
            self._began = now if self._began is None else self._began
            if (end - self._first) / self._rate > now - self._began:
                return IDLE
        batch = generate(self._config, self._kind, self._next, end, self._columns)
        self._next = end
        return SourceBatch(batch, {"events": end})

    def close(self) -> None:
        """Nothing is open."""
