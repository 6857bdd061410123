"""The queries of the suite as streams.

Each query names the columns that it reads of each kind of event; nothing else is read from the files. Columns
of the results are those of the suite's SQL, except that times called ``wstart``, ``sstart``, ``send`` and ``ts``
are epoch milliseconds (int64) and that averages are double.

q12 counts in event time, not in processing time, so that its result is a function of the input. The statistics
per day of q15 to q17 are windows of a day: they end with the day, and their state with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import TypeAlias

import pyarrow as pa
from datafusion import Expr, lit
from datafusion import functions as f

from operators.engine import column_named as col
from operators.nexmark.model import EVENT_TIME, SCHEMAS, SEQ, Kind
from operators.stateful.window_aggregate import WINDOW_END, WINDOW_START
from operators.stream import DataStream

__all__ = ["QUERIES", "Query", "Streams"]

Streams: TypeAlias = Mapping[Kind, DataStream]
"""The events that a query asked for, by kind."""

_WINDOW = timedelta(seconds=10)
_DAY = timedelta(days=1)
_SIDE_INPUT_ROWS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One query. ``inputs``: the columns it reads of each kind; ``partition_by``: of its output."""

    name: str
    title: str
    inputs: Mapping[Kind, tuple[str, ...]]
    build: Callable[[Streams], DataStream]
    partition_by: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind, columns in self.inputs.items():
            assert set(columns) <= set(SCHEMAS[kind].names), self.name


def _bids(*columns: str) -> Mapping[Kind, tuple[str, ...]]:
    return MappingProxyType({Kind.BID: columns})


# -- stateless


def _q0(streams: Streams) -> DataStream:
    return streams[Kind.BID]


def _q1(streams: Streams) -> DataStream:
    return streams[Kind.BID].with_column("price", _euros())


def _q2(streams: Streams) -> DataStream:
    return streams[Kind.BID].filter(col("auction") % lit(123) == lit(0))


def _q10(streams: Streams) -> DataStream:
    time = col(EVENT_TIME)
    return streams[Kind.BID].with_columns(dt=_text_of(time, "%Y-%m-%d"), hm=_text_of(time, "%H:%M"))


def _q14(streams: Streams) -> DataStream:
    hour = f.date_part("hour", col(EVENT_TIME))
    day_time = (hour >= lit(8)) & (hour <= lit(18))
    night_time = (hour <= lit(6)) | (hour >= lit(20))
    time_type = f.when(day_time, lit("dayTime")).when(night_time, lit("nightTime")).otherwise(lit("otherTime"))
    extra = col("extra")
    count = f.character_length(extra) - f.character_length(f.replace(extra, lit("c"), lit("")))
    bounds = (_euros() > lit(1_000_000)) & (_euros() < lit(50_000_000))
    return (
        streams[Kind.BID]
        .filter(bounds)
        .select(
            "auction",
            "bidder",
            _euros().alias("price"),
            time_type.alias("bidTimeType"),
            EVENT_TIME,
            "extra",
            f.coalesce(count, lit(0)).cast(pa.int64()).alias("c_counts"),
        )
    )


_CHANNEL_IDS = {"apple": "0", "google": "1", "facebook": "2", "baidu": "3"}


def _q21(streams: Streams) -> DataStream:
    channel_id = f.case(f.lower(col("channel")))
    for name, number in _CHANNEL_IDS.items():
        channel_id = channel_id.when(lit(name), lit(number))
    in_url = f.array_element(f.regexp_match(col("url"), lit("(&|^)channel_id=([^&]*)")), lit(2))
    # Evaluated once, for the channels that are not known only: a bid without either has a null there.
    bids = streams[Kind.BID].with_column("channel_id", channel_id.otherwise(in_url))
    return bids.filter(col("channel_id").is_not_null()).drop("url")


def _q22(streams: Streams) -> DataStream:
    parts = [f.split_part(col("url"), lit("/"), lit(3 + i)).alias(f"dir{i}") for i in (1, 2, 3)]
    return streams[Kind.BID].select("auction", "bidder", "price", "channel", *parts)


# -- windows


