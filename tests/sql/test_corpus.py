"""Every query of the corpus, as a stream that crashes twice, says what DuckDB says in batch."""

from __future__ import annotations

import pytest

from tests.sql.corpus import CHANGELOGS, EXPRESSIONS, JOINS, RANKINGS, SHAPES, WINDOWS
from tests.sql.running import answered, as_rows, streamed


def check(query: str, reference: str | None, *, crashes: int) -> None:
    found, wanted = streamed(query, crashes=crashes), answered(reference or query)
    assert [name for name in found.column_names if name != "op"] == wanted.column_names
    assert as_rows(found) == as_rows(wanted)


@pytest.mark.parametrize(("query", "reference"), EXPRESSIONS)
def test_expressions_of_each_row(query: str, reference: str | None) -> None:
    check(query, reference, crashes=0)


@pytest.mark.parametrize(("query", "reference"), SHAPES)
def test_subqueries_and_unions(query: str, reference: str | None) -> None:
    check(query, reference, crashes=2)


@pytest.mark.parametrize(("query", "reference"), WINDOWS)
def test_windows(query: str, reference: str | None) -> None:
    assert "op" not in streamed(query, crashes=0).column_names
    check(query, reference, crashes=2)


@pytest.mark.parametrize(("query", "reference"), CHANGELOGS)
def test_groups_without_a_window(query: str, reference: str | None) -> None:
    check(query, reference, crashes=2)


@pytest.mark.parametrize(("query", "reference"), JOINS)
def test_joins(query: str, reference: str | None) -> None:
    check(query, reference, crashes=2)


@pytest.mark.parametrize(("query", "reference"), RANKINGS)
def test_first_rows_of_a_partition(query: str, reference: str | None) -> None:
    check(query, reference, crashes=2)
