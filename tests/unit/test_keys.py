"""Canonical keys, their hash (against a slow oracle that follows the specification) and row equality."""

from __future__ import annotations

import decimal
import math
import random
import struct
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from statebackend.keys import HASH_VERSION, Hasher, canonical_schema, canonicalise, hash_columns, rows_equal

M = (1 << 64) - 1
G = 0x9E3779B97F4A7C15
NULL = 0xD6E8FEB86659FD93


# --- the oracle: one value at a time, plain integers ---


def mix(x: int) -> int:
    x &= M
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & M
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & M
    return x ^ x >> 31


def fold(words: list[int]) -> int:
    h = 0
    for w in words:
        h = mix((h ^ w) + G)
    return h


def seq(length: int, words: list[int]) -> int:
    return mix(length + sum(mix(w + i * G) for i, w in enumerate(words, 1)))


def le_words(data: bytes) -> list[int]:
    return [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]


def word(value: Any, kind: pa.DataType) -> int:
    t = pa.types
    if value is None:
        return NULL
    if t.is_dictionary(kind) or t.is_run_end_encoded(kind):
        return word(value, kind.value_type)
    if t.is_boolean(kind):
        return int(value)
    if t.is_integer(kind):
        return int(value) & M
    if t.is_floating(kind):
        value = float(value)
        if math.isnan(value):
            return 0x7FF8 << 48
        return int.from_bytes(struct.pack("<d", value + 0.0), "little")
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        return seq(len(value), le_words(value))
    if t.is_struct(kind):
        return fold([word(value[f.name], f.type) for f in kind])
    if t.is_map(kind):
        return seq(len(value), [fold([word(k, kind.key_type), word(v, kind.item_type)]) for k, v in value])
    if t.is_nested(kind):
        return seq(len(value), [word(v, kind.value_type) for v in value])
    if t.is_decimal128(kind) or t.is_decimal256(kind):
        unscaled = int(decimal.Context(prec=80).scaleb(value, kind.scale))
        return fold(le_words(unscaled.to_bytes(kind.bit_width // 8, "little", signed=True)))
    raise AssertionError(kind)


STRINGS = ["", "a", "ab", "abcdefgh", "abcdefghi", "a\0", "a\0\0", "ü" * 9, "x" * 63, "y" * 64, "z" * 65, "w" * 1000]
D = decimal.Decimal

COLUMNS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "bool": (pa.bool_(), [True, False]),
    "int8": (pa.int8(), [-128, -1, 0, 127]),
    "uint16": (pa.uint16(), [0, 65535]),
    "int32": (pa.int32(), [-(2**31), -1, 5]),
    "int64": (pa.int64(), [-(2**63), -1, 0, 5, 2**63 - 1]),
    "uint64": (pa.uint64(), [0, 2**64 - 1]),
    "float16": (pa.float16(), [np.float16(1.5), np.float16(-0.0), np.float16("nan")]),
    "float32": (pa.float32(), [0.0, -0.0, 1.5, math.nan, math.inf]),
    "float64": (pa.float64(), [0.0, -0.0, 0.1, -math.nan, -math.inf]),
    "string": (pa.string(), STRINGS),
    "large_string": (pa.large_string(), STRINGS),
    "string_view": (pa.string_view(), STRINGS),
    "binary": (pa.binary(), [s.encode() for s in STRINGS]),
    "large_binary": (pa.large_binary(), [s.encode() for s in STRINGS]),
    "binary_view": (pa.binary_view(), [s.encode() for s in STRINGS]),
    "fixed_size_binary": (pa.binary(11), [b"0123456789a", b"\0" * 11]),
    "decimal128": (pa.decimal128(30, 3), [D("1.500"), D("-123456789012345678901234.567")]),
    "decimal256": (pa.decimal256(60, 2), [D("1.50"), D("-99999999999999999999999999999999999999.25")]),
    "dictionary": (pa.dictionary(pa.int32(), pa.string()), ["a", "b", "abcdefghi"]),
    "struct": (pa.struct([("a", pa.int64()), ("b", pa.string())]), [{"a": 1, "b": None}, {"a": None, "b": "x"}]),
    "list": (pa.list_(pa.int64()), [[], [1], [1, 2], [2, 1], [None]]),
    "large_list": (pa.large_list(pa.string()), [[], ["a", "b"], ["ab"]]),
    "list_view": (pa.list_view(pa.int64()), [[], [1], [1, 2], [2, 1]]),
    "fixed_size_list": (pa.list_(pa.int32(), 2), [[1, 2], [2, 1], [None, 1]]),
    "map": (pa.map_(pa.string(), pa.int64()), [[], [("a", 1)], [("a", 1), ("b", None)]]),
    "deep": (
        pa.list_(pa.struct([("f", pa.float64()), ("d", pa.dictionary(pa.int8(), pa.string()))])),
        [[], [{"f": -0.0, "d": "a"}], [{"f": math.nan, "d": None}, None]],
    ),
}


def random_column(kind: pa.DataType, values: list[Any], rows: int, seed: int) -> pa.Array:
    rng = random.Random(seed)
    return pa.array([rng.choice([*values, None]) for _ in range(rows)], kind)


@pytest.fixture(params=COLUMNS)
def column(request: pytest.FixtureRequest) -> pa.Array:
    return random_column(*COLUMNS[request.param], rows=300, seed=1)


def test_hash_is_what_the_specification_says(column: pa.Array) -> None:
    expected = [fold([word(v, column.type)]) for v in column.to_pylist()]
    assert hash_columns([column]).tolist() == expected


def test_hash_folds_columns_by_position() -> None:
    a, b = pa.array([1, None, 2]), pa.array(["x", "y", None])
    assert hash_columns([a, b]).tolist() == [
        fold([word(x, a.type), word(y, b.type)]) for x, y in zip(a.to_pylist(), b.to_pylist(), strict=True)
    ]
    assert hash_columns([a, b]).tolist() != hash_columns([b, a]).tolist()


def test_hash_golden_values_never_change() -> None:
    assert HASH_VERSION == 1
    golden = {
        "int": pa.array([0, 5, -1, None], pa.int64()),
        "float": pa.array([0.0, 1.5, math.nan], pa.float64()),
        "string": pa.array(["", "a", "user-000017", "x" * 100]),
        "timestamp": pa.array([datetime(2013, 1, 1, tzinfo=UTC)], pa.timestamp("ms", "UTC")),
        "decimal": pa.array([D("-1.50")], pa.decimal128(10, 2)),
        "list": pa.array([[], [1, 2]]),
    }
    assert {k: [f"{h:016x}" for h in hash_columns([v]).tolist()] for k, v in golden.items()} == GOLDEN


GOLDEN = {
    "int": ["e220a8397b1dcdaf", "63033b0ca389c35a", "e4d971771b652c20", "a7b77319d39f7883"],
    "float": ["e220a8397b1dcdaf", "d6dab18e1392608a", "c72971d82e15bb46"],
    "string": ["e220a8397b1dcdaf", "0e2122a08c39f77a", "a4ebe0fbefca7db3", "596c90ab02680d5c"],
    "timestamp": ["41fe4e6d155997a5"],
    "decimal": ["11fe8e8b189a62c9"],
    "list": ["e220a8397b1dcdaf", "2f795372f7adf87c"],
}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.timestamp("us", "Europe/Berlin"), [datetime(2020, 1, 1, tzinfo=UTC), datetime(1960, 1, 1, tzinfo=UTC)]),
        (pa.timestamp("ns"), [datetime(2020, 1, 1)]),  # noqa: DTZ001
        (pa.date32(), [date(2020, 1, 1), date(1950, 1, 1)]),
        (pa.date64(), [date(2020, 1, 1)]),
        (pa.time32("s"), [time(1, 2, 3)]),
        (pa.time64("us"), [time(1, 2, 3, 4)]),
        (pa.duration("ms"), [timedelta(seconds=-5)]),
        (pa.decimal32(5, 2), [D("-1.50")]),
        (pa.decimal64(12, 2), [D("-1.50")]),
    ],
    ids=str,
)
def test_times_and_small_decimals_hash_as_their_integers(kind: pa.DataType, values: list[Any]) -> None:
    array = pa.array([*values, None], kind)
    integers = array.view(pa.int32() if kind.bit_width == 32 else pa.int64()).cast(pa.int64())
    assert hash_columns([array]).tolist() == hash_columns([integers]).tolist()


