"""What cannot run as a stream is refused when it is planned, with the part named and what to write instead."""

from __future__ import annotations

import pytest

from operators import SchemaError, StreamContext, UnsupportedQueryError
from statebackend import UnsupportedAggregateError
from tests.sql.running import context

REFUSED = {
    "SELECT n FROM a ORDER BY n": ("ORDER BY", "row_number"),
    "SELECT n FROM a LIMIT 3": ("LIMIT", "row_number"),
    "SELECT n FROM a OFFSET 3": ("LIMIT or OFFSET", "row_number"),
    "SELECT n FROM public.a": ("public.a", "write a"),
    "SELECT table_name FROM information_schema.tables": ("information_schema.tables", "no schema"),
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
    "SELECT unnest([n, 1]) AS m, unnest([2]) AS o FROM a": ("several lists", "one list"),
    "SELECT unnest(unnest([[n]])) AS m FROM a": ("lists in lists", "one list"),
    "SELECT unnest(struct(n, v)) FROM a": ("struct", "one list"),
    "SELECT n FROM a WHERE k IN (SELECT k FROM b)": ("<subquery>", "SEMI JOIN"),
    "SELECT n FROM a WHERE n = ANY (SELECT n FROM b)": ("<subquery>", "SEMI JOIN"),
    "SELECT n, (SELECT count(*) FROM b WHERE b.k = a.k) AS c FROM a": ("<subquery>", "join"),
    "SELECT k, count(*) AS c FROM a GROUP BY k HAVING count(*) > (SELECT count(*) FROM b)": ("<subquery>", "join"),
    "SELECT a.n FROM a JOIN b ON a.n = b.n AND a.v = (SELECT max(v) FROM b)": ("<subquery>", "join"),
    "SELECT n, (SELECT max(n) FROM b) AS m FROM a": ("<subquery>", "join"),
    "SELECT n FROM a WHERE EXISTS (SELECT 1 FROM b WHERE b.k = a.k)": ("EXISTS", "join"),
    "SELECT q.m FROM a, LATERAL (SELECT a.n + 1 AS m) AS q": ("LATERAL", "newest row"),
    "SELECT DISTINCT ON (k) k, n FROM a": ("DISTINCT ON", "row_number"),
    "SELECT s FROM a INTERSECT ALL SELECT s FROM b": ("INTERSECT ALL", "INTERSECT"),
    "SELECT s FROM a EXCEPT ALL SELECT s FROM b": ("EXCEPT ALL", "EXCEPT"),
    "SELECT j FROM a EXCEPT SELECT j FROM dim": ("over the table dim", "join"),
    "(SELECT s FROM a EXCEPT SELECT s FROM b) INTERSECT SELECT s FROM b": ("corrected", "window"),
    "SELECT k, v FROM a RIGHT JOIN (SELECT k, t AS u, n AS m FROM b) AS q USING (k)": ("USING", "coalesce"),
    "SELECT k FROM (SELECT k, n FROM a) AS p NATURAL FULL JOIN (SELECT k, n FROM b) AS q": ("NATURAL", "coalesce"),
    "SELECT n FROM a WHERE (v > 0) IS NOT DISTINCT FROM (x > 0) AND j = 1": ("IS DISTINCT FROM", "parentheses"),
    "SELECT n FROM a WHERE (v > 0) IS DISTINCT FROM (x > 0) OR j = 1": ("IS DISTINCT FROM", "parentheses"),
    "SELECT c FROM (SELECT count(*) AS c FROM a GROUP BY k) WHERE c > 3": ("without k", "select it too"),
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
    "SELECT k, CAST(row_number() OVER (PARTITION BY k ORDER BY n) AS INT) AS r FROM a": ("row_number", "rn <= n"),
    "SELECT tumble(t, INTERVAL '5 s') AS w FROM a": ("tumble", "GROUP BY"),
    "SELECT n FROM a WHERE tumble(t, INTERVAL '5 s') > TIMESTAMP '1970-01-01'": ("tumble", "GROUP BY"),
    "SELECT count(*) FROM a GROUP BY tumble(t, INTERVAL '5 s'), hop(t, INTERVAL '1 s', INTERVAL '2 s')": (
        "two windows",
        "twice",
    ),
    "SELECT count(*) FROM a GROUP BY tumble(t, INTERVAL '1 month')": ("INTERVAL '1 months'", "days"),
    "SELECT count(*) FROM a GROUP BY hop(t, INTERVAL '1 month', INTERVAL '2 months')": ("hop", "days"),
    "SELECT count(*) FROM a GROUP BY tumble(t, INTERVAL '5 s' + INTERVAL '1 s')": ("INTERVAL '1 seconds'", "constant"),
    "SELECT count(*) FROM a GROUP BY tumble(t, NULL)": ("tumble", "constant"),
    "SELECT tumble(w, INTERVAL '5 s') AS x FROM (SELECT k, max(t) AS w FROM a GROUP BY k) GROUP BY 1": (
        "tumble",
        "event time",
    ),
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
    **{
        f"SELECT n FROM (SELECT n, row_number() OVER (PARTITION BY {window} ORDER BY n) AS rn FROM a) WHERE rn <= 2": (
            part,
            instead,
        )
        for window, part, instead in (
            ("hop(t, INTERVAL '1 s', INTERVAL '2 s')", "PARTITION BY hop", "tumble()"),
            ("tumble(t + INTERVAL '1 s', INTERVAL '2 s')", "PARTITION BY tumble", "event time"),
            ("tumble(t, INTERVAL '2 s'), date_bin(INTERVAL '1 s', t)", "two windows", "within one"),
            ("tumble(t, INTERVAL '1 month')", "tumble", "days"),
        )
    },
    "SELECT rn, w FROM (SELECT tumble(t, INTERVAL '2 s') + INTERVAL '1 s' AS w, "
    "row_number() OVER (PARTITION BY tumble(t, INTERVAL '2 s') ORDER BY n) AS rn FROM a) WHERE rn = 1": (
        "tumble",
        "BY",
    ),
    **{
        f"SELECT a.n FROM a JOIN b ON a.k = b.k AND {one} = {other}": (part, instead)
        for one, other, part, instead in (
            ("tumble(a.t, INTERVAL '1 s')", "tumble(b.t, INTERVAL '2 s')", "tumble", "the same"),
            ("tumble(a.t, INTERVAL '1 s')", "hop(b.t, INTERVAL '1 s', INTERVAL '1 s')", "hop", "the same"),
            ("session(a.t, INTERVAL '1 s')", "session(b.t, INTERVAL '1 s')", "session", "tumble() or hop()"),
            ("tumble(a.t, INTERVAL '1 s')", "tumble(a.t, INTERVAL '1 s')", "tumble", "both event times"),
            (
                "tumble(a.t, INTERVAL '1 s')",
                "tumble(b.t + INTERVAL '1 s', INTERVAL '1 s')",
                "tumble",
                "both event times",
            ),
            ("tumble(a.t, INTERVAL '1 s')", "b.t", "tumble", "GROUP BY"),
        )
    },
    **{
        f"SELECT {columns} FROM (SELECT cumulate(t, INTERVAL '1 s', INTERVAL '4 s') AS w, window_end_time() AS e, "
        f"count(*) AS c FROM a GROUP BY 1) AS q GROUP BY {groups}": ("cumulate", "window_end_time()")
        for columns, groups in (
            ("tumble(w, INTERVAL '4 s') AS x, q.w AS y, max(c) AS m", "1, 2"),
            ("w, max(c) AS m", "w"),
            ("w, e, c", "w, e, c"),
        )
    },
    "SELECT window_end_time() AS e, k FROM a GROUP BY k": ("without a window", "tumble"),
    "SELECT n, now() AS at FROM a": ("now()", "event"),
    "SELECT n FROM a WHERE random() < 0.5": ("random()", "event"),
    "SELECT k, max(now()) AS at FROM a GROUP BY k": ("now()", "event"),
    "SELECT uuid() AS id FROM a": ("uuid()", "event"),
    "SELECT rand() AS r, n FROM a": ("random()", "event"),
    "SELECT current_date AS d, n FROM a": ("current_date()", "event"),
    "SELECT input_file_name() AS f, n FROM a": ("input_file_name()", "event"),
    "SELECT DISTINCT random() AS r FROM a": ("random()", "event"),
    "SELECT k, sum(n) AS s FROM a GROUP BY k, random()": ("random()", "event"),
    "SELECT a.n FROM a JOIN b ON a.k = b.k AND random() < 0.5": ("random()", "event"),
    "SELECT k, row_number() OVER (PARTITION BY k ORDER BY random()) AS rn FROM a": ("random()", "event"),
    "SELECT tumble(t, INTERVAL '5 s') AS w, now() AS at FROM a GROUP BY 1": ("now()", "event"),
    "SELECT a.n FROM a CROSS JOIN b": ("without a condition", "ON"),
    "SELECT a.n, label FROM a RIGHT JOIN dim ON a.j = dim.j": ("Right join", "LEFT"),
    "SELECT a.n, label FROM dim LEFT JOIN a ON a.j = dim.j": ("Right join", "LEFT"),
    "SELECT a.n, label FROM a JOIN dim ON a.j > dim.j": ("table dim", "equality"),
    "SELECT a.n, label FROM a LEFT JOIN dim ON a.j = dim.j AND dim.label <> 'one'": ("LEFT JOIN", "subquery"),
    "SELECT a.n FROM a LEFT SEMI JOIN dim ON a.j = dim.j AND dim.label <> 'one'": ("LEFT SEMI JOIN", "subquery"),
    "SELECT dim.label FROM dim LEFT SEMI JOIN a ON a.j = dim.j": ("RightSemi join", "LEFT"),
    "SELECT dim.label FROM dim LEFT ANTI JOIN a ON a.j = dim.j": ("RightAnti join", "LEFT"),
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

DOCUMENTED = {
    # Flink: over aggregation (queries/over-agg.md)
    """SELECT order_id, SUM(amount) OVER (PARTITION BY product_id ORDER BY order_time RANGE BETWEEN INTERVAL '1' HOUR
       PRECEDING AND CURRENT ROW) AS total FROM orders""": ("window function sum", "GROUP BY"),
    """SELECT order_id, AVG(amount) OVER w AS mean FROM orders WINDOW w AS (PARTITION BY product_id ORDER BY order_time
       ROWS BETWEEN 10 PRECEDING AND CURRENT ROW)""": ("window function avg", "GROUP BY"),
    # Flink: ORDER BY (queries/orderby.md), VALUES (queries/select.md)
    "SELECT * FROM orders ORDER BY order_time, order_id": ("ORDER BY", "row_number"),
    "SELECT order_id, price FROM (VALUES (1, 2.0), (2, 3.1)) AS t (order_id, price)": ("VALUES", "table"),
    # Flink: group aggregation that does not select its group (queries/group-agg.md)
    "SELECT COUNT(*) AS c FROM orders GROUP BY order_id": ("without order_id", "select it too"),
    "SELECT SUM(amount) AS s FROM orders GROUP BY users HAVING SUM(amount) > 50": ("without users", "select it too"),
    # Flink: no ranking output optimization (queries/topn.md)
    """SELECT supplier_id, item, price FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY supplier_id ORDER BY price DESC)
       AS rn FROM bid) WHERE rn <= 5""": ("without row_number", "select it too"),
    # Flink: IN and EXISTS (queries/set-ops.md), semi and anti window joins with them (queries/window-join.md)
    "SELECT users, amount FROM orders WHERE product_id IN (SELECT id FROM product)": ("IN (<subquery>)", "SEMI JOIN"),
    """SELECT * FROM orders AS l WHERE l.product_id NOT IN (SELECT product_id FROM orders AS r WHERE l.users = r.users)
    """: ("NOT IN (<subquery>)", "ANTI JOIN"),
    "SELECT users FROM orders o WHERE NOT EXISTS (SELECT 1 FROM shipments s WHERE s.order_id = o.order_id)": (
        "NOT EXISTS (<subquery>)",
        "ANTI JOIN",
    ),
    # Flink: outer joins (queries/joins.md) of a table, and array expansion
    "SELECT o.order_id, p.name FROM orders AS o RIGHT JOIN product AS p ON o.product_id = p.id": ("Right join", "LEFT"),
    "SELECT order_id, tag FROM (SELECT order_id, [1] AS tags FROM orders) CROSS JOIN UNNEST(tags) AS t (tag)": (
        "LATERAL",
        "unnest(list)",
    ),
    # Arroyo: windows without their event time (docs, SQL)
    "SELECT count(*) AS c FROM cars GROUP BY date_bin(INTERVAL '1 hour', time, TIMESTAMP '1970-01-01 00:30:00')": (
        "date_bin",
        "origin",
    ),
}
REFUSED.update(DOCUMENTED)

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
    "SELECT a.n FROM a JOIN b ON a.k = b.k AND b.t > a.t AND b.t < a.t + INTERVAL '1 month'": "months have no fixed",
    "SELECT a.n FROM a LEFT JOIN b ON a.k = b.k AND b.t > a.t": "left",
    "SELECT a.n, b.n AS m FROM a FULL JOIN b ON a.k = b.k AND b.t > a.t": "full",
    "SELECT k, count(*) AS c FROM a GROUP BY k UNION ALL SELECT k, count(*) FROM b GROUP BY k": "changelog",
    "SELECT k, unnest(l) AS m FROM (SELECT k, array_agg(n) AS l FROM a GROUP BY k)": "changelog",
    """SELECT k FROM (SELECT *, row_number() OVER (ORDER BY c) AS rn FROM (SELECT k, count(*) AS c FROM a GROUP BY k))
       WHERE rn <= 3""": "changelog",
    "SELECT n, t FROM a UNION ALL SELECT count(*), tumble(t, INTERVAL '5 s') FROM a GROUP BY 2": "timestamp",
    "SELECT n, t FROM a UNION ALL SELECT n, t + INTERVAL '1 s' FROM b": "event time",
    "SELECT count(*) AS c FROM a GROUP BY cumulate(t, INTERVAL '2 s', INTERVAL '5 s')": "multiple",
    "SELECT k AS op, count(*) AS c FROM a GROUP BY k": "'op'",
    "SELECT * FROM TABLE(TUMBLE(TABLE bid, DESCRIPTOR(bidtime), INTERVAL '10' MINUTES))": "sql:",  # Flink
    # Flink: temporal joins (queries/joins.md)
    "SELECT o.users FROM orders AS o JOIN product FOR SYSTEM_TIME AS OF o.order_time AS r ON product_id = id": "sql:",
    "SELECT tumble_start(bidtime, INTERVAL '10' MINUTE) AS b FROM bid GROUP BY 1": "'tumble'",  # Flink
    "SELECT tumble(INTERVAL '1 minute') AS w, count(*) AS c FROM bid GROUP BY w": "tumble",  # Arroyo
}


