"""Bytes of many records become columns: a row for each record, and those that are to blame are found."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from operators import BadInputError
from operators.formats import CsvFormat, Format, FormatError, JsonFormat, RawFormat, decode, infer_json

ROWS = pa.schema([("a", pa.int64()), ("s", pa.string())])


def rows(format_: Format, *values: Any) -> list[dict[str, Any]]:
    return format_.decode(values).to_pylist()  # type: ignore[no-any-return]


# -- JSON


def test_fields_are_columns_whatever_their_order() -> None:
    found = rows(JsonFormat(ROWS), b'{"a": 1, "s": "x"}', b'{"s": "y", "other": [1], "a": 2}', b"{}")
    assert found == [{"a": 1, "s": "x"}, {"a": 2, "s": "y"}, {"a": None, "s": None}]


def test_json_may_be_written_over_several_lines() -> None:
    assert rows(JsonFormat(ROWS), b'{\n  "a": 1,\r\n  "s": "x\\ny"\n}\n', b' {"a":2}') == [
        {"a": 1, "s": "x\ny"},
        {"a": 2, "s": None},
    ]


def test_times_are_text_or_counts_in_the_unit_of_the_column() -> None:
    time = datetime(2024, 5, 1, 10, tzinfo=UTC)
    schema = pa.schema([("t", pa.timestamp("ms", "UTC")), ("u", pa.timestamp("s"))])
    counted = b'{"t": %d, "u": %d}' % (time.timestamp() * 1000, time.timestamp())
    written = b'{"t": "2024-05-01T10:00:00Z", "u": "2024-05-01 10:00:00"}'
    expected = {"t": time, "u": time.replace(tzinfo=None)}
    format_ = JsonFormat(schema)
    assert rows(format_, counted, counted) == [expected] * 2
    assert rows(format_, written) == [expected]
    mixed = decode(format_, [written, counted, counted, written])
    assert (mixed.batch.to_pylist(), mixed.rejected) == ([expected] * 4, [])


NOT_ONE_OBJECT = {
    "empty": b"",
    "blank": b"  ",
    "two objects": b'{"a": 1}{"a": 2}',
    "two lines": b'{"a": 1}\n{"a": 2}',
    "begins an object that the next one ends": b'{"a": 1, "s": "}',
    "ends an object that the one before began": b'{", "a": 1}',
    "an array": b'[{"a": 1}]',
    "a number": b"7",
    "null": b"null",
    "torn": b'{"a": 1',
    "another type": b'{"a": "one"}',
    "too large": b'{"a": 123456789012345678901234567890}',
    "a field twice": b'{"a": 1, "a": 2}',
    "not UTF-8": b'{"s": "\xff"}',
    "a byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "no JSON": b"<a>1</a>",
}


@pytest.mark.parametrize("what", NOT_ONE_OBJECT)
def test_a_record_that_is_not_one_object_is_rejected_and_no_other(what: str) -> None:
    bad = NOT_ONE_OBJECT[what]
    good = [b'{"a": %d, "s": "x"}' % i for i in range(7)]
    for at in (0, 3, 7):
        found = decode(JsonFormat(ROWS), [*good[:at], bad, *good[at:]])
        assert [r.index for r in found.rejected] == [at]
        assert found.rejected[0].reason
        assert found.batch.column(0).to_pylist() == list(range(7))


def test_bad_records_cannot_make_up_for_each_other() -> None:
    """An empty record and one of two objects are as many rows as records."""
    found = decode(JsonFormat(ROWS), [b"", b'{"a": 1}{"a": 2}', b'{"a": 3}', b'{"a": 1, "s": "}', b'{", "a": 4}'])
    assert [r.index for r in found.rejected] == [0, 1, 3, 4]
    assert found.batch.column(0).to_pylist() == [3]


def test_a_column_that_is_not_nullable_is_required() -> None:
    schema = pa.schema([pa.field("a", pa.int64(), nullable=False)])
    found = decode(JsonFormat(schema), [b'{"a": 1}', b"{}", b'{"a": null}'])
    assert [r.reason for r in found.rejected] == ["no value for 'a', which is not nullable"] * 2
    assert found.batch.schema == schema


def test_records_longer_than_a_block_are_read() -> None:
    long = json.dumps({"a": 1, "s": "x" * 3_000_000}).encode()
    found = rows(JsonFormat(ROWS), *[b'{"a": 0}'] * 9, long, *[b'{"a": 2}'] * 9)
    assert [r["a"] for r in found] == [0] * 9 + [1] + [2] * 9


@pytest.mark.parametrize("seed", range(5))
def test_json_is_decoded_as_python_does(seed: int) -> None:
    rng = random.Random(seed)
    words = ["", "a", "ä\n", '"', "\\", "}{", "\u2028", "😀", " x "]
    nested = pa.struct([("x", pa.float64()), ("l", pa.list_(pa.string()))])
    schema = pa.schema([("a", pa.int64()), ("b", pa.bool_()), ("s", pa.string()), ("n", nested)])
    values = []
    for _ in range(300):
        inner = {"x": rng.choice([None, rng.random(), 1e300]), "l": rng.choices(words, k=rng.randrange(3))}
        row = {
            "a": rng.choice([None, rng.getrandbits(62)]),
            "b": rng.random() < 0.5,
            "s": rng.choice(words),
            "n": inner,
        }
        values.append(row)
    text = [json.dumps(v, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, None, 2])).encode() for v in values]
    assert rows(JsonFormat(schema), *text) == values


def test_columns_are_inferred_from_samples() -> None:
    samples = [b'{"a": 1, "n": null}', b'{"a": 2.5, "t": "2024-05-01T10:00:00", "l": []}']
    found = infer_json(samples)
    assert [str(f.type) for f in found] == ["double", "string", "timestamp[s]", "list<item: string>"]
    with pytest.raises(BadInputError, match="give schema="):
        infer_json([b"no"])


# -- CSV


def test_lines_are_rows() -> None:
    assert rows(CsvFormat(ROWS), b"1,x", b'2,"y,""z"""\r\n', b",") == [
        {"a": 1, "s": "x"},
        {"a": 2, "s": 'y,"z"'},
        {"a": None, "s": None},
    ]
    assert rows(CsvFormat(ROWS, delimiter=";"), b"1;x") == [{"a": 1, "s": "x"}]


