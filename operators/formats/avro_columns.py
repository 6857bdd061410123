"""Avro records decoded column by column, all records at once.

An Avro record is its fields one after the other, without marks in between. So there is a place in each record, and a
field is read at the places of all records with a few array operations, which moves them all on. Nothing here goes
record by record; a list is read item by item, its n-th in all records at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from operators.formats.cells import Cells, gathered, struct_of, text_of
from operators.windows import Int64Array

__all__ = ["AvroColumns"]

_INT32 = 1 << 31
_DECIMAL_BYTES = 16


class AvroColumns:
    """Records in ``values``, each beginning after ``skip`` bytes.

    Every method raises `FormatError` if a record is not what its type says.
    """

    def __init__(self, values: Sequence[bytes], skip: int = 0) -> None:
        lengths = np.fromiter(map(len, values), np.int64, len(values))
        ends = np.cumsum(lengths)
        self._cells = Cells(np.frombuffer(b"".join(values), np.uint8), ends - lengths + skip, ends)

    def read(self, record: AvroRecord) -> list[pa.Array]:
        """A column for each field, of all records, which have to end there."""
        every = np.arange(len(self._cells.at))
        columns = [self._read(f.type, every) for f in record.fields]
        if (self._cells.at != self._cells.ends).any():
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
                return struct_of(children, arrow_type(kind), len(rows))
            case AvroArray():
                offsets, items = self._blocks(rows, arrow_type(kind.items), lambda some: self._read(kind.items, some))
                return pa.ListArray.from_arrays(offsets, items)
            case AvroMap():
                return self._map(kind, rows)

    # -- values

    def _within(self, rows: Int64Array, high: int, what: str) -> Int64Array:
        found = self._cells.zigzags(rows)
        if ((found < 0) | (found >= high)).any():
            raise FormatError(f"{what} is none of {high}")
        return found

    def _primitive(self, kind: AvroPrimitive, rows: Int64Array) -> pa.Array:
        match kind.name:
            case "null":
                return pa.nulls(len(rows))
            case "boolean":
                raw = self._cells.fixed(rows, 1)[:, 0]
                if (raw > 1).any():
                    raise FormatError("a boolean is neither 0 nor 1")
                return pa.array(raw.astype(bool))
            case "int" | "long":
                return self._integers(kind, rows)
            case "float":
                return pa.array(self._cells.fixed(rows, 4).view("<f4")[:, 0])
            case "double":
                return pa.array(self._cells.fixed(rows, 8).view("<f8")[:, 0])
        lengths = self._cells.zigzags(rows)
        if pa.types.is_decimal(kind.arrow):
            return self._decimals(kind.arrow, rows, lengths)
        raw = self._cells.binary(rows, lengths)
        return text_of(raw) if kind.name == "string" else raw

    def _integers(self, kind: AvroPrimitive, rows: Int64Array) -> pa.Array:
        found = self._cells.zigzags(rows)
        if kind.name == "long":
            return pa.array(found).view(kind.arrow)
        if ((found < -_INT32) | (found >= _INT32)).any():
            raise FormatError("an int has more than 32 bits")
        return pa.array(found.astype(np.int32)).view(kind.arrow)

    def _fixed(self, kind: AvroFixed, rows: Int64Array) -> pa.Array:
        if pa.types.is_decimal(kind.arrow):
            return self._decimals(kind.arrow, rows, np.full(len(rows), kind.size, np.int64))
        cells = np.ascontiguousarray(self._cells.fixed(rows, kind.size))
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

    def _decimals(self, kind: pa.DataType, rows: Int64Array, lengths: Int64Array) -> pa.Array:
        """Integers in two's complement, the highest byte first; made sixteen bytes, the lowest first."""
        if (lengths > _DECIMAL_BYTES).any() or (lengths == 0).any():
            raise FormatError("a decimal has no bytes, or more than 16")
        starts = self._cells.pass_over(rows, lengths)
        negative = self._cells.data[starts] >= 0x80
        cells = np.where(negative[:, None], np.uint8(0xFF), np.uint8(0)).repeat(_DECIMAL_BYTES, axis=1)
        for place in range(int(lengths.max(initial=0))):
            has = lengths > place
            cells[has, place] = self._cells.data[(starts + lengths - 1 - place)[has]]
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
            counts = self._cells.zigzags(rows[going])
            sized = counts < 0
            if sized.any():
                self._cells.zigzags(rows[going[sized]])
                counts = np.abs(counts)
            if (counts > self._cells.ends[rows[going]] - self._cells.at[rows[going]]).any():
                raise FormatError("a list is longer than its record")
            going, counts = going[counts != 0], counts[counts != 0]
            for number in range(int(counts.max(initial=0))):
                owners.append(going[counts > number])
                pieces.append(read(rows[owners[-1]]))
        return gathered(owners, pieces, len(rows), kind)

    def _map(self, kind: AvroMap, rows: Int64Array) -> pa.Array:
        text = AvroPrimitive("string", pa.string())
        entry = pa.struct([pa.field("key", pa.string()), pa.field("value", arrow_type(kind.values))])

        def read(some: Int64Array) -> pa.Array:
            return struct_of([self._read(text, some), self._read(kind.values, some)], entry, len(some))

        offsets, entries = self._blocks(rows, entry, read)
        return pa.MapArray.from_arrays(offsets, entries.field(0), entries.field(1))
