"""A filter that knows which keys a file does not hold: a split block Bloom filter.

The one of the Parquet format (``BloomFilter.md`` there; after Putze, Sanders, Singler, "Cache-, hash- and
space-efficient Bloom filters"). A key sets one bit in each of the eight 32-bit words of one block of 256 bits, so
that a probe touches one place in memory; at 10 bits per key about one missing key in a hundred seems to be there.

With x the 64-bit hash of the key after another round of mixing (the hashes of one file may share their high bits)::

    block  = (x >> 32) * blocks >> 32
    bit i  = (low 32 bits of x * SALT[i] mod 2**32) >> 27      for each of the eight words i

A filter never denies a key that was added.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from statebackend import format as envelope
from statebackend.errors import CorruptionError
from statebackend.keys import distinct, mix_word, mix_words

__all__ = ["BloomFilter"]

_SALT = (0x47B6137B, 0x44974D91, 0x8824AD5B, 0xA2B7289D, 0x705495C7, 0x2DF1424B, 0x9EFC4947, 0x5C6BFB31)
_SALTS = np.array(_SALT, dtype=np.uint32)
_BLOCK_BITS, _BLOCK_BYTES = 256, 32
_CHUNK = 1 << 14  # keys that are built or probed at once: eight words each
_LOW = np.uint64((1 << 32) - 1)
_HALF = np.uint64(32)


class BloomFilter:
    """See the module. Immutable; thread-safe."""

    __slots__ = ("_bytes", "_words")

    def __init__(self, words: npt.NDArray[np.uint32]) -> None:
        self._words = words
        self._bytes: memoryview = words.reshape(-1).view(np.uint8).data.toreadonly()

    @classmethod
    def of(cls, hashes: npt.NDArray[np.uint64], bits_per_key: int) -> BloomFilter:
        """The filter of some hashes; equal ones count once."""
        mixed = distinct(mix_words(hashes))
        words = np.zeros((max(1, -(-len(mixed) * bits_per_key // _BLOCK_BITS)), 8), dtype="<u4")
        for start in range(0, len(mixed), _CHUNK):
            blocks, masks = _places(mixed[start : start + _CHUNK], len(words))
            first = np.flatnonzero(np.append(True, blocks[1:] != blocks[:-1]))  # sorted, as the hashes are
            words[blocks[first]] |= np.bitwise_or.reduceat(masks, first, axis=0)
        return cls(words)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self._words.nbytes

    def may_hold(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """For each hash: False if it was certainly not added."""
        found = np.empty(len(hashes), dtype=np.bool_)
        for start in range(0, len(hashes), _CHUNK):
            blocks, masks = _places(mix_words(hashes[start : start + _CHUNK]), len(self._words))
            masks &= ~self._words[blocks]
            # Eight words without a missing bit are four wide zeros.
            missing = masks.view(np.uint64)
            missing[:, :2] |= missing[:, 2:]
            found[start : start + _CHUNK] = (missing[:, 0] | missing[:, 1]) == 0
        return found

    def may_hold_one(self, hash_: int) -> bool:
        """The same for one hash, without numpy: a few microseconds less."""
        x = mix_word(hash_)
        block = (x >> 32) * len(self._words) >> 32
        held = int.from_bytes(self._bytes[block * _BLOCK_BYTES : (block + 1) * _BLOCK_BYTES], "little")
        low = x & 0xFFFFFFFF
        for salt in _SALT:
            if not held >> ((low * salt & 0xFFFFFFFF) >> 27) & 1:
                return False
            held >>= 32
        return True

    def encode(self) -> bytes:
        """The filter as an object of kind ``SSTABLE_FILTER``."""
        return envelope.encode(envelope.ObjectKind.SSTABLE_FILTER, {"words": self._words.tobytes()})

    @classmethod
    def decode(cls, data: bytes, name: str) -> BloomFilter:
        """Read what `encode` wrote; ``name`` of the file, for messages. Raises `CorruptionError`."""
        value = envelope.decode(envelope.ObjectKind.SSTABLE_FILTER, data, name)
        raw = value.get("words") if isinstance(value, dict) else None
        if not isinstance(raw, bytes) or not raw or len(raw) % _BLOCK_BYTES:
            raise CorruptionError(f"{name}: the filter is not a number of blocks of {_BLOCK_BYTES} bytes")
        return cls(np.frombuffer(raw, dtype="<u4").reshape(-1, 8))


def _places(mixed: npt.NDArray[np.uint64], blocks: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
    """The block of every hash, and the bits that it sets in the eight words."""
    at = (mixed >> _HALF) * np.uint64(blocks) >> _HALF
    low = (mixed & _LOW).astype(np.uint32)
    bits = low[:, None] * _SALTS
    bits >>= np.uint32(27)
    return at, np.left_shift(np.uint32(1), bits, out=bits)
