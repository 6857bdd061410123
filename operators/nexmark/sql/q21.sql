-- q21: bids with the number of their channel, some out of the URL.

CREATE EXTERNAL TABLE bid STORED AS PARQUET LOCATION 'events/bid'
    OPTIONS ('event_time' 'dateTime', 'watermark_delay' '4 seconds');
CREATE EXTERNAL TABLE q21 (
    auction BIGINT, bidder BIGINT, price BIGINT, channel VARCHAR, channel_id VARCHAR
) STORED AS PARQUET LOCATION 'out/q21' OPTIONS ('mode' 'sink');

INSERT INTO q21
SELECT * FROM (
    SELECT auction, bidder, price, channel,
        CASE lower(channel) WHEN 'apple' THEN '0' WHEN 'google' THEN '1' WHEN 'facebook' THEN '2' WHEN 'baidu' THEN '3'
            ELSE regexp_match(url, '(&|^)channel_id=([^&]*)')[2] END AS channel_id
    FROM bid)
WHERE channel_id IS NOT NULL;
