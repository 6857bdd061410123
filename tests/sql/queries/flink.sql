-- Queries of the documentation of Flink (docs/content/docs/dev/table/sql/queries), as far as the dialect can say them.
-- Windows that Flink takes from a table function are said in GROUP BY; the window of a row by itself is date_bin.

-- SELECT & WHERE, SELECT DISTINCT (queries/select.md, select-distinct.md)
SELECT * FROM orders;

SELECT order_id, amount + tax AS price FROM orders;

SELECT amount + tax AS price FROM orders WHERE order_id = 10;

SELECT DISTINCT product_id FROM orders;

-- WITH (queries/with.md)
WITH orders_with_total AS (SELECT order_id, amount + product_id AS total FROM orders)
    SELECT order_id, SUM(total) AS total FROM orders_with_total GROUP BY order_id;

-- Windowing table-valued functions, window aggregation (queries/window-tvf.md, window-agg.md)
SELECT tumble(bidtime, INTERVAL '10 seconds') AS w, SUM(price) AS price FROM bid GROUP BY w;

SELECT window_start_time() AS b, window_end_time() AS e, SUM(price) AS price FROM bid
    GROUP BY hop(bidtime, INTERVAL '5 seconds', INTERVAL '10 seconds');
-- in DuckDB
SELECT win(bidtime, 5) - d * INTERVAL '5 seconds' AS b, win(bidtime, 5) - (d - 2) * INTERVAL '5 seconds' AS e, SUM(price) AS price
    FROM bid, range(2) AS g(d) GROUP BY 1, 2;

SELECT window_start_time() AS b, window_end_time() AS e, SUM(price) AS price FROM bid
    GROUP BY cumulate(bidtime, INTERVAL '2 seconds', INTERVAL '10 seconds');
-- in DuckDB
SELECT win(bidtime, 10) AS b, e, SUM(price) AS price FROM (SELECT *, win(bidtime, 10) + d * INTERVAL '2 s' AS e
    FROM bid, range(1, 6) AS g(d)) WHERE bidtime < e GROUP BY 1, 2;

SELECT window_start_time() AS b, window_end_time() AS e, supplier_id, SUM(price) AS price FROM bid
    GROUP BY session(bidtime, INTERVAL '500 milliseconds'), supplier_id;
-- in DuckDB
WITH marked AS (SELECT *, coalesce(bidtime - lag(bidtime) OVER (PARTITION BY supplier_id ORDER BY bidtime) >
    INTERVAL '500 milliseconds', true) AS first FROM bid), numbered AS
    (SELECT *, sum(first::INT) OVER (PARTITION BY supplier_id ORDER BY bidtime) AS id FROM marked)
    SELECT min(bidtime) AS b, max(bidtime) + INTERVAL '500 milliseconds' AS e, supplier_id, SUM(price) AS price
    FROM numbered GROUP BY supplier_id, id;

-- Cascading window aggregation (window-agg.md)
WITH window1 AS (SELECT tumble(bidtime, INTERVAL '5 seconds') AS rowtime, SUM(price) AS partial_price
    FROM bid GROUP BY supplier_id, 1) SELECT tumble(rowtime, INTERVAL '10 seconds') AS w, SUM(partial_price) AS
    total_price FROM window1 GROUP BY 1;

-- Group aggregation, DISTINCT aggregation, HAVING (queries/group-agg.md)
SELECT COUNT(*) AS c FROM orders;

SELECT users, COUNT(*) AS c FROM orders GROUP BY users;

SELECT COUNT(DISTINCT product_id) AS c FROM orders;

SELECT users, SUM(amount) AS total FROM orders GROUP BY users HAVING SUM(amount) > 50;

-- FILTER instead of CASE (dev/table/tuning.md, split distinct aggregation)
SELECT users, COUNT(DISTINCT order_id) AS total, COUNT(DISTINCT
    CASE WHEN product_id IN (1, 2) THEN order_id ELSE NULL END) AS app, COUNT(DISTINCT order_id) FILTER (WHERE
    product_id IN (0, 2)) AS web FROM orders GROUP BY users;

-- Joins (queries/joins.md): regular, interval, lookup
SELECT o.order_id, s.carrier FROM orders AS o INNER JOIN shipments AS s ON o.order_id = s.order_id;

SELECT o.order_id, s.order_id AS shipped, o.amount FROM orders o, shipments s WHERE o.order_id = s.order_id
    AND o.order_time BETWEEN s.ship_time - INTERVAL '4' SECOND AND s.ship_time;

SELECT o.order_id, s.carrier FROM orders o JOIN shipments s ON o.order_id = s.order_id
    AND o.order_time >= s.ship_time - INTERVAL '10' MINUTE AND o.order_time < s.ship_time;

SELECT o.order_id, s.order_id AS same FROM orders o JOIN orders s ON o.product_id = s.product_id
    AND o.order_time = s.order_time;

SELECT o.order_id, p.name FROM orders AS o LEFT JOIN product AS p ON o.product_id = p.id;

