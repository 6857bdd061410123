"""The queries of the suite as streaming SQL, with the columns of the reference."""

from __future__ import annotations

__all__ = ["SQL"]

_STATISTICS = """count(*) AS total_bids,
    count(*) FILTER (WHERE price < 10000) AS rank1_bids,
    count(*) FILTER (WHERE price >= 10000 AND price < 1000000) AS rank2_bids,
    count(*) FILTER (WHERE price >= 1000000) AS rank3_bids"""
_DISTINCT = ", ".join(
    f"""count(DISTINCT {column}) AS total_{column}s,
    count(DISTINCT {column}) FILTER (WHERE price < 10000) AS rank1_{column}s,
    count(DISTINCT {column}) FILTER (WHERE price >= 10000 AND price < 1000000) AS rank2_{column}s,
    count(DISTINCT {column}) FILTER (WHERE price >= 1000000) AS rank3_{column}s"""
    for column in ("bidder", "auction")
)
_EURO = "CAST(price AS DECIMAL(19, 0)) * CAST('0.908' AS DECIMAL(4, 3))"
_DAY = "to_char(\"dateTime\", '%Y-%m-%d')"
_TUMBLE = "tumble(\"dateTime\", INTERVAL '10 seconds')"
_IN_TIME = 'a.id = b.auction AND b."dateTime" >= a."dateTime" AND b."dateTime" <= a.expires'

