"""The suite as SQL over streams says what the reference says in batch."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from operators import StreamContext
from operators.sinks import MemorySink
from tests.nexmark.reference import REFERENCES, expected
from tests.nexmark.sql import SQL
from tests.sql.running import as_rows

SIDE_INPUT = pa.table({"key": pa.array(range(10_000), pa.int64()), "value": [str(n) for n in range(10_000)]})


def test_every_query_is_there() -> None:
    assert SQL.keys() == REFERENCES.keys()


@pytest.mark.parametrize("query", SQL)
def test_queries_as_sql(query: str, ordered: Path) -> None:
    context = StreamContext()
    for kind in ("person", "auction", "bid"):
        if re.search(rf"(FROM|JOIN) {kind}\b", SQL[query]):
            stream = context.read_parquet(str(ordered / kind), event_time="dateTime", max_disorder=4_000, name=kind)
            context.register(kind, stream)
    context.register("side_input", SIDE_INPUT)
    sink = MemorySink()
    context.sql(SQL[query]).sink(sink)
    context.run()
    found, wanted = sink.table(), expected(query, ordered)
    assert [name for name in found.column_names if name != "op"] == wanted.column_names
    assert wanted.num_rows > 0
    assert as_rows(found) == as_rows(wanted)