def test_month_day_nano_intervals_hash_and_compare() -> None:
    a = pa.array([pa.MonthDayNano([1, 2, 3]), pa.MonthDayNano([1, 2, 4]), None])
    assert len(set(hash_columns([a]).tolist())) == 3
    assert rows_equal([a], [a.take(pa.array([0, 0, 2]))]).tolist() == [True, False, True]


def test_hash_does_not_depend_on_slicing_or_chunk_borders(column: pa.Array) -> None:
    whole = hash_columns([column])
    for start, length in [(0, 300), (1, 299), (7, 100), (299, 1), (300, 0)]:
        part = column.slice(start, length)
        assert hash_columns([part]).tolist() == whole[start : start + length].tolist()
        assert hash_columns([part.slice(0, length // 2)]).tolist() == whole[start : start + length // 2].tolist()


def test_hash_of_more_rows_than_one_block_equals_the_hash_of_its_parts() -> None:
    rng = np.random.default_rng(3)
    rows = 100_000
    columns = [
        pa.array(rng.integers(-(2**62), 2**62, rows), mask=rng.random(rows) < 0.1),
        pa.array([f"k{i}" * (i % 30) for i in rng.integers(0, 5000, rows)]),
    ]
    whole = hash_columns(columns)
    parts = [hash_columns([c.slice(i, 777) for c in columns]) for i in range(0, rows, 777)]
    assert whole.tolist() == np.concatenate(parts).tolist()


def test_garbage_under_nulls_and_after_the_last_string_does_not_reach_the_hash() -> None:
    valid = pa.py_buffer(b"\x05")  # rows 0 and 2
    a = pa.Array.from_buffers(pa.int64(), 3, [valid, pa.py_buffer(np.array([1, 99, 3]).tobytes())])
    assert hash_columns([a]).tolist() == hash_columns([pa.array([1, None, 3])]).tolist()
    offsets = pa.py_buffer(np.array([0, 2, 4, 5], dtype=np.int32).tobytes())
    for slack in (b"", b"?", b"????????????"):
        s = pa.Array.from_buffers(pa.string(), 3, [valid, offsets, pa.py_buffer(b"abXXc" + slack)])
        assert hash_columns([s]).tolist() == hash_columns([pa.array(["ab", None, "c"])]).tolist()


def test_one_very_long_string_among_short_ones_is_hashed_in_one_go() -> None:
    values = ["a", "b" * 3_000_000, "", "c"]
    assert hash_columns([pa.array(values)]).tolist() == [fold([word(v, pa.string())]) for v in values]


def test_hash_is_the_same_for_every_layout_of_a_value() -> None:
    values = ["a", None, "abcdefghijk", "a"]
    layouts = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
    hashes = [hash_columns([pa.array(values, kind)]).tolist() for kind in layouts]
    hashes.append(hash_columns([pc.run_end_encode(pa.array(values))]).tolist())
    assert all(h == hashes[0] for h in hashes)
    integers = [hash_columns([pa.array([5, -7], kind)]).tolist() for kind in (pa.int8(), pa.int32(), pa.int64())]
    assert integers[0] == integers[1] == integers[2]


def test_hash_spreads_dense_and_similar_keys_evenly() -> None:
    rows = 1 << 16
    for array in (
        pa.array(range(rows)),
        pa.array([i << 40 for i in range(rows)], pa.uint64()),
        pa.array([float(i) for i in range(rows)]),
        pa.array([f"user-{i:08d}" for i in range(rows)]),
        pa.array([[i, i + 1] for i in range(rows)]),
    ):
        hashes = hash_columns([array])
        assert len(np.unique(hashes)) == rows
        for bits in (hashes >> np.uint64(58), hashes & np.uint64(63)):
            counts = np.bincount(bits.astype(np.int64), minlength=64)
            assert abs(counts - rows / 64).max() < 6 * math.sqrt(rows / 64)


def test_hasher_keeps_the_highest_bits_only() -> None:
    batch = pa.record_batch({"a": list(range(1000)), "b": ["x"] * 1000})
    full = Hasher().hash(batch, ["a", "b"])
    assert full.tolist() == hash_columns(batch.columns).tolist()
    assert full.tolist() != Hasher().hash(batch, ["b", "a"]).tolist()
    few = Hasher(bits=3).hash(batch, ["a", "b"])
    assert (few == full & np.uint64(7 << 61)).all()
    assert len(np.unique(few)) == 8
    assert not Hasher(bits=0).hash(batch, ["a"]).any()
    assert not Hasher().hash(batch, []).any()
    with pytest.raises(ValueError, match="between 0 and 64, not 65"):
        Hasher(bits=65)


def test_unions_are_refused_by_name() -> None:
    union = pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])])
    with pytest.raises(TypeError, match="union"):
        canonicalise(pa.record_batch({"u": union}))
    with pytest.raises(TypeError, match="union"):
        hash_columns([union])


