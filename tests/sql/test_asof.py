"""LATERAL as the join with versions: what DuckDB says of it in batch, over streams that crash."""

from __future__ import annotations

import pytest

from operators import UnsupportedQueryError
from tests.sql.running import answered, as_rows, context, streamed

_NEWEST = "b.k = a.k AND b.t <= a.t"


def lateral(columns: str = "n", where: str = _NEWEST, order: str = "b.t DESC", limit: str = "LIMIT 1") -> str:
    return f"LATERAL (SELECT {columns} FROM b WHERE {where} ORDER BY {order} {limit}) AS x"


CORPUS = [
    f"SELECT a.n, x.n AS m, x.v FROM a LEFT JOIN {lateral('n, v')} ON true",
    f"SELECT a.n, x.n AS m, x.t AS since FROM a, {lateral('*')}",
    f"SELECT a.n, x.n AS m FROM a CROSS JOIN {lateral()} WHERE x.n > 20",
    f"SELECT a.n, m, u FROM a JOIN {lateral('n + 1 AS m, v, upper(k) AS u')} ON x.v > a.v WHERE a.n % 2 = 0",
    f"SELECT a.n, x.n AS m FROM a LEFT JOIN {lateral(where=f'{_NEWEST} AND a.j = b.j AND b.v > 0')} ON true",
    f"SELECT a.n, coalesce(x.c, 0) AS c FROM a LEFT JOIN {lateral('7 AS c', f'{_NEWEST} AND v IS NOT NULL')} ON true",
    f"""SELECT a.n, x.n AS m FROM a LEFT JOIN
        {lateral(where="b.k = a.k AND b.t BETWEEN a.t - INTERVAL '1 second' AND a.t")} ON true""",
    f"""SELECT a.n, x.n AS m FROM a LEFT JOIN
        {lateral(where="upper(b.k) = a.k AND a.t >= b.t AND b.t >= a.t - INTERVAL '300 milliseconds'")} ON true""",
    """SELECT q.n, y.m FROM a AS q JOIN LATERAL (SELECT z.n * 2 AS m FROM (SELECT * FROM b WHERE v > 0) AS z
       WHERE z.k = q.k AND z.t <= q.t ORDER BY z.t DESC LIMIT 1) AS y ON true""",
    """SELECT q.n, y.n AS m FROM a AS q JOIN LATERAL (SELECT n FROM a AS older WHERE older.k = q.k AND older.v > 0
       AND older.t <= q.t ORDER BY older.t DESC LIMIT 1) AS y ON true""",
]


@pytest.mark.parametrize("query", CORPUS)
def test_each_row_meets_the_version_of_its_time(query: str) -> None:
    found, wanted = streamed(query, crashes=2), answered(query)
    assert found.column_names == wanted.column_names
    assert as_rows(found) == as_rows(wanted)


def test_the_result_has_the_event_time_of_the_rows() -> None:
    stream = context().sql(f"SELECT a.t, x.n FROM a JOIN {lateral()} ON true")
    assert stream.event_time == "t"
    assert "as-of join" in stream.explain()


@pytest.mark.parametrize(
    ("query", "part"),
    [
        (f"SELECT a.n FROM a JOIN {lateral(order='b.t')} ON true", "ORDER BY t DESC"),
        (f"SELECT a.n FROM a JOIN {lateral(order='b.t DESC, n')} ON true", "nothing else"),
        (f"SELECT a.n FROM a JOIN {lateral(order='n DESC')} ON true", "the event time of the versions"),
        (f"SELECT a.n FROM a JOIN {lateral(limit='LIMIT 2')} ON true", "say LIMIT 1"),
        (f"SELECT a.n FROM a JOIN {lateral(limit='LIMIT 1 OFFSET 1')} ON true", "say LIMIT 1"),
        (f"SELECT a.n FROM a JOIN {lateral(limit='')} ON true", "only the newest row of a key"),
        (f"SELECT a.n FROM a JOIN {lateral(where='b.k = a.k')} ON true", "only the newest row of a key"),
        (f"SELECT a.n FROM a JOIN {lateral(where='b.t <= a.t')} ON true", "only the newest row of a key"),
        (f"SELECT a.n FROM a JOIN {lateral(where='b.k = a.k AND b.t < a.t')} ON true", "the condition b.t <"),
        (f"SELECT a.n FROM a JOIN {lateral(where=f'{_NEWEST} AND b.v > a.v')} ON true", "the condition b.v >"),
        (f"SELECT a.n FROM a JOIN {lateral(where=f'{_NEWEST} OR b.v = a.v')} ON true", "the condition"),
        (f"SELECT a.n FROM a JOIN {lateral('n + a.n AS n')} ON true", "a.n"),
        (f"SELECT a.n FROM a LEFT JOIN {lateral()} ON x.n > 3", "ON true"),
        (f"SELECT a.n FROM a JOIN {lateral('max(n) AS n').replace('ORDER BY b.t DESC LIMIT 1', '')} ON true", "newest"),
        ("SELECT a.n FROM a, LATERAL (SELECT j FROM dim WHERE dim.j = a.j ORDER BY j DESC LIMIT 1) AS x", "by its key"),
        ("SELECT a.n FROM a, LATERAL (SELECT n FROM b WHERE b.k = a.k AND b.t <= a.t ORDER BY t DESC LIMIT 1)", "AS x"),
    ],
)
def test_any_other_lateral_is_refused(query: str, part: str) -> None:
    with pytest.raises(UnsupportedQueryError, match=part):
        context().sql(query)
