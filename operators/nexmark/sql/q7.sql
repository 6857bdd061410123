-- q7: highest bids per 10 s.

CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q7 (
    wstart BIGINT, auction BIGINT, bidder BIGINT, price BIGINT, ts BIGINT
) STORED AS PARQUET LOCATION 'out/q7' OPTIONS ('mode' 'sink');

INSERT INTO q7
WITH most AS (
    SELECT tumble("dateTime", INTERVAL '10 seconds') AS w, max(price) AS price FROM bid GROUP BY 1)
SELECT CAST(m.w AS BIGINT) AS wstart, b.auction, b.bidder, b.price, CAST(b."dateTime" AS BIGINT) AS ts
FROM bid AS b JOIN most AS m
    ON b.price = m.price AND b."dateTime" >= m.w AND b."dateTime" < m.w + INTERVAL '10 seconds';
