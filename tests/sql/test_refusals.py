"""What cannot run as a stream is refused when it is planned, with the part named and what to write instead."""

from __future__ import annotations

import pytest

from operators import SchemaError, UnsupportedQueryError
from statebackend import UnsupportedAggregateError
from tests.sql.running import context

REFUSED = {
    "SELECT n FROM a ORDER BY n": ("ORDER BY", "row_number"),
    "SELECT n FROM a LIMIT 3": ("LIMIT", "row_number"),
    "SELECT n FROM a OFFSET 3": ("LIMIT or OFFSET", "row_number"),
    "SELECT 1 AS one": ("without FROM", "stream"),
    "VALUES (1), (2)": ("VALUES", "table"),
    "SELECT * FROM dim": ("tables alone", "stream"),
    "SELECT j FROM dim UNION ALL SELECT n FROM a": ("over the table dim", "join"),
    "SELECT a.n FROM (dim AS d JOIN dim AS e ON d.j = e.j) JOIN a ON a.j = e.j": ("two tables", "before"),
    "EXPLAIN SELECT n FROM a": ("EXPLAIN", "explain()"),
    "WITH RECURSIVE q AS (SELECT 1 AS m UNION ALL SELECT m + 1 FROM q WHERE m < 3) SELECT * FROM q": (
        "RECURSIVE",
        "own",
    ),
    "SELECT unnest([1, 2]) AS m FROM a": ("UNNEST", "flat_map"),
    "SELECT n FROM a WHERE k IN (SELECT k FROM b)": ("<subquery>", "join"),
    "SELECT n, (SELECT max(n) FROM b) AS m FROM a": ("<subquery>", "join"),
    "SELECT n FROM a WHERE EXISTS (SELECT 1 FROM b WHERE b.k = a.k)": ("EXISTS", "join"),
    "SELECT q.m FROM a, LATERAL (SELECT a.n + 1 AS m) AS q": ("LATERAL", "newest row"),
    "SELECT DISTINCT ON (k) k, n FROM a": ("DISTINCT ON", "row_number"),
    "SELECT DISTINCT c FROM (SELECT k, count(*) AS c FROM a GROUP BY k)": ("without k", "select it too"),
    "SELECT DISTINCT k, c FROM (SELECT k, count(*) AS c FROM a GROUP BY k)": ("DISTINCT", "GROUP BY"),
    "SELECT k FROM a INTERSECT SELECT k FROM b": ("INTERSECT", "join"),
    "SELECT k FROM a EXCEPT SELECT k FROM b": ("EXCEPT", "join"),
    "SELECT count(*) AS c FROM a GROUP BY k": ("without k", "select it too"),
    "SELECT k, sum(v) OVER (PARTITION BY k) AS total FROM a": ("window function", "GROUP BY"),
    "SELECT k, lag(v) OVER (ORDER BY t) AS before FROM a": ("window function", "row_number"),
    "SELECT k, rank() OVER (PARTITION BY k ORDER BY t) AS r FROM a": ("window function", "row_number"),
    "SELECT k, row_number() OVER (PARTITION BY k ORDER BY t) AS rn FROM a": ("without a bound", "rn <= n"),
    "SELECT k FROM (SELECT k, row_number() OVER (PARTITION BY k) AS rn FROM a) WHERE rn = 1": (
        "row_number",
        "ORDER BY",
    ),
    **{
        f"SELECT k FROM (SELECT k, row_number() OVER (PARTITION BY k ORDER BY t) AS rn FROM a) WHERE {bound}": (
            "on a row number",
            "rn <= n",
        )
        for bound in (
            "rn > 3",
            "rn = 2",
            "rn <= 0",
            "rn <= 1.5",
            "rn % 2 = 0",
            "rn = 1 OR k = 'a'",
            "rn BETWEEN 1 AND 3",
        )
    },
    "SELECT k, n FROM (SELECT k, n, row_number() OVER (PARTITION BY k ORDER BY n) AS rn FROM a) WHERE rn <= 3": (
        "without row_number",
        "select it too",
    ),
    "SELECT k, n, rn + 1 AS m FROM (SELECT k, n, row_number() OVER (PARTITION BY k ORDER BY n) + 1 AS rn FROM a)": (
        "row_number",
        "rn <= n",
    ),
    "SELECT tumble(t, INTERVAL '5 s') AS w FROM a": ("tumble", "GROUP BY"),
    "SELECT n FROM a WHERE tumble(t, INTERVAL '5 s') > TIMESTAMP '1970-01-01'": ("tumble", "GROUP BY"),
    "SELECT count(*) FROM a GROUP BY tumble(t, INTERVAL '5 s'), hop(t, INTERVAL '1 s', INTERVAL '2 s')": (
        "two windows",
        "twice",
    ),
    "SELECT count(*) FROM a GROUP BY tumble(t, INTERVAL '1 month')": ("tumble", "days"),
    "SELECT count(*) FROM a GROUP BY tumble(t, INTERVAL '1 microsecond')": ("tumble", "milliseconds"),
    "SELECT count(*) FROM a GROUP BY tumble(t + INTERVAL '1 second', INTERVAL '5 s')": ("tumble", "event time"),
    "SELECT count(*) FROM (SELECT t AS u, t + INTERVAL '1 day' AS t FROM a) GROUP BY tumble(t, INTERVAL '5 s')": (
        "tumble",
        "event time",
    ),
    "SELECT count(*) FROM a GROUP BY date_bin(INTERVAL '5 s', t, TIMESTAMP '1970-01-01 00:00:01')": (
        "date_bin",
        "origin",
    ),
    "SELECT window_end_time() AS e, k FROM a GROUP BY k": ("without a window", "tumble"),
    "SELECT n, now() AS at FROM a": ("now()", "event"),
    "SELECT n FROM a WHERE random() < 0.5": ("random()", "event"),
    "SELECT k, max(now()) AS at FROM a GROUP BY k": ("now()", "event"),
    "SELECT uuid() AS id FROM a": ("uuid()", "event"),
    "SELECT a.n FROM a CROSS JOIN b": ("without a condition", "ON"),
    "SELECT a.n, label FROM a RIGHT JOIN dim ON a.j = dim.j": ("Right join", "LEFT"),
    "SELECT a.n, label FROM dim LEFT JOIN a ON a.j = dim.j": ("Right join", "LEFT"),
    "SELECT a.n, label FROM a JOIN dim ON a.j > dim.j": ("table dim", "equality"),
    "SELECT a.n, label FROM a LEFT JOIN dim ON a.j = dim.j AND dim.label <> 'one'": ("LEFT JOIN", "subquery"),
    "SELECT n FROM a TABLESAMPLE BERNOULLI (10)": ("TABLESAMPLE", "leave it out"),
    "SELECT k, count(*) FROM a GROUP BY k WITH ROLLUP": ("ROLLUP", "leave it out"),
    "SELECT k, count(*) FROM a GROUP BY k WITH TOTALS": ("TOTALS", "leave it out"),
    "SELECT n FROM a PREWHERE v > 0": ("PREWHERE", "leave it out"),
    "SELECT n FROM a PARTITION (p)": ("PARTITION", "leave it out"),
    "SELECT * ILIKE 'n%' FROM a": ("ILIKE", "leave it out"),
    "SELECT n FROM a FOR JSON AUTO": ("FOR JSON", "leave it out"),
    "SELECT r FROM a JOIN (SELECT j, random() AS r FROM dim) AS d ON a.j = d.j": ("random()", "leave it out"),
    "SELECT n FROM a WHERE v > $1": ("$1", "cannot compute"),
    "CREATE VIEW q AS SELECT n FROM a": ("statement", "SELECT"),
    "CREATE TABLE q AS SELECT n FROM a": ("statement", "SELECT"),
    "INSERT INTO a SELECT * FROM a": ("statement", "SELECT"),
    "DROP TABLE a": ("statement", "SELECT"),
    "SET datafusion.execution.batch_size = 1": ("statement", "SELECT"),
}

