"""Every query of the corpus, as a stream, says what DuckDB says in batch, whatever happens to the job.

The queries of a family run in one job, which reads the rows once. Each is also run by itself in a job that dies again
and again over the LSM store (``make soak``), a sample of them here.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pytest

from tests.sql.corpus import Query, corpus
from tests.sql.running import answered, differences, streamed, streamed_together, survived

EVERY = [query for family in corpus().values() for query in family]
SAMPLE = EVERY[::27]


def wrong(queries: Sequence[Query], found: Sequence[pa.Table]) -> dict[str, str]:
    """How the rows of each query differ from the answer of DuckDB, of those where they do."""
    compared = {q.text: differences(table, answered(q.reference)) for q, table in zip(queries, found, strict=True)}
    return {text: difference for text, difference in compared.items() if difference}


def test_each_query_of_the_corpus_is_there_once() -> None:
    assert len({query.text for query in EVERY}) == len(EVERY) >= 180


@pytest.mark.parametrize("family", corpus())
def test_streams_say_what_duckdb_says(family: str) -> None:
    queries = corpus()[family]
    found = streamed_together([query.text for query in queries])
    assert not wrong(queries, found)
    if family in ("expressions", "windows"):
        assert not [q.text for q, table in zip(queries, found, strict=True) if "op" in table.column_names]


def test_a_sample_survives_crashes_in_the_store() -> None:
    assert len(SAMPLE) >= 12
    found = survived([q.text for q in SAMPLE], crashes=1, seed=1, directory="memory://corpus-sample")
    assert not wrong(SAMPLE, found)


@pytest.mark.soak
@pytest.mark.parametrize("number", range(len(EVERY)))
def test_soak_each_query_survives_crashes_in_the_store(number: int) -> None:
    query = EVERY[number]
    found = streamed(query.text, crashes=3, seed=number, directory=f"memory://corpus-{number}")
    assert not wrong([query], [found])
