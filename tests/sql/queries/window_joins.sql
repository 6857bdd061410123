-- Joins of rows in the same window.

-- Flink, queries/window-join.md
SELECT l.order_id, r.order_id AS shipped, tumble(l.order_time, INTERVAL '5 seconds') AS w FROM orders AS l
    JOIN shipments AS r ON l.users = r.carrier AND l.order_id % 4 = r.order_id % 4
    AND tumble(l.order_time, INTERVAL '5 seconds') = tumble(r.ship_time, INTERVAL '5 seconds');

SELECT l.order_id, r.order_id AS shipped, l.users FROM orders AS l
    LEFT JOIN shipments AS r ON tumble(r.ship_time, INTERVAL '3 seconds') = tumble(l.order_time, INTERVAL '3 seconds')
    AND l.users = r.carrier AND l.amount > 300;

SELECT l.order_id, r.order_id AS shipped, r.carrier FROM orders AS l
    RIGHT JOIN shipments AS r ON l.users = r.carrier AND l.order_id > r.order_id + 50
    AND tumble(l.order_time, INTERVAL '3 seconds') = tumble(r.ship_time, INTERVAL '3 seconds');

SELECT l.order_id, r.order_id AS shipped, coalesce(l.users, r.carrier) AS k FROM orders AS l
    FULL JOIN shipments AS r ON date_bin(INTERVAL '2 s', l.order_time) = date_bin(INTERVAL '2 s', r.ship_time)
    AND l.users = r.carrier AND l.order_id % 8 = r.order_id % 8;

SELECT l.n, l.k FROM a AS l LEFT SEMI JOIN b AS r ON l.j = r.j AND l.v > r.v + 900
    AND tumble(l.t, INTERVAL '4 s') = tumble(r.t, INTERVAL '4 s');
-- in DuckDB
SELECT l.n, l.k FROM a AS l SEMI JOIN b AS r ON l.j = r.j AND l.v > r.v + 900
    AND tumble(l.t, INTERVAL '4 s') = tumble(r.t, INTERVAL '4 s');

SELECT l.n, l.k FROM a AS l LEFT ANTI JOIN b AS r ON l.k = r.k
    AND tumble(l.t, INTERVAL '1 s') = tumble(r.t, INTERVAL '1 s');
-- in DuckDB
SELECT l.n, l.k FROM a AS l ANTI JOIN b AS r ON l.k = r.k
    AND tumble(l.t, INTERVAL '1 s') = tumble(r.t, INTERVAL '1 s');

-- without another key, and in WHERE
SELECT l.n, r.n AS m FROM a AS l, b AS r WHERE tumble(l.t, INTERVAL '1 s') = tumble(r.t, INTERVAL '1 s') AND l.v > r.v;

-- overlapping windows: once per window
SELECT l.n, r.n AS m, hop(l.t, INTERVAL '1 s', INTERVAL '2 s') AS w FROM a AS l JOIN b AS r ON l.k = r.k
    AND hop(l.t, INTERVAL '1 s', INTERVAL '2 s') = hop(r.t, INTERVAL '1 s', INTERVAL '2 s');
-- in DuckDB
SELECT l.n, r.n AS m, l.w FROM (SELECT *, win(t, 1) - d * INTERVAL '1 s' AS w FROM a, range(2) AS g(d)) AS l
    JOIN (SELECT *, win(t, 1) - d * INTERVAL '1 s' AS w FROM b, range(2) AS g(d)) AS r ON l.k = r.k AND l.w = r.w;

-- and what follows
SELECT tumble(l.t, INTERVAL '2 s') AS w, l.k, count(*) AS c, sum(r.v) AS s FROM a AS l JOIN b AS r ON l.k = r.k
    AND tumble(l.t, INTERVAL '2 s') = tumble(r.t, INTERVAL '2 s') GROUP BY tumble(l.t, INTERVAL '2 s'), l.k;

SELECT tumble(w, INTERVAL '4 s') AS x, count(*) AS c FROM (SELECT date_bin(INTERVAL '2 s', r.t) AS w, l.n FROM a AS l
    JOIN b AS r ON l.k = r.k AND date_bin(INTERVAL '2 s', l.t) = date_bin(INTERVAL '2 s', r.t)) GROUP BY 1;

SELECT p.n, q.c FROM (SELECT tumble(l.t, INTERVAL '2 s') AS w, l.n FROM a AS l JOIN b AS r ON l.n = r.n + 40
    AND tumble(l.t, INTERVAL '2 s') = tumble(r.t, INTERVAL '2 s')) AS p
    JOIN (SELECT tumble(t, INTERVAL '2 s') AS w, count(*) AS c FROM a GROUP BY 1) AS q ON p.w = q.w;

SELECT l.n, r.c FROM (SELECT tumble(t, INTERVAL '1 s') AS window_start_time, k, count(*) AS n FROM a GROUP BY 1, 2) AS l
    JOIN (SELECT tumble(t, INTERVAL '1 s') AS w, k, count(*) AS c FROM b GROUP BY 1, 2) AS r
    ON tumble(l.window_start_time, INTERVAL '3 s') = tumble(r.w, INTERVAL '3 s') AND l.k = r.k;