WRONG = {
    "SELECT m FROM a": "No field named m",
    "SELECT n FROM nowhere": "not found",
    "SELEC n FROM a": "sql:",
    "SELECT n FROM a; SELECT n FROM b": "sql:",
    "SELECT a.n, b.n FROM a JOIN b ON a.k = b.k AND a.t = b.t": "twice",
    "SELECT n FROM a WHERE n + 1": "boolean",
    "SELECT n FROM a UNION ALL SELECT k FROM b": "CAST",
    "SELECT a.n FROM a LEFT JOIN b ON a.k = b.k": "left",
    "SELECT a.n FROM a JOIN b ON a.v > b.v": "equality",
    "SELECT k, count(*) FROM a GROUP BY k, tumble(t, INTERVAL '0 seconds')": "positive",
    "SELECT a.n FROM a JOIN (SELECT k, count(*) AS c FROM b GROUP BY k) AS q ON a.k = q.k": "changelog",
    "SELECT a.n FROM a JOIN b ON a.n = b.k": "is int64",
}


@pytest.mark.parametrize("query", REFUSED)
def test_a_part_without_a_meaning_is_named_with_what_to_write(query: str) -> None:
    part, instead = REFUSED[query]
    with pytest.raises(UnsupportedQueryError) as caught:
        context().sql(query)
    assert part in caught.value.part
    assert instead in caught.value.instead


@pytest.mark.parametrize("query", WRONG)
def test_what_does_not_fit_is_a_schema_error(query: str) -> None:
    with pytest.raises(SchemaError) as caught:
        context().sql(query)
    assert WRONG[query] in str(caught.value)


def test_an_aggregate_that_cannot_take_rows_back_is_refused() -> None:
    with pytest.raises(UnsupportedAggregateError, match="max"):
        context().sql("SELECT max(c) AS m FROM (SELECT k, count(*) AS c FROM a GROUP BY k)")


def test_words_in_quotes_and_comments_are_no_clauses() -> None:
    job = context()
    job.sql("SELECT n AS \"tablesample\" FROM a WHERE k <> 'with rollup' -- prewhere\n /* connect by */")
