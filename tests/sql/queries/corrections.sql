-- What is asked of results that are corrected.

SELECT j, sum(total) AS s, avg(total) AS m, count(total) AS c, count(*) AS r FROM (SELECT j, s, sum(v) AS total
    FROM a WHERE n % 3 = 0 OR v IS NULL GROUP BY j, s) GROUP BY j;

SELECT j, sum(total) AS s FROM (SELECT j, k, sum(v) AS total FROM a WHERE v IS NULL GROUP BY j, k) GROUP BY j;

SELECT j, sum(c) FILTER (WHERE c > 2) AS s, count(*) FILTER (WHERE k IS NULL) AS m FROM
    (SELECT j, k, s, count(*) AS c FROM a GROUP BY j, k, s) GROUP BY j;

SELECT k, s, count(*) AS c FROM a GROUP BY k, s HAVING count(*) = 2;

SELECT k, sum(v) AS total FROM a GROUP BY k HAVING sum(v) BETWEEN -500 AND 500 OR k IS NULL;

SELECT c, sum(c) AS s FROM (SELECT s, count(*) AS c FROM a GROUP BY s HAVING count(*) > 5) GROUP BY c;

SELECT count(*) AS c FROM (SELECT DISTINCT k, j FROM a);

SELECT k, count(*) AS c FROM (SELECT DISTINCT k, j, s FROM a) GROUP BY k;

SELECT DISTINCT c FROM (SELECT s, count(*) AS c FROM a GROUP BY s);

SELECT DISTINCT c % 2 = 0 AS even FROM (SELECT k, j, count(*) AS c FROM a GROUP BY k, j);

SELECT c FROM (SELECT s, count(*) AS c FROM a GROUP BY s) GROUP BY c;

SELECT sum(whole) AS w FROM (SELECT j, sum(total) AS whole FROM (SELECT j, k, sum(n) AS total FROM a
    GROUP BY j, k) GROUP BY j);

SELECT k, n, v FROM (SELECT *, row_number() OVER (PARTITION BY k ORDER BY v DESC NULLS LAST, n) AS rn FROM a)
    WHERE rn = 1 AND v > 990;

SELECT k, rn, v FROM (SELECT *, row_number() OVER (PARTITION BY k ORDER BY v DESC NULLS LAST, n) AS rn FROM a)
    WHERE rn <= 3 AND v % 2 = 0;

SELECT sum(v) AS best, count(*) AS c FROM (SELECT *, row_number() OVER (PARTITION BY k ORDER BY v DESC NULLS LAST,
    n) AS rn FROM a) WHERE rn <= 3;

SELECT rn, sum(v) AS total FROM (SELECT * FROM
    (SELECT *, row_number() OVER (PARTITION BY k ORDER BY v DESC NULLS LAST, n) AS rn FROM a)
    WHERE rn <= 2) GROUP BY rn;

SELECT k, count(*) AS c, sum(v) AS s FROM (SELECT *, row_number() OVER (PARTITION BY k, j ORDER BY t DESC, n) AS rn
    FROM a) WHERE rn = 1 GROUP BY k;

SELECT k, v, rn FROM (SELECT k, v, row_number() OVER (PARTITION BY k ORDER BY v DESC NULLS LAST) AS rn FROM a)
    WHERE rn <= 4;

SELECT k, n, rn FROM (SELECT k, n, row_number() OVER (PARTITION BY k ORDER BY v NULLS FIRST, n DESC) AS rn
    FROM (SELECT * FROM a UNION ALL SELECT * FROM b) WHERE j <> 1) WHERE rn <= 2;

SELECT label, n, rn FROM (SELECT label, n, row_number() OVER (PARTITION BY label ORDER BY x, n) AS rn FROM a
    JOIN dim ON a.j = dim.j) WHERE rn <= 2;

SELECT k, n FROM a QUALIFY row_number() OVER (PARTITION BY k ORDER BY t, n) = 1;

SELECT u, i, n FROM (SELECT n, row_number() OVER (PARTITION BY upper(k), j + 1 ORDER BY abs(v) DESC NULLS LAST, n)
    AS rn, upper(k) AS u, j + 1 AS i FROM a) WHERE rn = 1;

(SELECT j, k FROM a WHERE v > 900) INTERSECT (SELECT j, k FROM b WHERE v > 700);

(SELECT s FROM a WHERE v > 0) EXCEPT (SELECT s FROM b WHERE v > 0) EXCEPT (SELECT 's1' AS s FROM b);

SELECT count(*) AS c FROM ((SELECT s FROM a WHERE v > 0) EXCEPT (SELECT s FROM b WHERE v > 500));
