-- Joins of streams, and of streams with tables.

SELECT a.n, b.n AS m FROM a JOIN b ON a.k = b.k AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds';

SELECT a.n, b.n AS m, a.v + b.v AS w FROM a , b WHERE a.k = b.k AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' AND a.v > b.v;

SELECT a.n, b.n AS m FROM a LEFT JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds';

SELECT a.n, b.n AS m FROM a RIGHT JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds';

SELECT a.n, b.n AS m FROM a FULL JOIN b ON a.k = b.k AND a.j = b.j AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds';

SELECT a.n, b.n AS m FROM a LEFT JOIN b ON a.k = b.k AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' WHERE b.n IS NULL;

SELECT x.n, y.n AS m FROM a AS x JOIN a AS y ON x.k = y.k AND x.t > y.t AND x.t < y.t + INTERVAL '1 s';

SELECT a.n, b.n AS m FROM a JOIN b ON a.s = b.s AND a.k = b.k;

SELECT a.n, b.n AS m FROM a JOIN b ON a.n % 5 = b.n % 7 AND upper(b.k) = upper(a.k)
    AND b.t BETWEEN a.t - INTERVAL '1 second' AND a.t + INTERVAL '500 milliseconds';

SELECT a.n, b.n AS m FROM a LEFT JOIN b ON a.n % 5 = b.n AND a.n + b.n > 3
    AND b.t BETWEEN a.t - INTERVAL '1 second' AND a.t + INTERVAL '500 milliseconds';

SELECT a.n, b.n AS m FROM a JOIN b ON a.n + b.n = 100 AND a.k = b.k;

SELECT a.n, b.n AS m FROM a JOIN b ON a.j = b.j WHERE b.n = 7 AND a.n = b.n;

SELECT k, a.n, b.n AS m FROM a JOIN b USING (k, s);

SELECT a.n, label FROM a JOIN dim ON a.j = dim.j;

SELECT a.n, d.label FROM a LEFT JOIN dim AS d ON d.j = a.j;

SELECT a.n, dim.* FROM dim JOIN a ON a.j = dim.j WHERE dim.label <> 'one' AND a.v > 0;

SELECT a.n, d.many FROM a JOIN (SELECT j, count(*) AS many FROM dim GROUP BY j) AS d ON a.j = d.j;

SELECT label, count(*) AS c FROM a JOIN dim ON a.j = dim.j GROUP BY label;

SELECT a.n, b.n AS m, label FROM a JOIN b ON a.k = b.k AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds' JOIN dim ON a.j = dim.j;

SELECT a.n FROM a LEFT SEMI JOIN b ON a.k = b.k AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds';
-- in DuckDB
SELECT a.n FROM a SEMI JOIN b ON a.k = b.k AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds';

SELECT a.n FROM a LEFT ANTI JOIN b ON a.k = b.k AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds';
-- in DuckDB
SELECT a.n FROM a ANTI JOIN b ON a.k = b.k AND b.t BETWEEN a.t - INTERVAL '1 second'
    AND a.t + INTERVAL '500 milliseconds';

SELECT p.w, p.k, p.c, q.c AS d FROM (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a
    GROUP BY 1, 2) AS p JOIN (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM b GROUP BY 1, 2) AS q
    ON p.w = q.w AND p.k = q.k;
-- in DuckDB
SELECT p.w, p.k, p.c, q.c AS d FROM (SELECT win(t, 5) AS w, k, count(*) AS c FROM a GROUP BY 1, 2) AS p JOIN
    (SELECT win(t, 5) AS w, k, count(*) AS c FROM b GROUP BY 1, 2) AS q ON p.w = q.w AND p.k = q.k;

SELECT tumble(t, INTERVAL '5 s') AS w, count(*) AS c FROM (SELECT a.t FROM a JOIN b ON a.k = b.k
    AND b.t BETWEEN a.t - INTERVAL '1 second' AND a.t + INTERVAL '500 milliseconds') AS both GROUP BY 1;
-- in DuckDB
SELECT win(t, 5) AS w, count(*) AS c FROM (SELECT a.t FROM a JOIN b ON a.k = b.k
    AND b.t BETWEEN a.t - INTERVAL '1 second' AND a.t + INTERVAL '500 milliseconds') AS q GROUP BY 1;

-- A table function, and an expression of the stream as the key
SELECT a.n, value FROM a JOIN range(0, 2) ON a.j = value;
-- in DuckDB
SELECT a.n, range AS value FROM a JOIN range(0, 2) ON a.j = range;

SELECT a.n, g.value FROM a JOIN generate_series(1, 2) AS g ON a.j + 1 = g.value;
-- in DuckDB
SELECT a.n, g.value FROM a JOIN generate_series(1, 2) AS g(value) ON a.j + 1 = g.value;

-- Flink, queries/set-ops.md: IN and EXISTS, of a table
SELECT o.users, o.amount FROM orders AS o LEFT SEMI JOIN product AS p ON o.product_id = p.id;
-- in DuckDB
SELECT users, amount FROM orders WHERE product_id IN (SELECT id FROM product);

SELECT o.order_id FROM orders AS o LEFT ANTI JOIN product AS p ON p.id = o.product_id;
-- in DuckDB
SELECT order_id FROM orders WHERE product_id NOT IN (SELECT id FROM product);

SELECT a.n FROM a LEFT SEMI JOIN dim ON nullif(a.j, 0) = dim.j;
-- in DuckDB
SELECT a.n FROM a SEMI JOIN dim ON nullif(a.j, 0) = dim.j;

SELECT a.n, a.k FROM a LEFT ANTI JOIN (SELECT j FROM dim WHERE label <> 'zero') AS d ON nullif(a.j, 2) = d.j;
-- in DuckDB
SELECT a.n, a.k FROM a ANTI JOIN (SELECT j FROM dim WHERE label <> 'zero') AS d ON nullif(a.j, 2) = d.j;

SELECT tumble(t, INTERVAL '5 s') AS w, count(*) AS c FROM a LEFT SEMI JOIN product AS p ON a.j = p.id GROUP BY 1;
-- in DuckDB
SELECT tumble(t, INTERVAL '5 s') AS w, count(*) AS c FROM a SEMI JOIN product AS p ON a.j = p.id GROUP BY 1;
