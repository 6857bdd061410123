-- q13: bids with a value out of a table of 10,000 rows.

CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE VIEW side_input AS SELECT value AS key, CAST(value AS VARCHAR) AS value FROM generate_series(0, 9999);
CREATE EXTERNAL TABLE q13 (
    auction BIGINT, bidder BIGINT, price BIGINT, "dateTime" TIMESTAMP(3), value VARCHAR
) STORED AS PARQUET LOCATION 'out/q13' OPTIONS ('mode' 'sink');

INSERT INTO q13
SELECT b.auction, b.bidder, b.price, b."dateTime", s.value
FROM (SELECT *, auction % 10000 AS place FROM bid) AS b JOIN side_input AS s ON b.place = s.key;
