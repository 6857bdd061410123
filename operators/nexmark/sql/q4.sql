-- q4: average of the winning bids per category.

CREATE EXTERNAL TABLE auction STORED AS PARQUET LOCATION 'events/auction'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q4 (
    category BIGINT, mean DOUBLE
) STORED AS PARQUET LOCATION 'out/q4' OPTIONS ('mode' 'sink', 'emit' 'final');

INSERT INTO q4
SELECT category, avg(final) AS mean FROM (
    SELECT a.id, a.category, max(b.price) AS final
    FROM auction AS a JOIN bid AS b
        ON a.id = b.auction AND b."dateTime" >= a."dateTime" AND b."dateTime" <= a.expires
    GROUP BY a.id, a.category)
GROUP BY category;
