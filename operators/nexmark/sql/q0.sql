-- q0: pass bids through.

CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q0 (
    auction BIGINT, bidder BIGINT, price BIGINT, "dateTime" TIMESTAMP(3), extra VARCHAR
) STORED AS PARQUET LOCATION 'out/q0' OPTIONS ('mode' 'sink');

INSERT INTO q0
SELECT auction, bidder, price, "dateTime", extra FROM bid;
