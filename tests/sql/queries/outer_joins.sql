-- Conditions of outer joins, in ON and in WHERE; keys of several types; USING.

SELECT a.n, b.n AS m FROM a LEFT JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' AND a.v > 0;

SELECT a.n, b.n AS m FROM a LEFT JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' AND b.v > 0;

SELECT a.n, b.n AS m FROM a LEFT JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' WHERE b.v > 0;

SELECT a.n, b.n AS m FROM a LEFT JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' WHERE a.v > 0;

SELECT a.n, b.n AS m FROM a LEFT JOIN (SELECT * FROM b WHERE v > 0) AS b ON a.k = b.k AND a.j = b.j
    AND b.t BETWEEN a.t - INTERVAL '1 second' AND a.t + INTERVAL '500 milliseconds';

SELECT a.n, b.n AS m FROM (SELECT * FROM a WHERE v > 0) AS a LEFT JOIN b ON a.k = b.k AND a.j = b.j
    AND b.t BETWEEN a.t - INTERVAL '1 second' AND a.t + INTERVAL '500 milliseconds' AND a.v > b.v;

SELECT a.n, b.n AS m FROM a RIGHT JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' AND a.v > 0;

SELECT a.n, b.n AS m FROM a RIGHT JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' AND b.v > 0;

SELECT b.n AS m, b.k FROM a RIGHT JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' WHERE a.n IS NULL;

SELECT a.n, b.n AS m FROM a FULL JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' AND a.v > b.v;

SELECT a.n, b.n AS m, coalesce(a.j, b.j) AS i FROM a FULL JOIN b ON a.k = b.k AND a.j = b.j
    AND b.t BETWEEN a.t - INTERVAL '1 second' AND a.t + INTERVAL '500 milliseconds' WHERE coalesce(a.j, b.j) = 1;

SELECT a.n, b.n AS m FROM a FULL JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' WHERE a.n IS NULL OR b.n IS NULL;

SELECT a.n, b.n AS m, CASE WHEN b.v IS NULL THEN 'none' ELSE 'some' END AS c FROM a LEFT JOIN b ON a.k = b.k
    AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second' AND a.t + INTERVAL '500 milliseconds';

SELECT a.n, b.n AS m, d.label FROM a LEFT JOIN b ON a.k = b.k AND a.j = b.j
    AND b.t BETWEEN a.t - INTERVAL '1 second' AND a.t + INTERVAL '500 milliseconds' LEFT JOIN dim AS d ON b.j = d.j;

SELECT a.n, c.n AS m FROM a LEFT JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' JOIN a AS c ON c.n = b.n + 1 AND c.k = a.k;

SELECT a.n, b.n AS m FROM a JOIN b ON a.j = b.n;

SELECT a.n, b.n AS m FROM a JOIN b ON a.n = b.n AND a.t < b.t;

SELECT a.n, b.n AS m FROM a JOIN b ON a.k = b.k WHERE b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' AND (a.v > 0 OR b.v > 0) AND NOT (a.j = b.j);

SELECT a.n, b.n AS m FROM a JOIN b ON a.k = b.k AND b.t > a.t AND b.t - a.t < INTERVAL '700 milliseconds';

SELECT a.n, b.n AS m FROM a JOIN b ON a.k = b.k AND b.t >= a.t + INTERVAL '1 s' AND b.t < a.t + INTERVAL '1.5 s';

SELECT a.n, b.n AS m FROM a LEFT JOIN b ON a.k = b.k AND b.t NOT BETWEEN a.t AND a.t AND b.t = a.t;

-- USING and NATURAL
SELECT w, k, c, d FROM
    (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a WHERE v > 200 GROUP BY 1, 2) AS p INNER JOIN
    (SELECT tumble(t, INTERVAL '5 s') AS w, k, sum(v) AS d FROM b WHERE j = 1 GROUP BY 1, 2) AS q USING (w, k);

SELECT w, k, c, d FROM
    (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a WHERE v > 200 GROUP BY 1, 2) AS p LEFT JOIN
    (SELECT tumble(t, INTERVAL '5 s') AS w, k, sum(v) AS d FROM b WHERE j = 1 GROUP BY 1, 2) AS q USING (w, k);

SELECT w, k, c, d FROM
    (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a WHERE v > 200 GROUP BY 1, 2) AS p NATURAL JOIN
    (SELECT tumble(t, INTERVAL '5 s') AS w, k, sum(v) AS d FROM b WHERE j = 1 GROUP BY 1, 2) AS q;

SELECT coalesce(p.w, q.w) AS w, coalesce(p.k, q.k) AS k, c, d FROM
    (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a WHERE v > 200 GROUP BY 1, 2) AS p FULL JOIN
    (SELECT tumble(t, INTERVAL '5 s') AS w, k, sum(v) AS d FROM b WHERE j = 1 GROUP BY 1, 2) AS q ON p.w = q.w AND p.k = q.k;

SELECT a.n, a.k FROM a LEFT SEMI JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' AND a.v > b.v AND b.x > 0;
-- in DuckDB
SELECT a.n, a.k FROM a SEMI JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' AND a.v > b.v AND b.x > 0;

SELECT a.n, a.k FROM a LEFT ANTI JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' AND a.v > b.v AND b.x > 0;
-- in DuckDB
SELECT a.n, a.k FROM a ANTI JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' AND a.v > b.v AND b.x > 0;