def _w(streams: Streams) -> DataStream:
    price = col("price")
    aggregates = [
        f.count(lit(1)).alias("cnt"),
        f.sum(price).alias("total"),
        f.min(price).alias("lo"),
        f.max(price).alias("hi"),
        f.avg(price).alias("mean"),
    ]
    windows = streams[Kind.BID].window("bidder", aggregates, _WINDOW, name="windows")
    return windows.select(_wstart(), "bidder", "cnt", "total", "lo", "hi", "mean")


def _q5(streams: Streams) -> DataStream:
    count = f.count(lit(1)).alias("num")
    windows = streams[Kind.BID].window("auction", count, _WINDOW, timedelta(seconds=2), name="windows")
    most = windows.top_n(1, WINDOW_START, col("num").sort(ascending=False), ties="all", name="most")
    return most.select(_wstart(), "auction", "num")


def _q7(streams: Streams) -> DataStream:
    price = col("price").sort(ascending=False)
    highest = streams[Kind.BID].top_n(1, [], price, ties="all", window=_WINDOW, name="highest")
    return highest.select(_wstart(), "auction", "bidder", "price", _ts())


def _q11(streams: Streams) -> DataStream:
    sessions = streams[Kind.BID].session_window("bidder", f.count(lit(1)).alias("cnt"), _WINDOW, name="sessions")
    ends = _millis(col(WINDOW_END)).alias("send")
    return sessions.select("bidder", "cnt", _millis(col(WINDOW_START)).alias("sstart"), ends)


def _q12(streams: Streams) -> DataStream:
    windows = streams[Kind.BID].window("bidder", f.count(lit(1)).alias("cnt"), _WINDOW, name="windows")
    return windows.select(_wstart(), "bidder", "cnt")


def _q15(streams: Streams) -> DataStream:
    days = streams[Kind.BID].window([], _statistics(), _DAY, name="days")
    return days.select(_day(), *_STATISTICS)


def _q16(streams: Streams) -> DataStream:
    aggregates = [f.max(col(EVENT_TIME)).alias("latest"), *_statistics()]
    days = streams[Kind.BID].window("channel", aggregates, _DAY, name="days")
    return days.select("channel", _day(), _text_of(col("latest"), "%H:%M").alias("minute"), *_STATISTICS)


def _q17(streams: Streams) -> DataStream:
    price = col("price")
    aggregates = [
        *_statistics(of=()),
        f.min(price).alias("min_price"),
        f.max(price).alias("max_price"),
        f.avg(price).alias("avg_price"),
        f.sum(price).alias("sum_price"),
    ]
    days = streams[Kind.BID].window("auction", aggregates, _DAY, name="days")
    return days.select("auction", _day(), *_STATISTICS[:4], "min_price", "max_price", "avg_price", "sum_price")


_RANKS = ("total", "rank1", "rank2", "rank3")
_STATISTICS = tuple(f"{rank}_{what}" for what in ("bids", "bidders", "auctions") for rank in _RANKS)


def _statistics(of: tuple[str, ...] = ("bidder", "auction")) -> list[Expr]:
    """Bids, and different values of these columns, in all and in three ranges of price."""
    price = col("price")
    ranges = (None, price < lit(10_000), (price >= lit(10_000)) & (price < lit(1_000_000)), price >= lit(1_000_000))
    found = [f.count(lit(1), filter=where).alias(f"{rank}_bids") for rank, where in zip(_RANKS, ranges, strict=True)]
    for column in of:
        for rank, where in zip(_RANKS, ranges, strict=True):
            found.append(f.count(col(column), distinct=True, filter=where).alias(f"{rank}_{column}s"))
    return found


# -- joins


def _q3(streams: Streams) -> DataStream:
    persons = streams[Kind.PERSON].filter(f.in_list(col("state"), [lit("OR"), lit("ID"), lit("CA")]))
    persons = persons.with_column_renamed("id", "person")
    auctions = streams[Kind.AUCTION].filter(col("category") == lit(10))
    joined = auctions.join(persons, left_on="seller", right_on="person", name="sellers")
    return joined.select("name", "city", "state", "id")


def _q4(streams: Streams) -> DataStream:
    final = f.max(col("price")).alias("final")
    auctions = _bids_in_time(streams).aggregate(["id", "category"], final, emit="final", name="auctions")
    return auctions.aggregate("category", f.avg(col("final")).alias("mean"), emit="final", name="categories")


