-- q19: ten highest bids of each auction.

CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q19 (
    auction BIGINT, rnk BIGINT, bidder BIGINT, price BIGINT, ts BIGINT, seq BIGINT
) STORED AS PARQUET LOCATION 'out/q19' OPTIONS ('mode' 'sink', 'emit' 'final');

INSERT INTO q19
SELECT auction, rnk, bidder, price, CAST("dateTime" AS BIGINT) AS ts, seq FROM (
    SELECT *, row_number() OVER (PARTITION BY auction ORDER BY price DESC, seq) AS rnk FROM bid)
WHERE rnk <= 10;
