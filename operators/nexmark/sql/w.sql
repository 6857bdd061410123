-- w: statistics of prices per bidder and 10 s.

CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE w (
    wstart BIGINT, bidder BIGINT, cnt BIGINT, total BIGINT, lo BIGINT, hi BIGINT, mean DOUBLE
) STORED AS PARQUET LOCATION 'out/w' OPTIONS ('mode' 'sink');

INSERT INTO w
SELECT CAST(tumble("dateTime", INTERVAL '10 seconds') AS BIGINT) AS wstart, bidder,
    count(*) AS cnt, sum(price) AS total, min(price) AS lo, max(price) AS hi, avg(price) AS mean
FROM bid GROUP BY tumble("dateTime", INTERVAL '10 seconds'), bidder;
