-- Queries of the documentation (doc.arroyo.dev/sql) and of the tests (crates/arroyo-sql-testing) of Arroyo, as far as
-- the dialect can say them.

-- docs: SQL, streaming windows
SELECT tumble(time, INTERVAL '1 second') AS w, COUNT(DISTINCT driver_id) AS drivers FROM cars GROUP BY w;

SELECT hop(time, INTERVAL '1 second', INTERVAL '6 seconds') AS w, COUNT(DISTINCT driver_id) AS drivers
    FROM cars GROUP BY w;
-- in DuckDB
SELECT win(time, 1) - d * INTERVAL '1 second' AS w, COUNT(DISTINCT driver_id) AS drivers
    FROM cars, range(6) AS g(d) GROUP BY w;

-- docs: SQL, window functions
SELECT * FROM (SELECT ROW_NUMBER() OVER (PARTITION BY w ORDER BY c DESC, driver_id) AS row_number, driver_id, c, w
    FROM (SELECT driver_id, hop(time, INTERVAL '1 second', INTERVAL '6 seconds') AS w, count(*) AS c
    FROM cars GROUP BY 1, 2)) WHERE row_number = 1;
-- in DuckDB
SELECT * FROM (SELECT ROW_NUMBER() OVER (PARTITION BY w ORDER BY c DESC, driver_id) AS row_number, driver_id, c, w
    FROM (SELECT driver_id, win(time, 1) - d * INTERVAL '1 second' AS w, count(*) AS c
    FROM cars, range(6) AS g(d) GROUP BY 1, 2)) WHERE row_number = 1;

-- docs: SQL, joins (window join), and windowed_outer_join.sql
SELECT dropoffs.w AS dw, pickups.w AS pw, dropoff_drivers, pickup_drivers FROM
    (SELECT tumble(time, INTERVAL '6 seconds') AS w, COUNT(DISTINCT driver_id) AS dropoff_drivers FROM cars
    WHERE event_type = 'dropoff' AND location = 'a' GROUP BY 1) dropoffs INNER JOIN
    (SELECT tumble(time, INTERVAL '6 seconds') AS w, COUNT(DISTINCT driver_id) AS pickup_drivers FROM cars
    WHERE event_type = 'pickup' AND driver_id > 20 GROUP BY 1) pickups ON dropoffs.w = pickups.w;

SELECT dropoffs.w AS dw, pickups.w AS pw, dropoff_drivers, pickup_drivers FROM
    (SELECT tumble(time, INTERVAL '6 seconds') AS w, COUNT(DISTINCT driver_id) AS dropoff_drivers FROM cars
    WHERE event_type = 'dropoff' AND location = 'a' GROUP BY 1) dropoffs FULL OUTER JOIN
    (SELECT tumble(time, INTERVAL '6 seconds') AS w, COUNT(DISTINCT driver_id) AS pickup_drivers FROM cars
    WHERE event_type = 'pickup' AND driver_id > 20 GROUP BY 1) pickups ON dropoffs.w = pickups.w;

-- arroyo-sql-testing: active_drivers.sql, suspicious_drivers.sql, filter_updating_aggregates.sql
SELECT count(*) AS c FROM (SELECT driver_id, count(*) AS c FROM cars GROUP BY driver_id HAVING count(*) > 15);

SELECT count(*) AS drivers FROM (SELECT driver_id, sum(CASE WHEN event_type = 'pickup' THEN 1 ELSE 0 END) AS
    pickups, sum(CASE WHEN event_type = 'dropoff' THEN 1 ELSE 0 END) AS dropoffs FROM cars GROUP BY 1)
    WHERE pickups < dropoffs;

SELECT * FROM (SELECT count(DISTINCT subtask_index) AS subtasks FROM impulse) WHERE subtasks >= 1;

-- aggregates.sql, grouped_aggregates.sql, null_aggregates.sql
SELECT counter % 5 AS m, min(counter) AS low, max(counter) AS high, sum(counter) AS total, count(*) AS c,
    avg(counter) AS mean FROM impulse GROUP BY 1;

WITH nullable_values AS (SELECT counter % 3 AS bucket, CASE WHEN counter % 3 = 0 THEN NULL WHEN counter % 3 = 1
    AND counter % 2 = 0 THEN NULL ELSE CAST(counter AS BIGINT) END AS value FROM impulse)
    SELECT bucket, COUNT(*) AS c, COUNT(value) AS cv, MIN(value) AS low, MAX(value) AS high, SUM(value) AS total,
    AVG(value) AS mean FROM nullable_values GROUP BY bucket;

-- every_aggregate.sql, without the approximate ones
SELECT event_type, round(avg(driver_id), 4) AS mean, bit_and(driver_id) AS b1, bit_or(driver_id) AS b2,
    bit_xor(driver_id) AS b3, bool_and(driver_id > 0) AS b4, bool_or(driver_id > 0) AS b5, count(*) AS c,
    max(driver_id) AS high, min(driver_id) AS low, sum(driver_id) AS total, round(corr(driver_id, load), 4) AS x1,
    round(covar_pop(driver_id, load), 4) AS x2, round(covar_samp(driver_id, load), 4) AS x3,
    round(stddev(driver_id), 4) AS d1, round(stddev_pop(driver_id), 4) AS d2, round(var_pop(driver_id), 4) AS d3,
    round(regr_slope(driver_id, load), 4) AS r1, round(regr_avgx(driver_id, load), 4) AS r2, regr_count(driver_id,
    load) AS r3, round(regr_intercept(driver_id, load), 4) AS r4, round(regr_r2(driver_id, load), 4) AS r5,
    round(regr_sxx(driver_id, load), 4) AS r6 FROM cars GROUP BY event_type;

