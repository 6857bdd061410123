"""Bytes of many records, read at a place in each: what decoders that go column by column share.

Every method takes the numbers of some records, reads the next value of each of them with a few array operations, and
moves their places on behind it. All raise `FormatError` if a record ends too early.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from operators.formats.base import FormatError
from operators.windows import Int64Array

__all__ = ["Cells", "UInt64Array", "gathered", "struct_of", "text_of"]

UInt64Array = np.ndarray[Any, np.dtype[np.uint64]]

_VARINT_BYTES = 10


class Cells:
    """``at``: where the next value of each record begins in ``data``; ``ends``: where the record ends."""

    def __init__(self, data: np.ndarray[Any, np.dtype[np.uint8]], at: Int64Array, ends: Int64Array) -> None:
        self.data = data
        self.at = at
        self.ends = ends

    def varints(self, rows: Int64Array) -> UInt64Array:
        """Numbers of variable length: seven bits in a byte, the lowest first."""
        at, ends = self.at[rows], self.ends[rows]
        found = np.zeros(len(rows), np.uint64)
        going = np.arange(len(rows))
        for step in range(_VARINT_BYTES):
            places = at[going]
            if (places >= ends[going]).any():
                raise FormatError("it ends too early")
            byte = self.data[places]
            found[going] |= (byte & 0x7F).astype(np.uint64) << np.uint64(7 * step)
            at[going] += 1
            going = going[byte >= 0x80]
            if not len(going):
                break
        else:
            raise FormatError("a number is too long")
        self.at[rows] = at
        return found

    def zigzags(self, rows: Int64Array) -> Int64Array:
        """Signed numbers of variable length: 0, -1, 1, -2, ..."""
        found = self.varints(rows)
        return (found >> np.uint64(1)).astype(np.int64) ^ -(found & np.uint64(1)).astype(np.int64)

    def pass_over(self, rows: Int64Array, lengths: Int64Array) -> Int64Array:
        """Where these bytes begin."""
        starts = self.at[rows]
        if (lengths < 0).any() or (lengths > self.ends[rows] - starts).any():
            raise FormatError("it ends too early")
        self.at[rows] = starts + lengths
        return starts

    def fixed(self, rows: Int64Array, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """So many bytes of each record."""
        starts = self.pass_over(rows, np.full(len(rows), size, np.int64))
        cells: np.ndarray[Any, np.dtype[np.uint8]] = self.data[starts[:, None] + np.arange(size)]
        return cells

    def binary(self, rows: Int64Array, lengths: Int64Array) -> pa.Array:
        """As many bytes of each record as ``lengths`` says."""
        starts = self.pass_over(rows, lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(self.data[places])]
        return pa.Array.from_buffers(pa.binary(), len(rows), buffers)


def text_of(raw: pa.Array) -> pa.Array:
    """Bytes as text; `FormatError` if they are none."""
    try:
        return raw.cast(pa.string())
    except pa.ArrowInvalid as error:
        raise FormatError("no UTF-8 text") from error


def gathered(
    owners: list[Int64Array], pieces: list[pa.Array], count: int, kind: pa.DataType
) -> tuple[pa.Array, pa.Array]:
    """Offsets and items of lists whose items were read one after the other; ``owners``: the list of each item."""
    if not pieces:
        return pa.array(np.zeros(count + 1, np.int32)), pa.array([], kind)
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    lengths = np.bincount(owner, minlength=count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.array(offsets), pa.concat_arrays(pieces).take(pa.array(order))


def struct_of(children: list[pa.Array], kind: pa.DataType, count: int) -> pa.Array:
    """A struct array, also one without fields."""
    if not children:
        return pa.array([{}] * count, kind)
    return pa.StructArray.from_arrays(children, fields=list(kind))
