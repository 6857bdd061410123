"""Events as record batches, a pure function of the configuration and a range of event numbers.

Of each 50 consecutive events the first is a person, three are auctions and 46 are bids; ids count up
within each kind from 1000. Half of all bids go to one hot auction, three quarters come from one hot
bidder and three quarters of the auctions are offered by one hot seller, which change with every hundred
new auctions and persons; the others are uniform over those in flight. Prices are log-uniform over six
decades, half of the bids come through one of four channels and the others through one of 10,000.
``extra`` fills the events to 200, 500 and 100 bytes on average.

Where the originals draw one number after another, `Draws` gives each use its own lane, so that events
can be made in any order; and each channel has a URL that depends on the seed, which theirs does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.nexmark.draws import Draws, Int64Array, letter_pool
from operators.nexmark.model import DISORDER_STRIDE, EVENT_TIME, GROUP, SCHEMAS, SEQ, Kind, NexmarkConfig

__all__ = ["generate"]

_PERSONS, _AUCTIONS = 1, 3  # of each GROUP
_FIRST_ID = 1000
_FIRST_CATEGORY, _CATEGORIES = 10, 5
_ID_LEAD = 10  # ids of persons and auctions that are yet to come may be used
_HOT_EVERY = 100
_HOT_AUCTIONS, _HOT_BIDDERS, _HOT_SELLERS, _HOT_CHANNELS = 2, 4, 4, 2  # all but one in so many are hot
_AUCTIONS_IN_FLIGHT = 100
_ACTIVE_PERSONS = 1000
_BYTES = {Kind.PERSON: 200, Kind.AUCTION: 500, Kind.BID: 100}
_CHANNELS = 10_000
_CHUNK = 50_000  # events made together: what they need stays in the cache of a core

_STATES = ("AZ", "CA", "ID", "OR", "WA", "WY")
_CITIES = (
    "Phoenix", "Los Angeles", "San Francisco", "Boise", "Portland", "Bend", "Redmond", "Seattle", "Kent", "Cheyenne",
)  # fmt: skip
_FIRST_NAMES = ("Peter", "Paul", "Luke", "John", "Saul", "Vicky", "Kate", "Julie", "Sarah", "Deiter", "Walter")
_LAST_NAMES = ("Shultz", "Abrams", "Spencer", "White", "Bartels", "Walton", "Smith", "Jones", "Noris")
_NAMES = tuple(f"{first} {last}" for first in _FIRST_NAMES for last in _LAST_NAMES)
_HOT_CHANNEL_NAMES = ("Google", "Facebook", "Baidu", "Apple")

_Columns: TypeAlias = Mapping[str, Callable[[], pa.Array]]
"""How to make each column, once it is asked for."""


def generate(
    config: NexmarkConfig, kind: Kind, start: int, end: int, columns: tuple[str, ...] | None = None
) -> pa.RecordBatch:
    """All events of one kind among the events ``start`` up to, without, ``end`` of the stream.

    ``columns``: only these, in this order; all, as in `SCHEMAS`, by default.
    """
    if not 0 <= start <= end:
        raise ValueError(f"expected 0 <= start <= end, found {start} and {end}")
    full = SCHEMAS[kind]
    schema = full if columns is None else pa.schema([full.field(name) for name in columns])
    parts = [_chunk(config, kind, at, min(at + _CHUNK, end), schema) for at in range(start, end, _CHUNK)]
    return pa.concat_batches(parts) if parts else pa.RecordBatch.from_pylist([], schema)


def _chunk(config: NexmarkConfig, kind: Kind, start: int, end: int, schema: pa.Schema) -> pa.RecordBatch:
    places = np.arange(start, end, dtype=np.int64)
    group = config.disorder_events
    numbers = places if group == 1 else places // group * group + places * DISORDER_STRIDE % group
    within = numbers % GROUP
    first, last = {
        Kind.PERSON: (0, _PERSONS),
        Kind.AUCTION: (_PERSONS, _PERSONS + _AUCTIONS),
        Kind.BID: (_PERSONS + _AUCTIONS, GROUP),
    }[kind]
    wanted = (within >= first) & (within < last)
    events = _Events(config, places[wanted], numbers[wanted])
    makers = {Kind.PERSON: _persons, Kind.AUCTION: _auctions, Kind.BID: _bids}[kind](events)
    return pa.RecordBatch.from_arrays([makers[name]() for name in schema.names], schema=schema)


class _Events:
    """Events of one kind: their places in the stream and the numbers that determine them."""

    def __init__(self, config: NexmarkConfig, places: Int64Array, numbers: Int64Array) -> None:
        self.seed = config.seed
        self.places = places
        self.draws = Draws(config.seed, numbers)
        self.rate = config.events_per_second
        self.times = config.base_time_ms + numbers * 1000 // self.rate
        group, within = np.divmod(numbers, GROUP)
        self.last_person: Int64Array = group * _PERSONS + np.minimum(within, _PERSONS - 1)
        """Person ids so far, from 0; of a person its own."""
        auction = np.clip(within - _PERSONS, -1, _AUCTIONS - 1)
        self.last_auction: Int64Array = group * _AUCTIONS + auction
        """Likewise of auctions."""

    def common(self) -> _Columns:
        """The columns of every kind."""
        return {SEQ: lambda: pa.array(self.places), EVENT_TIME: lambda: _timestamps(self.times)}

    def price(self, lane: int) -> Int64Array:
        """Cents, log-uniform from 1 to a million dollars."""
        return np.round(10.0 ** (6.0 * self.draws.fraction(lane)) * 100.0).astype(np.int64)

    def person(self, hot_ratio: int, hot: int, lane: int) -> Int64Array:
        """Ids: the ``hot``-th of the last hundred, or any of the active persons and of the few to come."""
        active = np.minimum(self.last_person + 1, _ACTIVE_PERSONS)
        other = self.last_person + 1 - active + self.draws.below(active + _ID_LEAD, lane)
        return _FIRST_ID + np.where(
            self.draws.below(hot_ratio, lane + 1) > 0, self.last_person // _HOT_EVERY * _HOT_EVERY + hot, other
        )

    def auction(self, lane: int) -> Int64Array:
        """Ids: the first of the last hundred, or any of those in flight and of the few to come."""
        oldest = np.maximum(self.last_auction - _AUCTIONS_IN_FLIGHT, 0)
        other = oldest + self.draws.below(self.last_auction - oldest + 1 + _ID_LEAD, lane)
        return _FIRST_ID + np.where(
            self.draws.below(_HOT_AUCTIONS, lane + 1) > 0, self.last_auction // _HOT_EVERY * _HOT_EVERY, other
        )

    def text(self, longest: int, lane: int, *, spaces: bool = True) -> pa.Array:
        """3 up to, without, ``longest`` letters."""
        lengths = 3 + self.draws.below(longest - 3, lane)
        return self.draws.letters(lengths, lane + 1, spaces=spaces)

    def pick(self, pool: tuple[str, ...], lane: int) -> pa.Array:
        """Any one of a few strings."""
        return pa.array(pool).take(pa.array(self.draws.below(len(pool), lane)))

    def filling(self, kind: Kind, size: Int64Array | int, lane: int) -> pa.Array:
        """Letters that fill events of ``size`` bytes to the average of their kind, give or take 20 %."""
        room = np.broadcast_to(np.maximum(_BYTES[kind] - np.asarray(size), 0), len(self.draws))
        spread = np.round(room * 0.2).astype(np.int64)
        lengths = room - spread + self.draws.below(np.maximum(2 * spread, 1), lane)
        return self.draws.letters(lengths, lane + 1)


def _persons(events: _Events) -> _Columns:
    name = lru_cache(1)(lambda: events.pick(_NAMES, 0))
    city = lru_cache(1)(lambda: events.pick(_CITIES, 1))
    state = lru_cache(1)(lambda: events.pick(_STATES, 2))
    card = lru_cache(1)(lambda: events.draws.digits("0000 0000 0000 0000", 3))
    email = lru_cache(1)(
        lambda: pc.binary_join_element_wise(
            events.text(7, 4, spaces=False), "@", events.text(5, 6, spaces=False), ".com", ""
        )
    )
    return {
        **events.common(),
        "id": lambda: pa.array(_FIRST_ID + events.last_person),
        "name": name,
        "emailAddress": email,
        "creditCard": card,
        "city": city,
        "state": state,
        "extra": lambda: events.filling(Kind.PERSON, 8 + _lengths(name(), email(), card(), city(), state()), 8),
    }


def _auctions(events: _Events) -> _Columns:
    draws = events.draws
    initial = lru_cache(1)(lambda: events.price(0))
    item = lru_cache(1)(lambda: events.text(20, 2))
    description = lru_cache(1)(lambda: events.text(100, 4))
    # As long on average as it takes to fill the auctions in flight.
    horizon_ms = max(1, _AUCTIONS_IN_FLIGHT * GROUP // _AUCTIONS * 1000 // events.rate)
    return {
        **events.common(),
        "id": lambda: pa.array(_FIRST_ID + events.last_auction),
        "itemName": item,
        "description": description,
        "initialBid": lambda: pa.array(initial()),
        "reserve": lambda: pa.array(initial() + events.price(1)),
        "expires": lambda: _timestamps(events.times + 1 + draws.below(2 * horizon_ms, 6)),
        "seller": lambda: pa.array(events.person(_HOT_SELLERS, 0, 7)),
        "category": lambda: pa.array(_FIRST_CATEGORY + draws.below(_CATEGORIES, 9)),
        "extra": lambda: events.filling(Kind.AUCTION, 8 + _lengths(item(), description()) + 5 * 8, 10),
    }


def _bids(events: _Events) -> _Columns:
    draws = events.draws

    @lru_cache(1)
    def channel() -> pa.Array:
        hot = draws.below(len(_HOT_CHANNEL_NAMES), 5)
        other = len(_HOT_CHANNEL_NAMES) + draws.below(_CHANNELS, 6)
        return pa.array(np.where(draws.below(_HOT_CHANNELS, 7) > 0, hot, other))

    return {
        **events.common(),
        "auction": lambda: pa.array(events.auction(0)),
        # The second of a hundred, so that hot bidders and hot sellers differ.
        "bidder": lambda: pa.array(events.person(_HOT_BIDDERS, 1, 2)),
        "price": lambda: pa.array(events.price(4)),
        "channel": lambda: _channels(events.seed)[0].take(channel()),
        "url": lambda: _channels(events.seed)[1].take(channel()),
        "extra": lambda: events.filling(Kind.BID, 4 * 8, 8),
    }


@lru_cache(4)
def _channels(seed: int) -> tuple[pa.Array, pa.Array]:
    """Name and URL of every channel, the hot ones first; nine in ten of the others name themselves in it."""
    names = [*_HOT_CHANNEL_NAMES, *(f"channel-{number}" for number in range(_CHANNELS))]
    first, second, third = (letter_pool(seed, len(names), 5, 100 + lane) for lane in range(3))
    named = Draws(seed, np.arange(len(names), dtype=np.int64)).below(10, 103) > 0
    urls = []
    for i, path in enumerate(zip(first, second, third, strict=True)):
        url = f"https://www.nexmark.com/{'/'.join(path)}/item.htm?query=1"
        number = i - len(_HOT_CHANNEL_NAMES)
        urls.append(f"{url}&channel_id={_reversed_bits(number)}" if number >= 0 and named[i] else url)
    return pa.array(names), pa.array(urls)


def _reversed_bits(number: int) -> int:
    """Of 32, as a signed integer without its sign: Java's Math.abs(Integer.reverse(number))."""
    reversed_ = int(f"{number:032b}"[::-1], 2)
    return abs(reversed_ - (1 << 32) if reversed_ >> 31 else reversed_)


def _lengths(*columns: pa.Array) -> Int64Array:
    """Bytes of all columns together, by row."""
    return sum((pc.binary_length(c).to_numpy().astype(np.int64) for c in columns), np.zeros(len(columns[0]), np.int64))


def _timestamps(times: Int64Array) -> pa.Array:
    return pa.array(times).view(pa.timestamp("ms"))
