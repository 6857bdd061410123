import struct

import pytest

from statebackend.errors import CorruptionError, UnsupportedFormatError
from statebackend.format import ObjectKind, checksum, decode, encode

VALUE = {"a": [1, 2.5, None, True], "b": b"\x00\xff", "c": {"d": "ü"}}


def test_what_was_encoded_comes_back() -> None:
    assert decode(ObjectKind.MANIFEST, encode(ObjectKind.MANIFEST, VALUE), "m") == VALUE


def test_every_truncation_is_a_corruption_that_names_the_object() -> None:
    data = encode(ObjectKind.MANIFEST, VALUE)
    for size in range(len(data)):
        with pytest.raises(CorruptionError, match="the-object"):
            decode(ObjectKind.MANIFEST, data[:size], "the-object")


def test_every_flipped_bit_is_a_corruption() -> None:
    data = encode(ObjectKind.MANIFEST, VALUE)
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptionError):
            decode(ObjectKind.MANIFEST, bytes(damaged), "m")


def test_a_newer_version_is_refused_with_both_numbers() -> None:
    payload = b"\x80"
    header = struct.pack("<4sBBHQ", b"SBK\x01", ObjectKind.MANIFEST, 0, 77, len(payload))
    data = header + struct.pack("<Q", checksum(header, payload)) + payload
    with pytest.raises(UnsupportedFormatError, match=r"m: format version 77 .* up to 1"):
        decode(ObjectKind.MANIFEST, data, "m")


def test_an_object_of_another_kind_is_refused() -> None:
    with pytest.raises(CorruptionError, match="kind 2"):
        decode(ObjectKind.MANIFEST, encode(ObjectKind.SSTABLE_INDEX, VALUE), "m")