-- Window join (queries/window-join.md): of rows, and of aggregates
SELECT l.order_id, r.order_id AS shipped, l.w FROM (SELECT *, date_bin(INTERVAL '5 seconds', order_time) AS w
    FROM orders) AS l JOIN (SELECT *, date_bin(INTERVAL '5 seconds', ship_time) AS w FROM shipments) AS r
    ON l.users = r.carrier AND l.w = r.w;

SELECT l.w AS lw, l.k AS lk, l.c AS lc, r.w AS rw, r.k AS rk, r.c AS rc FROM
    (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a WHERE v > 0 GROUP BY 1, 2) AS l LEFT
    JOIN (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM b WHERE v < 0 GROUP BY 1, 2) AS r
    ON l.k = r.k AND l.w = r.w;

SELECT l.w AS lw, l.k AS lk, l.c AS lc, r.w AS rw, r.k AS rk, r.c AS rc FROM
    (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a WHERE v > 0 GROUP BY 1, 2) AS l RIGHT
    JOIN (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM b WHERE v < 0 GROUP BY 1, 2) AS r
    ON l.k = r.k AND l.w = r.w;

SELECT l.w AS lw, l.k AS lk, l.c AS lc, r.w AS rw, r.k AS rk, r.c AS rc FROM
    (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a WHERE v > 0 GROUP BY 1, 2) AS l FULL
    JOIN (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM b WHERE v < 0 GROUP BY 1, 2) AS r
    ON l.k = r.k AND l.w = r.w;

SELECT l.w, l.k, l.c FROM (SELECT tumble(t, INTERVAL '3 s') AS w, k, count(*) AS c FROM a GROUP BY 1, 2) AS l
    LEFT SEMI JOIN (SELECT tumble(t, INTERVAL '3 s') AS w, k FROM b WHERE v > 600 GROUP BY 1, 2) AS r
    ON l.k = r.k AND l.w = r.w;
-- in DuckDB
SELECT l.w, l.k, l.c FROM (SELECT tumble(t, INTERVAL '3 s') AS w, k, count(*) AS c FROM a
    GROUP BY 1, 2) AS l SEMI JOIN (SELECT tumble(t, INTERVAL '3 s') AS w, k FROM b WHERE v > 600
    GROUP BY 1, 2) AS r ON l.k = r.k AND l.w = r.w;

SELECT l.w, l.k, l.c FROM (SELECT tumble(t, INTERVAL '3 s') AS w, k, count(*) AS c FROM a GROUP BY 1, 2) AS l
    LEFT ANTI JOIN (SELECT tumble(t, INTERVAL '3 s') AS w, k FROM b WHERE v > 600 GROUP BY 1, 2) AS r
    ON l.k = r.k AND l.w = r.w;
-- in DuckDB
SELECT l.w, l.k, l.c FROM (SELECT tumble(t, INTERVAL '3 s') AS w, k, count(*) AS c FROM a
    GROUP BY 1, 2) AS l ANTI JOIN (SELECT tumble(t, INTERVAL '3 s') AS w, k FROM b WHERE v > 600
    GROUP BY 1, 2) AS r ON l.k = r.k AND l.w = r.w;

-- Set operations (queries/set-ops.md)
(SELECT s FROM a) UNION (SELECT s FROM b);

(SELECT s FROM a) UNION ALL (SELECT s FROM b);

(SELECT v, j FROM a) INTERSECT (SELECT v, j FROM b);

(SELECT v, k FROM a) EXCEPT (SELECT v, k FROM b);

-- Top-N (queries/topn.md)
SELECT * FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY supplier_id ORDER BY price DESC NULLS LAST, bid_id) AS
    row_num FROM bid) WHERE row_num <= 5;

-- Window Top-N (queries/window-topn.md): after a window aggregation, and of rows
SELECT * FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY w ORDER BY price DESC NULLS LAST, supplier_id) AS rownum
    FROM (SELECT tumble(bidtime, INTERVAL '10 seconds') AS w, supplier_id, SUM(price) AS price, COUNT(*) AS cnt
    FROM bid GROUP BY 1, 2)) WHERE rownum <= 3;

SELECT * FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY date_bin(INTERVAL '10 seconds', bidtime) ORDER BY price
    DESC NULLS LAST, bid_id) AS rownum, date_bin(INTERVAL '10 seconds', bidtime) AS w FROM bid) WHERE rownum <= 3;

-- Deduplication, window deduplication (queries/deduplication.md, window-deduplication.md)
SELECT order_id, users, product_id FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY order_id ORDER BY order_time ASC)
    AS row_num FROM orders) WHERE row_num = 1;

SELECT bidtime, price, item, supplier_id, w, rownum FROM
    (SELECT *, date_bin(INTERVAL '10 seconds', bidtime) AS w, ROW_NUMBER() OVER (PARTITION BY
    date_bin(INTERVAL '10 seconds', bidtime) ORDER BY bidtime DESC, bid_id) AS rownum FROM bid) WHERE rownum <= 1;