def _q8(streams: Streams) -> DataStream:
    some = f.count(lit(1)).alias("some")
    persons = streams[Kind.PERSON].window(["id", "name"], some, _WINDOW, name="persons")
    sellers = streams[Kind.AUCTION].window("seller", some, _WINDOW, name="sellers")
    joined = persons.select(WINDOW_START, "id", "name").join(
        sellers.select(WINDOW_START, "seller"),
        left_on=[WINDOW_START, "id"],
        right_on=[WINDOW_START, "seller"],
        name="new-sellers",
    )
    return joined.select("id", "name", _wstart())


def _q9(streams: Streams) -> DataStream:
    order = [col("price").sort(ascending=False), col("bid_time").sort(), col("bid_seq").sort()]
    winning = _bids_in_time(streams).top_n(1, "id", order, emit="final", name="winning")
    auction = SCHEMAS[Kind.AUCTION].names
    return winning.select(*auction, "auction", "bidder", "price", _millis(col("bid_time")).alias("ts"))


def _q13(streams: Streams) -> DataStream:
    numbers = list(range(_SIDE_INPUT_ROWS))
    side_input = pa.table({"key": pa.array(numbers, pa.int64()), "value": [str(number) for number in numbers]})
    bids = streams[Kind.BID].with_column("key", col("auction") % lit(_SIDE_INPUT_ROWS))
    return bids.lookup_join(side_input, on="key", name="side-input").drop("key")


def _q20(streams: Streams) -> DataStream:
    auctions = _renamed(
        streams[Kind.AUCTION].filter(col("category") == lit(10)),
        {EVENT_TIME: "auction_dateTime", "extra": "auction_extra"},
    )
    bids = _renamed(streams[Kind.BID], {EVENT_TIME: "bid_dateTime", "extra": "bid_extra"})
    joined = bids.join(auctions, left_on="auction", right_on="id", name="bids-with-auctions")
    return joined.drop("id")


def _bids_in_time(streams: Streams) -> DataStream:
    """Each bid that came while its auction went on, with the auction; the bid's time is ``bid_time``."""
    bids = _renamed(streams[Kind.BID], {EVENT_TIME: "bid_time", SEQ: "bid_seq"})
    return bids.interval_join(
        streams[Kind.AUCTION],
        left_on="auction",
        right_on="id",
        before=0,
        after=None,
        filter=col("bid_time") <= col("expires"),
        name="bids-in-time",
    )


def _renamed(stream: DataStream, names: Mapping[str, str]) -> DataStream:
    for old, new in names.items():
        if old in stream.schema.names:
            stream = stream.with_column_renamed(old, new)
    return stream


# -- by key


def _q18(streams: Streams) -> DataStream:
    last = streams[Kind.BID].deduplicate(["bidder", "auction"], keep="last", order_by="seq", emit="final", name="last")
    return last.select("auction", "bidder", "price", _ts(), "seq")


def _q19(streams: Streams) -> DataStream:
    order = [col("price").sort(ascending=False), col("seq").sort()]
    highest = streams[Kind.BID].top_n(10, "auction", order, with_rank="rnk", emit="final", name="highest")
    return highest.select("auction", "rnk", "bidder", "price", _ts(), "seq")


# -- expressions


def _euros() -> Expr:
    """0.908 times the price, exactly: decimal(23, 3)."""
    rate = lit(pa.scalar(Decimal("0.908"), pa.decimal128(4, 3)))
    return (col("price").cast(pa.decimal128(19, 0)) * rate).cast(pa.decimal128(23, 3))


def _millis(time: Expr) -> Expr:
    return time.cast(pa.timestamp("ms")).cast(pa.int64())


def _ts() -> Expr:
    return _millis(col(EVENT_TIME)).alias("ts")


def _wstart() -> Expr:
    return _millis(col(WINDOW_START)).alias("wstart")


def _day() -> Expr:
    return _text_of(col(WINDOW_START), "%Y-%m-%d").alias("day")


def _text_of(time: Expr, form: str) -> Expr:
    return f.to_char(time, lit(form))


