"""Protocol Buffers, decoded column by column, all records at once.

A message is a row of fields, each with its number, in any order. So the next field of all records is read at once, as
often as the record with the most fields has some; those that have the same field there are read with a few array
operations. What comes of a generated class is its descriptor alone: no message is ever made.

As the specification says, of a field that comes several times the last value counts, and unknown fields are passed
over. (Two pieces of one message field are not merged: the last one counts.) A field without presence that does not come
has its default, one with presence, and a message, is null. ``google.protobuf.Timestamp`` is a timestamp in
microseconds; a number of an enum that has no name there is its number as text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from operators.errors import SchemaError
from operators.formats.base import FormatError
from operators.formats.cells import Cells, UInt64Array, gathered, struct_of, text_of
from operators.windows import Int64Array

__all__ = ["ProtobufFormat"]

_TIMESTAMP = "google.protobuf.Timestamp"
_HEADER_BYTES = 5
_US_PER_S = 1_000_000
_SECONDS_MAX = 253_402_300_800


class _Wire(IntEnum):
    """How the value of a field is written."""

    VARINT = 0
    EIGHT = 1
    LENGTH = 2
    FOUR = 5


@dataclass(frozen=True, slots=True)
class _Scalar:
    """A type of values: how they are written, the Arrow type, and what an absent one is."""

    wire: _Wire
    arrow: pa.DataType
    default: Any
    read: Callable[[Cells, Int64Array], pa.Array]


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a message; ``repeated`` and ``of_map``: a list, and one that is a map."""

    name: str
    number: int
    kind: _Scalar | _Message
    repeated: bool
    of_map: bool
    presence: bool

    @property
    def arrow(self) -> pa.DataType:
        """The type of its column."""
        item = self.kind.arrow
        if self.of_map:
            return pa.map_(item.field(0).type, item.field(1).type)
        return pa.list_(item) if self.repeated else item


@dataclass(frozen=True, slots=True)
class _Message:
    """A message, by its fields."""

    name: str
    fields: tuple[_Field, ...]
    wire: _Wire = _Wire.LENGTH
    default: Any = None

    @property
    def arrow(self) -> pa.DataType:
        """A struct, or what a well-known type stands for."""
        if self.name == _TIMESTAMP:
            return pa.timestamp("us", "UTC")
        return pa.struct([pa.field(f.name, f.arrow) for f in self.fields])


class ProtobufFormat:
    """Messages of one type.

    ``message``: the class that ``protoc`` generated for Python, or its descriptor. ``framed``: records begin as those
    of Confluent's serializer do, with a zero byte, the number of the schema in a registry (which need not be asked),
    and which message of its file it is.

    Raises `SchemaError` for a message that contains itself, and for groups.
    """

    takes_nulls = False

    def __init__(self, message: Any, *, framed: bool = False) -> None:
        descriptor = getattr(message, "DESCRIPTOR", message)
        self._message = _parsed(descriptor, ())
        self._path = _path_of(descriptor) if framed else None
        self.schema = pa.schema([pa.field(f.name, f.arrow) for f in self._message.fields])

    def describe(self) -> Mapping[str, Any]:
        """The message and its columns."""
        return {"format": "protobuf", "message": self._message.name, "schema": self.schema.to_string()}

    def decode(self, values: Sequence[bytes]) -> pa.RecordBatch:
        """See `Format.decode`."""
        lengths = np.fromiter(map(len, values), np.int64, len(values))
        ends = np.cumsum(lengths)
        cells = Cells(np.frombuffer(b"".join(values), np.uint8), ends - lengths, ends)
        if self._path is not None:
            _read_frame(cells, self._path)
        return pa.RecordBatch.from_arrays(_read_message(self._message, cells), schema=self.schema)


def _read_frame(cells: Cells, path: Sequence[int]) -> None:
    every = np.arange(len(cells.at))
    if (cells.fixed(every, _HEADER_BYTES)[:, 0] != 0).any():
        raise FormatError("it does not begin with a zero byte and the number of a schema")
    counts = cells.zigzags(every)
    # The first message of a file is written as no path at all.
    first = counts == 0
    if (first.any() and list(path) != [0]) or (counts[~first] != len(path)).any():
        raise FormatError("it is another message of its file")
    for number in path:
        if (cells.zigzags(every[~first]) != number).any():
            raise FormatError("it is another message of its file")


# -- messages


@dataclass(slots=True)
class _Column:
    """What was read of a field so far: pieces of values, and the records that each is of."""

    pieces: list[pa.Array] = field(default_factory=list)
    owners: list[Int64Array] = field(default_factory=list)

    def add(self, rows: Int64Array, values: pa.Array) -> None:
        """Values of these records, which come after those before."""
        self.owners.append(rows)
        self.pieces.append(values)


