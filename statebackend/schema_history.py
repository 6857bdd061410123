"""How the columns of a table change while its files stay as they are.

Every field of a table has an id, given once. A `SchemaVersion` is what the columns were for a while, with their
ids; a file says by which version it was written. `SchemaHistory` holds all versions of one table and brings the rows
of any of them into the newest: columns are found by id, whatever they are called, widened, and filled with their
default where a file is older than they are.

`SchemaHistory.evolved` decides whether a table may become what is asked for. Columns are matched by name, those of
partial states by the names of the results that they are for (``state_changes.py``);
`SchemaChanges` says what names cannot tell: which old column a new name means, and which ones shall go. A column that
is merely missing is refused, for it may have been renamed, or this may be an older program.

Invariants:

* A version never changes, none is removed, and an id is never given to a second field.
* Every value of an old type is a value of the new one.
* The hash of a key and the order of rows stay the same, so files of all versions are probed and merged alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pyarrow as pa

from statebackend.errors import SchemaMismatchError
from statebackend.keys import canonical_schema
from statebackend.state_changes import state_changes
from statebackend.tables import SchemaChanges, TableSpec

__all__ = ["SchemaHistory", "SchemaVersion"]

_LADDERS = (
    (pa.int8(), pa.int16(), pa.int32(), pa.int64()),
    (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
    (pa.float16(), pa.float32(), pa.float64()),
)
"""Types that may become any later one of their line; the hash of a value stays the same (see ``keys.py``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaVersion:
    """The columns of a table for a while: field i of ``schema`` has the id ``ids[i]``.

    ``defaults``: by id, of the fields that this version added, what older rows hold in them; null where none is named.
    They are plain values (bool, int, float, str, bytes): times in their unit, decimals as text.
    """

    schema: pa.Schema
    ids: tuple[int, ...]
    defaults: Mapping[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.schema) or len(set(self.ids)) != len(self.ids):
            raise ValueError(f"a schema of {len(self.schema)} fields with ids {self.ids}")
        canonical_schema(self.schema)
        for field_id in self.defaults:
            self.default_of(field_id)

    def default_of(self, field_id: int) -> pa.Scalar:
        """What rows hold in a field of this version that were written before it."""
        kind = _canonical(self.schema.field(self.ids.index(field_id)).type)
        value = self.defaults[field_id]
        return pa.scalar(Decimal(value) if pa.types.is_decimal(kind) else value, kind)

    def id_of(self, name: str) -> int:
        """The id of the field of this name."""
        position: int = self.schema.names.index(name)
        return self.ids[position]

    def names_of(self, ids: Collection[int]) -> list[str]:
        """The names of the fields with these ids, as far as there are any."""
        return [name for i, name in zip(self.ids, self.schema.names, strict=True) if i in ids]


@dataclass(frozen=True, slots=True)
class SchemaHistory:
    """All versions of the schema of one table, oldest first; a file names one by its position here."""

    versions: tuple[SchemaVersion, ...]

    def __post_init__(self) -> None:
        if not self.versions:
            raise ValueError("a table without a schema")
        newest = dict(zip(self.current.ids, self.current.schema.types, strict=True))
        for version in self.versions[:-1]:
            for field_id, kind in zip(version.ids, version.schema.types, strict=True):
                if field_id in newest and not _widens(kind, newest[field_id]):
                    raise ValueError(f"field {field_id} was {kind} and is {newest[field_id]}")

    @classmethod
    def begin(cls, schema: pa.Schema) -> SchemaHistory:
        """The history of a new table."""
        return cls((SchemaVersion(schema=schema, ids=tuple(range(1, len(schema) + 1))),))

    @property
    def current(self) -> SchemaVersion:
        """The newest version, in which rows are written and read."""
        return self.versions[-1]

    @property
    def number(self) -> int:
        """The number of the newest version."""
        return len(self.versions) - 1

    def key_ids(self, spec: TableSpec) -> list[int]:
        """The ids of the key columns of a table as it is declared now."""
        return [self.current.id_of(name) for name in spec.key]

    def upgraded(self, batch: pa.RecordBatch, number: int, types: Sequence[pa.DataType]) -> list[pa.Array]:
        """Canonical columns of one version as columns of the newest, whose canonical types are given."""
        old = self.versions[number]
        names = dict(zip(old.ids, old.schema.names, strict=True))
        added_in = {i: version for version in self.versions for i in version.defaults}
        columns = []
        for field_id, kind in zip(self.current.ids, types, strict=True):
            if field_id in names:
                column = batch.column(names[field_id])
                columns.append(column if column.type == kind else column.cast(kind))
            elif field_id in added_in:
                columns.append(pa.repeat(added_in[field_id].default_of(field_id).cast(kind), batch.num_rows))
            else:
                columns.append(pa.nulls(batch.num_rows, kind))
        return columns

    def evolved(self, known: TableSpec, wanted: TableSpec, where: str) -> SchemaHistory:
        """This history, of a table declared as ``known``, with one more version if ``wanted`` needs one.

        Raises `SchemaMismatchError`, which names ``where`` (the store), both schemas and the reason, when the table
        cannot become what is wanted.
        """
        reason, evolved = _Evolution(self, known, wanted).decide()
        if reason is None:
            return evolved
        raise SchemaMismatchError(
            f"{where}: table {known.name!r} has ({_described(known)}), asked for ({_described(wanted)}): {reason}"
        )

    def require_unchanged(self, known: TableSpec, wanted: TableSpec, where: str) -> None:
        """Raise `SchemaMismatchError` unless ``wanted`` is what the table, which is open, is already."""
        if self.evolved(known, wanted, where) is not self:
            raise SchemaMismatchError(
                f"{where}: table {known.name!r} is open with ({_described(known)}), asked for ({_described(wanted)}): "
                "columns change only when a table is opened first; close the store and open it again"
            )


class _RefusedError(Exception):
    """Why a table cannot become what is asked for."""


@dataclass(frozen=True, slots=True)
class _Evolution:
    """One request to change a table."""

    history: SchemaHistory
    known: TableSpec
    wanted: TableSpec

    @property
    def changes(self) -> SchemaChanges:
        return self.wanted.changes or SchemaChanges()

    def decide(self) -> tuple[str | None, SchemaHistory]:
        """Why not, or None; and the history afterwards."""
        try:
            return None, self._evolved()
        except _RefusedError as refusal:
            return str(refusal), self.history

    def _evolved(self) -> SchemaHistory:
        current = self.history.current
        for name in ("kind", "order"):
            old, new = getattr(self.known, name), getattr(self.wanted, name)
            if old != new:
                raise _RefusedError(f"the {name} {old.value!r} of a table cannot change to {new.value!r}")
        if (self.known.aggregation is None) != (self.wanted.aggregation is None):
            raise _RefusedError("rows that are states of an aggregation and rows that are not have other meanings")
        empty: Mapping[str, Any] = {}
        if self.known.aggregation is not None:
            found, empty = self._match_states()
        else:
            found = self._match()
            self._check_dropped(set(found))
        self._check_roles(dict(zip(self.wanted.schema.names, found, strict=True)))
        for wanted, field_id in zip(self.wanted.schema, found, strict=True):
            if field_id is not None:
                self._check_kept(current.schema.field(current.ids.index(field_id)), wanted)
        next_id = max(i for version in self.history.versions for i in version.ids) + 1
        ids, defaults = [], {}
        for wanted, field_id in zip(self.wanted.schema, found, strict=True):
            if field_id is None:
                field_id, next_id = next_id, next_id + 1
                default = empty[wanted.name] if wanted.name in empty else self._default(wanted)
                if default is not None:
                    defaults[field_id] = default
            ids.append(field_id)
        if tuple(ids) == current.ids and self.wanted.schema == current.schema:
            return self.history
        version = SchemaVersion(schema=self.wanted.schema, ids=tuple(ids), defaults=defaults)
        return SchemaHistory((*self.history.versions, version))

    def _match_states(self) -> tuple[list[int | None], Mapping[str, Any]]:
        """The id of every wanted column of a table of states, and what older states hold in new ones."""
        try:
            changes = state_changes(self.known, self.wanted, _widens)
        except ValueError as error:
            raise _RefusedError(str(error)) from error
        current, renamed = self.history.current, self.changes.renamed
        names = {**{k: renamed.get(k, k) for k in self.wanted.key if k not in current.schema.names}, **changes.found}
        keys = {k: k for k in self.wanted.key if k in current.schema.names}
        old = [{**names, **keys}.get(name) for name in self.wanted.schema.names]
        if unknown := [k for k, o in zip(self.wanted.key, old, strict=False) if o not in current.schema.names]:
            raise _RefusedError(f"the key {list(self.known.key)} cannot change to {list(self.wanted.key)}: {unknown}")
        return [None if name is None else current.id_of(name) for name in old], changes.empty

    def _match(self) -> list[int | None]:
        """The id of every wanted column, None for a new one."""
        current, renamed = self.history.current, self.changes.renamed
        names: list[str | None] = []
        for name in self.wanted.schema.names:
            old: str | None = name
            while old is not None and old not in current.schema.names:  # a rename that was missed: the one before it
                old = renamed.get(old)
            if old != name and old in self.wanted.schema.names:
                raise _RefusedError(f"column {name!r} is to be the renamed {old!r}, which is asked for too")
            if old is not None and old in names:
                raise _RefusedError(f"two columns are to be the renamed {old!r}")
            names.append(old)
        return [None if name is None else current.id_of(name) for name in names]

    def _check_dropped(self, kept: set[int | None]) -> None:
        current = self.history.current
        for field_id, name in zip(current.ids, current.schema.names, strict=True):
            if field_id not in kept and name not in self.changes.dropped:
                raise _RefusedError(
                    f"column {name!r} is missing: name it in SchemaChanges, as renamed={{new name: {name!r}}} "
                    f"or as dropped=[{name!r}]"
                )

    def _check_roles(self, ids: Mapping[str, int | None]) -> None:
        """The key, and the column by which rows expire, are the same fields as before."""
        current = self.history.current
        if [ids[k] for k in self.wanted.key] != [current.id_of(k) for k in self.known.key]:
            raise _RefusedError(f"the key {list(self.known.key)} cannot change to {list(self.wanted.key)}")
        for role in ("time_field", "ttl_field"):
            old, new = getattr(self.known, role), getattr(self.wanted, role)
            if old != new and (old is None or new is None or current.id_of(old) != ids[new]):
                raise _RefusedError(f"the {role} {old!r} cannot change to {new!r}")

    def _check_kept(self, old: pa.Field, new: pa.Field) -> None:
        if old.nullable and not new.nullable:
            raise _RefusedError(f"column {new.name!r} may hold nulls, so it cannot become not null")
        if not _widens(old.type, new.type):
            raise _RefusedError(f"column {new.name!r} cannot change from {old.type} to {new.type} without loss")
        if new.name in self.wanted.key and not _keeps_hash(old.type, new.type):
            raise _RefusedError(
                f"the key column {new.name!r} cannot change from {old.type} to {new.type}: its hash would"
            )

    def _default(self, added: pa.Field) -> Any:
        """What older rows shall hold in a new column, as a plain value; None for null."""
        value = self.changes.defaults.get(added.name)
        if value is None:
            if not added.nullable:
                raise _RefusedError(
                    f"the new column {added.name!r} is not null: say SchemaChanges(defaults={{{added.name!r}: ...}})"
                )
            return None
        kind = _canonical(added.type)
        try:
            if isinstance(value, float) and pa.types.is_integer(kind):
                raise TypeError("a float")  # Arrow would make 1 of 1.5
            return _plain(value.cast(kind) if isinstance(value, pa.Scalar) else pa.scalar(value, kind))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"table {self.wanted.name!r}: default {value!r} of column {added.name!r} is no {added.type}: {error}"
            ) from error


