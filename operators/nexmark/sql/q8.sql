-- q8: persons who offered an auction in the 10 s in which they came.

CREATE EXTERNAL TABLE person STORED AS PARQUET LOCATION 'events/person'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE auction STORED AS PARQUET LOCATION 'events/auction'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q8 (
    id BIGINT, name VARCHAR, wstart BIGINT
) STORED AS PARQUET LOCATION 'out/q8' OPTIONS ('mode' 'sink');

INSERT INTO q8
SELECT p.id, p.name, CAST(p.w AS BIGINT) AS wstart
FROM (SELECT tumble("dateTime", INTERVAL '10 seconds') AS w, id, name FROM person GROUP BY 1, 2, 3) AS p
JOIN (SELECT tumble("dateTime", INTERVAL '10 seconds') AS w, seller FROM auction GROUP BY 1, 2) AS a
    ON p.id = a.seller AND p.w = a.w;
