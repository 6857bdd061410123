-- q9: the winning bid of every auction.

CREATE EXTERNAL TABLE auction STORED AS PARQUET LOCATION 'events/auction'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q9 (
    seq BIGINT, id BIGINT, "itemName" VARCHAR, description VARCHAR, "initialBid" BIGINT, reserve BIGINT,
    "dateTime" TIMESTAMP(3), expires TIMESTAMP(3), seller BIGINT, category BIGINT, extra VARCHAR, auction BIGINT,
    bidder BIGINT, price BIGINT, ts BIGINT
) STORED AS PARQUET LOCATION 'out/q9' OPTIONS ('mode' 'sink', 'emit' 'final');

INSERT INTO q9
SELECT seq, id, "itemName", description, "initialBid", reserve, "dateTime", expires, seller, category, extra,
    auction, bidder, price, ts
FROM (
    SELECT a.*, b.auction, b.bidder, b.price, CAST(b."dateTime" AS BIGINT) AS ts,
        row_number() OVER (PARTITION BY a.id ORDER BY b.price DESC, b."dateTime", b.seq) AS place
    FROM auction AS a JOIN bid AS b
        ON a.id = b.auction AND b."dateTime" >= a."dateTime" AND b."dateTime" <= a.expires)
WHERE place = 1;
