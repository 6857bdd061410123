-- q14: bids of a middle price, with the time of day and a count of letters.

CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q14 (
    auction BIGINT, bidder BIGINT, price DECIMAL(24, 3), "bidTimeType" VARCHAR, "dateTime" TIMESTAMP(3),
    extra VARCHAR, c_counts INT
) STORED AS PARQUET LOCATION 'out/q14' OPTIONS ('mode' 'sink');

INSERT INTO q14
SELECT auction, bidder, price,
    CASE WHEN hour BETWEEN 8 AND 18 THEN 'dayTime'
         WHEN hour <= 6 OR hour >= 20 THEN 'nightTime'
         ELSE 'otherTime' END AS "bidTimeType",
    "dateTime", extra, length(extra) - length(replace(extra, 'c', '')) AS c_counts
FROM (
    SELECT auction, bidder, CAST(price AS DECIMAL(19, 0)) * CAST('0.908' AS DECIMAL(4, 3)) AS price,
        extract(hour FROM "dateTime") AS hour, "dateTime", extra
    FROM bid)
WHERE price > 1000000 AND price < 50000000;