_LIST = [
    Query(
        name="q0",
        title="pass bids through",
        inputs=_bids("auction", "bidder", "price", EVENT_TIME, "extra"),
        build=_q0,
    ),
    Query(
        name="q1",
        title="prices in euros",
        inputs=_bids("auction", "bidder", "price", EVENT_TIME, "extra"),
        build=_q1,
    ),
    Query(name="q2", title="bids on every 123rd auction", inputs=_bids("auction", "price"), build=_q2),
    Query(
        name="q3",
        title="sellers in three states, and their auctions of one category",
        inputs={Kind.PERSON: ("id", "name", "city", "state"), Kind.AUCTION: ("id", "seller", "category")},
        build=_q3,
    ),
    Query(
        name="q4",
        title="average of the winning bids per category",
        inputs={Kind.AUCTION: ("id", "category", EVENT_TIME, "expires"), Kind.BID: ("auction", "price", EVENT_TIME)},
        build=_q4,
    ),
    Query(
        name="q5",
        title="auctions with the most bids per 10 s, every 2 s",
        inputs=_bids("auction", EVENT_TIME),
        build=_q5,
    ),
    Query(
        name="q7",
        title="highest bids per 10 s",
        inputs=_bids("auction", "bidder", "price", EVENT_TIME),
        build=_q7,
    ),
    Query(
        name="q8",
        title="persons who offered an auction in the 10 s in which they came",
        inputs={Kind.PERSON: ("id", "name", EVENT_TIME), Kind.AUCTION: ("seller", EVENT_TIME)},
        build=_q8,
    ),
    Query(
        name="q9",
        title="the winning bid of every auction",
        inputs={
            Kind.AUCTION: tuple(SCHEMAS[Kind.AUCTION].names),
            Kind.BID: (SEQ, "auction", "bidder", "price", EVENT_TIME),
        },
        build=_q9,
    ),
    Query(
        name="q10",
        title="bids into directories by day and minute",
        inputs=_bids("auction", "bidder", "price", EVENT_TIME, "extra"),
        build=_q10,
        partition_by=("dt", "hm"),
    ),
    Query(name="q11", title="sessions of a bidder, 10 s apart", inputs=_bids("bidder", EVENT_TIME), build=_q11),
    Query(name="q12", title="bids per bidder and 10 s", inputs=_bids("bidder", EVENT_TIME), build=_q12),
    Query(
        name="q13",
        title="bids with a value out of a table of 10,000 rows",
        inputs=_bids("auction", "bidder", "price", EVENT_TIME),
        build=_q13,
    ),
    Query(
        name="q14",
        title="bids of a middle price, with the time of day and a count of letters",
        inputs=_bids("auction", "bidder", "price", EVENT_TIME, "extra"),
        build=_q14,
    ),
    Query(
        name="q15",
        title="bids, bidders and auctions per day, by price range",
        inputs=_bids("auction", "bidder", "price", EVENT_TIME),
        build=_q15,
    ),
    Query(
        name="q16",
        title="the same per channel and day",
        inputs=_bids("auction", "bidder", "price", "channel", EVENT_TIME),
        build=_q16,
    ),
    Query(
        name="q17",
        title="number and price of bids per auction and day",
        inputs=_bids("auction", "price", EVENT_TIME),
        build=_q17,
    ),
    Query(
        name="q18",
        title="last bid of each bidder on each auction",
        inputs=_bids("auction", "bidder", "price", "seq", EVENT_TIME),
        build=_q18,
    ),
    Query(
        name="q19",
        title="ten highest bids of each auction",
        inputs=_bids("auction", "bidder", "price", "seq", EVENT_TIME),
        build=_q19,
    ),
    Query(
        name="q20",
        title="bids with their auctions of one category",
        inputs={
            Kind.BID: ("auction", "bidder", "price", "channel", "url", EVENT_TIME, "extra"),
            Kind.AUCTION: tuple(name for name in SCHEMAS[Kind.AUCTION].names if name != SEQ),
        },
        build=_q20,
    ),
    Query(
        name="q21",
        title="bids with the number of their channel, some out of the URL",
        inputs=_bids("auction", "bidder", "price", "channel", "url"),
        build=_q21,
    ),
    Query(
        name="q22",
        title="bids with the directories of their URL",
        inputs=_bids("auction", "bidder", "price", "channel", "url"),
        build=_q22,
    ),
    Query(
        name="w",
        title="statistics of prices per bidder and 10 s",
        inputs=_bids("bidder", "price", EVENT_TIME),
        build=_w,
    ),
]

QUERIES: Mapping[str, Query] = MappingProxyType({query.name: query for query in _LIST})
"""All queries by name."""
