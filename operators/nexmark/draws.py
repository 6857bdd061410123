"""Random numbers and strings as a pure function of (seed, event number, lane).

A *lane* is one use of randomness: "the price", "the third word of the description". Lane and seed
give a key; the draw for event n is the n-th output of the SplitMix64 generator that starts there
(Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014). So the draws of any
range of events are computed alone, in any order, always the same.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["Draws", "Int64Array", "letter_pool"]

Int64Array: TypeAlias = npt.NDArray[np.int64]
_UInt64Array: TypeAlias = npt.NDArray[np.uint64]
_ByteArray: TypeAlias = npt.NDArray[np.uint8]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_EVEN_BYTES = np.uint64(0x00FF00FF00FF00FF)
_ODD_BYTES = np.uint64(0xFF00FF00FF00FF00)
_LETTER_A = np.uint64(0x6161616161616161)
_LETTERS = np.uint64(26)
_DIGIT_0 = 48
_SPACE = 32
_WORD = 8
_LANE_BITS = 16
_SPACES = 1 << 15  # lanes of users lie below


class Draws:
    """The randomness of some events. ``events``: their numbers, none negative."""

    def __init__(self, seed: int, events: Int64Array) -> None:
        self._seed = np.uint64(seed % (1 << 64))
        self._steps: _UInt64Array = events.astype(np.uint64) * _GOLDEN

    def __len__(self) -> int:
        return len(self._steps)

    def below(self, bound: int | Int64Array, lane: int) -> Int64Array:
        """Integers from 0 to ``bound`` - 1; ``bound`` is 1 to 2**31, one for all or one for each event."""
        # Multiply and shift: off from uniform by less than bound / 2**32.
        bounds = np.asarray(bound, dtype=np.uint64)
        return (((self._words(lane) >> np.uint64(32)) * bounds) >> np.uint64(32)).astype(np.int64)

    def fraction(self, lane: int) -> npt.NDArray[np.float64]:
        """Floats from 0 up to, without, 1, with 53 random bits."""
        return (self._words(lane) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def letters(self, lengths: Int64Array, lane: int, *, spaces: bool = False) -> pa.Array:
        """Strings of random lower-case letters of these lengths; with ``spaces``, one in 13 inside is a space."""
        words = max(1, -(-int(lengths.max(initial=0)) // _WORD))
        letters = self._letter_matrix(words, lane)
        if spaces:
            letters = self._with_spaces(letters, lengths, lane)
        return _ragged(letters, lengths)

    def digits(self, pattern: str, lane: int) -> pa.Array:
        """Strings like ``pattern`` with a random digit in place of each ``0``."""
        rows = np.tile(np.frombuffer(pattern.encode(), dtype=np.uint8), (len(self), 1))
        for word, at in enumerate(i for i, c in enumerate(pattern) if c == "0"):
            rows[:, at] = _DIGIT_0 + self.below(10, lane + (word << _LANE_BITS))
        return _ragged(rows, np.full(len(self), len(pattern), dtype=np.int64))

    def _letter_matrix(self, words: int, lane: int) -> _ByteArray:
        """``8 * words`` letters for each event. A letter comes from one byte: a is as likely as z to 10 %."""
        random = self._words(*(lane + (word << _LANE_BITS) for word in range(words)))
        even = random & _EVEN_BYTES
        even *= _LETTERS
        even >>= np.uint64(8)
        even &= _EVEN_BYTES
        random >>= np.uint64(8)
        random &= _EVEN_BYTES
        random *= _LETTERS
        random &= _ODD_BYTES
        random |= even
        random += _LETTER_A
        # Big-endian machines would give other strings: the order of the bytes is fixed here.
        return random.astype("<u8", copy=False).view(np.uint8).reshape(len(self), words * _WORD)

    def _with_spaces(self, letters: _ByteArray, lengths: Int64Array, lane: int) -> _ByteArray:
        """One in 13 becomes a space, but never an end of the string, which the original trims."""
        words = letters.shape[1] // _WORD
        random = self._words(*(lane + _SPACES + (word << _LANE_BITS) for word in range(words)))
        spaces = random.astype("<u8", copy=False).view(np.uint8).reshape(letters.shape) < 256 / 13
        columns = np.arange(letters.shape[1])
        spaces[:, 0] = False
        spaces &= columns[None, :] < (lengths - 1)[:, None]
        return np.where(spaces, np.uint8(_SPACE), letters)

    def _words(self, *lanes: int) -> _UInt64Array:
        """64 random bits for each event; for several lanes a matrix, one column for each."""
        keys = np.array(lanes, dtype=np.uint64)
        keys *= _GOLDEN
        keys = _mixed(_mixed(keys) ^ self._seed)
        return _mixed(self._steps + keys[0] if len(lanes) == 1 else self._steps[:, None] + keys[None, :])


def letter_pool(seed: int, count: int, length: int, lane: int) -> list[str]:
    """``count`` strings of ``length`` letters that depend on the seed alone."""
    draws = Draws(seed, np.arange(count, dtype=np.int64))
    pool: list[str] = draws.letters(np.full(count, length, dtype=np.int64), lane).to_pylist()
    return pool


def _mixed(words: _UInt64Array) -> _UInt64Array:
    """The output function of SplitMix64; overwrites its argument."""
    words ^= words >> np.uint64(30)
    words *= _MIX_1
    words ^= words >> np.uint64(27)
    words *= _MIX_2
    words ^= words >> np.uint64(31)
    return words


def _ragged(rows: _ByteArray, lengths: Int64Array) -> pa.Array:
    """The first ``lengths[i]`` bytes of each row as a string."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    data = rows[np.arange(rows.shape[1], dtype=np.int32)[None, :] < lengths[:, None]]
    return pa.Array.from_buffers(pa.string(), len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(data)])
