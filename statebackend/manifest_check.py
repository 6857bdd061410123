"""Whether what was decoded is a manifest: every field of its annotated type, every number in its bounds.

A checksum tells damage, not intent: a manifest may be well-formed msgpack and still hold a list where a name belongs.
Everything is checked here, once and by the annotations of the values themselves, so that the code behind may trust
them and a wrong one is named where it is read.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from operator import attrgetter
from types import UnionType
from typing import Any

from statebackend.manifest import Branch, Manifest, Pin, Savepoint
from statebackend.objectstore_base import check_name
from statebackend.sstable import SSTableMeta
from statebackend.tables import TableSpec

__all__ = ["check_manifest", "check_numbers"]

_MS_MAX = 253_402_300_799_999
"""The last millisecond of the year 9999: what calendars can show."""
_NUMBER_MAX = 1 << 62
"""No store gets there; a number that is about to came from damaged bytes."""
_SCALARS = frozenset([int, str, bytes, float, bool, type(None)])


def check_manifest(manifest: Manifest) -> None:
    """Raise ``TypeError`` or ``ValueError`` that names the field unless every field is what it claims to be."""
    try:
        _checker(Manifest)(manifest)
    except _WrongError as error:
        raise error.within("manifest") from None
    check_numbers(manifest)
    for kept in manifest.retained:
        if not all(0 <= n < _NUMBER_MAX for n in (kept.rows_written, kept.bytes_written, kept.duration_ms)):
            raise ValueError(f"checkpoint {kept.checkpoint_id}: rows, bytes or duration are out of bounds: {kept}")
    moments = [manifest.created_ms, *(r.created_ms for r in manifest.retained)]
    copies: list[Savepoint | Branch | Pin] = [
        *manifest.savepoints.values(), *manifest.branches.values(), *manifest.pins.values(),
    ]  # fmt: skip
    for copy in copies:
        check_name(copy.object_name)
        moments += [copy.created_ms, getattr(copy, "expires_ms", None) or 0]
    if not all(0 <= m <= _MS_MAX for m in moments):
        raise ValueError(f"times {moments} are not all between 0 and {_MS_MAX} ms")
    for state in manifest.tables.values():
        for file in state.files:
            _check_file(file, state.spec)


def check_numbers(manifest: Manifest) -> None:
    """Raise ``ValueError`` if one of the numbers that grow is out of bounds: what is written must be readable."""
    for number in (manifest.number, manifest.checkpoint_id, manifest.writer_epoch, manifest.compactor_epoch):
        if not 0 <= number < _NUMBER_MAX:
            raise ValueError(f"{number} among number, checkpoint id and epochs is out of bounds")


def _check_file(file: SSTableMeta, spec: TableSpec) -> None:
    check_name(file.name)
    if not (0 <= file.tail_bytes <= file.size and file.rows >= 0 and 0 <= file.hash_min <= file.hash_max < 1 << 64):
        raise ValueError(f"{file.name}: sizes, rows or hashes are out of bounds: {file}")
    if spec.expiry_field is None:
        return
    # A file of nothing but deletions has no times by ttl, so that the least is above the greatest.
    if file.time_min is None or file.time_max is None or (spec.time_field and file.time_min > file.time_max):
        raise ValueError(f"{file.name}: times {file.time_min} to {file.time_max}")


Checker = Callable[[Any], None]


class _WrongError(TypeError):
    """What is wrong, and where in the value, from the inside out."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.path: list[str] = []

    def within(self, place: str) -> _WrongError:
        self.path.append(place)
        return self

    def __str__(self) -> str:
        return f"{''.join(reversed(self.path))} {self.args[0]}"


@cache
def _checker(hint: Any) -> Checker:
    """What raises `_WrongError` unless a value is what ``hint`` says, all the way down; made once for each type."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return _anything
    if isinstance(hint, typing.NewType):
        return _checker(hint.__supertype__)
    if origin in (typing.Union, UnionType):
        kinds = typing.get_args(hint)
        (kind,) = (k for k in kinds if k is not type(None))
        return _optional(_checker(kind)) if type(None) in kinds else _checker(kind)
    if origin is Mapping:
        key_hint, value_hint = typing.get_args(hint)
        return _mapping(_checker(key_hint), _checker(value_hint))
    if origin in (tuple, Sequence):
        return _sequence(_checker(typing.get_args(hint)[0]))
    if is_dataclass(hint):
        return _dataclass(typing.cast("type[Any]", hint))
    return _integer if hint is int else _instance(hint)


def _anything(value: Any) -> None:
    pass


def _integer(value: Any) -> None:
    if type(value) is not int:  # bool is an int in Python, and not here
        raise _expected(value, "int")


def _instance(kind: Any) -> Checker:
    def check(value: Any) -> None:
        if not isinstance(value, kind):
            raise _expected(value, kind.__name__)

    return check


def _optional(inner: Checker) -> Checker:
    def check(value: Any) -> None:
        if value is not None:
            inner(value)

    return check


def _mapping(check_key: Checker, check_value: Checker) -> Checker:
    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise _expected(value, "dict")
        for key, item in value.items():
            try:
                check_key(key)
                check_value(item)
            except _WrongError as error:
                raise error.within(f"[{key!r}]") from None

    return check


def _sequence(check_item: Checker) -> Checker:
    def check(value: Any) -> None:
        if not isinstance(value, (tuple, list)):
            raise _expected(value, "a list")
        for n, item in enumerate(value):
            try:
                check_item(item)
            except _WrongError as error:
                raise error.within(f"[{n}]") from None

    return check


def _dataclass(cls: type[Any]) -> Checker:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    checks = [(name, _checker(hints[name])) for name in names]
    values_of = attrgetter(*names) if len(names) > 1 else None
    passed: set[tuple[type, ...]] = set()

    def check(value: Any) -> None:
        if not isinstance(value, cls):
            raise _expected(value, cls.__name__)
        if values_of is not None:
            # Entries of files are many and flat: one whose types are those of one that passed, passes.
            types = tuple(map(type, values_of(value)))
            if types in passed:
                return
        for name, check_field in checks:
            try:
                check_field(getattr(value, name))
            except _WrongError as error:
                raise error.within(f".{name}") from None
        if values_of is not None and all(kind in _SCALARS for kind in types):
            passed.add(types)

    return check


def _expected(value: Any, kind: str) -> _WrongError:
    return _WrongError(f"is {type(value).__name__}, expected {kind}")
