"""The three kinds of events: their columns, and the constants by which they are made.

All constants are the defaults of the generators of Flink's suite (nexmark/nexmark) and, before it,
of Apache Beam.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import pyarrow as pa

__all__ = ["BASE_TIME_MS", "EVENT_TIME", "GROUP", "SCHEMAS", "SEQ", "Kind", "NexmarkConfig"]

SEQ = "seq"
"""Column of the event number, over all kinds."""
EVENT_TIME = "dateTime"
"""Column of the event time."""
BASE_TIME_MS = 1_436_918_400_000
"""2015-07-15T00:00:00Z, the first event time in Beam's suite."""
GROUP = 50
"""Events in which the proportions of the kinds are exact."""

_TIME = pa.timestamp("ms")


class Kind(StrEnum):
    """A kind of event; also the name of its directory."""

    PERSON = "person"
    AUCTION = "auction"
    BID = "bid"


SCHEMAS = MappingProxyType(
    {
        Kind.PERSON: pa.schema(
            {
                SEQ: pa.int64(),
                "id": pa.int64(),
                "name": pa.string(),
                "emailAddress": pa.string(),
                "creditCard": pa.string(),
                "city": pa.string(),
                "state": pa.string(),
                EVENT_TIME: _TIME,
                "extra": pa.string(),
            }
        ),
        Kind.AUCTION: pa.schema(
            {
                SEQ: pa.int64(),
                "id": pa.int64(),
                "itemName": pa.string(),
                "description": pa.string(),
                "initialBid": pa.int64(),
                "reserve": pa.int64(),
                EVENT_TIME: _TIME,
                "expires": _TIME,
                "seller": pa.int64(),
                "category": pa.int64(),
                "extra": pa.string(),
            }
        ),
        Kind.BID: pa.schema(
            {
                SEQ: pa.int64(),
                "auction": pa.int64(),
                "bidder": pa.int64(),
                "price": pa.int64(),
                "channel": pa.string(),
                "url": pa.string(),
                EVENT_TIME: _TIME,
                "extra": pa.string(),
            }
        ),
    }
)
"""Columns and types of each kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NexmarkConfig:
    """What determines every event.

    ``base_time_ms``: epoch ms of event 0. ``events_per_second``: of event time.
    ``disorder_events``: each so many consecutive events change places (by a fixed permutation, the
    suite's ``outOfOrderGroupSize``); 1 leaves them in the order of their times. ``seq`` is always the place
    in the stream.
    """

    seed: int = 0
    base_time_ms: int = BASE_TIME_MS
    events_per_second: int = 10_000
    disorder_events: int = 1

    def __post_init__(self) -> None:
        if self.events_per_second < 1:
            raise ValueError(f"events_per_second must be at least 1, not {self.events_per_second}")
        if self.disorder_events < 1 or self.disorder_events % DISORDER_STRIDE == 0:
            raise ValueError(
                f"disorder_events must be at least 1 and no multiple of {DISORDER_STRIDE}, not {self.disorder_events}"
            )


DISORDER_STRIDE = 953
"""Event n of a group of g takes the place n * 953 mod g, as in the suite."""