def _read_message(message: _Message, cells: Cells) -> list[pa.Array]:
    """A column for each field."""
    fields = {f.number: f for f in message.fields}
    columns = {f.number: _Column() for f in message.fields}
    while len(rows := np.flatnonzero(cells.at < cells.ends)):
        tags = cells.varints(rows)
        for tag in [int(tags[0])] if (tags == tags[0]).all() else np.unique(tags).tolist():
            some = rows[tags == tag]
            number, wire = tag >> 3, tag & 7
            if number == 0:
                raise FormatError("a field has no number")
            known = fields.get(number)
            if known is None or not _read_field(known, wire, cells, some, columns[number]):
                _pass_over(wire, cells, some)
    return [_finished(f, columns[f.number], len(cells.at)) for f in message.fields]


def _read_field(known: _Field, wire: int, cells: Cells, rows: Int64Array, into: _Column) -> bool:
    """Read it; False if it is not written as the field is, which makes it an unknown one."""
    if wire == known.kind.wire:
        into.add(rows, _read_value(known.kind, cells, rows))
        return True
    if not known.repeated or wire != _Wire.LENGTH:
        return False
    # Packed: many values one after the other.
    lengths = cells.varints(rows).astype(np.int64)
    starts = cells.pass_over(rows, lengths)
    inner = Cells(cells.data, starts, starts + lengths)
    while len(some := np.flatnonzero(inner.at < inner.ends)):
        into.add(rows[some], _read_value(known.kind, inner, some))
    return True


def _read_value(kind: _Scalar | _Message, cells: Cells, rows: Int64Array) -> pa.Array:
    if isinstance(kind, _Scalar):
        return kind.read(cells, rows)
    lengths = cells.varints(rows).astype(np.int64)
    starts = cells.pass_over(rows, lengths)
    children = _read_message(kind, Cells(cells.data, starts, starts + lengths))
    return _timestamps(children) if kind.name == _TIMESTAMP else struct_of(children, kind.arrow, len(rows))


def _pass_over(wire: int, cells: Cells, rows: Int64Array) -> None:
    match wire:
        case _Wire.VARINT:
            cells.varints(rows)
        case _Wire.EIGHT:
            cells.fixed(rows, 8)
        case _Wire.FOUR:
            cells.fixed(rows, 4)
        case _Wire.LENGTH:
            cells.pass_over(rows, cells.varints(rows).astype(np.int64))
        case _:
            raise FormatError("a group, or no message at all")


def _finished(known: _Field, read: _Column, count: int) -> pa.Array:
    if known.repeated:
        offsets, items = gathered(read.owners, read.pieces, count, known.kind.arrow)
        if known.of_map:
            return pa.MapArray.from_arrays(offsets, items.field(0), items.field(1))
        return pa.ListArray.from_arrays(offsets, items)
    default = None if known.presence else known.kind.default
    if not read.pieces:
        return pa.repeat(pa.scalar(default, known.arrow), count)
    at = np.full(count, -1, np.int64)
    begin = 0
    for rows in read.owners:
        at[rows] = np.arange(begin, begin + len(rows))
        begin += len(rows)
    values = pa.concat_arrays(read.pieces).take(pa.array(at, mask=at < 0))
    return values if default is None else values.fill_null(pa.scalar(default, known.arrow))