def test_empty_and_uneven_columns() -> None:
    for kind, _ in COLUMNS.values():
        assert len(hash_columns([pa.array([], kind)])) == 0
        assert len(rows_equal([pa.array([], kind)], [pa.array([], kind)])) == 0
    assert hash_columns([pa.nulls(2)]).tolist() == [fold([NULL])] * 2
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        hash_columns([pa.array([1]), pa.array([1, 2])])
    with pytest.raises(ValueError, match="lengths"):
        rows_equal([pa.array([1])], [pa.array([1, 2])])
    with pytest.raises(TypeError, match="int64 with keys of type string"):
        rows_equal([pa.array([1])], [pa.array(["1"])])


# --- canonical form ---


def test_canonicalise_keeps_values_and_gives_the_canonical_schema(column: pa.Array) -> None:
    for array in (column, column.slice(13, 200)):
        batch = pa.record_batch([array], schema=pa.schema([pa.field("c", array.type, metadata={"k": "v"})], {"m": "1"}))
        result = canonicalise(batch)
        result.validate(full=True)
        assert result.schema.equals(canonical_schema(batch.schema), check_metadata=True)
        assert result.schema.field("c").metadata == {b"k": b"v"}
        assert repr(result.column(0).to_pylist()).replace("-0.0", "0.0") == repr(array.to_pylist()).replace(
            "-0.0", "0.0"
        )
        assert hash_columns(result.columns).tolist() == hash_columns([array]).tolist()
        assert canonicalise(result) is result


