"""Queries over two streams and a table, and the same questions in DuckDB's words (None: in the same words)."""

from __future__ import annotations

__all__ = ["CHANGELOGS", "EXPRESSIONS", "JOINS", "RANKINGS", "SHAPES", "WINDOWS"]

Corpus = list[tuple[str, str | None]]

_SCALARS = [
    "n, k, v",
    "n + 1 AS m, v * 2 - n AS w",
    "n % 7 AS m, -v AS w, abs(v) AS y",
    "v / 2.0 AS half, x * x AS square",
    "CASE WHEN v > 0 THEN 'up' WHEN v < 0 THEN 'down' ELSE 'none' END AS way",
    "CASE j WHEN 0 THEN 'no' WHEN 1 THEN 'one' END AS word",
    "CAST(n AS VARCHAR) AS text, CAST(j AS BIGINT) AS big",
    "TRY_CAST(s AS INT) AS number, n",
    "coalesce(k, 'nobody') AS who, nullif(j, 1) AS other",
    "upper(s) AS loud, lower(k) AS quiet, length(s) AS size",
    "k || '-' || s AS pair",
    "substr(s, 2, 3) AS part, replace(s, '1', 'x') AS changed",
    "split_part(s, '1', 1) AS head, strpos(s, '2') AS place",
    "greatest(n, 100) AS high, least(n, 100) AS low",
    "n - (v - n) AS m, n - v - n AS w, n / 3.0 * 2 AS y",
    "date_trunc('second', t) AS second, t",
    "t + INTERVAL '90 seconds' AS later, t - INTERVAL '1 day' AS earlier",
    "extract(hour FROM t) AS hour, extract(minute FROM t) AS minute",
    "k IS NULL AS none, v IS NOT NULL AS some, (v > 0) IS TRUE AS up, (v > 0) IS NOT FALSE AS maybe",
    'n AS "Odd Name", j AS "select"',
    "round(x, 2) AS y, floor(x) AS z, power(j, 2) AS p",
    "a.n, a.k",
]

_PREDICATES = [
    "v > 0",
    "v > 0 AND j = 1 OR k IS NULL",
    "NOT (v > 0)",
    "v BETWEEN -100 AND 100",
    "v NOT BETWEEN -100 AND 100",
    "k IN ('a', 'b')",
    "k NOT IN ('a', 'b')",
    "s LIKE 's1%'",
    "s NOT LIKE 's1%'",
    "k ILIKE 'A'",
    "(v IS DISTINCT FROM 3) AND (k IS NOT DISTINCT FROM NULL)",
    "t >= TIMESTAMP '1970-01-01 00:00:05'",
    "t < TIMESTAMP '1970-01-01 00:00:05' - INTERVAL '3 seconds'",
    "CASE WHEN j = 2 THEN v > 0 ELSE n % 2 = 0 END",
    "length(s) = 2 AND abs(v) > 500",
    "true",
    "n = 3 AND n = 4",
]

EXPRESSIONS: Corpus = [
    *((f"SELECT {scalars} FROM a ", None) for scalars in _SCALARS),
    *((f"SELECT n FROM a WHERE {predicate}", None) for predicate in _PREDICATES),
]

SHAPES: Corpus = [
    (query, None)
    for query in (
        "SELECT * FROM a ",
        "SELECT m FROM (SELECT n * 2 AS m, v FROM a WHERE v > 0) WHERE m > 100",
        "SELECT q.m, q.m + 1 AS o FROM (SELECT n AS m FROM a ) AS q",
        "SELECT y FROM (SELECT n, k FROM a ) AS q(x, y)",
        "WITH big AS (SELECT n, v FROM a WHERE v > 500) SELECT n FROM big WHERE n % 2 = 0",
        "WITH one AS (SELECT n, v FROM a ), two(m, w) AS (SELECT n + 1, v FROM one) SELECT m, w FROM two WHERE w > 0",
        "SELECT n, k FROM a UNION ALL SELECT n, k FROM b ",
        "SELECT n AS m FROM a WHERE v > 0 UNION ALL SELECT n + 1000 FROM b UNION ALL SELECT -n FROM a WHERE v < 0",
        "SELECT m, count(*) AS c FROM (SELECT j AS m FROM a UNION ALL SELECT j FROM b ) AS u GROUP BY m",
        "SELECT n, v FROM (SELECT * FROM a WHERE j = 1) UNION ALL (SELECT n, v FROM b WHERE j = 2)",
        "SELECT x.n FROM a AS x WHERE x.k = 'a'",
    )
]