def _timestamps(children: Sequence[pa.Array]) -> pa.Array:
    seconds, nanos = (child.to_numpy(zero_copy_only=False) for child in children)
    if (np.abs(seconds) > _SECONDS_MAX).any() or ((nanos < 0) | (nanos >= 1_000_000_000)).any():
        raise FormatError("a timestamp is out of bounds")
    return pa.array(seconds * _US_PER_S + nanos // 1000).view(pa.timestamp("us", "UTC"))


# -- values


def _varints(made: Callable[[UInt64Array], np.ndarray[Any, Any]]) -> Callable[[Cells, Int64Array], pa.Array]:
    return lambda cells, rows: pa.array(made(cells.varints(rows)))


def _fixed(size: int, kind: str) -> Callable[[Cells, Int64Array], pa.Array]:
    return lambda cells, rows: pa.array(cells.fixed(rows, size).view(kind)[:, 0])


def _bytes(cells: Cells, rows: Int64Array) -> pa.Array:
    return cells.binary(rows, cells.varints(rows).astype(np.int64))


def _text(cells: Cells, rows: Int64Array) -> pa.Array:
    return text_of(_bytes(cells, rows))


def _zigzag(found: UInt64Array) -> Int64Array:
    return (found >> np.uint64(1)).astype(np.int64) ^ -(found & np.uint64(1)).astype(np.int64)


_SCALARS: Mapping[int, _Scalar] = {
    # By the numbers of FieldDescriptorProto.Type.
    1: _Scalar(_Wire.EIGHT, pa.float64(), 0.0, _fixed(8, "<f8")),
    2: _Scalar(_Wire.FOUR, pa.float32(), 0.0, _fixed(4, "<f4")),
    3: _Scalar(_Wire.VARINT, pa.int64(), 0, _varints(lambda u: u.astype(np.int64))),
    4: _Scalar(_Wire.VARINT, pa.uint64(), 0, _varints(lambda u: u)),
    5: _Scalar(_Wire.VARINT, pa.int32(), 0, _varints(lambda u: u.astype(np.int32))),
    6: _Scalar(_Wire.EIGHT, pa.uint64(), 0, _fixed(8, "<u8")),
    7: _Scalar(_Wire.FOUR, pa.uint32(), 0, _fixed(4, "<u4")),
    8: _Scalar(_Wire.VARINT, pa.bool_(), False, _varints(lambda u: u != 0)),
    9: _Scalar(_Wire.LENGTH, pa.string(), "", _text),
    12: _Scalar(_Wire.LENGTH, pa.binary(), b"", _bytes),
    13: _Scalar(_Wire.VARINT, pa.uint32(), 0, _varints(lambda u: u.astype(np.uint32))),
    15: _Scalar(_Wire.FOUR, pa.int32(), 0, _fixed(4, "<i4")),
    16: _Scalar(_Wire.EIGHT, pa.int64(), 0, _fixed(8, "<i8")),
    17: _Scalar(_Wire.VARINT, pa.int32(), 0, _varints(lambda u: _zigzag(u & np.uint64(0xFFFFFFFF)).astype(np.int32))),
    18: _Scalar(_Wire.VARINT, pa.int64(), 0, _varints(_zigzag)),
}
_GROUP, _MESSAGE, _ENUM = 10, 11, 14
_REPEATED = 3


def _enum(names: Mapping[int, str], default: str) -> _Scalar:
    known = np.array(sorted(names), np.int32)
    texts = pa.array([names[int(number)] for number in known], pa.string())

    def read(cells: Cells, rows: Int64Array) -> pa.Array:
        numbers = cells.varints(rows).astype(np.int32)
        at = np.searchsorted(known, numbers).clip(max=len(known) - 1)
        named = known[at] == numbers
        found = texts.take(pa.array(at, mask=~named))
        return found if named.all() else pc.coalesce(found, pa.array(numbers).cast(pa.string()))

    return _Scalar(_Wire.VARINT, pa.string(), default, read)


# -- descriptors


def _parsed(descriptor: Any, above: tuple[str, ...]) -> _Message:
    """The message of a descriptor; ``above``: the messages that it is in."""
    try:
        name, declared = descriptor.full_name, list(descriptor.fields)
    except AttributeError as error:
        raise SchemaError(f"Protobuf: {descriptor!r} is neither a generated class nor its descriptor") from error
    if name in above:
        raise SchemaError(f"Protobuf: message {name!r} contains itself, and has no Arrow type")
    return _Message(name, tuple(_parsed_field(f, (*above, name)) for f in declared))


def _parsed_field(declared: Any, above: tuple[str, ...]) -> _Field:
    kind: _Scalar | _Message
    if declared.type == _GROUP:
        raise SchemaError(f"Protobuf: field {declared.full_name!r} is a group; groups are not read")
    if declared.type == _MESSAGE:
        kind = _parsed(declared.message_type, above)
    elif declared.type == _ENUM:
        names = {value.number: value.name for value in declared.enum_type.values}
        kind = _enum(names, declared.enum_type.values[0].name)
    else:
        kind = _SCALARS[declared.type]
    of_map = declared.type == _MESSAGE and declared.message_type.GetOptions().map_entry
    # Before 6.31 the library told it by the label.
    repeated = declared.is_repeated if hasattr(declared, "is_repeated") else declared.label == _REPEATED
    return _Field(declared.name, declared.number, kind, repeated, of_map, declared.has_presence)


def _path_of(descriptor: Any) -> list[int]:
    """Which message of its file it is: its number among its neighbours, after those of the messages that it is in."""
    outer = descriptor.containing_type
    among = descriptor.file.message_types_by_name if outer is None else outer.nested_types_by_name
    number = list(among).index(descriptor.name)
    return [number] if outer is None else [*_path_of(outer), number]