@pytest.fixture(scope="module")
def job() -> StreamContext:
    """One job for all: a query that is refused leaves nothing in it."""
    return context()


@pytest.mark.parametrize("query", REFUSED)
def test_a_part_without_a_meaning_is_named_with_what_to_write(query: str, job: StreamContext) -> None:
    part, instead = REFUSED[query]
    with pytest.raises(UnsupportedQueryError) as caught:
        job.sql(query, name=query)
    assert part in caught.value.part
    assert instead in caught.value.instead


@pytest.mark.parametrize("query", WRONG)
def test_what_does_not_fit_is_a_schema_error(query: str, job: StreamContext) -> None:
    with pytest.raises(SchemaError) as caught:
        job.sql(query, name=query)
    assert WRONG[query] in str(caught.value)


@pytest.mark.parametrize("call", ["max(c)", "count(DISTINCT c)", "array_agg(c)", "stddev(c)"])
def test_an_aggregate_that_cannot_take_rows_back_is_refused(call: str, job: StreamContext) -> None:
    with pytest.raises(UnsupportedAggregateError, match=call[:3]):
        job.sql(f"SELECT {call} AS m FROM (SELECT k, count(*) AS c FROM a GROUP BY k)", name=call)


def test_words_in_quotes_and_comments_are_no_clauses(job: StreamContext) -> None:
    job.sql("SELECT n AS \"tablesample\" FROM a WHERE k <> 'with rollup' -- prewhere\n /* connect by */")
