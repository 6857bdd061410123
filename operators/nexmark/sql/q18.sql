-- q18: last bid of each bidder on each auction.

CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q18 (
    auction BIGINT, bidder BIGINT, price BIGINT, ts BIGINT, seq BIGINT
) STORED AS PARQUET LOCATION 'out/q18' OPTIONS ('mode' 'sink', 'emit' 'final');

INSERT INTO q18
SELECT auction, bidder, price, CAST("dateTime" AS BIGINT) AS ts, seq FROM (
    SELECT *, row_number() OVER (PARTITION BY bidder, auction ORDER BY "dateTime" DESC, seq DESC) AS place FROM bid)
WHERE place = 1;
