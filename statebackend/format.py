"""The envelope of every object that is not an Arrow file: magic, kind, version, checksum, msgpack.

::

    offset  size  field
    0       4     magic "SBK\\x01"
    4       1     kind, see `ObjectKind`
    5       1     zero
    6       2     version of this kind, little-endian
    8       8     length of the payload in bytes, little-endian
    16      8     xxh3-64 over bytes 0..16 and the payload, little-endian
    24      n     payload, one msgpack value

Nothing read from a store is ever executed: msgpack carries plain values only, no extension types.
A newer version is refused with both numbers in the message.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any

import msgpack
import xxhash

from statebackend.errors import CorruptionError, UnsupportedFormatError

__all__ = ["MANIFEST_VERSION", "SSTABLE_VERSION", "ObjectKind", "checksum", "decode", "encode"]

# DO NOT CHANGE THESE VALUES: they are in every object that was ever written. A retired number
# stays listed.
MAGIC = b"SBK\x01"
MANIFEST_VERSION = 1
SSTABLE_VERSION = 1
FILTER_VERSION = 1

_HEADER = struct.Struct("<4sBBHQ")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size


class ObjectKind(IntEnum):
    """What an object is. DO NOT CHANGE: stored in every envelope."""

    MANIFEST = 1
    SSTABLE_INDEX = 2
    SSTABLE_FILTER = 3


_VERSIONS = {
    ObjectKind.MANIFEST: MANIFEST_VERSION,
    ObjectKind.SSTABLE_INDEX: SSTABLE_VERSION,
    ObjectKind.SSTABLE_FILTER: FILTER_VERSION,
}


def checksum(*parts: bytes | memoryview) -> int:
    """xxh3-64 over the concatenation of ``parts``."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


def encode(kind: ObjectKind, value: Any) -> bytes:
    """Wrap a plain value (None, bool, int, float, str, bytes, list, dict) in an envelope."""
    payload: bytes = msgpack.packb(value, use_bin_type=True)
    header = _HEADER.pack(MAGIC, kind, 0, _VERSIONS[kind], len(payload))
    return b"".join((header, _CHECKSUM.pack(checksum(header, payload)), payload))


def decode(kind: ObjectKind, data: bytes, name: str) -> Any:
    """Unwrap an envelope; ``name`` is the object's name, for messages.

    Raises `UnsupportedFormatError` for a newer version and `CorruptionError` for anything else
    that is not exactly what `encode` wrote.
    """
    if len(data) < HEADER_BYTES:
        raise CorruptionError(f"{name}: truncated: {len(data)} bytes, the header alone has {HEADER_BYTES}")
    magic, found_kind, zero, version, length = _HEADER.unpack_from(data)
    if magic != MAGIC or zero != 0:
        raise CorruptionError(
            f"{name}: not an object of a state store: it begins with {data[:6]!r}, expected {MAGIC!r}"
        )
    payload = data[HEADER_BYTES:]
    if length != len(payload):
        raise CorruptionError(f"{name}: truncated or extended: payload of {len(payload)} bytes, expected {length}")
    expected = _CHECKSUM.unpack_from(data, _HEADER.size)[0]
    found = checksum(data[: _HEADER.size], payload)
    if found != expected:
        raise CorruptionError(f"{name}: checksum is {found:016x}, expected {expected:016x}")
    if found_kind != kind:
        raise CorruptionError(f"{name}: object of kind {found_kind}, expected {kind.name} ({int(kind)})")
    if version > _VERSIONS[kind]:
        raise UnsupportedFormatError(
            f"{name}: format version {version} of {kind.name}; this library reads up to {_VERSIONS[kind]}: upgrade it"
        )
    try:
        return msgpack.unpackb(payload, raw=False, strict_map_key=False)
    except Exception as error:  # msgpack raises many kinds, ValueError and its own among them
        raise CorruptionError(f"{name}: payload is not msgpack: {error}") from error
