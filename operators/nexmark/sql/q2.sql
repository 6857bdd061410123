-- q2: bids on every 123rd auction.

CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q2 (
    auction BIGINT, price BIGINT
) STORED AS PARQUET LOCATION 'out/q2' OPTIONS ('mode' 'sink');

INSERT INTO q2
SELECT auction, price FROM bid WHERE auction % 123 = 0;
