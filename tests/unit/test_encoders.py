"""Rows as records of JSON, CSV, Avro and raw bytes: every value as the library that reads it expects, for any batch."""

from __future__ import annotations

import datetime as dt
import decimal
import io
import json
import math
import random
from typing import Any

import fastavro
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

from operators.encoders import AvroEncoder, CsvEncoder, JsonEncoder, RawEncoder, avro_schema
from operators.errors import SchemaError

UTC = dt.UTC
TEXTS = [
    "",
    "plain",
    'a "quoted" one',
    "back\\slash",
    "line\nbreak\r\n",
    "tab\t\b\f",
    "\x00\x01\x1f",
    "ünïcödé 🎉",
    "\x7f",
]
MOMENT = dt.datetime(2013, 1, 1, 5, 6, 7, 89)  # noqa: DTZ001 - a column without zone

COLUMNS: dict[str, tuple[pa.DataType, list[Any], Any]] = {
    # type, values, and what a reader of JSON finds
    "text": (pa.string(), TEXTS, TEXTS),
    "large": (pa.large_string(), TEXTS, TEXTS),
    "view": (pa.string_view(), TEXTS, TEXTS),
    "word": (pa.dictionary(pa.int32(), pa.string()), ["x", "y"], ["x", "y"]),
    "integer": (pa.int64(), [0, -1, 2**63 - 1, -(2**63)], [0, -1, 2**63 - 1, -(2**63)]),
    "unsigned": (pa.uint64(), [0, 2**64 - 1], [0, 2**64 - 1]),
    "double": (pa.float64(), [0.1, -1e300, 5e-324, math.nan, math.inf], [0.1, -1e300, 5e-324, None, None]),
    "single": (pa.float32(), [0.5, -math.inf], [0.5, None]),
    "half": (pa.float16(), [0.5, math.nan], [0.5, None]),
    "flag": (pa.bool_(), [True, False], [True, False]),
    "price": (pa.decimal128(20, 4), [decimal.Decimal("-12345678.0001")], [decimal.Decimal("-12345678.0001")]),
    "day": (pa.date32(), [dt.date(2013, 1, 31)], ["2013-01-31"]),
    "time": (pa.time64("us"), [dt.time(1, 2, 3, 4)], ["01:02:03.000004"]),
    "naive": (pa.timestamp("us"), [MOMENT], ["2013-01-01T05:06:07.000089"]),
    "zoned": (
        pa.timestamp("ms", "America/New_York"),
        [dt.datetime(2013, 7, 1, tzinfo=UTC)],
        ["2013-07-01T00:00:00.000Z"],
    ),
    "span": (pa.duration("ms"), [dt.timedelta(seconds=2)], [2000]),
    "nothing": (pa.null(), [None], [None]),
    "list": (pa.list_(pa.string()), [[], ["a", None, '"']], [[], ["a", None, '"']]),
    "pair": (pa.list_(pa.int64(), 2), [[1, 2], [None, 3]], [[1, 2], [None, 3]]),
    "nested": (pa.large_list(pa.list_(pa.int8())), [[[1], None, []]], [[[1], None, []]]),
    "struct": (
        pa.struct([("a", pa.int64()), ("b c", pa.list_(pa.string()))]),
        [{"a": 1, "b c": ["x"]}, {"a": None, "b c": None}],
        [{"a": 1, "b c": ["x"]}, {"a": None, "b c": None}],
    ),
    "map": (pa.map_(pa.string(), pa.int64()), [[("k", 1), ('"', None)], []], [{"k": 1, '"': None}, {}]),
    "numbered": (pa.map_(pa.int32(), pa.string()), [[(1, "x")]], [{"1": "x"}]),
    "dated": (pa.map_(pa.date32(), pa.string()), [[(dt.date(2020, 1, 2), "x")]], [{"2020-01-02": "x"}]),
}


def random_batch(names: list[str], rng: random.Random, rows: int) -> tuple[pa.RecordBatch, list[dict[str, Any]]]:
    """Rows of the values above, with nulls, and what a reader of their JSON should find."""
    picks = {n: [rng.randrange(-1, len(COLUMNS[n][1])) for _ in range(rows)] for n in names}
    arrays = [pa.array([None if i < 0 else COLUMNS[n][1][i] for i in picks[n]], COLUMNS[n][0]) for n in names]
    read = [{n: None if picks[n][r] < 0 else COLUMNS[n][2][picks[n][r]] for n in names} for r in range(rows)]
    return pa.RecordBatch.from_arrays(arrays, names=names), read


