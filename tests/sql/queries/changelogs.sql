-- GROUP BY without a window, and DISTINCT: changelogs.

SELECT k, count(*) AS c FROM a GROUP BY k;

SELECT j, k, sum(v) AS total, min(x) AS low, max(s) AS last FROM a WHERE v > -500 GROUP BY j, k;

SELECT count(*) AS c, avg(v) AS mean FROM a;

SELECT k, count(*) AS c FROM a GROUP BY k HAVING count(*) > 70;

SELECT k AS who, sum(v) * 2 AS twice FROM a GROUP BY k;

SELECT n % 5 AS m, count(DISTINCT s) AS different FROM a GROUP BY n % 5;

SELECT DISTINCT k FROM a;

SELECT DISTINCT k, j FROM a WHERE v > 0;

SELECT DISTINCT n % 3 AS m FROM a;

SELECT k FROM a UNION SELECT k FROM b;

SELECT c, count(*) AS keys FROM (SELECT s, count(*) AS c FROM a GROUP BY s) GROUP BY c;

SELECT sum(total) AS whole FROM (SELECT k, sum(n) AS total FROM a GROUP BY k);

SELECT date_trunc('minute', t) AS m, count(*) AS c FROM a GROUP BY 1;

SELECT k, sum(n) FILTER (WHERE j = 1) AS ones, count(*) FILTER (WHERE v IS NULL) AS nulls FROM a GROUP BY k;
