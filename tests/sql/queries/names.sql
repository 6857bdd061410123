-- Columns that change their names, or share them.

SELECT n AS v, v AS n FROM a;

SELECT v AS n, k FROM (SELECT n AS v, s AS k FROM a WHERE v > 0) WHERE v < 200;

SELECT x.n, y.v FROM (SELECT n, j FROM a) AS x JOIN (SELECT n, v FROM b) AS y ON x.n = y.n;

SELECT y.n, x.n AS m FROM a AS x JOIN a AS y ON x.n = y.n + 1 AND x.k = y.k;

WITH q AS (SELECT n, k FROM a WHERE j = 1) SELECT p.n, q.k FROM q AS p JOIN q ON p.n = q.n;

WITH q AS (SELECT n, k FROM a WHERE j = 1) SELECT n FROM q UNION ALL SELECT n + 1000 FROM q WHERE k = 'a';

WITH a AS (SELECT n, v FROM b) SELECT n, v FROM a;

SELECT * EXCEPT (t, x) FROM a;

SELECT * REPLACE (v * 2 AS v) FROM (SELECT n, v FROM a);

SELECT a.*, 1 AS one FROM a;

SELECT n AS "a.b", v AS "x y", k AS "Ü", j AS "N" FROM a;

SELECT count(*) AS "count(*)", max(n) AS "max(a.n)" FROM a;

SELECT k AS n, count(*) AS k FROM a GROUP BY k;

SELECT n % 3 AS n, count(*) AS c FROM a GROUP BY a.n % 3;

SELECT sum(n) AS n, max(n) - min(n) AS m, sum(n) + sum(n) AS o, CASE WHEN count(*) > 3 THEN 'many' END AS p FROM a;

SELECT DISTINCT k AS a, j AS b FROM a WHERE k IS NOT NULL;

SELECT k, j FROM a GROUP BY k, j HAVING max(n) > 340;

SELECT 'x' AS x, 1.5 AS y, NULL AS z, n FROM a;

SELECT j FROM a UNION ALL SELECT n FROM b;

SELECT n, NULL AS k FROM a UNION ALL SELECT n, k FROM b;

SELECT n AS m, 1 AS f FROM a UNION ALL SELECT x, 2 FROM b;

SELECT s FROM (SELECT s FROM a UNION ALL SELECT k FROM b) WHERE s LIKE '%1%' OR s IS NULL;

SELECT tumble(s, INTERVAL '4 seconds') AS t, count(*) AS c FROM (SELECT t AS s, n AS t FROM a) GROUP BY 1;
-- in DuckDB
SELECT win(t, 4) AS t, count(*) AS c FROM a AS r GROUP BY win(r.t, 4);

SELECT window_start_time, c FROM (SELECT tumble(t, INTERVAL '4 s') AS window_start_time, count(*) AS c
    FROM a GROUP BY 1) WHERE c > 39;
-- in DuckDB
SELECT win(t, 4) AS window_start_time, count(*) AS c FROM a GROUP BY 1 HAVING count(*) > 39;

SELECT tumble(window_start_time, INTERVAL '8 s') AS window_start_time, sum(c) AS window_end_time FROM
    (SELECT tumble(t, INTERVAL '4 s') AS window_start_time, count(*) AS c FROM a GROUP BY 1) GROUP BY 1;
-- in DuckDB
SELECT win(t, 8) AS window_start_time, count(*) AS window_end_time FROM a GROUP BY 1;
