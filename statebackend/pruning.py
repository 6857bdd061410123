"""Which files and blocks of a table a predicate needs, by what the manifest and the indexes know of them.

*Times.* Whether a predicate can be true of rows in a range of times is decided by Arrow, which simplifies it under the
guarantee that the time lies there (`may_match`). That is sound, since the time is part of the key: all versions of a
row have the same. Ranges of keys of bytes in order ``key`` likewise.

*Keys.* Where a predicate is only true of some values of the partition key (``key = 'x'``, also several, joined by AND
and OR), the hashes of these values choose the blocks, and the filters of the files. The values are taken from the
predicate in its Substrait form, a public standard; of whatever is not understood (a function, another comparison, a
list that Arrow does not encode), nothing is concluded, and all is read.

What is left out cannot match; what is read may still hold rows that do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow.fs import LocalFileSystem

from statebackend.cache import OpenFile
from statebackend.keys import canonicalise
from statebackend.merge import HASH_COLUMN, TableLayout
from statebackend.plan_surgery import read_wire
from statebackend.sstable import SSTableMeta
from statebackend.tables import TableOrder, TableSpec

__all__ = ["Pruning", "key_values", "may_match"]

_KEYS_MAX = 1000
"""Of more keys than this every block holds some."""

Hashes: TypeAlias = npt.NDArray[np.uint64]
Times: TypeAlias = npt.NDArray[np.int64]
Values: TypeAlias = Mapping[str, frozenset[Any]]
"""Of some columns the values that they can have; of the others nothing is known."""


@dataclass(frozen=True, slots=True)
class Pruning:
    """What a predicate asks of one table.

    ``schema``: the columns that readers of the table see. ``hashes``: sorted, of the partition keys that may match,
    None if any may; ``known``: what filters of files know of these keys, None if they know nothing.
    """

    spec: TableSpec
    schema: pa.Schema
    predicate: pc.Expression
    hashes: Hashes | None
    known: Hashes | None

    @classmethod
    def of(cls, layout: TableLayout, predicate: pc.Expression) -> Pruning:
        """``predicate`` may name any column that readers of the table see."""
        keys = _partition_keys(layout, predicate)
        if keys is None:
            return cls(layout.spec, layout.result_schema, predicate, None, None)
        hashes = layout.hash_of(keys)
        probes = keys.append_column(HASH_COLUMN, pa.array(hashes))
        return cls(layout.spec, layout.result_schema, predicate, np.unique(hashes), layout.filter_hashes(probes))

    def files(self, files: Sequence[SSTableMeta]) -> list[SSTableMeta]:
        """The files that may hold rows that match, by what the manifest says of them."""
        low, high = (np.array([getattr(f, name) for f in files], np.uint64) for name in ("hash_min", "hash_max"))
        first, last = (np.array([getattr(f, n) or 0 for f in files], np.int64) for n in ("time_min", "time_max"))
        keep = self._ranges(low, high, first, last)
        return [file for file, wanted in zip(files, keep, strict=True) if wanted]

    def blocks(self, file: OpenFile) -> npt.NDArray[np.bool_]:
        """Which blocks of a file may hold rows that match."""
        index = file.index
        if self.known is not None and file.filter is not None and not file.filter.may_hold(self.known).any():
            return np.zeros(len(index.entries), dtype=bool)
        return self._ranges(index.hash_min, index.hash_max, index.time_min, index.time_max)

    def _ranges(self, low: Hashes, high: Hashes, first: Times, last: Times) -> npt.NDArray[np.bool_]:
        """Which ranges of hashes and times, their ends included, may hold rows that match."""
        keep = np.ones(len(low), dtype=bool)
        if self.hashes is not None:
            keep = np.searchsorted(self.hashes, high, side="right") > np.searchsorted(self.hashes, low, side="left")
        if self.spec.time_field is not None:
            kind, time = self.schema.field(self.spec.time_field).type, pc.field(self.spec.time_field)
            spans = zip(pa.array(first).cast(kind), pa.array(last).cast(kind), strict=True)
            keep &= may_match(self.predicate, self.schema, [(time >= a) & (time <= b) for a, b in spans])
        if self.spec.order is TableOrder.KEY and pa.types.is_binary(self.schema.field(self.spec.key[0]).type):
            spans = zip(low.tolist(), high.tolist(), strict=True)
            keep &= may_match(self.predicate, self.schema, [_prefixed(self.spec.key[0], a, b) for a, b in spans])
        return keep


def may_match(
    predicate: pc.Expression, schema: pa.Schema, guarantees: Sequence[pc.Expression]
) -> npt.NDArray[np.bool_]:
    """Under which of the guarantees, each of which holds for all rows of some set, the predicate may be true.

    ``predicate`` may name any column of ``schema``.
    """
    # Fragments of a dataset that is never read: Arrow drops those whose guarantee contradicts the predicate.
    form, nowhere = ds.IpcFileFormat(), LocalFileSystem()
    fragments = [
        form.make_fragment(str(number), nowhere, partition_expression=holds) for number, holds in enumerate(guarantees)
    ]
    sets = ds.FileSystemDataset(fragments, schema, form, nowhere)
    keep = np.zeros(len(fragments), dtype=bool)
    keep[[int(fragment.path) for fragment in sets.get_fragments(predicate)]] = True
    return keep


def key_values(predicate: pc.Expression, schema: pa.Schema) -> Values:
    """Of some columns, the values without which the predicate cannot be true. Null is a value."""
    try:
        message = read_wire(bytes(memoryview(predicate.to_substrait(schema))))
    except (pa.ArrowException, ValueError):  # a type or a function that Substrait has no word for
        return {}
    functions = {}
    for extension in _all(message, _EXTENSIONS):
        for declared in _all(read_wire(extension), _EXTENSION_FUNCTION):
            fields = dict(read_wire(declared))
            functions[fields.get(_ANCHOR, 0)] = _text(fields.get(_NAME, b"")).partition(":")[0]
    for referred in _all(message, _REFERRED):
        for expression in _all(read_wire(referred), _EXPRESSION):
            return _Reader(schema, functions).values(expression)
    return {}


# Fields of Substrait's messages: ExtendedExpression, ExtensionFunction, Expression and what they hold.
_EXTENSIONS, _REFERRED = 2, 3
_EXTENSION_FUNCTION, _ANCHOR, _NAME = 3, 2, 3
_EXPRESSION = 1
_LITERAL, _SELECTION, _SCALAR_FUNCTION = 1, 2, 3
_FUNCTION_REFERENCE, _ARGUMENT, _ARGUMENT_VALUE = 1, 4, 3
_DIRECT_REFERENCE, _STRUCT_FIELD, _FIELD, _CHILD = 1, 2, 1, 2
_INTEGERS = {2, 3, 5, 7}
_BOOLEAN, _STRING, _BINARY = 1, 12, 13


class _Reader:
    """Reads one expression in its Substrait form."""

    def __init__(self, schema: pa.Schema, functions: Mapping[Any, str]) -> None:
        self._schema = schema
        self._functions = functions

    def values(self, expression: bytes) -> Values:
        """What must be for the expression to be true."""
        call = next(iter(_all(read_wire(expression), _SCALAR_FUNCTION)), None)
        if call is None:
            return {}
        fields = read_wire(call)
        name = self._functions.get(dict(fields).get(_FUNCTION_REFERENCE, 0), "")
        arguments = [value for a in _all(fields, _ARGUMENT) for value in _all(read_wire(a), _ARGUMENT_VALUE)]
        if name == "and":
            return _both([self.values(a) for a in arguments])
        if name == "or":
            return _either([self.values(a) for a in arguments])
        if name == "is_null" and len(arguments) == 1 and (column := self._column(arguments[0])) is not None:
            return {column: frozenset([None])}
        if name == "equal" and len(arguments) == 2:
            for column_side, literal_side in (arguments, arguments[::-1]):
                column, literal = self._column(column_side), _literal(literal_side)
                if column is not None and literal is not None:
                    return {column: frozenset([literal])}
        return {}

    def _column(self, expression: bytes) -> str | None:
        """The name of a top-level column, if that is all it is."""
        for selection in _all(read_wire(expression), _SELECTION):
            for direct in _all(read_wire(selection), _DIRECT_REFERENCE):
                for field in _all(read_wire(direct), _STRUCT_FIELD):
                    parts = dict(read_wire(field))
                    if _CHILD not in parts:
                        return str(self._schema.names[int(parts.get(_FIELD, 0))])
        return None


def _literal(expression: bytes) -> Any:
    """The value of a literal that is a boolean, an integer, text or bytes; else None."""
    for literal in _all(read_wire(expression), _LITERAL):
        for kind, value in read_wire(literal):
            if kind == _BOOLEAN:
                return bool(value)
            if kind in _INTEGERS and isinstance(value, int):
                return value - (1 << 64) if value >> 63 else value
            if kind == _STRING and isinstance(value, bytes):
                return _text(value)
            if kind == _BINARY:
                return value
    return None


def _both(parts: Iterable[Values]) -> Values:
    found: dict[str, frozenset[Any]] = {}
    for part in parts:
        for column, values in part.items():
            found[column] = found[column] & values if column in found else values
    return found


def _either(parts: Sequence[Values]) -> Values:
    common = set.intersection(*(set(part) for part in parts)) if parts else set()
    return {column: frozenset().union(*(part[column] for part in parts)) for column in common}


def _partition_keys(layout: TableLayout, predicate: pc.Expression) -> pa.RecordBatch | None:
    """The partition keys that may match, in canonical form; None if that cannot be told."""
    names = layout.partition_key
    values = key_values(predicate, layout.result_schema)
    if not names or any(name not in values for name in names):
        return None
    if math.prod(len(values[name]) for name in names) > _KEYS_MAX:
        return None
    schema = pa.schema([layout.canonical.field(name) for name in names])
    rows = list(zip(*product(*(values[name] for name in names)), strict=True)) or [()] * len(names)
    try:
        arrays = [pa.array(column, field.type) for column, field in zip(rows, schema, strict=True)]
    except (pa.ArrowException, OverflowError):  # a literal that the column cannot hold: another type than it seems
        return None
    return canonicalise(pa.RecordBatch.from_arrays(arrays, schema=schema))


def _prefixed(key: str, low: int, high: int) -> pc.Expression:
    """What holds for keys of bytes whose first eight, as a number, lie in a range: shorter keys count as with zeros."""
    at_least = pc.field(key) >= pa.scalar(low.to_bytes(8, "big").rstrip(b"\0"), pa.binary())
    beyond = high + 1
    return at_least if beyond >> 64 else at_least & (pc.field(key) < pa.scalar(beyond.to_bytes(8, "big"), pa.binary()))


def _all(fields: Sequence[tuple[int, int | bytes]], number: int) -> list[bytes]:
    return [value for field, value in fields if field == number and isinstance(value, bytes)]


def _text(value: Any) -> str:
    return bytes(value).decode()
