-- q11: sessions of a bidder, 10 s apart.

CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q11 (
    bidder BIGINT, cnt BIGINT, sstart BIGINT, send BIGINT
) STORED AS PARQUET LOCATION 'out/q11' OPTIONS ('mode' 'sink');

INSERT INTO q11
SELECT bidder, count(*) AS cnt,
    CAST(window_start_time() AS BIGINT) AS sstart, CAST(window_end_time() AS BIGINT) AS send
FROM bid GROUP BY bidder, session("dateTime", INTERVAL '10 seconds');