_AGGREGATES = """count(*) AS c, count(v) AS cv, sum(v) AS total, min(v) AS low, max(v) AS high, avg(x) AS mean,
    count(DISTINCT s) AS different, sum(v) FILTER (WHERE v > 0) AS gains, stddev(x) AS spread,
    bool_or(v > 900) AS any"""

WINDOWS: Corpus = [
    (
        f"SELECT tumble(t, INTERVAL '5 s') AS w, k, {_AGGREGATES} FROM a GROUP BY tumble(t, INTERVAL '5 s'), k",
        f"SELECT win(t, 5) AS w, k, {_AGGREGATES} FROM a GROUP BY 1, 2",
    ),
    (
        """SELECT window_start_time() AS b, window_end_time() AS e, count(*) AS c FROM a
           GROUP BY tumble(t, INTERVAL '5 s')""",
        "SELECT win(t, 5) AS b, win(t, 5) + INTERVAL '5 s' AS e, count(*) AS c FROM a GROUP BY win(t, 5)",
    ),
    (
        "SELECT date_bin(INTERVAL '7 seconds', t) AS w, sum(v) AS total FROM a GROUP BY w",
        "SELECT win(t, 7) AS w, sum(v) AS total FROM a GROUP BY w",
    ),
    (
        """SELECT hop(t, INTERVAL '2 seconds', INTERVAL '6 seconds') AS w, j, count(*) AS c, max(s) AS last FROM a
           GROUP BY 1, 2""",
        """SELECT win(t, 2) - d * INTERVAL '2 seconds' AS w, j, count(*) AS c, max(s) AS last
           FROM a, range(3) AS g(d) GROUP BY 1, 2""",
    ),
    (
        """SELECT window_start_time() AS b, window_end_time() AS e, sum(v) AS total FROM a
           GROUP BY cumulate(t, INTERVAL '2 seconds', INTERVAL '6 seconds')""",
        """SELECT win(t, 6) AS b, e, sum(v) AS total FROM (SELECT *, win(t, 6) + d * INTERVAL '2 seconds' AS e
           FROM a, range(1, 4) AS g(d)) WHERE t < e GROUP BY 1, 2""",
    ),
    (
        """SELECT k, window_start_time() AS b, window_end_time() AS e, count(*) AS c FROM a
           GROUP BY session(t, INTERVAL '700 milliseconds'), k""",
        """WITH marked AS (SELECT *, coalesce(t - lag(t) OVER (PARTITION BY k ORDER BY t) > INTERVAL '700 milliseconds',
               true) AS first FROM a),
           numbered AS (SELECT *, sum(first::INT) OVER (PARTITION BY k ORDER BY t) AS id FROM marked)
           SELECT k, min(t) AS b, max(t) + INTERVAL '700 milliseconds' AS e, count(*) AS c FROM numbered
           GROUP BY k, id""",
    ),
    (
        """SELECT tumble(t, INTERVAL '5 s') AS w, k FROM a WHERE v > 0 GROUP BY 1, 2
           HAVING count(*) > 2 AND sum(v) > 500""",
        "SELECT win(t, 5) AS w, k FROM a WHERE v > 0 GROUP BY 1, 2 HAVING count(*) > 2 AND sum(v) > 500",
    ),
    (
        """SELECT tumble(t, INTERVAL '5 s') AS w, upper(k) AS u, sum(v * 2) + 1 AS total, sum(v) / count(v) AS mean
           FROM a GROUP BY 1, upper(k)""",
        """SELECT win(t, 5) AS w, upper(k) AS u, sum(v * 2) + 1 AS total, sum(v) // count(v) AS mean
           FROM a GROUP BY 1, 2""",
    ),
    (
        "SELECT tumble(t, INTERVAL '5 s') AS w, array_agg(n ORDER BY v DESC NULLS LAST, n) AS list FROM a GROUP BY 1",
        "SELECT win(t, 5) AS w, array_agg(n ORDER BY v DESC NULLS LAST, n) AS list FROM a GROUP BY 1",
    ),
    (
        """SELECT tumble(t, INTERVAL '5 s') AS w, first_value(n ORDER BY n) AS f, last_value(n ORDER BY n) AS l
           FROM a GROUP BY 1""",
        "SELECT win(t, 5) AS w, first(n ORDER BY n) AS f, last(n ORDER BY n) AS l FROM a GROUP BY 1",
    ),
    (
        "SELECT tumble(t, INTERVAL '5 s') AS w, k FROM a GROUP BY 1, 2",
        "SELECT DISTINCT win(t, 5) AS w, k FROM a ",
    ),
    (
        """SELECT tumble(w, INTERVAL '10 seconds') AS ww, sum(c) AS total, max(c) AS most FROM
           (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a GROUP BY 1, 2) GROUP BY 1""",
        """SELECT win(w, 10) AS ww, sum(c) AS total, max(c) AS most FROM
           (SELECT win(t, 5) AS w, k, count(*) AS c FROM a GROUP BY 1, 2) GROUP BY 1""",
    ),
    (
        """SELECT tumble(t, INTERVAL '5 s') AS w, count(*) AS c FROM (SELECT t FROM a UNION ALL SELECT t FROM b ) AS u
           GROUP BY 1""",
        "SELECT win(t, 5) AS w, count(*) AS c FROM (SELECT t FROM a UNION ALL SELECT t FROM b ) AS u GROUP BY 1",
    ),
    (
        "SELECT count(*) AS c FROM a GROUP BY k, tumble(t, INTERVAL '5 s')",
        "SELECT count(*) AS c FROM a GROUP BY k, win(t, 5)",
    ),
]