def parsed(value: bytes) -> Any:
    def exact(text: str) -> Any:
        return decimal.Decimal(text) if text.endswith("0001") else float(text)

    return json.loads(value, parse_float=exact)


def test_json_of_every_type_is_read_as_what_it_was_also_from_slices() -> None:
    rng = random.Random(7)
    for _ in range(20):
        names = rng.sample(list(COLUMNS), rng.randint(1, len(COLUMNS)))
        batch, read = random_batch(names, rng, rng.randint(0, 12))
        start = rng.randint(0, batch.num_rows)
        for piece, rows in ((batch, read), (batch.slice(start), read[start:]), (batch.slice(0, start), read[:start])):
            values = JsonEncoder(batch.schema).encode(piece)
            assert values.type == pa.binary()
            assert [parsed(v) for v in values.to_pylist()] == rows


def test_a_json_object_has_the_columns_in_their_order_and_nulls_as_null() -> None:
    batch = pa.record_batch(
        {"b": [1], 'a"': [None], "ü": ["x"]},
        schema=pa.schema([("b", pa.int8()), ('a"', pa.string()), ("ü", pa.string())]),
    )
    assert JsonEncoder(batch.schema).encode(batch).to_pylist() == ['{"b":1,"a\\"":null,"ü":"x"}'.encode()]


def test_a_row_without_columns_is_an_empty_object() -> None:
    batch = pa.record_batch({"a": [1, 2]}).select([])
    assert JsonEncoder(batch.schema).encode(pa.record_batch({"a": [1, 2]}).select([])).to_pylist() == [b"{}"] * 2


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary(4),
        pa.list_(pa.struct([("x", pa.binary())])),
        pa.month_day_nano_interval(),
    ],
)
def test_what_json_has_no_way_to_write_is_refused_with_what_to_do(kind: pa.DataType) -> None:
    with pytest.raises(SchemaError, match="turn column 'payload' into text"):
        JsonEncoder(pa.schema([("payload", kind)]))


def test_csv_is_read_by_arrow_as_what_it_was() -> None:
    names = ["text", "integer", "flag", "day", "naive", "price", "word"]
    batch, _ = random_batch(names, random.Random(3), 40)
    data = b"\n".join(CsvEncoder(batch.schema).encode(batch).to_pylist())
    types = {n: pa.string() if n == "word" else batch.schema.field(n).type for n in names}
    convert = pacsv.ConvertOptions(
        column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
    )
    read = pacsv.read_csv(
        io.BytesIO(data),
        pacsv.ReadOptions(column_names=names),
        pacsv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
        convert,
    )
    assert read.to_pylist() == batch.to_pylist()


def test_csv_refuses_what_is_no_value_and_delimiters_that_are_none() -> None:
    for kind in (pa.binary(), pa.list_(pa.int64()), pa.struct([("x", pa.int64())])):
        with pytest.raises(SchemaError, match="turn column 'c' into text"):
            CsvEncoder(pa.schema([("c", kind)]))
    with pytest.raises(ValueError, match="delimiter"):
        CsvEncoder(pa.schema([("c", pa.int64())]), delimiter='"')


def test_raw_is_one_column_as_it_is() -> None:
    for kind in (pa.string(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int8(), pa.string())):
        schema = pa.schema([("v", kind)])
        values = ["x", None, ""] if "string" in str(kind) else [b"x", None, b""]
        batch = pa.record_batch(
            [pa.array(values, pa.string() if "string" in str(kind) else pa.binary()).cast(kind)], schema=schema
        )
        assert RawEncoder(schema).encode(batch).to_pylist() == [b"x", None, b""]
    for schema in (pa.schema([("v", pa.int64())]), pa.schema([("v", pa.string()), ("w", pa.string())]), pa.schema([])):
        with pytest.raises(SchemaError, match="columns="):
            RawEncoder(schema)


# -- Avro


