-- The first rows of partitions.

SELECT k, n, v FROM (SELECT *, row_number() OVER (PARTITION BY k ORDER BY t, n) AS rn FROM a) WHERE rn = 1;

SELECT k, n FROM (SELECT *, row_number() OVER (PARTITION BY k ORDER BY t DESC, n DESC) AS rn FROM a) WHERE rn = 1;

SELECT k, j, n, rn FROM (SELECT *, row_number() OVER (PARTITION BY k, j ORDER BY t DESC, n) AS rn FROM a)
    WHERE rn <= 1;

SELECT k, n, v FROM (SELECT *, row_number() OVER (PARTITION BY k ORDER BY v DESC NULLS LAST, n) AS rn FROM a)
    WHERE rn = 1;

SELECT k, n, v, rn FROM (SELECT *, row_number() OVER (PARTITION BY k ORDER BY v DESC NULLS LAST, n) AS rn
    FROM a) WHERE rn <= 3;

SELECT k, n, rn FROM (SELECT *, row_number() OVER (PARTITION BY k ORDER BY v NULLS FIRST, n) AS rn FROM a)
    WHERE 3 > rn;

SELECT k, n, rn FROM (SELECT *, row_number() OVER (PARTITION BY k ORDER BY n) AS rn FROM a) AS q WHERE q.rn <= 4
    AND n % 2 = 0;

SELECT k, n, rn FROM (SELECT k, n, row_number() OVER (PARTITION BY k ORDER BY abs(v) NULLS LAST, n) AS rn
    FROM a) WHERE rn <= 2;

SELECT n, v, rn FROM (SELECT *, row_number() OVER (ORDER BY v NULLS LAST, n) AS rn FROM a) WHERE rn <= 5;

SELECT k, n, v FROM a QUALIFY row_number() OVER (PARTITION BY k ORDER BY v DESC NULLS LAST, n) = 1;

SELECT r, m FROM (SELECT n + 1 AS m, row_number() OVER (PARTITION BY n % 4 ORDER BY n) AS rn, n % 4 AS r
    FROM a) WHERE rn = 1;

SELECT w, k, c FROM (SELECT *, row_number() OVER (PARTITION BY w ORDER BY c DESC, k NULLS LAST) AS rn FROM
    (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a GROUP BY 1, 2)) WHERE rn <= 2;
-- in DuckDB
SELECT w, k, c FROM (SELECT *, row_number() OVER (PARTITION BY w ORDER BY c DESC, k NULLS LAST) AS rn FROM
    (SELECT win(t, 5) AS w, k, count(*) AS c FROM a GROUP BY 1, 2)) WHERE rn <= 2;

-- within windows: Flink, queries/window-topn.md and window-deduplication.md
SELECT * FROM (SELECT n, k, v, tumble(t, INTERVAL '5 s') AS w,
    row_number() OVER (PARTITION BY tumble(t, INTERVAL '5 s') ORDER BY v DESC NULLS LAST, n) AS rn FROM a) WHERE rn <= 3;

SELECT n, k, rn FROM (SELECT *, row_number() OVER (PARTITION BY k, tumble(t, INTERVAL '5 s') ORDER BY t DESC, n) AS rn
    FROM a) WHERE rn = 1 AND v > 0;

SELECT n, w FROM (SELECT tumble(t, INTERVAL '4 s') AS w, n, v,
    row_number() OVER (PARTITION BY upper(k), tumble(t, INTERVAL '4 s') ORDER BY abs(v) NULLS FIRST, n) AS rn FROM a)
    WHERE rn < 3;

SELECT k, n, tumble(t, INTERVAL '3 s') AS w FROM a
    QUALIFY row_number() OVER (PARTITION BY tumble(t, INTERVAL '3 s'), k ORDER BY x, n) <= 2;

SELECT tumble(w, INTERVAL '8 s') AS ww, count(*) AS c, sum(v) AS s FROM (SELECT v, tumble(t, INTERVAL '4 s') AS w,
    row_number() OVER (PARTITION BY tumble(t, INTERVAL '4 s'), j ORDER BY n) AS rn FROM a) WHERE rn <= 5 GROUP BY 1;

SELECT w, n, rn FROM (SELECT date_bin(INTERVAL '5 s', u) AS w, n,
    row_number() OVER (PARTITION BY date_bin(INTERVAL '5 s', u) ORDER BY n DESC) AS rn
    FROM (SELECT t + INTERVAL '1 s' AS u, n FROM a)) WHERE rn <= 2;

SELECT x, w, c, rn FROM (SELECT tumble(w, INTERVAL '10 s') AS x, w, c,
    row_number() OVER (PARTITION BY tumble(w, INTERVAL '10 s') ORDER BY c DESC, w) AS rn
    FROM (SELECT tumble(t, INTERVAL '2 s') AS w, count(*) AS c FROM a GROUP BY 1)) WHERE rn <= 2;