CHANGELOGS: Corpus = [
    (query, None)
    for query in (
        "SELECT k, count(*) AS c FROM a GROUP BY k",
        "SELECT j, k, sum(v) AS total, min(x) AS low, max(s) AS last FROM a WHERE v > -500 GROUP BY j, k",
        "SELECT count(*) AS c, avg(v) AS mean FROM a ",
        "SELECT k, count(*) AS c FROM a GROUP BY k HAVING count(*) > 70",
        "SELECT k AS who, sum(v) * 2 AS twice FROM a GROUP BY k",
        "SELECT n % 5 AS m, count(DISTINCT s) AS different FROM a GROUP BY n % 5",
        "SELECT DISTINCT k FROM a ",
        "SELECT DISTINCT k, j FROM a WHERE v > 0",
        "SELECT DISTINCT n % 3 AS m FROM a ",
        "SELECT k FROM a UNION SELECT k FROM b ",
        "SELECT c, count(*) AS keys FROM (SELECT s, count(*) AS c FROM a GROUP BY s) GROUP BY c",
        "SELECT sum(total) AS whole FROM (SELECT k, sum(n) AS total FROM a GROUP BY k)",
        "SELECT date_trunc('minute', t) AS m, count(*) AS c FROM a GROUP BY 1",
        "SELECT k, sum(n) FILTER (WHERE j = 1) AS ones, count(*) FILTER (WHERE v IS NULL) AS nulls FROM a GROUP BY k",
    )
]

_NEAR = "b.t BETWEEN a.t - INTERVAL '1 second' AND a.t + INTERVAL '500 milliseconds'"

JOINS: Corpus = [
    *(
        (query, None)
        for query in (
            f"SELECT a.n, b.n AS m FROM a JOIN b ON a.k = b.k AND {_NEAR}",
            f"SELECT a.n, b.n AS m, a.v + b.v AS w FROM a , b WHERE a.k = b.k AND {_NEAR} AND a.v > b.v",
            f"SELECT a.n, b.n AS m FROM a LEFT JOIN b ON a.k = b.k AND a.j = b.j AND {_NEAR}",
            f"SELECT a.n, b.n AS m FROM a RIGHT JOIN b ON a.k = b.k AND a.j = b.j AND {_NEAR}",
            f"SELECT a.n, b.n AS m FROM a FULL JOIN b ON a.k = b.k AND a.j = b.j AND {_NEAR}",
            f"SELECT a.n, b.n AS m FROM a LEFT JOIN b ON a.k = b.k AND {_NEAR} WHERE b.n IS NULL",
            "SELECT x.n, y.n AS m FROM a AS x JOIN a AS y ON x.k = y.k AND x.t > y.t AND x.t < y.t + INTERVAL '1 s'",
            "SELECT a.n, b.n AS m FROM a JOIN b ON a.s = b.s AND a.k = b.k",
            f"SELECT a.n, b.n AS m FROM a JOIN b ON a.n % 5 = b.n % 7 AND upper(b.k) = upper(a.k) AND {_NEAR}",
            f"SELECT a.n, b.n AS m FROM a LEFT JOIN b ON a.n % 5 = b.n AND a.n + b.n > 3 AND {_NEAR}",
            "SELECT a.n, b.n AS m FROM a JOIN b ON a.n + b.n = 100 AND a.k = b.k",
            "SELECT a.n, b.n AS m FROM a JOIN b ON a.j = b.j WHERE b.n = 7 AND a.n = b.n",
            "SELECT k, a.n, b.n AS m FROM a JOIN b USING (k, s)",
            "SELECT a.n, label FROM a JOIN dim ON a.j = dim.j",
            "SELECT a.n, d.label FROM a LEFT JOIN dim AS d ON d.j = a.j",
            "SELECT a.n, dim.* FROM dim JOIN a ON a.j = dim.j WHERE dim.label <> 'one' AND a.v > 0",
            "SELECT a.n, d.many FROM a JOIN (SELECT j, count(*) AS many FROM dim GROUP BY j) AS d ON a.j = d.j",
            "SELECT label, count(*) AS c FROM a JOIN dim ON a.j = dim.j GROUP BY label",
            f"""SELECT a.n, b.n AS m, label FROM a JOIN b ON a.k = b.k AND {_NEAR} JOIN dim ON a.j = dim.j""",
        )
    ),
    *(
        (
            f"SELECT a.n FROM a LEFT {kind} JOIN b ON a.k = b.k AND {_NEAR}",
            f"SELECT a.n FROM a {kind} JOIN b ON a.k = b.k AND {_NEAR}",
        )
        for kind in ("SEMI", "ANTI")
    ),
    (
        """SELECT p.w, p.k, p.c, q.c AS d FROM
           (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a GROUP BY 1, 2) AS p JOIN
           (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM b GROUP BY 1, 2) AS q
           ON p.w = q.w AND p.k = q.k""",
        """SELECT p.w, p.k, p.c, q.c AS d FROM (SELECT win(t, 5) AS w, k, count(*) AS c FROM a GROUP BY 1, 2) AS p JOIN
           (SELECT win(t, 5) AS w, k, count(*) AS c FROM b GROUP BY 1, 2) AS q ON p.w = q.w AND p.k = q.k""",
    ),
    (
        f"""SELECT tumble(t, INTERVAL '5 s') AS w, count(*) AS c FROM
            (SELECT a.t FROM a JOIN b ON a.k = b.k AND {_NEAR}) AS both GROUP BY 1""",
        f"""SELECT win(t, 5) AS w, count(*) AS c FROM
            (SELECT a.t FROM a JOIN b ON a.k = b.k AND {_NEAR}) AS q GROUP BY 1""",
    ),
]