def _plain(scalar: pa.Scalar) -> Any:
    """A scalar as a value that msgpack carries. Raises ``TypeError`` for nested ones."""
    kind = scalar.type
    if pa.types.is_decimal(kind):
        return str(scalar.as_py())
    if pa.types.is_temporal(kind) and not pa.types.is_interval(kind):
        return scalar.value
    value = scalar.as_py()
    if not isinstance(value, bool | int | float | str | bytes):
        raise TypeError(f"no defaults are kept for type {kind}")
    return value


def _widens(old: pa.DataType, new: pa.DataType) -> bool:
    """Whether every value of the old type is a value of the new one, and means the same."""
    if old == new:
        return True
    if isinstance(old, pa.BaseExtensionType) or isinstance(new, pa.BaseExtensionType):
        return False
    old, new = _canonical(old), _canonical(new)
    if old == new or _on_ladder(old, new):
        return True
    if pa.types.is_decimal(old) and pa.types.is_decimal(new):
        return bool(old.scale == new.scale and old.precision <= new.precision and old.bit_width <= new.bit_width)
    return bool(old == pa.date32() and new in (pa.timestamp("s"), pa.timestamp("ms")))


def _keeps_hash(old: pa.DataType, new: pa.DataType) -> bool:
    """Whether a value that is widened so keeps its hash; see the table in ``keys.py``."""
    old, new = _canonical(old), _canonical(new)
    if pa.types.is_decimal(old) and pa.types.is_decimal(new):
        return bool(old.bit_width == new.bit_width or new.bit_width <= 64)
    return old == new or _on_ladder(old, new)


def _on_ladder(old: pa.DataType, new: pa.DataType) -> bool:
    return any(old in line and new in line and line.index(old) <= line.index(new) for line in _LADDERS)


def _canonical(kind: pa.DataType) -> pa.DataType:
    return canonical_schema(pa.schema([("", kind)])).field(0).type


def _described(spec: TableSpec) -> str:
    return ", ".join(f"{f.name}: {f.type}{'' if f.nullable else ' not null'}" for f in spec.schema)
