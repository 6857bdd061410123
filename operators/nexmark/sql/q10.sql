-- q10: bids into directories by day and minute.

CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q10 (
    auction BIGINT, bidder BIGINT, price BIGINT, "dateTime" TIMESTAMP(3), extra VARCHAR, dt VARCHAR, hm VARCHAR
) STORED AS PARQUET PARTITIONED BY (dt, hm) LOCATION 'out/q10' OPTIONS ('mode' 'sink');

INSERT INTO q10
SELECT auction, bidder, price, "dateTime", extra,
    to_char("dateTime", '%Y-%m-%d') AS dt, to_char("dateTime", '%H:%M') AS hm
FROM bid;
