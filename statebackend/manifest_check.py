"""Whether what was decoded is a manifest: every field of its annotated type, every number in its bounds.

A checksum tells damage, not intent: a manifest may be well-formed msgpack and still hold a list where a name belongs.
Everything is checked here, once and by the annotations of the values themselves, so that the code behind may trust
them and a wrong one is named where it is read.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any

from statebackend.manifest import Branch, Manifest, Pin, Savepoint
from statebackend.objectstore_base import check_name
from statebackend.sstable import SSTableMeta
from statebackend.tables import TableSpec

__all__ = ["check_manifest"]

_MS_MAX = 253_402_300_799_999
"""The last millisecond of the year 9999: what calendars can show."""
_SCALARS = (int, str, bytes, float, bool, type(None))


def check_manifest(manifest: Manifest) -> None:
    """Raise ``TypeError`` or ``ValueError`` that names the field unless every field is what it claims to be."""
    _check(manifest, Manifest, "manifest")
    for number in (manifest.number, manifest.checkpoint_id, manifest.writer_epoch, manifest.compactor_epoch):
        if number < 0:
            raise ValueError(f"negative number {number} among number, checkpoint id and epochs")
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


def _check_file(file: SSTableMeta, spec: TableSpec) -> None:
    check_name(file.name)
    if not (0 <= file.tail_bytes <= file.size and file.rows >= 0 and 0 <= file.hash_min <= file.hash_max < 1 << 64):
        raise ValueError(f"{file.name}: sizes, rows or hashes are out of bounds: {file}")
    if spec.expiry_field is None:
        return
    # A file of nothing but deletions has no times by ttl, so that the least is above the greatest.
    if file.time_min is None or file.time_max is None or (spec.time_field and file.time_min > file.time_max):
        raise ValueError(f"{file.name}: times {file.time_min} to {file.time_max}")


def _check(value: Any, hint: Any, where: str) -> None:
    """Raise ``TypeError`` unless ``value`` is what ``hint`` says, all the way down."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return
    if isinstance(hint, typing.NewType):
        _check(value, hint.__supertype__, where)
    elif origin in (typing.Union, UnionType):
        kinds = typing.get_args(hint)
        if value is not None or type(None) not in kinds:
            (kind,) = (k for k in kinds if k is not type(None))
            _check(value, kind, where)
    elif origin is Mapping:
        _require(value, dict, where)
        key_hint, value_hint = typing.get_args(hint)
        for key, item in value.items():
            _check(key, key_hint, f"a key of {where}")
            _check(item, value_hint, f"{where}[{key!r}]")
    elif origin in (tuple, Sequence):
        _require(value, (tuple, list), where)
        item_hint = typing.get_args(hint)[0]
        for n, item in enumerate(value):
            _check(item, item_hint, f"{where}[{n}]")
    elif is_dataclass(hint):
        _require(value, hint, where)
        _check_fields(value, where)
    elif hint is int:
        if type(value) is not int:  # bool is an int in Python, and not here
            raise TypeError(f"{where} is {type(value).__name__}, expected int")
    else:
        _require(value, hint, where)


def _check_fields(value: Any, where: str) -> None:
    names, hints = _hints(value.__class__)
    values = [getattr(value, name) for name in names]
    # Entries of files are many and flat: one whose types are those of one that passed, passes.
    types = (type(value), *map(type, values))
    if types in _passed:
        return
    for name, item, hint in zip(names, values, hints, strict=True):
        _check(item, hint, f"{where}.{name}")
    if all(isinstance(item, _SCALARS) for item in values):
        _passed.add(types)


_passed: set[tuple[type, ...]] = set()


@cache
def _hints(cls: Any) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    hints = typing.get_type_hints(cls)
    names = tuple(f.name for f in fields(cls))
    return names, tuple(hints[name] for name in names)


def _require(value: Any, kinds: Any, where: str) -> None:
    if not isinstance(value, kinds):
        raise TypeError(f"{where} is {type(value).__name__}, expected {getattr(kinds, '__name__', 'a list')}")
