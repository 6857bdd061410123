"""The hash of one key in plain Python: the same numbers as `keys.hash_columns`, without vectorised calls."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, TypeAlias

import pyarrow as pa

from statebackend.keys import GOLDEN, NULL_WORD, mix_word

__all__ = ["WordOf", "fold_words", "word_function"]

WordOf: TypeAlias = Callable[[Any], int]
"""The word of one value, as specified in ``keys.py``."""

_MASK = (1 << 64) - 1


def word_function(kind: pa.DataType) -> WordOf | None:
    """How values of a canonical type become words, given as Python gives them; None for types without a short way."""
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return _integer_word
    if pa.types.is_string(kind):
        return _string_word
    if pa.types.is_binary(kind):
        return _bytes_word
    return None


def fold_words(words: list[int]) -> int:
    """The hash of a key of these words."""
    hash_ = 0
    for word in words:
        hash_ = mix_word(hash_ ^ word)
    return hash_


def _integer_word(value: int | None) -> int:
    return NULL_WORD if value is None else value & _MASK


def _string_word(value: str | None) -> int:
    return NULL_WORD if value is None else _bytes_word(value.encode())


def _bytes_word(value: bytes | None) -> int:
    if value is None:
        return NULL_WORD
    length = len(value)
    count = (length + 7) // 8
    total, place = length, 0
    for word in struct.unpack(f"<{count}Q", value.ljust(8 * count, b"\0")):
        total += mix_word(word + place)
        place += GOLDEN
    return mix_word(total - GOLDEN)