@pytest.mark.parametrize("bad", [b"", b"1", b"1,x,y", b"x,1", b"1,x\n2,y", b'1,"x', b'1,"\n"', b'1,"\xff"'])
def test_a_record_that_is_not_one_line_is_rejected_and_no_other(bad: bytes) -> None:
    for at in (0, 2, 4):
        good = [b"%d,x" % i for i in range(4)]
        found = decode(CsvFormat(ROWS), [*good[:at], bad, *good[at:]])
        assert [r.index for r in found.rejected] == [at]
        assert found.batch.column(0).to_pylist() == [0, 1, 2, 3]


# -- raw


def test_raw_records_are_as_they_are() -> None:
    assert rows(RawFormat(), b"\xff", None, b"") == [{"value": b"\xff"}, {"value": None}, {"value": b""}]
    found = decode(RawFormat(text=True), [b"a", b"\xff", "ä".encode()])
    assert found.batch.to_pylist() == [{"value": "a"}, {"value": "ä"}]
    assert [(r.index, r.reason) for r in found.rejected] == [(1, "no UTF-8 text")]


def test_nothing_decodes_to_no_rows() -> None:
    assert decode(JsonFormat(ROWS), []).batch.schema == ROWS


def test_an_error_names_no_more_than_the_beginning_of_a_record() -> None:
    with pytest.raises(FormatError) as error:
        JsonFormat(ROWS).decode([b"x" * 1000])
    assert len(str(error.value)) < 120