_OVER = "row_number() OVER (PARTITION BY"

RANKINGS: Corpus = [
    *(
        (query, None)
        for query in (
            f"SELECT k, n, v FROM (SELECT *, {_OVER} k ORDER BY t, n) AS rn FROM a ) WHERE rn = 1",
            f"SELECT k, n FROM (SELECT *, {_OVER} k ORDER BY t DESC, n DESC) AS rn FROM a ) WHERE rn = 1",
            f"SELECT k, j, n, rn FROM (SELECT *, {_OVER} k, j ORDER BY t DESC, n) AS rn FROM a ) WHERE rn <= 1",
            f"SELECT k, n, v FROM (SELECT *, {_OVER} k ORDER BY v DESC NULLS LAST, n) AS rn FROM a ) WHERE rn = 1",
            f"SELECT k, n, v, rn FROM (SELECT *, {_OVER} k ORDER BY v DESC NULLS LAST, n) AS rn FROM a ) WHERE rn <= 3",
            f"SELECT k, n, rn FROM (SELECT *, {_OVER} k ORDER BY v NULLS FIRST, n) AS rn FROM a ) WHERE 3 > rn",
            f"SELECT k, n, rn FROM (SELECT *, {_OVER} k ORDER BY n) AS rn FROM a ) AS q WHERE q.rn <= 4 AND n % 2 = 0",
            f"SELECT k, n, rn FROM (SELECT k, n, {_OVER} k ORDER BY abs(v) NULLS LAST, n) AS rn FROM a ) WHERE rn <= 2",
            "SELECT n, v, rn FROM (SELECT *, row_number() OVER (ORDER BY v NULLS LAST, n) AS rn FROM a) WHERE rn <= 5",
            f"SELECT k, n, v FROM a QUALIFY {_OVER} k ORDER BY v DESC NULLS LAST, n) = 1",
            f"SELECT r, m FROM (SELECT n + 1 AS m, {_OVER} n % 4 ORDER BY n) AS rn, n % 4 AS r FROM a) WHERE rn = 1",
        )
    ),
    (
        f"""SELECT w, k, c FROM (SELECT *, {_OVER} w ORDER BY c DESC, k NULLS LAST) AS rn FROM
            (SELECT tumble(t, INTERVAL '5 s') AS w, k, count(*) AS c FROM a GROUP BY 1, 2)) WHERE rn <= 2""",
        f"""SELECT w, k, c FROM (SELECT *, {_OVER} w ORDER BY c DESC, k NULLS LAST) AS rn FROM
            (SELECT win(t, 5) AS w, k, count(*) AS c FROM a GROUP BY 1, 2)) WHERE rn <= 2""",
    ),
]
