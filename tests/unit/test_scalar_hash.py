"""One key in plain Python has the hash that `hash_columns` gives it."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pytest

from statebackend.keys import hash_columns
from statebackend.scalar_hash import fold_words, word_function

RNG = random.Random(7)
VALUES: dict[pa.DataType, list[Any]] = {
    pa.int8(): [None, -128, -1, 0, 127],
    pa.int64(): [None, -(1 << 63), -1, 0, 1, (1 << 63) - 1],
    pa.uint64(): [None, 0, (1 << 64) - 1],
    pa.bool_(): [None, False, True],
    pa.string(): [None, "", "a", "12345678", "ü" * 5, "x" * 200],
    pa.binary(): [None, *(RNG.randbytes(n) for n in (*range(20), 63, 64, 65, 300))],
}


@pytest.mark.parametrize("kind", VALUES, ids=str)
def test_every_value_has_its_hash(kind: pa.DataType) -> None:
    word = word_function(kind)
    assert word is not None
    expected = hash_columns([pa.array(VALUES[kind], kind)]).tolist()
    assert [fold_words([word(v)]) for v in VALUES[kind]] == expected


def test_the_words_of_several_columns_are_folded_in_order() -> None:
    strings, numbers = ["a", None, "b"], [1, 2, None]
    expected = hash_columns([pa.array(strings), pa.array(numbers)]).tolist()
    text, number = word_function(pa.string()), word_function(pa.int64())
    assert text is not None
    assert number is not None
    assert [fold_words([text(s), number(n)]) for s, n in zip(strings, numbers, strict=True)] == expected


@pytest.mark.parametrize("kind", [pa.float64(), pa.date32(), pa.list_(pa.int64()), pa.decimal128(5, 2)], ids=str)
def test_types_without_a_short_way_say_so(kind: pa.DataType) -> None:
    assert word_function(kind) is None
