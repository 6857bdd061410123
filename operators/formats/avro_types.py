"""Schemas of Avro as values: parsed, names resolved, and the Arrow type that each stands for.

What has no Arrow type that is known beforehand is refused: types that contain themselves, and unions of several types
besides null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pyarrow as pa

from operators.errors import SchemaError

__all__ = [
    "AvroArray",
    "AvroEnum",
    "AvroField",
    "AvroFixed",
    "AvroMap",
    "AvroPrimitive",
    "AvroRecord",
    "AvroType",
    "AvroUnion",
    "arrow_type",
    "parse_avro",
]


@dataclass(frozen=True, slots=True)
class AvroPrimitive:
    """null, boolean, int, long, float, double, bytes or string; ``arrow`` is what it or its logical type stands for."""

    name: str
    arrow: pa.DataType


@dataclass(frozen=True, slots=True)
class AvroFixed:
    """So many bytes."""

    size: int
    arrow: pa.DataType


@dataclass(frozen=True, slots=True)
class AvroEnum:
    """One of these texts."""

    symbols: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AvroArray:
    """A list."""

    items: AvroType


@dataclass(frozen=True, slots=True)
class AvroMap:
    """Values by text."""

    values: AvroType


@dataclass(frozen=True, slots=True)
class AvroUnion:
    """A type or null; ``null`` is the number of the branch that is null, None if there is none."""

    branches: int
    null: int | None
    inner: AvroType


@dataclass(frozen=True, slots=True)
class AvroField:
    """A field of a record. ``default`` as in the schema, None also where it has none."""

    name: str
    type: AvroType
    default: Any = None


@dataclass(frozen=True, slots=True)
class AvroRecord:
    """Fields in their order."""

    fields: tuple[AvroField, ...]


AvroType: TypeAlias = AvroPrimitive | AvroFixed | AvroEnum | AvroArray | AvroMap | AvroUnion | AvroRecord

_PRIMITIVES: Mapping[str, pa.DataType] = {
    "null": pa.null(),
    "boolean": pa.bool_(),
    "int": pa.int32(),
    "long": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "bytes": pa.binary(),
    "string": pa.string(),
}
_LOGICAL: Mapping[tuple[str, str], pa.DataType] = {
    ("int", "date"): pa.date32(),
    ("int", "time-millis"): pa.time32("ms"),
    ("long", "time-micros"): pa.time64("us"),
    ("long", "timestamp-millis"): pa.timestamp("ms", "UTC"),
    ("long", "timestamp-micros"): pa.timestamp("us", "UTC"),
    ("long", "timestamp-nanos"): pa.timestamp("ns", "UTC"),
    ("long", "local-timestamp-millis"): pa.timestamp("ms"),
    ("long", "local-timestamp-micros"): pa.timestamp("us"),
    ("long", "local-timestamp-nanos"): pa.timestamp("ns"),
}
_DECIMAL_DIGITS = 38


def parse_avro(text: str | Mapping[str, Any]) -> AvroRecord:
    """The schema of a record. Raises `SchemaError` for anything else, and for what has no Arrow type."""
    try:
        declared = json.loads(text) if isinstance(text, str) else text
        parsed = _Parser().parse(declared, "")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SchemaError(f"Avro: this is no schema: {error!r}") from error
    if not isinstance(parsed, AvroRecord):
        raise SchemaError("Avro: the schema of a topic must be a record, whose fields become columns")
    return parsed


def arrow_type(kind: AvroType) -> pa.DataType:
    """The Arrow type of the values of an Avro type."""
    match kind:
        case AvroPrimitive() | AvroFixed():
            return kind.arrow
        case AvroEnum():
            return pa.string()
        case AvroArray():
            return pa.list_(arrow_type(kind.items))
        case AvroMap():
            return pa.map_(pa.string(), arrow_type(kind.values))
        case AvroUnion():
            return arrow_type(kind.inner)
        case AvroRecord():
            return pa.struct([pa.field(f.name, arrow_type(f.type)) for f in kind.fields])


@dataclass(slots=True)
class _Parser:
    """Follows names, which may be used again after they were declared."""

    named: dict[str, AvroType | None] = field(default_factory=dict)

    def parse(self, declared: Any, space: str) -> AvroType:
        if isinstance(declared, str):
            return self._by_name(declared, space)
        if isinstance(declared, Sequence):
            return self._union(declared, space)
        kind = declared["type"]
        if kind in ("record", "error", "enum", "fixed"):
            return self._declare(kind, declared, space)
        if kind == "array":
            return AvroArray(self.parse(declared["items"], space))
        if kind == "map":
            return AvroMap(self.parse(declared["values"], space))
        if kind in _PRIMITIVES:
            return AvroPrimitive(kind, _logical(kind, declared))
        return self.parse(kind, space)

    def _by_name(self, name: str, space: str) -> AvroType:
        if name in _PRIMITIVES:
            return AvroPrimitive(name, _PRIMITIVES[name])
        full = name if "." in name or not space else f"{space}.{name}"
        found = self.named.get(full, self.named.get(name))
        if found is not None:
            return found
        if full in self.named:
            raise SchemaError(f"Avro: type {full!r} contains itself, and has no Arrow type")
        raise SchemaError(f"Avro: type {name!r} is not declared")

    def _union(self, declared: Sequence[Any], space: str) -> AvroType:
        others = [d for d in declared if d != "null"]
        if len(others) != 1:
            names = ", ".join(d if isinstance(d, str) else str(d.get("name", d.get("type"))) for d in declared)
            raise SchemaError(f"Avro: a union of {names or 'nothing'} has no Arrow type; null and one more has")
        null = next((i for i, d in enumerate(declared) if d == "null"), None)
        return AvroUnion(len(declared), null, self.parse(others[0], space))

    def _declare(self, kind: str, declared: Mapping[str, Any], space: str) -> AvroType:
        name = declared["name"]
        space = name.rpartition(".")[0] or declared.get("namespace", space)
        full = name if "." in name or not space else f"{space}.{name}"
        self.named[full] = None
        made: AvroType
        if kind == "enum":
            made = AvroEnum(tuple(declared["symbols"]))
        elif kind == "fixed":
            plain = pa.binary(declared["size"])
            decimal = declared.get("logicalType") == "decimal"
            made = AvroFixed(declared["size"], _decimal(declared, plain) if decimal else plain)
        else:
            fields = [AvroField(f["name"], self.parse(f["type"], space), f.get("default")) for f in declared["fields"]]
            made = AvroRecord(tuple(fields))
        self.named[full] = made
        return made


def _logical(kind: str, declared: Mapping[str, Any]) -> pa.DataType:
    """What is not known is the type beneath, as the specification says."""
    logical = declared.get("logicalType")
    if kind == "bytes" and logical == "decimal":
        return _decimal(declared, pa.binary())
    return _LOGICAL.get((kind, str(logical)), _PRIMITIVES[kind])


def _decimal(declared: Mapping[str, Any], otherwise: pa.DataType) -> pa.DataType:
    digits = declared["precision"]
    return pa.decimal128(digits, declared.get("scale", 0)) if 0 < digits <= _DECIMAL_DIGITS else otherwise
