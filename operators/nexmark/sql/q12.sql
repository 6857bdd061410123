-- q12: bids per bidder and 10 s.

CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q12 (
    wstart BIGINT, bidder BIGINT, cnt BIGINT
) STORED AS PARQUET LOCATION 'out/q12' OPTIONS ('mode' 'sink');

INSERT INTO q12
SELECT CAST(tumble("dateTime", INTERVAL '10 seconds') AS BIGINT) AS wstart, bidder, count(*) AS cnt
FROM bid GROUP BY tumble("dateTime", INTERVAL '10 seconds'), bidder;
