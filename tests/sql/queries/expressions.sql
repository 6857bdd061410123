-- Expressions of each row: SELECT lists and predicates.

SELECT n, k, v FROM a;

SELECT n + 1 AS m, v * 2 - n AS w FROM a;

SELECT n % 7 AS m, -v AS w, abs(v) AS y FROM a;

SELECT v / 2.0 AS half, x * x AS square FROM a;

SELECT CASE WHEN v > 0 THEN 'up' WHEN v < 0 THEN 'down' ELSE 'none' END AS way FROM a;

SELECT CASE j WHEN 0 THEN 'no' WHEN 1 THEN 'one' END AS word FROM a;

SELECT CAST(n AS VARCHAR) AS text, CAST(j AS BIGINT) AS big FROM a;

SELECT TRY_CAST(s AS INT) AS number, n FROM a;

SELECT coalesce(k, 'nobody') AS who, nullif(j, 1) AS other FROM a;

SELECT upper(s) AS loud, lower(k) AS quiet, length(s) AS size FROM a;

SELECT k || '-' || s AS pair FROM a;

SELECT substr(s, 2, 3) AS part, replace(s, '1', 'x') AS changed FROM a;

SELECT split_part(s, '1', 1) AS head, strpos(s, '2') AS place FROM a;

SELECT greatest(n, 100) AS high, least(n, 100) AS low FROM a;

SELECT n - (v - n) AS m, n - v - n AS w, n / 3.0 * 2 AS y FROM a;

SELECT date_trunc('second', t) AS second, t FROM a;

SELECT t + INTERVAL '90 seconds' AS later, t - INTERVAL '1 day' AS earlier FROM a;

SELECT extract(hour FROM t) AS hour, extract(minute FROM t) AS minute FROM a;

SELECT k IS NULL AS none, v IS NOT NULL AS some, (v > 0) IS TRUE AS up, (v > 0) IS NOT FALSE AS maybe FROM a;

SELECT n AS "Odd Name", j AS "select" FROM a;

SELECT round(x, 2) AS y, floor(x) AS z, power(j, 2) AS p FROM a;

SELECT a.n, a.k FROM a;

SELECT n FROM a WHERE v > 0;

SELECT n FROM a WHERE v > 0 AND j = 1 OR k IS NULL;

SELECT n FROM a WHERE NOT (v > 0);

SELECT n FROM a WHERE v BETWEEN -100 AND 100;

SELECT n FROM a WHERE v NOT BETWEEN -100 AND 100;

SELECT n FROM a WHERE k IN ('a', 'b');

SELECT n FROM a WHERE k NOT IN ('a', 'b');

SELECT n FROM a WHERE s LIKE 's1%';

SELECT n FROM a WHERE s NOT LIKE 's1%';

SELECT n FROM a WHERE k ILIKE 'A';

SELECT n FROM a WHERE (v IS DISTINCT FROM 3) AND (k IS NOT DISTINCT FROM NULL);

SELECT n FROM a WHERE t >= TIMESTAMP '1970-01-01 00:00:05';

SELECT n FROM a WHERE t < TIMESTAMP '1970-01-01 00:00:05' - INTERVAL '3 seconds';

SELECT n FROM a WHERE CASE WHEN j = 2 THEN v > 0 ELSE n % 2 = 0 END;

SELECT n FROM a WHERE length(s) = 2 AND abs(v) > 500;

SELECT n FROM a WHERE true;

SELECT n FROM a WHERE n = 3 AND n = 4;
