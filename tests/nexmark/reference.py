"""What each query means, as one SQL query that DuckDB computes in batch over all events.

Written from the suite's SQL and shares nothing with the streams. `columns` are those the streams must have,
in order. In Flink ``BETWEEN`` and windows are as here; windows are half open, aligned to the epoch.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import duckdb
import pyarrow as pa

__all__ = ["REFERENCES", "expected", "views"]

_STATISTICS = """
    count(*) AS total_bids,
    count(*) FILTER (price < 10000) AS rank1_bids,
    count(*) FILTER (price >= 10000 AND price < 1000000) AS rank2_bids,
    count(*) FILTER (price >= 1000000) AS rank3_bids
"""
_DISTINCT = """
    count(DISTINCT bidder) AS total_bidders,
    count(DISTINCT bidder) FILTER (price < 10000) AS rank1_bidders,
    count(DISTINCT bidder) FILTER (price >= 10000 AND price < 1000000) AS rank2_bidders,
    count(DISTINCT bidder) FILTER (price >= 1000000) AS rank3_bidders,
    count(DISTINCT auction) AS total_auctions,
    count(DISTINCT auction) FILTER (price < 10000) AS rank1_auctions,
    count(DISTINCT auction) FILTER (price >= 10000 AND price < 1000000) AS rank2_auctions,
    count(DISTINCT auction) FILTER (price >= 1000000) AS rank3_auctions
"""
_TUMBLE = "ms // 10000 * 10000"
_WINNING = """
    SELECT auction.*, bid.auction, bid.bidder, bid.price, bid.ms AS ts, row_number() OVER (
        PARTITION BY auction.id ORDER BY bid.price DESC, bid.ms, bid.seq) AS place
    FROM auction JOIN bid ON auction.id = bid.auction AND bid.dateTime BETWEEN auction.dateTime AND auction.expires
