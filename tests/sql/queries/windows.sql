-- GROUP BY with a window.

SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c, count(v) AS cv, sum(v) AS total, min(v) AS low, max(v) AS
    high, avg(x) AS mean, count(DISTINCT s) AS different, sum(v) FILTER (WHERE v > 0) AS gains, stddev(x) AS spread,
    bool_or(v > 900) AS any FROM a GROUP BY tumble(t, INTERVAL '5 s'), k;
-- in DuckDB
SELECT win(t, 5) AS w, k, count(*) AS c, count(v) AS cv, sum(v) AS total, min(v) AS low, max(v) AS high, avg(x) AS
    mean, count(DISTINCT s) AS different, sum(v) FILTER (WHERE v > 0) AS gains, stddev(x) AS spread, bool_or(v >
    900) AS any FROM a GROUP BY 1, 2;

SELECT window_start_time() AS b, window_end_time() AS e, count(*) AS c FROM a GROUP BY tumble(t, INTERVAL '5 s');
-- in DuckDB
SELECT win(t, 5) AS b, win(t, 5) + INTERVAL '5 s' AS e, count(*) AS c FROM a GROUP BY win(t, 5);

SELECT date_bin(INTERVAL '7 seconds', t) AS w, sum(v) AS total FROM a GROUP BY w;
-- in DuckDB
SELECT win(t, 7) AS w, sum(v) AS total FROM a GROUP BY w;

SELECT hop(t, INTERVAL '2 seconds', INTERVAL '6 seconds') AS w, j, count(*) AS c, max(s) AS last FROM a
    GROUP BY 1, 2;
-- in DuckDB
SELECT win(t, 2) - d * INTERVAL '2 seconds' AS w, j, count(*) AS c, max(s) AS last FROM a, range(3) AS g(d)
    GROUP BY 1, 2;

SELECT window_start_time() AS b, window_end_time() AS e, sum(v) AS total FROM a
    GROUP BY cumulate(t, INTERVAL '2 seconds', INTERVAL '6 seconds');
-- in DuckDB
SELECT win(t, 6) AS b, e, sum(v) AS total FROM (SELECT *, win(t, 6) + d * INTERVAL '2 seconds' AS e
    FROM a, range(1, 4) AS g(d)) WHERE t < e GROUP BY 1, 2;

SELECT k, window_start_time() AS b, window_end_time() AS e, count(*) AS c FROM a
    GROUP BY session(t, INTERVAL '700 milliseconds'), k;
-- in DuckDB
WITH marked AS (SELECT *, coalesce(t - lag(t) OVER (PARTITION BY k ORDER BY t) > INTERVAL '700 milliseconds', true)
    AS first FROM a), numbered AS (SELECT *, sum(first::INT) OVER (PARTITION BY k ORDER BY t) AS id
    FROM marked) SELECT k, min(t) AS b, max(t) + INTERVAL '700 milliseconds' AS e, count(*) AS c FROM
    numbered GROUP BY k, id;

SELECT tumble(t, INTERVAL '5 s') AS w, k FROM a WHERE v > 0 GROUP BY 1, 2 HAVING count(*) > 2 AND sum(v) > 500;
-- in DuckDB
SELECT win(t, 5) AS w, k FROM a WHERE v > 0 GROUP BY 1, 2 HAVING count(*) > 2 AND sum(v) > 500;

SELECT tumble(t, INTERVAL '5 s') AS w, upper(k) AS u, sum(v * 2) + 1 AS total, sum(v) / count(v) AS mean
    FROM a GROUP BY 1, upper(k);
-- in DuckDB
SELECT win(t, 5) AS w, upper(k) AS u, sum(v * 2) + 1 AS total, sum(v) // count(v) AS mean FROM a GROUP BY 1, 2;

SELECT tumble(t, INTERVAL '5 s') AS w, array_agg(n ORDER BY v DESC NULLS LAST, n) AS list FROM a GROUP BY 1;
-- in DuckDB
SELECT win(t, 5) AS w, array_agg(n ORDER BY v DESC NULLS LAST, n) AS list FROM a GROUP BY 1;

SELECT tumble(t, INTERVAL '5 s') AS w, first_value(n ORDER BY n) AS f, last_value(n ORDER BY n) AS l FROM a
    GROUP BY 1;
-- in DuckDB
SELECT win(t, 5) AS w, first(n ORDER BY n) AS f, last(n ORDER BY n) AS l FROM a GROUP BY 1;

SELECT tumble(t, INTERVAL '5 s') AS w, k FROM a GROUP BY 1, 2;
-- in DuckDB
SELECT DISTINCT win(t, 5) AS w, k FROM a;

SELECT tumble(w, INTERVAL '10 seconds') AS ww, sum(c) AS total, max(c) AS most FROM
    (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a GROUP BY 1, 2) GROUP BY 1;
-- in DuckDB
SELECT win(w, 10) AS ww, sum(c) AS total, max(c) AS most FROM (SELECT win(t, 5) AS w, k, count(*) AS c
    FROM a GROUP BY 1, 2) GROUP BY 1;

SELECT tumble(t, INTERVAL '5 s') AS w, count(*) AS c FROM (SELECT t FROM a UNION ALL SELECT t FROM b) AS u
    GROUP BY 1;
-- in DuckDB
SELECT win(t, 5) AS w, count(*) AS c FROM (SELECT t FROM a UNION ALL SELECT t FROM b) AS u GROUP BY 1;

SELECT count(*) AS c FROM a GROUP BY k, tumble(t, INTERVAL '5 s');
-- in DuckDB
SELECT count(*) AS c FROM a GROUP BY k, win(t, 5);