SQL = {
    "q0": 'SELECT auction, bidder, price, "dateTime", extra FROM bid',
    "q1": f'SELECT auction, bidder, {_EURO} AS price, "dateTime", extra FROM bid',
    "q2": "SELECT auction, price FROM bid WHERE auction % 123 = 0",
    "q3": """
        SELECT p.name, p.city, p.state, a.id FROM auction AS a JOIN person AS p ON a.seller = p.id
        WHERE a.category = 10 AND p.state IN ('OR', 'ID', 'CA')""",
    "q4": f"""
        SELECT category, avg(final) AS mean FROM (
            SELECT a.id, a.category, max(b.price) AS final FROM auction AS a JOIN bid AS b ON {_IN_TIME}
            GROUP BY a.id, a.category)
        GROUP BY category""",
    "q5": """
        WITH counts AS (
            SELECT hop("dateTime", INTERVAL '2 seconds', INTERVAL '10 seconds') AS w, auction, count(*) AS num
            FROM bid GROUP BY 1, 2),
        most AS (SELECT tumble(w, INTERVAL '2 seconds') AS w, max(num) AS num FROM counts GROUP BY 1)
        SELECT CAST(c.w AS BIGINT) AS wstart, c.auction, c.num FROM counts AS c JOIN most AS m
        ON c.w = m.w AND c.num = m.num""",
    "q7": f"""
        WITH most AS (SELECT {_TUMBLE} AS w, max(price) AS price FROM bid GROUP BY 1)
        SELECT CAST(m.w AS BIGINT) AS wstart, b.auction, b.bidder, b.price, CAST(b."dateTime" AS BIGINT) AS ts
        FROM bid AS b JOIN most AS m
        ON b.price = m.price AND b."dateTime" >= m.w AND b."dateTime" < m.w + INTERVAL '10 seconds'""",
    "q8": f"""
        SELECT p.id, p.name, CAST(p.w AS BIGINT) AS wstart
        FROM (SELECT {_TUMBLE} AS w, id, name FROM person GROUP BY 1, 2, 3) AS p
        JOIN (SELECT {_TUMBLE} AS w, seller FROM auction GROUP BY 1, 2) AS a ON p.id = a.seller AND p.w = a.w""",
    "q9": f"""
        SELECT seq, id, "itemName", description, "initialBid", reserve, "dateTime", expires, seller, category, extra,
            auction, bidder, price, ts FROM (
            SELECT a.*, b.auction, b.bidder, b.price, CAST(b."dateTime" AS BIGINT) AS ts, row_number() OVER (
                PARTITION BY a.id ORDER BY b.price DESC, b."dateTime", b.seq) AS place
            FROM auction AS a JOIN bid AS b ON {_IN_TIME})
        WHERE place = 1""",
    "q10": f"""
        SELECT auction, bidder, price, "dateTime", extra, {_DAY} AS dt, to_char("dateTime", '%H:%M') AS hm FROM bid""",
    "q11": """
        SELECT bidder, count(*) AS cnt, CAST(window_start_time() AS BIGINT) AS sstart,
            CAST(window_end_time() AS BIGINT) AS send
        FROM bid GROUP BY bidder, session("dateTime", INTERVAL '10 seconds')""",
    "q12": f"SELECT CAST({_TUMBLE} AS BIGINT) AS wstart, bidder, count(*) AS cnt FROM bid GROUP BY {_TUMBLE}, bidder",
    "q13": """
        SELECT b.auction, b.bidder, b.price, b."dateTime", s.value
        FROM (SELECT *, auction % 10000 AS place FROM bid) AS b JOIN side_input AS s ON b.place = s.key""",
    "q14": f"""
        SELECT auction, bidder, {_EURO} AS price,
            CASE WHEN extract(hour FROM "dateTime") BETWEEN 8 AND 18 THEN 'dayTime'
                 WHEN extract(hour FROM "dateTime") <= 6 OR extract(hour FROM "dateTime") >= 20 THEN 'nightTime'
                 ELSE 'otherTime' END AS "bidTimeType",
            "dateTime", extra, length(extra) - length(replace(extra, 'c', '')) AS c_counts
        FROM bid WHERE {_EURO} > 1000000 AND {_EURO} < 50000000""",
    "q15": f"SELECT {_DAY} AS day, {_STATISTICS}, {_DISTINCT} FROM bid GROUP BY 1",
    "q16": f"""
        SELECT channel, {_DAY} AS day, max(to_char("dateTime", '%H:%M')) AS minute, {_STATISTICS}, {_DISTINCT}
        FROM bid GROUP BY 1, 2""",
    "q17": f"""
        SELECT auction, {_DAY} AS day, {_STATISTICS}, min(price) AS min_price, max(price) AS max_price,
            avg(price) AS avg_price, sum(price) AS sum_price FROM bid GROUP BY 1, 2""",
    "q18": """
        SELECT auction, bidder, price, CAST("dateTime" AS BIGINT) AS ts, seq FROM (
            SELECT *, row_number() OVER (PARTITION BY bidder, auction ORDER BY "dateTime" DESC, seq DESC) AS rn
            FROM bid)
        WHERE rn = 1""",
    "q19": """
        SELECT auction, rnk, bidder, price, CAST("dateTime" AS BIGINT) AS ts, seq FROM (
            SELECT *, row_number() OVER (PARTITION BY auction ORDER BY price DESC, seq) AS rnk FROM bid)
        WHERE rnk <= 10""",
    "q20": """
        SELECT b.auction, b.bidder, b.price, b.channel, b.url, b."dateTime" AS "bid_dateTime", b.extra AS bid_extra,
            a."itemName", a.description, a."initialBid", a.reserve, a."dateTime" AS "auction_dateTime", a.expires,
            a.seller, a.category, a.extra AS auction_extra
        FROM bid AS b JOIN (SELECT * FROM auction WHERE category = 10) AS a ON b.auction = a.id""",
    "q21": """
        SELECT * FROM (
            SELECT auction, bidder, price, channel, CASE lower(channel) WHEN 'apple' THEN '0' WHEN 'google' THEN '1'
                WHEN 'facebook' THEN '2' WHEN 'baidu' THEN '3'
                ELSE regexp_match(url, '(&|^)channel_id=([^&]*)')[2] END AS channel_id
            FROM bid) WHERE channel_id IS NOT NULL""",
    "q22": """
        SELECT auction, bidder, price, channel, split_part(url, '/', 4) AS dir1, split_part(url, '/', 5) AS dir2,
            split_part(url, '/', 6) AS dir3 FROM bid""",
    "w": f"""
        SELECT CAST({_TUMBLE} AS BIGINT) AS wstart, bidder, count(*) AS cnt, sum(price) AS total, min(price) AS lo,
            max(price) AS hi, avg(price) AS mean FROM bid GROUP BY {_TUMBLE}, bidder""",
}
"""All queries by name."""
