"""Avro records become columns as another library wrote them, or are refused; schemas come from a registry."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import fastavro
import pyarrow as pa
import pytest

from operators import BadInputError, SchemaError, SourceUnavailableError
from operators.formats import AvroFormat, FormatError, SchemaRegistry, decode
from operators.sources import KafkaSource
from tests.support.kafka import KafkaBroker
from tests.support.schema_registry import registry

SIMPLE = {"type": "record", "name": "r", "fields": [{"name": "a", "type": "long"}, {"name": "s", "type": "string"}]}


def record(*fields: tuple[str, Any]) -> dict[str, Any]:
    return {"type": "record", "name": "r", "fields": [{"name": n, "type": t} for n, t in fields]}


def written(schema: Mapping[str, Any], *rows: Mapping[str, Any]) -> list[bytes]:
    parsed = fastavro.parse_schema(json.loads(json.dumps(schema)))
    found = []
    for row in rows:
        out = io.BytesIO()
        fastavro.schemaless_writer(out, parsed, row)
        found.append(out.getvalue())
    return found


def read(schema: Mapping[str, Any], *rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    return AvroFormat(schema).decode(written(schema, *rows)).to_pylist()  # type: ignore[no-any-return]


INNER = {
    "type": "record",
    "name": "inner",
    "fields": [{"name": "x", "type": "int"}, {"name": "y", "type": ["null", "string"]}],
}
TYPES: dict[str, tuple[Any, list[Any]]] = {
    "null": ("null", [None]),
    "boolean": ("boolean", [True, False]),
    "int": ("int", [0, -1, 63, -64, 64, 2**31 - 1, -(2**31)]),
    "long": ("long", [0, -1, 2**62, 2**63 - 1, -(2**63)]),
    "float": ("float", [0.5, -0.0, float("inf")]),
    "double": ("double", [0.1, 1e300]),
    "bytes": ("bytes", [b"", b"\x00\xff", b"x" * 300]),
    "string": ("string", ["", "ä😀", "x" * 300]),
    "enum": ({"type": "enum", "name": "e", "symbols": ["a", "b"]}, ["b", "a"]),
    "fixed": ({"type": "fixed", "name": "f", "size": 3}, [b"abc"]),
    "optional": (["null", "long"], [None, 5]),
    "optional, null last": (["string", "null"], ["x", None]),
    "union of one": (["long"], [3]),
    "array": ({"type": "array", "items": "string"}, [[], ["a"], ["b", "", "c"]]),
    "array of arrays": ({"type": "array", "items": {"type": "array", "items": "int"}}, [[], [[]], [[1], [], [2, 3]]]),
    "array of records": ({"type": "array", "items": INNER}, [[], [{"x": 1, "y": None}, {"x": 2, "y": "z"}]]),
    "map": ({"type": "map", "values": ["null", "long"]}, [{}, {"a": 1}, {"b": None, "c": 3}]),
    "record": (INNER, [{"x": 1, "y": "z"}, {"x": -5, "y": None}]),
    "optional record": (["null", INNER], [None, {"x": 1, "y": "z"}]),
    "date": ({"type": "int", "logicalType": "date"}, [date(1969, 1, 1), date(2024, 2, 29)]),
    "time": ({"type": "int", "logicalType": "time-millis"}, [time(1, 2, 3, 4000)]),
    "time in us": ({"type": "long", "logicalType": "time-micros"}, [time(1, 2, 3, 4)]),
    "timestamp": ({"type": "long", "logicalType": "timestamp-millis"}, [datetime(2024, 5, 1, 10, tzinfo=UTC)]),
    "timestamp in us": ({"type": "long", "logicalType": "timestamp-micros"}, [datetime(1900, 5, 1, tzinfo=UTC)]),
    "local timestamp": ({"type": "long", "logicalType": "local-timestamp-micros"}, [datetime(2024, 5, 1, 10)]),  # noqa: DTZ001
    "decimal": (
        {"type": "bytes", "logicalType": "decimal", "precision": 30, "scale": 2},
        [Decimal("0.00"), Decimal("-1.28"), Decimal("123456789012345678901234567.89")],
    ),
    "fixed decimal": (
        {"type": "fixed", "name": "d", "size": 5, "logicalType": "decimal", "precision": 9, "scale": 3},
        [Decimal("-1.000"), Decimal("999.999")],
    ),
    "unknown logical type": ({"type": "string", "logicalType": "uuid-of-ours"}, ["x"]),
}


def plain(value: Any) -> Any:
    """Maps as Arrow shows them."""
    return list(value.items()) if isinstance(value, dict) and not {"x", "y"} & value.keys() else value


@pytest.mark.parametrize("what", TYPES)
def test_values_of_a_type_are_read_as_they_were_written(what: str) -> None:
    kind, values = TYPES[what]
    found = read(record(("before", "long"), ("v", kind), ("after", "string")), *_rows(values))
    assert [r["v"] for r in found] == [plain(v) for v in values]
    assert [(r["before"], r["after"]) for r in found] == [(i, f"n{i}") for i in range(len(values))]


def _rows(values: list[Any]) -> list[dict[str, Any]]:
    return [{"before": i, "v": v, "after": f"n{i}"} for i, v in enumerate(values)]


@pytest.mark.parametrize("seed", range(5))
def test_random_records_are_read_as_they_were_written(seed: int) -> None:
    rng = random.Random(seed)
    names = rng.sample(sorted(TYPES), 6)
    fields = []
    for number, name in enumerate(names):
        text = json.dumps(TYPES[name][0])
        for known in ("inner", "e", "f", "d"):
            text = text.replace(f'"name": "{known}"', f'"name": "{known}{number}"')
        fields.append((f"c{number}", json.loads(text)))
    rows = [{f"c{i}": rng.choice(TYPES[name][1]) for i, name in enumerate(names)} for _ in range(100)]
    found = read(record(*fields), *rows)
    assert found == [{k: plain(v) for k, v in row.items()} for row in rows]


def test_lists_in_several_blocks_with_sizes_are_read() -> None:
    schema = record(("v", {"type": "array", "items": "int"}))
    # Two items in a block of one, then one of two with its size in bytes.
    assert AvroFormat(schema).decode([bytes([2, 10, 3, 4, 14, 16, 0]), bytes([0])]).to_pylist() == [
        {"v": [5, 7, 8]},
        {"v": []},
    ]


def test_a_named_type_may_be_used_again() -> None:
    schema = {
        "type": "record",
        "name": "a.r",
        "fields": [{"name": "x", "type": INNER}, {"name": "z", "type": "a.inner"}],
    }
    schema["fields"].append({"name": "u", "type": ["null", "inner"]})  # type: ignore[attr-defined]
    row = {"x": {"x": 1, "y": None}, "z": {"x": 2, "y": "b"}, "u": None}
    assert read(schema, row) == [row]


@pytest.mark.parametrize("seed", range(2))
def test_torn_and_flipped_records_are_rejected_or_read_and_never_a_crash(seed: int) -> None:
    rng = random.Random(seed)
    schema = record(
        *[
            (f"c{i}", TYPES[n][0])
            for i, n in enumerate(("long", "optional", "string", "array of records", "map", "enum", "decimal"))
        ]
    )
    row = {"c0": 5, "c1": 7, "c2": "text", "c3": [{"x": 1, "y": "z"}], "c4": {"a": 1}, "c5": "a", "c6": Decimal("1.25")}
    [good] = written(schema, row)
    format_ = AvroFormat(schema)
    for cut in range(len(good)):
        assert [r.index for r in decode(format_, [good, good[:cut], good]).rejected] == [1], cut
    assert [r.index for r in decode(format_, [good + b"\0", good]).rejected] == [0]
    for _ in range(50):
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        found = decode(format_, [good, bytes(bad), good])
        assert found.batch.num_rows + len(found.rejected) == 3
        found.batch.validate(full=True)
        assert found.batch.to_pylist()[0] == found.batch.to_pylist()[-1]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("long", "must be a record"),
        ("{", "no schema"),
        (record(("a", "number")), "'number' is not declared"),
        (record(("a", ["null", "int", "string"])), "a union of null, int, string has no Arrow type"),
        (record(("a", ["null", "r"])), "'r' contains itself"),
    ],
)
def test_what_has_no_columns_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        AvroFormat(json.dumps(schema) if schema != "{" else schema)


# -- with a registry


def numbered(number: int, schema: Mapping[str, Any], *rows: Mapping[str, Any]) -> list[bytes]:
    return [struct.pack(">bi", 0, number) + value for value in written(schema, *rows)]


def test_each_record_is_read_with_the_schema_it_was_written_with() -> None:
    newer = record(("s", "string"), ("a", "int"), ("extra", "double"))
    with registry() as known:
        known.schemas = {1: SIMPLE, 7: newer, 9: record(("a", "long"))}
        reader = {**SIMPLE, "fields": [SIMPLE["fields"][0], {"name": "s", "type": "string", "default": "none"}]}
        format_ = AvroFormat(reader, SchemaRegistry(known.url))
        values = [
            *numbered(1, SIMPLE, {"a": 1, "s": "x"}),
            *numbered(7, newer, {"a": 2, "s": "y", "extra": 0.5}),
            *numbered(9, known.schemas[9], {"a": 3}),
            *numbered(1, SIMPLE, {"a": 4, "s": "z"}),
        ]
        assert format_.decode(values).to_pylist() == [
            {"a": 1, "s": "x"},
            {"a": 2, "s": "y"},
            {"a": 3, "s": "none"},
            {"a": 4, "s": "z"},
        ]
        assert sorted(known.asked) == [f"/schemas/ids/{n}" for n in (1, 7, 9)], "each is asked for once"


def test_a_record_without_a_known_schema_is_bad_and_a_registry_that_is_away_is_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with registry() as known:
        known.schemas = {1: SIMPLE, 2: record(("a", ["int", "string"]))}
        format_ = AvroFormat(SIMPLE, SchemaRegistry(known.url))
        [good] = numbered(1, SIMPLE, {"a": 1, "s": "x"})
        found = decode(
            format_, [good, b"\0\0\0\0", good[:4], b"\1" + good[1:], b"\0\0\0\0\5" + good[5:], b"\0\0\0\0\2\0"]
        )
        assert [r.index for r in found.rejected] == [1, 2, 3, 4, 5]
        assert "no schema 5" in found.rejected[3].reason
        assert "union" in found.rejected[4].reason
        known.schemas[5], known.failures = SIMPLE, 1
        assert decode(format_, [b"\0\0\0\0\5" + good[5:]]).rejected == []
        assert "does not answer (status 503)" in caplog.text
    away = AvroFormat(SIMPLE, SchemaRegistry(known.url, unavailable_s=0.01))
    with pytest.raises(SourceUnavailableError, match=rf"{known.url} did not answer"):
        decode(away, [good])


def test_credentials_of_a_registry_are_sent_and_never_told() -> None:
    with registry() as known:
        known.schemas, known.authorization = {1: SIMPLE}, "Basic dXNlcjpwYXNzd29yZA=="
        right = SchemaRegistry(known.url, auth=("user", "password"))
        assert right.schema(1) is not None
        assert "password" not in repr(right)
        with pytest.raises(SourceUnavailableError, match="refuses") as refused:
            SchemaRegistry(known.url, auth=("user", "secret-word")).schema(1)
        assert "secret-word" not in str(refused.value)
    with pytest.raises(ValueError, match="auth=") as told:
        SchemaRegistry("http://user:secret-word@host")
    assert "secret-word" not in str(told.value)


def test_a_topic_of_avro_is_read_with_the_newest_schema_of_its_subject(kafka: KafkaBroker) -> None:
    topic = kafka.create_topic()
    kafka.produce(topic, [*numbered(1, SIMPLE, {"a": 1, "s": "x"}, {"a": 2, "s": "y"}), b"poison"])
    with registry() as known:
        with pytest.raises(BadInputError, match=f"no subject '{topic}-value'; give schema="):
            KafkaSource(topic, kafka.servers, format="avro", schema_registry=known.url)
        known.schemas, known.subjects = {1: SIMPLE}, {f"{topic}-value": SIMPLE}
        source = KafkaSource(topic, kafka.servers, format="avro", schema_registry=known.url, on_bad_record="divert")
        assert source.schema == pa.schema([("a", pa.int64()), ("s", pa.string())])
        source.open(None)
        rows: list[Any] = []
        dead = 0
        until = datetime.now(UTC) + timedelta(seconds=30)
        while dead == 0 and datetime.now(UTC) < until:
            item = source.poll()
            if hasattr(item, "batch"):
                rows += item.batch.to_pylist()  # type: ignore[union-attr]
                dead += 0 if item.dead_letters is None else item.dead_letters.num_rows  # type: ignore[union-attr]
        source.close()
    assert (rows, dead) == ([{"a": 1, "s": "x"}, {"a": 2, "s": "y"}], 1)
    with pytest.raises(SchemaError, match="needs schema= or schema_registry="):
        KafkaSource(topic, kafka.servers, format="avro")


def test_a_value_that_does_not_fit_the_readers_column_is_bad() -> None:
    with registry() as known:
        known.schemas = {1: record(("a", "string"))}
        format_ = AvroFormat(pa.schema([("a", pa.int64())]), SchemaRegistry(known.url))
        values = numbered(1, known.schemas[1], {"a": "5"}, {"a": "five"})
        assert [r.index for r in decode(format_, values).rejected] == [1]
        with pytest.raises(FormatError, match="field 'a' is no int64"):
            format_.decode(values)
