"""Random queries, as streams, say what DuckDB says in batch, or are refused when they are planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest

from operators.errors import OperatorError
from statebackend import UnsupportedAggregateError
from tests.sql.corpus import Query
from tests.sql.random_queries import random_query
from tests.sql.running import answered, context, differences, streamed_together, survived

_ROWS_MAX = 30_000


def plannable(seeds: Iterable[int]) -> list[Query]:
    """The queries of these seeds that are not refused and give no more rows than is quick to compare."""
    job = context()
    found, refused = [], Counter[str]()
    for seed in seeds:
        query = random_query(seed)
        try:
            job.sql(query.text, name=f"q{seed}")
        except (OperatorError, UnsupportedAggregateError) as error:
            refused[str(error)] += 1
        else:
            found.append(query)
    assert len(found) > 3 * refused.total(), refused
    return [query for query in found if answered(query.reference).num_rows <= _ROWS_MAX]


def check(queries: list[Query], cut: int) -> None:
    found = streamed_together([query.text for query in queries], cut)
    for query, table in zip(queries, found, strict=True):
        assert not differences(table, answered(query.reference)), f"{query.text}\n{query.reference}"


def test_random_queries_say_what_duckdb_says() -> None:
    check(plannable(range(5)), 1)


@pytest.mark.soak
@pytest.mark.parametrize("start", range(0, 5000, 25))
def test_soak_random_queries_say_what_duckdb_says(start: int) -> None:
    check(plannable(range(start, start + 25)), start)


@pytest.mark.soak
@pytest.mark.parametrize("start", range(0, 500, 25))
def test_soak_random_queries_survive_crashes_in_the_store(start: int) -> None:
    queries = plannable(range(start, start + 25))
    url = f"memory://random-{start}"
    for query, table in zip(
        queries, survived([q.text for q in queries], crashes=3, seed=start, directory=url), strict=True
    ):
        assert not differences(table, answered(query.reference)), f"{query.text}\n{query.reference}"
