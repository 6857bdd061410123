-- q3: sellers in three states, and their auctions of one category.

CREATE EXTERNAL TABLE person STORED AS PARQUET LOCATION 'events/person'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE auction STORED AS PARQUET LOCATION 'events/auction'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q3 (
    name VARCHAR, city VARCHAR, state VARCHAR, id BIGINT
) STORED AS PARQUET LOCATION 'out/q3' OPTIONS ('mode' 'sink');

INSERT INTO q3
SELECT p.name, p.city, p.state, a.id
FROM auction AS a JOIN person AS p ON a.seller = p.id
WHERE a.category = 10 AND p.state IN ('OR', 'ID', 'CA');
