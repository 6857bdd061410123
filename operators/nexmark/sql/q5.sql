-- q5: auctions with the most bids per 10 s, every 2 s.

CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q5 (
    wstart BIGINT, auction BIGINT, num BIGINT
) STORED AS PARQUET LOCATION 'out/q5' OPTIONS ('mode' 'sink');

INSERT INTO q5
WITH counts AS (
    SELECT hop("dateTime", INTERVAL '2 seconds', INTERVAL '10 seconds') AS w, auction, count(*) AS num
    FROM bid GROUP BY 1, 2),
most AS (
    SELECT tumble(w, INTERVAL '2 seconds') AS w, max(num) AS num FROM counts GROUP BY 1)
SELECT CAST(c.w AS BIGINT) AS wstart, c.auction, c.num
FROM counts AS c JOIN most AS m ON c.w = m.w AND c.num = m.num;
