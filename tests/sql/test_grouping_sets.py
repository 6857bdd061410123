"""GROUPING SETS, ROLLUP and CUBE say over streams that crash what they say in batch."""

from __future__ import annotations

import pytest

from operators import UnsupportedQueryError
from tests.sql.running import answered, as_rows, context, streamed

_WINDOW = "tumble(t, INTERVAL '5 s')"

CORPUS = [
    (
        "SELECT k, j, sum(v) AS s, grouping(k, j) AS g, grouping(j) AS h FROM a GROUP BY ROLLUP (k, j)",
        None,
    ),
    ("SELECT k, j, count(*) AS c, max(k) AS m, grouping(k, j) AS g FROM a GROUP BY CUBE (k, j)", None),
    (
        "SELECT k, j, sum(v) AS s, grouping(j, k) AS h, grouping(k, j) AS g FROM a GROUP BY GROUPING SETS ((k), (j))",
        None,
    ),
    ("SELECT k, n % 3 AS m, count(*) AS c, grouping(k, n % 3) AS g FROM a GROUP BY k, ROLLUP (n % 3)", None),
    ("SELECT k, count(*) AS c, grouping(k) AS g FROM a GROUP BY ROLLUP (k) HAVING count(*) > 70", None),
    ("SELECT k, count(*) AS c, grouping(k) AS g FROM a GROUP BY GROUPING SETS ((k))", None),
    (
        f"SELECT {_WINDOW} AS w, k, j, count(*) AS c, grouping(k) AS g FROM a GROUP BY {_WINDOW}, ROLLUP (k, j)",
        "SELECT win(t, 5) AS w, k, j, count(*) AS c, grouping(k) AS g FROM a GROUP BY win(t, 5), ROLLUP (k, j)",
    ),
    (
        f"""SELECT window_start_time() AS w, upper(k) AS u, n % 3 AS m, count(DISTINCT s) AS c FROM a
            GROUP BY GROUPING SETS (({_WINDOW}, upper(k)), (n % 3, {_WINDOW}), ({_WINDOW}))""",
        """SELECT win(t, 5) AS w, upper(k) AS u, n % 3 AS m, count(DISTINCT s) AS c FROM a
           GROUP BY GROUPING SETS ((win(t, 5), upper(k)), (n % 3, win(t, 5)), (win(t, 5)))""",
    ),
]


@pytest.mark.parametrize(("query", "reference"), CORPUS)
def test_every_set_has_its_groups(query: str, reference: str | None) -> None:
    found, wanted = streamed(query, crashes=2), answered(reference or query)
    assert [name for name in found.column_names if name != "op"] == wanted.column_names
    assert wanted.num_rows > 0
    assert as_rows(found) == as_rows(wanted)


def test_one_operator_keeps_the_state_of_all_sets() -> None:
    job = context()
    text = job.sql(f"SELECT k, j, count(*) AS c FROM a GROUP BY {_WINDOW}, CUBE (k, j)").explain()
    assert text.count("| state") == 1
    assert "union" in text


@pytest.mark.parametrize(
    ("query", "part", "instead"),
    [
        ("SELECT k, count(*) AS c FROM a GROUP BY GROUPING SETS ((k), (k))", "a set twice", "leave one out"),
        (f"SELECT k, count(*) AS c FROM a GROUP BY ROLLUP ({_WINDOW}, k)", "in some of the GROUPING SETS", "ROLLUP"),
        (f"SELECT grouping({_WINDOW}) AS g FROM a GROUP BY {_WINDOW}, ROLLUP (k)", "grouping", "leave it out"),
        ("SELECT k, j, count(*) AS c FROM a GROUP BY ROLLUP (k, j)", r"without grouping\(k, j\)", "select it too"),
        (
            "SELECT c, count(*) AS d FROM (SELECT k, count(*) AS c FROM a GROUP BY k) GROUP BY ROLLUP (c)",
            "rows that are corrected",
            "one query per set",
        ),
        (
            f"SELECT count(*) AS c FROM a GROUP BY CUBE ({', '.join(f'n % {i}' for i in range(1, 14))})",
            "CUBE of 13 groups",
            "GROUPING SETS",
        ),
    ],
)
def test_what_a_stream_cannot_say_is_refused(query: str, part: str, instead: str) -> None:
    with pytest.raises(UnsupportedQueryError, match=f"{part}.*{instead}"):
        context().sql(query)