def test_canonical_types_are_plain_all_the_way_down() -> None:
    schema = pa.schema(
        [
            pa.field("a", pa.dictionary(pa.int8(), pa.large_string()), nullable=False),
            ("b", pa.large_list(pa.struct([("x", pa.string_view())]))),
            ("c", pa.map_(pa.large_string(), pa.binary_view())),
            ("d", pa.list_(pa.dictionary(pa.int8(), pa.float32()), 3)),
            ("e", pa.timestamp("ms", "Europe/Berlin")),
        ]
    )
    assert canonical_schema(schema) == pa.schema(
        [
            pa.field("a", pa.string(), nullable=False),
            ("b", pa.list_(pa.struct([("x", pa.string())]))),
            ("c", pa.map_(pa.string(), pa.binary())),
            ("d", pa.list_(pa.float32(), 3)),
            ("e", pa.timestamp("ms", "Europe/Berlin")),
        ]
    )


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_floats_get_one_nan_and_one_zero(kind: pa.DataType) -> None:
    numpy_kind = kind.to_pandas_dtype()
    values = np.array([-0.0, 0.0, np.nan, -np.nan, 1.5, 0.0], dtype=numpy_kind)
    array = pa.array(values, kind, mask=np.array([False] * 5 + [True]))
    result = canonicalise(pa.record_batch({"f": array})).column(0)
    expected = np.array([0.0, 0.0, np.nan, np.nan, 1.5], dtype=numpy_kind)
    assert result.slice(0, 5).to_numpy(zero_copy_only=False).tobytes() == expected.tobytes()
    assert result.is_null().to_pylist() == [False] * 5 + [True]


def test_only_the_named_keys_have_their_floats_changed() -> None:
    batch = pa.record_batch({"k": [-0.0], "v": [-0.0], "s": pa.array(["a"], pa.large_string())})
    result = canonicalise(batch, keys=["k"])
    assert [math.copysign(1, result.column(i)[0].as_py()) for i in (0, 1)] == [1.0, -1.0]
    assert result.schema.field("s").type == pa.string()


def test_nothing_to_change_means_no_copy() -> None:
    batch = pa.record_batch({"a": [1, None], "b": ["x", "y"], "f": [0.5, math.nan], "l": [[1.0], None]})
    assert canonicalise(batch) is batch
    half = pa.record_batch({"a": [1, None], "b": pa.array(["x", "y"], pa.large_string())})
    assert canonicalise(half).column(0).buffers()[1].address == half.column(0).buffers()[1].address


# --- equality ---


def same_value(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, float | np.floating) and isinstance(b, float | np.floating) and math.isnan(a):
        return math.isnan(b)
    return bool(a == b)


@pytest.mark.parametrize("name", COLUMNS)
def test_rows_equal_agrees_with_comparing_values(name: str) -> None:
    a = random_column(*COLUMNS[name], rows=400, seed=2).slice(3, 380)
    b = random_column(*COLUMNS[name], rows=400, seed=3).slice(11, 380)
    expected = [same_value(x, y) for x, y in zip(a.to_pylist(), b.to_pylist(), strict=True)]
    assert rows_equal([a], [b]).tolist() == expected
    assert 0 < sum(expected) < 380
    assert rows_equal([a], [a]).all()
    assert (hash_columns([a]) == hash_columns([b])).tolist() == expected


def test_rows_equal_needs_all_columns_equal_and_ignores_the_layout() -> None:
    a = [pa.array([1, 1, None]), pa.array(["x", "y", "z"])]
    b = [pa.array([1, 2, None]), pa.array(["x", "y", "z"]).dictionary_encode()]
    assert rows_equal(a, b).tolist() == [True, False, True]
    b[1] = pa.array(["x", "y", "other"], pa.string_view())
    assert rows_equal(a, b).tolist() == [True, False, False]
