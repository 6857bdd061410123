"""Avro records decoded column by column, all records at once.

An Avro record is its fields one after the other, without marks in between. So there is a place in each record, and a
field is read at the places of all records with a few array operations, which moves them all on. Nothing here goes
record by record; a list is read item by item, its n-th in all records at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from operators.formats.avro_types import (
    AvroArray,
    AvroEnum,
    AvroFixed,
    AvroMap,
    AvroPrimitive,
    AvroRecord,
    AvroType,
    AvroUnion,
    arrow_type,
)
from operators.formats.base import FormatError
from operators.windows import Int64Array

__all__ = ["AvroColumns"]

_VARINT_BYTES = 10
_INT32 = 1 << 31
_DECIMAL_BYTES = 16


class AvroColumns:
    """Records in ``values``, each beginning after ``skip`` bytes.

    Every method raises `FormatError` if a record is not what its type says.
    """

    def __init__(self, values: Sequence[bytes], skip: int = 0) -> None:
        lengths = np.fromiter(map(len, values), np.int64, len(values))
        self._data = np.frombuffer(b"".join(values), np.uint8)
        self._ends = np.cumsum(lengths)
        # Where the next field of each record begins.
        self._at = self._ends - lengths + skip

    def read(self, record: AvroRecord) -> list[pa.Array]:
        """A column for each field, of all records, which have to end there."""
        every = np.arange(len(self._at))
        columns = [self._read(f.type, every) for f in record.fields]
        if (self._at != self._ends).any():
            raise FormatError("bytes are left over: it was written with another schema")
        return columns

    def _read(self, kind: AvroType, rows: Int64Array) -> pa.Array:
        """The values of a type, of the records of these numbers."""
        match kind:
            case AvroPrimitive():
                return self._primitive(kind, rows)
            case AvroFixed():
                return self._fixed(kind, rows)
            case AvroEnum():
                return self._enum(kind, rows)
            case AvroUnion():
                return self._union(kind, rows)
            case AvroRecord():
                children = [self._read(f.type, rows) for f in kind.fields]
                return _struct(children, arrow_type(kind), len(rows))
            case AvroArray():
                offsets, items = self._blocks(rows, arrow_type(kind.items), lambda some: self._read(kind.items, some))
                return pa.ListArray.from_arrays(offsets, items)
            case AvroMap():
                return self._map(kind, rows)

    # -- numbers

    def _longs(self, rows: Int64Array) -> Int64Array:
        """Numbers of variable length, in zigzag order."""
        at, ends = self._at[rows], self._ends[rows]
        found = np.zeros(len(rows), np.uint64)
        going = np.arange(len(rows))
        for step in range(_VARINT_BYTES):
            places = at[going]
            if (places >= ends[going]).any():
                raise FormatError("it ends too early")
            byte = self._data[places]
            found[going] |= (byte & 0x7F).astype(np.uint64) << np.uint64(7 * step)
            at[going] += 1
            going = going[byte >= 0x80]
            if not len(going):
                break
        else:
            raise FormatError("a number is too long")
        self._at[rows] = at
        return (found >> np.uint64(1)).astype(np.int64) ^ -(found & np.uint64(1)).astype(np.int64)

    def _within(self, rows: Int64Array, high: int, what: str) -> Int64Array:
        found = self._longs(rows)
        if ((found < 0) | (found >= high)).any():
            raise FormatError(f"{what} is none of {high}")
        return found

    # -- values

    def _primitive(self, kind: AvroPrimitive, rows: Int64Array) -> pa.Array:
        match kind.name:
            case "null":
                return pa.nulls(len(rows))
            case "boolean":
                raw = self._cells(rows, 1)[:, 0]
                if (raw > 1).any():
                    raise FormatError("a boolean is neither 0 nor 1")
                return pa.array(raw.astype(bool))
            case "int" | "long":
                return self._integers(kind, rows)
            case "float":
                return pa.array(self._cells(rows, 4).view("<f4")[:, 0])
            case "double":
                return pa.array(self._cells(rows, 8).view("<f8")[:, 0])
        lengths = self._longs(rows)
        if pa.types.is_decimal(kind.arrow):
            return self._decimals(kind.arrow, rows, lengths)
        raw = self._bytes(rows, lengths)
        try:
            return raw.cast(kind.arrow)
        except pa.ArrowInvalid as error:
            raise FormatError("no UTF-8 text") from error

    def _integers(self, kind: AvroPrimitive, rows: Int64Array) -> pa.Array:
        found = self._longs(rows)
        if kind.name == "long":
            return pa.array(found).view(kind.arrow)
        if ((found < -_INT32) | (found >= _INT32)).any():
            raise FormatError("an int has more than 32 bits")
        return pa.array(found.astype(np.int32)).view(kind.arrow)

    def _fixed(self, kind: AvroFixed, rows: Int64Array) -> pa.Array:
        if pa.types.is_decimal(kind.arrow):
            return self._decimals(kind.arrow, rows, np.full(len(rows), kind.size, np.int64))
        cells = np.ascontiguousarray(self._cells(rows, kind.size))
        return pa.Array.from_buffers(kind.arrow, len(rows), [None, pa.py_buffer(cells)])

    def _enum(self, kind: AvroEnum, rows: Int64Array) -> pa.Array:
        numbers = self._within(rows, len(kind.symbols), "an enum")
        return pa.array(kind.symbols, pa.string()).take(pa.array(numbers))

    def _union(self, kind: AvroUnion, rows: Int64Array) -> pa.Array:
        branches = self._within(rows, kind.branches, "a union")
        there = branches != kind.null if kind.null is not None else np.ones(len(rows), bool)
        values = self._read(kind.inner, rows[there])
        if there.all():
            return values
        # The value of a row is that of the number of values before it.
        return values.take(pa.array(np.cumsum(there) - 1, mask=~there))

    def _take(self, rows: Int64Array, lengths: Int64Array) -> Int64Array:
        """Where these bytes begin; moves on behind them."""
        starts = self._at[rows]
        if (lengths < 0).any() or (lengths > self._ends[rows] - starts).any():
            raise FormatError("it ends too early")
        self._at[rows] = starts + lengths
        return starts

    def _cells(self, rows: Int64Array, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """So many bytes of each record."""
        starts = self._take(rows, np.full(len(rows), size, np.int64))
        cells: np.ndarray[Any, np.dtype[np.uint8]] = self._data[starts[:, None] + np.arange(size)]
        return cells

    def _bytes(self, rows: Int64Array, lengths: Int64Array) -> pa.Array:
        starts = self._take(rows, lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(self._data[places])]
        return pa.Array.from_buffers(pa.binary(), len(rows), buffers)

    def _decimals(self, kind: pa.DataType, rows: Int64Array, lengths: Int64Array) -> pa.Array:
        """Integers in two's complement, the highest byte first; made sixteen bytes, the lowest first."""
        if (lengths > _DECIMAL_BYTES).any() or (lengths == 0).any():
            raise FormatError("a decimal has no bytes, or more than 16")
        starts = self._take(rows, lengths)
        negative = self._data[starts] >= 0x80
        cells = np.where(negative[:, None], np.uint8(0xFF), np.uint8(0)).repeat(_DECIMAL_BYTES, axis=1)
        for place in range(int(lengths.max(initial=0))):
            has = lengths > place
            cells[has, place] = self._data[(starts + lengths - 1 - place)[has]]
        made = pa.Array.from_buffers(kind, len(rows), [None, pa.py_buffer(np.ascontiguousarray(cells))])
        try:
            made.validate(full=True)
        except pa.ArrowInvalid as error:
            raise FormatError("a decimal has too many digits") from error
        return made

    # -- lists

    def _blocks(
        self, rows: Int64Array, kind: pa.DataType, read: Callable[[Int64Array], pa.Array]
    ) -> tuple[pa.Array, pa.Array]:
        """Offsets and items of lists, which come in blocks: a count and so many items, up to a count of zero.

        A negative count is followed by the size of the block in bytes.
        """
        pieces: list[pa.Array] = []
        owners: list[Int64Array] = []
        going = np.arange(len(rows))
        while len(going):
            counts = self._longs(rows[going])
            sized = counts < 0
            if sized.any():
                self._longs(rows[going[sized]])
                counts = np.abs(counts)
            if (counts > self._ends[rows[going]] - self._at[rows[going]]).any():
                raise FormatError("a list is longer than its record")
            going, counts = going[counts != 0], counts[counts != 0]
            for number in range(int(counts.max(initial=0))):
                owners.append(going[counts > number])
                pieces.append(read(rows[owners[-1]]))
        if not pieces:
            return pa.array(np.zeros(len(rows) + 1, np.int32)), pa.array([], kind)
        owner = np.concatenate(owners)
        order = np.argsort(owner, kind="stable")
        lengths = np.bincount(owner, minlength=len(rows))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.array(offsets), pa.concat_arrays(pieces).take(pa.array(order))

    def _map(self, kind: AvroMap, rows: Int64Array) -> pa.Array:
        text = AvroPrimitive("string", pa.string())
        entry = pa.struct([pa.field("key", pa.string()), pa.field("value", arrow_type(kind.values))])

        def read(some: Int64Array) -> pa.Array:
            return _struct([self._read(text, some), self._read(kind.values, some)], entry, len(some))

        offsets, entries = self._blocks(rows, entry, read)
        return pa.MapArray.from_arrays(offsets, entries.field(0), entries.field(1))


def _struct(children: Sequence[pa.Array], kind: pa.DataType, count: int) -> pa.Array:
    if not children:
        return pa.array([{}] * count, kind)
    return pa.StructArray.from_arrays(children, fields=list(kind))
