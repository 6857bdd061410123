-- Subqueries, common table expressions, unions.

SELECT * FROM a;

SELECT m FROM (SELECT n * 2 AS m, v FROM a WHERE v > 0) WHERE m > 100;

SELECT q.m, q.m + 1 AS o FROM (SELECT n AS m FROM a) AS q;

SELECT y FROM (SELECT n, k FROM a) AS q(x, y);

WITH big AS (SELECT n, v FROM a WHERE v > 500) SELECT n FROM big WHERE n % 2 = 0;

WITH one AS (SELECT n, v FROM a), two(m, w) AS (SELECT n + 1, v FROM one) SELECT m, w FROM two WHERE w > 0;

SELECT n, k FROM a UNION ALL SELECT n, k FROM b;

SELECT n AS m FROM a WHERE v > 0 UNION ALL SELECT n + 1000 FROM b UNION ALL SELECT -n FROM a WHERE v < 0;

SELECT m, count(*) AS c FROM (SELECT j AS m FROM a UNION ALL SELECT j FROM b) AS u GROUP BY m;

SELECT n, v FROM (SELECT * FROM a WHERE j = 1) UNION ALL (SELECT n, v FROM b WHERE j = 2);

SELECT x.n FROM a AS x WHERE x.k = 'a';

SELECT n, unnest(l) AS m FROM (SELECT n, CASE WHEN v > 0 THEN [n, v, NULL] WHEN v < -900 THEN [] END AS l FROM a);

SELECT m, count(*) AS c FROM (SELECT unnest([j, j + 1]) AS m FROM a WHERE v > 0) WHERE m <> 1 GROUP BY m;
