-- Three-valued logic.

SELECT n FROM a WHERE v NOT IN (1, 2, NULL);

SELECT n FROM a WHERE v IN (-100, 7, NULL) OR n < 5;

SELECT n FROM a WHERE k NOT IN ('a', 'b') OR k IS NULL;

SELECT n FROM a WHERE v = NULL OR v <> NULL;

SELECT n FROM a WHERE NOT (v > 0 AND k = 'a');

SELECT n FROM a WHERE (v > 0) = (j = 1);

SELECT n FROM a WHERE (v > 0 OR NULL) IS NULL;

SELECT n, (v > 0) IS UNKNOWN AS maybe, NOT (v > 0) AS down, v > 0 AND k = 'a' AS both, v > 0 OR k = 'a' AS any
    FROM a;

SELECT n, CASE WHEN v > 0 THEN 1 END AS one, CASE WHEN v > 0 THEN k WHEN NULL THEN 'x' END AS two FROM a;

SELECT n, CASE k WHEN NULL THEN 'null' WHEN 'a' THEN 'A' ELSE 'other' END AS word FROM a;

SELECT n, nullif(v, v) AS nothing, coalesce(NULL, v, 0) AS some, k || NULL AS lost, concat(k, '!') AS kept FROM a;

SELECT n, v BETWEEN 10 AND NULL AS up, v NOT BETWEEN NULL AND 10 AS down, v IS DISTINCT FROM NULL AS there FROM a;

SELECT k, v > 0 AS up, count(*) AS c FROM a GROUP BY k, v > 0;

SELECT k, count(v) AS c, sum(v) AS s, max(v) AS m FROM a WHERE v IS NULL GROUP BY k;

SELECT k, count(DISTINCT v) FILTER (WHERE v > 0) AS d, sum(DISTINCT j) AS s, count(k) AS c FROM a GROUP BY k;

SELECT count(DISTINCT k) AS d, count(DISTINCT k) FILTER (WHERE j = 1) AS e, count(k) AS c, count(1) AS all FROM a;

SELECT a.n, b.n AS m FROM a JOIN b ON a.v = b.v AND a.j = b.j;

SELECT a.n, b.n AS m FROM a JOIN b ON a.k = b.k AND a.s = b.s AND a.k IS NOT NULL;

SELECT a.n, b.n AS m FROM a JOIN b ON a.j = b.j AND (a.k IS NOT DISTINCT FROM b.k)
    AND b.t BETWEEN a.t - INTERVAL '1 second' AND a.t + INTERVAL '500 milliseconds' AND a.n % 4 = 1;

SELECT a.n, b.n AS m FROM a JOIN b ON a.j = b.j AND a.k <> b.k AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' AND a.n % 4 = 1;

SELECT a.n, d.label FROM a LEFT JOIN dim AS d ON nullif(a.j, 1) = d.j;

SELECT a.n FROM a LEFT JOIN dim AS d ON a.j = d.j WHERE d.j IS NULL;

SELECT a.n, d.label FROM a LEFT JOIN dim AS d ON a.j = d.j WHERE d.label <> 'one';
