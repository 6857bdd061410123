"""Rows as records of Kafka: keys, values, headers, partitions, times, tombstones, and columns that do not fit."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pyarrow as pa
import pytest
from datafusion import col
from datafusion import functions as f

from operators import StreamContext
from operators.errors import SchemaError
from operators.formats import AvroFormat, SchemaRegistry
from operators.kafka.records import RecordColumns, RecordMaker
from operators.sinks import Guarantee
from tests.support.schema_registry import registry

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("name", pa.string()),
        ("code", pa.binary()),
        ("at", pa.timestamp("us", "UTC")),
        ("where", pa.int32()),
        ("tags", pa.map_(pa.string(), pa.string())),
    ]
)
NOON = dt.datetime(2020, 1, 1, 12, tzinfo=dt.UTC)
ROWS = [
    {"id": 1, "name": "ada", "code": b"\xff", "at": NOON, "where": 3, "tags": [("a", "1"), ("b", None)]},
    {"id": None, "name": None, "code": None, "at": None, "where": None, "tags": None},
    {"id": 3, "name": "", "code": b"", "at": dt.datetime(1950, 1, 1, tzinfo=dt.UTC), "where": 0, "tags": []},
]


def records(bytes_max: int = 1000, **columns: Any) -> list[dict[str, Any]]:
    columns.setdefault("columns", ["id"])
    batch = pa.RecordBatch.from_pylist(ROWS, SCHEMA)
    return RecordMaker(SCHEMA, RecordColumns(**columns), bytes_max).make(batch).to_pylist()


def test_a_key_of_text_or_bytes_is_taken_as_it_is() -> None:
    assert [r["key"] for r in records(key=["name"])] == [b"ada", None, b""]
    assert [r["key"] for r in records(key=["code"])] == [b"\xff", None, b""]


def test_any_other_key_is_json() -> None:
    assert [r["key"] for r in records(key=["id"])] == [b"1", None, b"3"]
    assert records(key=["name", "id"])[0]["key"] == b'{"name":"ada","id":1}'
    assert [r["key"] for r in records(key=[])] == [b"{}"] * 3
    assert [r["key"] for r in records()] == [None] * 3


def test_values_are_all_columns_but_those_of_partition_and_headers() -> None:
    columns = RecordColumns(partition="where", headers={"h": "code"})
    assert columns.value_columns(SCHEMA) == ["id", "name", "at", "tags"]
    assert RecordColumns(headers="tags").value_columns(SCHEMA) == ["id", "name", "code", "at", "where"]
    assert records(columns=["name", "id"])[0]["value"] == b'{"name":"ada","id":1}'
    assert records(columns=["name", "id"], format="csv")[0]["value"] == b'"ada",1'
    assert [r["value"] for r in records(columns=["code"], format="raw")] == [b"\xff", None, b""]


def test_a_header_for_each_column_and_none_for_a_null() -> None:
    made = [r["headers"] for r in records(headers={"who": "name", "raw": "code", "n": "id"})]
    assert made == [[("who", b"ada"), ("raw", b"\xff"), ("n", b"1")], [], [("who", b""), ("raw", b""), ("n", b"3")]]
    assert [r["headers"] for r in records(headers="tags")] == [[("a", b"1"), ("b", None)], None, []]


def test_the_time_of_a_record_in_milliseconds_and_none_before_1970() -> None:
    assert [r["timestamp_ms"] for r in records(timestamp="at")] == [int(NOON.timestamp() * 1000), None, None]
    assert [r["timestamp_ms"] for r in records(timestamp="id")] == [1, None, 3]


def test_the_partition_of_a_column_and_the_partitioners_for_a_null() -> None:
    assert [r["partition"] for r in records(partition="where")] == [3, None, 0]
    batch = pa.RecordBatch.from_pylist([{**ROWS[0], "where": -1}], SCHEMA)
    with pytest.raises(SchemaError, match=r"partition='where': -1 in row 0"):
        RecordMaker(SCHEMA, RecordColumns(columns=["id"], partition="where"), 1000).make(batch)


def test_a_record_that_is_too_large_is_refused_with_its_row_and_what_to_do() -> None:
    batch = pa.RecordBatch.from_pylist([ROWS[0], {**ROWS[0], "name": "x" * 100}], SCHEMA)
    maker = RecordMaker(SCHEMA, RecordColumns(columns=["name"], key=["id"]), 100)
    with pytest.raises(SchemaError, match=r"row 1 of a batch.*112 of 100 bytes.*key '1'.*message\.max\.bytes"):
        maker.make(batch)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"columns": ["nope"]}, "columns: no column 'nope'; there are id, name"),
        ({"key": ["nope"]}, "key: no column 'nope'"),
        ({"key": ["code", "id"]}, "key: column 'code' of type binary"),
        ({"headers": {"h": "nope"}}, "headers: no column 'nope'"),
        ({"headers": "name"}, "headers='name': not a map"),
        ({"partition": "name"}, "partition='name': not a column of integers"),
        ({"timestamp": "name"}, "timestamp='name': neither a time"),
        ({"columns": ["code"]}, "turn column 'code' into text"),
        ({"columns": ["id"], "format": "raw"}, "columns="),
    ],
)
def test_columns_that_do_not_fit_are_refused_when_the_stream_is_built(columns: dict[str, Any], reason: str) -> None:
    columns.setdefault("columns", ["id"])
    stream = StreamContext().from_batches([], SCHEMA)
    with pytest.raises(SchemaError, match=f"write_kafka: .*{reason}"):
        stream.write_kafka("t", "localhost:9", **columns)


def test_wrong_arguments_are_refused() -> None:
    stream = StreamContext().from_batches([], SCHEMA)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"format": "xml"}, "format"),
        ({"schema_registry": "http://localhost:9"}, "format='avro'"),
        ({"changes": "maybe"}, "changes"),
        ({"guarantee": "at most once"}, "at most once"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"options": {"transactional.id": "x"}}, "transactional_id_prefix"),
        ({"options": {"enable.idempotence": False}}, "enable.idempotence"),
    ]
    for arguments, reason in wrong:
        with pytest.raises(ValueError, match=reason):
            stream.write_kafka("t", "localhost:9", **{"columns": ["id"], **arguments})
    for topic, servers in (("", "localhost:9"), ("t", ""), ("t", "me:secret@localhost:9")):
        with pytest.raises(ValueError):
            stream.write_kafka(topic, servers, columns=["id"])


def counted(context: StreamContext) -> Any:
    schema = pa.schema([("name", pa.string()), ("id", pa.int64())])
    return context.from_batches([], schema).aggregate("name", f.count(col("id")).alias("n"))


def test_a_changelog_is_upserts_under_its_own_key_and_no_other() -> None:
    with pytest.raises(SchemaError, match=r"the key of upserts is that of the stream, \['name'\].*changes='rows'"):
        counted(StreamContext()).write_kafka("t", "localhost:9", key="n")
    with pytest.raises(SchemaError, match="corrects nothing"):
        StreamContext().from_batches([], SCHEMA).write_kafka("t", "localhost:9", columns=["id"], changes="upsert")


def test_explain_and_the_plan_name_topic_and_guarantee() -> None:
    context = StreamContext()
    stream = counted(context)
    stream.write_kafka("totals", "localhost:9")
    stream.write_kafka("changes", "localhost:9", changes="rows", guarantee=Guarantee.AT_LEAST_ONCE)
    assert "kafka-totals (exactly once)" in context.explain()
    assert "kafka-changes (at least once)" in context.explain()
    assert [node.describe()["sink"] for node in context.graph.sinks] == [
        {"kind": "kafka", "topic": "totals"},
        {"kind": "immediate_kafka", "topic": "changes"},
    ]


def test_avro_records_begin_with_the_number_that_the_registry_gave_their_schema() -> None:
    batch = pa.RecordBatch.from_pylist(ROWS, SCHEMA)
    with registry() as known:
        client = SchemaRegistry(known.url)
        columns = RecordColumns(format="avro", columns=["id", "name"], registry=client, subject="t-value")
        maker = RecordMaker(SCHEMA, columns, 1000)
        assert known.asked == [], "nobody is asked before there are rows"
        values = [r["value"] for r in maker.make(batch).to_pylist()]
        maker.make(batch)
        assert known.asked == ["/subjects/t-value/versions"]
        assert [v[:5] for v in values] == [b"\x00\x00\x00\x00\x01"] * 3
        assert AvroFormat(SCHEMA, client).decode(values).select(["id", "name"]).to_pylist() == [
            {"id": r["id"], "name": r["name"]} for r in ROWS
        ]
        known.refuses = "not compatible with the one before"
        with pytest.raises(SchemaError, match=r"does not take the schema: .*not compatible"):
            RecordMaker(SCHEMA, columns, 1000).make(batch)