"""

REFERENCES = {
    "q0": "SELECT auction, bidder, price, dateTime, extra FROM bid",
    "q1": "SELECT auction, bidder, CAST(0.908 * price AS DECIMAL(23, 3)) AS price, dateTime, extra FROM bid",
    "q2": "SELECT auction, price FROM bid WHERE auction % 123 = 0",
    "q3": """
        SELECT name, city, state, auction.id AS id FROM auction JOIN person ON auction.seller = person.id
        WHERE category = 10 AND state IN ('OR', 'ID', 'CA')""",
    "q4": """
        SELECT category, avg(final) AS mean FROM (
            SELECT auction.id, category, max(price) AS final FROM auction JOIN bid
            ON auction.id = bid.auction AND bid.dateTime BETWEEN auction.dateTime AND auction.expires
            GROUP BY auction.id, category)
        GROUP BY category""",
    "q5": """
        WITH counts AS (
            SELECT start AS wstart, auction, count(*) AS num
            FROM bid, unnest(generate_series(ms // 2000 * 2000 - 8000, ms // 2000 * 2000, 2000)) AS starts(start)
            GROUP BY ALL)
        SELECT wstart, auction, num FROM counts QUALIFY num = max(num) OVER (PARTITION BY wstart)""",
    "q7": f"""
        SELECT {_TUMBLE} AS wstart, auction, bidder, price, ms AS ts FROM bid
        QUALIFY price = max(price) OVER (PARTITION BY {_TUMBLE})""",
    "q8": f"""
        SELECT DISTINCT p.id, p.name, p.wstart
        FROM (SELECT *, {_TUMBLE} AS wstart FROM person) p JOIN (SELECT *, {_TUMBLE} AS wstart FROM auction) a
        ON p.id = a.seller AND p.wstart = a.wstart""",
    "q9": f"""
        SELECT seq, id, itemName, description, initialBid, reserve, dateTime, expires, seller, category, extra,
            auction, bidder, price, ts FROM ({_WINNING}) WHERE place = 1""",
    "q10": """
        SELECT auction, bidder, price, dateTime, extra,
            strftime(dateTime, '%Y-%m-%d') AS dt, strftime(dateTime, '%H:%M') AS hm FROM bid""",
    "q11": """
        WITH marked AS (
            SELECT bidder, ms, seq, coalesce(ms - lag(ms) OVER (PARTITION BY bidder ORDER BY ms) > 10000, true) AS first
            FROM bid), numbered AS (
            SELECT *, sum(first::INT) OVER (PARTITION BY bidder ORDER BY ms ROWS UNBOUNDED PRECEDING) AS session
            FROM marked)
        SELECT bidder, count(*) AS cnt, min(ms) AS sstart, max(ms) + 10000 AS send
        FROM numbered GROUP BY bidder, session""",
    "q12": f"SELECT {_TUMBLE} AS wstart, bidder, count(*) AS cnt FROM bid GROUP BY ALL",
    "q13": "SELECT auction, bidder, price, dateTime, CAST(auction % 10000 AS VARCHAR) AS value FROM bid",
    "q14": """
        SELECT auction, bidder, CAST(0.908 * price AS DECIMAL(23, 3)) AS price,
            CASE WHEN hour(dateTime) >= 8 AND hour(dateTime) <= 18 THEN 'dayTime'
                 WHEN hour(dateTime) <= 6 OR hour(dateTime) >= 20 THEN 'nightTime'
                 ELSE 'otherTime' END AS bidTimeType,
            dateTime, extra, CAST(length(extra) - length(replace(extra, 'c', '')) AS BIGINT) AS c_counts
        FROM bid WHERE 0.908 * price > 1000000 AND 0.908 * price < 50000000""",
    "q15": f"SELECT strftime(dateTime, '%Y-%m-%d') AS day, {_STATISTICS}, {_DISTINCT} FROM bid GROUP BY day",
    "q16": f"""
        SELECT channel, strftime(dateTime, '%Y-%m-%d') AS day, max(strftime(dateTime, '%H:%M')) AS minute,
            {_STATISTICS}, {_DISTINCT} FROM bid GROUP BY channel, day""",
    "q17": f"""
        SELECT auction, strftime(dateTime, '%Y-%m-%d') AS day, {_STATISTICS}, min(price) AS min_price,
            max(price) AS max_price, avg(price) AS avg_price, sum(price) AS sum_price FROM bid GROUP BY auction, day""",
    "q18": """
        SELECT auction, bidder, price, ms AS ts, seq FROM bid
        QUALIFY row_number() OVER (PARTITION BY bidder, auction ORDER BY ms DESC, seq DESC) = 1""",
    "q19": """
        SELECT auction, row_number() OVER (PARTITION BY auction ORDER BY price DESC, seq) AS rnk,
            bidder, price, ms AS ts, seq FROM bid QUALIFY rnk <= 10""",
    "q20": """
        SELECT auction, bidder, price, channel, url, bid.dateTime AS bid_dateTime, bid.extra AS bid_extra,
            itemName, description, initialBid, reserve, auction.dateTime AS auction_dateTime, expires, seller,
            category, auction.extra AS auction_extra
        FROM bid JOIN auction ON bid.auction = auction.id WHERE category = 10""",
    "q21": r"""
        SELECT * FROM (
            SELECT auction, bidder, price, channel,
                CASE lower(channel) WHEN 'apple' THEN '0' WHEN 'google' THEN '1' WHEN 'facebook' THEN '2'
                    WHEN 'baidu' THEN '3' ELSE CASE WHEN regexp_matches(url, '(&|^)channel_id=([^&]*)')
                        THEN regexp_extract(url, '(&|^)channel_id=([^&]*)', 2) END END AS channel_id
            FROM bid) WHERE channel_id IS NOT NULL""",
    "q22": """
        SELECT auction, bidder, price, channel, split_part(url, '/', 4) AS dir1, split_part(url, '/', 5) AS dir2,
            split_part(url, '/', 6) AS dir3 FROM bid""",
    "w": f"""
        SELECT {_TUMBLE} AS wstart, bidder, count(*) AS cnt, sum(price) AS total, min(price) AS lo, max(price) AS hi,
            avg(price) AS mean FROM bid GROUP BY ALL""",
}


def views(connection: duckdb.DuckDBPyConnection, events: Path) -> None:
    """What the queries read: one view for each kind of event."""
    for kind in ("person", "auction", "bid"):
        files = f"{events}/{kind}/*.parquet"
        connection.execute(f"CREATE VIEW {kind} AS SELECT *, epoch_ms(dateTime) AS ms FROM read_parquet('{files}')")


@lru_cache(64)
def expected(query: str, events: Path) -> pa.Table:
    """The result of a query over a directory of events, in no order."""
    with duckdb.connect() as connection:
        views(connection, events)
        return connection.sql(REFERENCES[query]).to_arrow_table()