def plain(value: Any) -> Any:
    """As fastavro returns it: maps as dicts, times in UTC."""
    if isinstance(value, list):
        return dict(value) if value and isinstance(value[0], tuple) else [plain(v) for v in value]
    if isinstance(value, dt.datetime) and value.tzinfo is not None:
        return value.astimezone(UTC)
    return value


AVRO = [
    n
    for n in COLUMNS
    if n not in ("unsigned", "map", "numbered", "dated", "half", "span", "double", "single", "struct")
]


def test_avro_of_every_type_is_read_by_another_library_as_what_it_was_also_from_slices() -> None:
    rng = random.Random(11)
    for _ in range(20):
        names = rng.sample(AVRO, rng.randint(0, len(AVRO)))
        batch, _ = random_batch(names, rng, rng.randint(0, 12))
        batch = batch.append_column("bytes", pa.array([b"x" * (i * 40) for i in range(batch.num_rows)], pa.binary()))
        schema = fastavro.parse_schema(avro_schema(batch.schema))
        for piece in (batch, batch.slice(rng.randint(0, batch.num_rows))):
            values = AvroEncoder(batch.schema).encode(piece).to_pylist()
            read = []
            for value in values:
                stream = io.BytesIO(value)
                read.append(fastavro.schemaless_reader(stream, schema, None))
                assert stream.read() == b""
            assert read == [{n: plain(v) for n, v in row.items()} for row in piece.to_pylist()]


def test_avro_maps_structs_and_floats_are_read_back() -> None:
    schema = pa.schema(
        [
            pa.field("n", pa.int64(), nullable=False),
            ("m", pa.map_(pa.string(), pa.int64())),
            ("s", pa.struct([pa.field("x", pa.int32(), nullable=False), ("y", pa.list_(pa.string()))])),
            ("f", pa.float32()),
        ]
    )
    rows = [
        {"n": -1, "m": {"a": 1, "b": None}, "s": {"x": 1, "y": ["p", None]}, "f": math.inf},
        {"n": 2**40, "m": {}, "s": None, "f": None},
        {"n": 64, "m": None, "s": {"x": -64, "y": None}, "f": -0.5},
    ]
    batch = pa.RecordBatch.from_pylist([{**r, "m": r["m"] and list(r["m"].items())} for r in rows], schema)
    batch = batch.set_column(1, "m", pa.array([[("a", 1), ("b", None)], [], None], schema.field("m").type))
    values = AvroEncoder(schema).encode(pa.RecordBatch.from_arrays(batch.columns, schema=schema)).to_pylist()
    parsed_schema = fastavro.parse_schema(avro_schema(schema))
    assert [fastavro.schemaless_reader(io.BytesIO(v), parsed_schema, None) for v in values] == rows


def test_avro_under_a_given_schema_takes_its_fields_and_refuses_what_they_cannot_hold() -> None:
    declared = {
        "type": "record",
        "name": "r",
        "fields": [
            {"name": "e", "type": {"type": "enum", "name": "e", "symbols": ["a", "b"]}},
            {"name": "x", "type": [{"type": "fixed", "name": "f", "size": 2}, "null"]},
            {"name": "n", "type": "int"},
        ],
    }
    schema = pa.schema([("n", pa.int64()), ("e", pa.string()), ("x", pa.binary()), ("more", pa.string())])
    encoder = AvroEncoder(schema, declared)
    good = pa.RecordBatch.from_pydict({"n": [1, -1], "e": ["b", "a"], "x": [b"zz", None], "more": ["", ""]}, schema)
    read = [fastavro.schemaless_reader(io.BytesIO(v), declared, None) for v in encoder.encode(good).to_pylist()]
    assert read == [{"e": "b", "x": b"zz", "n": 1}, {"e": "a", "x": None, "n": -1}]
    for column, value in (("n", None), ("n", 2**31), ("e", "c"), ("e", None), ("x", b"zzz")):
        bad = {"n": [1], "e": ["a"], "x": [b"zz"], "more": [""], column: [value]}
        with pytest.raises(SchemaError, match=f"column '{column}'"):
            encoder.encode(pa.RecordBatch.from_pydict(bad, schema))
    with pytest.raises(SchemaError, match="field 'e' is no column"):
        AvroEncoder(pa.schema([("n", pa.int64())]), declared)
    with pytest.raises(SchemaError, match="has no duration"):
        AvroEncoder(pa.schema([("d", pa.duration("s"))]))
