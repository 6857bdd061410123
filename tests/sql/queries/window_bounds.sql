-- Bounds of windows, windows of windows, and what is asked within one.

SELECT w, c FROM (SELECT tumble(t, INTERVAL '5 s') AS w, count(*) AS c FROM a GROUP BY 1)
    WHERE w >= TIMESTAMP '1970-01-01 00:00:05' AND w < TIMESTAMP '1970-01-01 00:00:20';

SELECT tumble(t, INTERVAL '5 s') AS w, count(*) AS c FROM a GROUP BY 1
    HAVING tumble(t, INTERVAL '5 s') > TIMESTAMP '1970-01-01 00:00:02.5';

SELECT tumble(t, INTERVAL '5 s') AS w FROM a GROUP BY 1 HAVING max(v) > 980 OR count(DISTINCT k) < 4;

SELECT tumble(t, INTERVAL '5 s') AS w, count(*) AS c FROM a WHERE false GROUP BY 1;

SELECT DISTINCT tumble(t, INTERVAL '5 s') AS w FROM a GROUP BY 1, k;

SELECT tumble(t, INTERVAL '5 s') + INTERVAL '1 minute' AS later, count(*) + 1 AS c FROM a
    GROUP BY tumble(t, INTERVAL '5 s');

SELECT tumble(t, INTERVAL '3 s') AS w, count(DISTINCT s) FILTER (WHERE v > 0) AS c, sum(DISTINCT j) AS s,
    avg(DISTINCT j) AS m FROM a GROUP BY 1;

SELECT tumble(t, INTERVAL '3 s') AS w, array_agg(DISTINCT j ORDER BY j) AS l, string_agg(s, ',' ORDER BY n) AS s
    FROM a GROUP BY 1;

SELECT tumble(t, INTERVAL '3 s') AS w, array_agg(n ORDER BY v DESC NULLS FIRST, n) FILTER (WHERE j = 1) AS l
    FROM a GROUP BY 1;

SELECT tumble(t, INTERVAL '3 s') AS w, median(x) AS m, var_pop(x) AS v, bit_xor(n) AS b, covar_samp(x, v) AS c
    FROM a GROUP BY 1;

SELECT tumble(t, INTERVAL '3 s') AS w, t, count(*) AS c FROM a GROUP BY 1, t;

SELECT tumble(t, INTERVAL '3 s') AS w, v IS NULL AS gone, n % 2 AS m, min(k) AS low FROM a GROUP BY 1, 2, 3;

SELECT tumble(t, INTERVAL '1 day') AS w, count(*) AS c FROM a GROUP BY 1;

SELECT date_bin(INTERVAL '2 s', u) AS w, count(*) AS c FROM (SELECT t + INTERVAL '1 s' AS u FROM a) GROUP BY 1;

SELECT date_bin(INTERVAL '2 s', t) AS w, n FROM a;

SELECT tumble(w, INTERVAL '20 s') AS ww, max(c) AS c FROM (SELECT tumble(w, INTERVAL '10 s') AS w, sum(c) AS c
    FROM (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a GROUP BY 1, 2) GROUP BY 1, k) GROUP BY 1;

SELECT k, max(c) AS most FROM (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a
    GROUP BY 1, 2) GROUP BY k;

SELECT tumble(t, INTERVAL '5 s') AS w, count(*) AS c, max(m) AS m FROM (SELECT t, n AS m FROM a WHERE v > 0
    UNION ALL SELECT t, n FROM b WHERE v < 0 UNION ALL SELECT t, v FROM a WHERE j = 2) GROUP BY 1;

SELECT tumble(t, INTERVAL '5 s') AS w, label, count(*) AS c FROM a LEFT JOIN dim ON a.j = dim.j GROUP BY 1, 2;

SELECT tumble(t, INTERVAL '7 s') AS w, max(t) AS t FROM a GROUP BY 1;

