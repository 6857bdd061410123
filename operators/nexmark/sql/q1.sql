-- q1: prices in euros.

CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q1 (
    auction BIGINT, bidder BIGINT, price DECIMAL(24, 3), "dateTime" TIMESTAMP(3), extra VARCHAR
) STORED AS PARQUET LOCATION 'out/q1' OPTIONS ('mode' 'sink');

INSERT INTO q1
SELECT auction, bidder, CAST(price AS DECIMAL(19, 0)) * CAST('0.908' AS DECIMAL(4, 3)) AS price, "dateTime", extra
FROM bid;
