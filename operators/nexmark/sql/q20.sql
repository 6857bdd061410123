-- q20: bids with their auctions of one category.

CREATE EXTERNAL TABLE auction STORED AS PARQUET LOCATION 'events/auction'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q20 (
    auction BIGINT, bidder BIGINT, price BIGINT, channel VARCHAR, url VARCHAR, "bid_dateTime" TIMESTAMP(3),
    bid_extra VARCHAR, "itemName" VARCHAR, description VARCHAR, "initialBid" BIGINT, reserve BIGINT,
    "auction_dateTime" TIMESTAMP(3), expires TIMESTAMP(3), seller BIGINT, category BIGINT, auction_extra VARCHAR
) STORED AS PARQUET LOCATION 'out/q20' OPTIONS ('mode' 'sink');

INSERT INTO q20
SELECT b.auction, b.bidder, b.price, b.channel, b.url, b."dateTime" AS "bid_dateTime", b.extra AS bid_extra,
    a."itemName", a.description, a."initialBid", a.reserve, a."dateTime" AS "auction_dateTime", a.expires,
    a.seller, a.category, a.extra AS auction_extra
FROM bid AS b JOIN (SELECT * FROM auction WHERE category = 10) AS a ON b.auction = a.id;