-- hourly_by_event_type.sql, reinvoke_window_function.sql, sliding_window_end.sql
SELECT event_type, tumble(time, INTERVAL '6 seconds') AS hour, count(*) AS c FROM cars GROUP BY 1, 2;

SELECT tumble(w, INTERVAL '6 seconds') AS w2, count(DISTINCT driver_id) AS drivers FROM
    (SELECT driver_id, tumble(time, INTERVAL '6 seconds') AS w, count(*) AS pickups FROM cars
    WHERE event_type = 'pickup' GROUP BY 1, 2) WHERE pickups > 1 GROUP BY 1;

SELECT count(*) AS c, min(counter) AS low, max(counter) AS high, window_start_time() AS b, window_end_time() AS e
    FROM impulse GROUP BY hop(time, INTERVAL '2 second', INTERVAL '10 second');
-- in DuckDB
SELECT count(*) AS c, min(counter) AS low, max(counter) AS high, win(time, 2) - d * INTERVAL '2 s' AS b,
    win(time, 2) - (d - 5) * INTERVAL '2 s' AS e FROM impulse, range(5) AS g(d) GROUP BY 4, 5;

-- nexmark_q5.sql: a join of two aggregations of the same windows
SELECT a1.driver_id, a1.num FROM (SELECT driver_id, count(*) AS num, tumble(time, INTERVAL '6 seconds') AS w
    FROM cars GROUP BY driver_id, w) AS a1 JOIN (SELECT max(c.num) AS maxn, c.w AS w2 FROM
    (SELECT count(*) AS num, tumble(time, INTERVAL '6 seconds') AS w FROM cars GROUP BY driver_id, w) AS c
    GROUP BY tumble(c.w, INTERVAL '6 seconds'), c.w) AS m ON a1.w = m.w2 AND a1.num >= m.maxn;

-- session_window.sql, global_session_window.sql
SELECT window_start_time() AS b, window_end_time() AS e, user_id, count(*) AS c FROM (SELECT time,
    CASE WHEN counter % 10 = 0 THEN 0 ELSE counter END AS user_id FROM impulse)
    GROUP BY session(time, INTERVAL '2 seconds'), user_id;
-- in DuckDB
WITH u AS (SELECT time, CASE WHEN counter % 10 = 0 THEN 0 ELSE counter END AS user_id FROM impulse),
    marked AS (SELECT *, coalesce(time - lag(time) OVER (PARTITION BY user_id ORDER BY time) > INTERVAL '2 seconds',
    true) AS first FROM u), numbered AS (SELECT *, sum(first::INT) OVER (PARTITION BY user_id ORDER BY time) AS id
    FROM marked) SELECT min(time) AS b, max(time) + INTERVAL '2 seconds' AS e, user_id, count(*) AS c FROM
    numbered GROUP BY user_id, id;

SELECT count(*) AS c FROM (SELECT time FROM impulse WHERE counter % 40 < 11)
    GROUP BY session(time, INTERVAL '1 second');
-- in DuckDB
WITH u AS (SELECT time FROM impulse WHERE counter % 40 < 11), marked AS
    (SELECT *, coalesce(time - lag(time) OVER (ORDER BY time) > INTERVAL '1 second', true) AS first
    FROM u), numbered AS (SELECT *, sum(first::INT) OVER (ORDER BY time) AS id FROM marked)
    SELECT count(*) AS c FROM numbered GROUP BY id;

-- union.sql, updating_inner_join.sql, updating_inner_join_with_updating.sql (refused, see there)
SELECT counter, 'first' AS source FROM impulse UNION ALL SELECT order_id, 'second' AS source FROM shipments;

SELECT i.counter AS one, s.order_id AS two FROM impulse i INNER JOIN shipments s ON i.counter = s.order_id + 7;

-- bitcoin_stats.sql
SELECT w, subtask_index, open, high, low, close FROM
    (SELECT tumble(time, INTERVAL '5 seconds') AS w, subtask_index, first_value(load ORDER BY time, counter) AS
    open, max(load) AS high, min(load) AS low, last_value(load ORDER BY time, counter) AS close
    FROM impulse GROUP BY 1, 2) WHERE subtask_index IS NOT NULL;
-- in DuckDB
SELECT tumble(time, INTERVAL '5 seconds') AS w, subtask_index, first(load ORDER BY time, counter) AS open, max(load)
    AS high, min(load) AS low, last(load ORDER BY time, counter) AS close FROM impulse GROUP BY 1, 2;

-- unnest_in_view.sql
SELECT unnest(counters) AS counter FROM (SELECT tumble(time, INTERVAL '5 seconds') AS w, array_agg(counter) AS
    counters FROM impulse GROUP BY 1);