SELECT hop(t, INTERVAL '2 s', INTERVAL '5 s') AS w, count(*) AS c FROM a GROUP BY 1;
-- in DuckDB
SELECT w, count(*) AS c FROM (SELECT t, win(t, 2) - d * INTERVAL '2 s' AS w FROM a, range(3) AS g(d))
    WHERE t < w + INTERVAL '5 s' GROUP BY 1;

SELECT hop(t, INTERVAL '5 s', INTERVAL '2 s') AS w, count(*) AS c FROM a GROUP BY 1;
-- in DuckDB
SELECT win(t, 5) AS w, count(*) AS c FROM a WHERE t < win(t, 5) + INTERVAL '2 s' GROUP BY 1;

SELECT window_end_time() AS e, k, count(*) AS c FROM a
    GROUP BY cumulate(t, INTERVAL '1 s', INTERVAL '4 s'), k
    HAVING window_end_time() > TIMESTAMP '1970-01-01 00:00:03' AND count(*) > 1;
-- in DuckDB
SELECT e, k, count(*) AS c FROM (SELECT *, win(t, 4) + d * INTERVAL '1 s' AS e FROM a, range(1, 5) AS g(d))
    WHERE t < e AND e > TIMESTAMP '1970-01-01 00:00:03' GROUP BY 1, 2 HAVING count(*) > 1;

SELECT window_start_time() AS b, window_end_time() AS e, max(c) AS most FROM
    (SELECT tumble(t, INTERVAL '2 s') AS w, k, count(*) AS c FROM a GROUP BY 1, 2)
    GROUP BY hop(w, INTERVAL '4 s', INTERVAL '8 s');
-- in DuckDB
SELECT win(w, 4) - d * INTERVAL '4 s' AS b, win(w, 4) - (d - 2) * INTERVAL '4 s' AS e, max(c) AS most FROM
    (SELECT win(t, 2) AS w, k, count(*) AS c FROM a GROUP BY 1, 2), range(2) AS g(d) GROUP BY 1, 2;

SELECT tumble(e, INTERVAL '10 s') AS w, max(c) AS most FROM (SELECT window_end_time() AS e, k, count(*) AS c
    FROM a GROUP BY session(t, INTERVAL '600 milliseconds'), k) GROUP BY 1;
-- in DuckDB
WITH marked AS (SELECT *, coalesce(t - lag(t) OVER (PARTITION BY k ORDER BY t) > INTERVAL '600 milliseconds', true)
    AS first FROM a), numbered AS (SELECT *, sum(first::INT) OVER (PARTITION BY k ORDER BY t) AS id
    FROM marked) SELECT win(e, 10) AS w, max(c) AS most
    FROM (SELECT max(t) + INTERVAL '600 milliseconds' AS e, count(*) AS c FROM numbered GROUP BY k, id) GROUP BY 1;

SELECT tumble(t, INTERVAL '5 s') AS w, m, count(*) AS c
    FROM (SELECT t, unnest(string_to_array(s || ',' || coalesce(k, 'x'), ',')) AS m FROM a) GROUP BY 1, 2;

SELECT e, sum(c) AS s FROM (SELECT cumulate(t, INTERVAL '1 s', INTERVAL '4 s') AS w, window_end_time() AS e, k,
    count(*) AS c FROM a GROUP BY 1, k) GROUP BY e;
-- in DuckDB
SELECT e, count(*) AS s FROM (SELECT *, win(t, 4) + d * INTERVAL '1 s' AS e FROM a, range(1, 5) AS g(d))
    WHERE t < e GROUP BY 1;

SELECT tumble(w, INTERVAL '8 s') AS x, k, max(c) AS m FROM (SELECT cumulate(t, INTERVAL '1 s', INTERVAL '4 s') AS w, k,
    count(*) AS c FROM a GROUP BY 1, 2) GROUP BY 1, 2;
-- in DuckDB
SELECT win(w, 8) AS x, k, max(c) AS m FROM (SELECT win(t, 4) AS w, k, d, count(*) AS c FROM a, range(1, 5) AS g(d)
    WHERE t < win(t, 4) + d * INTERVAL '1 s' GROUP BY 1, 2, 3) GROUP BY 1, 2;
