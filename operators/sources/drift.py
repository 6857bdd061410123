"""When the files of a source have not all the same columns.

The policies, for a file whose columns differ from those of the stream:

``error``         it is refused;
``widen``         columns that it lacks are null, narrower ones are cast to the wider type; columns that the stream
                  does not have are refused. Where all files are known beforehand the stream has the columns of all;
``ignore_extra``  as ``widen``, but columns that the stream does not have are left out.

Columns that were asked for (``columns=``, ``schema=``) are never too few: what else a file holds is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa

from operators.errors import BadInputError, SchemaError

__all__ = ["Drift", "Fit", "common_schema", "extra_columns"]


class Drift(StrEnum):
    """What to do with a file whose columns are not those of the stream; see the module."""

    ERROR = "error"
    WIDEN = "widen"
    IGNORE_EXTRA = "ignore_extra"


def common_schema(schemas: Sequence[tuple[str, pa.Schema]], drift: Drift) -> pa.Schema:
    """The columns of a stream over files that are all known, by path: of the first one, or of all.

    Raises `SchemaError` naming two files whose columns do not go together.
    """
    path, common = schemas[0]
    if drift is not Drift.WIDEN:
        return common
    for other, schema in schemas[1:]:
        try:
            common = pa.unify_schemas([common, schema], promote_options="permissive")
        except pa.ArrowException as e:
            raise SchemaError(
                f"{other} has columns\n{schema}\nwhich do not go with those of {path}\n{common}: {e}"
            ) from e
    # What one of them lacks is null there.
    lacking = {name for _, schema in schemas for name in set(common.names) - set(schema.names)}
    return pa.schema([field.with_nullable(True) if field.name in lacking else field for field in common])


@dataclass(frozen=True, slots=True)
class Fit:
    """How the columns of one file become those of the stream.

    ``target``: the columns that are to come from the file. ``selected``: whether they were asked for by name.
    """

    path: str
    target: pa.Schema
    drift: Drift
    selected: bool
    first: str

    def fields(self, found: pa.Schema) -> list[str]:
        """The columns to read from a file that has these; raises `SchemaError` if they do not fit."""
        if self.drift is Drift.ERROR:
            self._require_same(found)
            return list(self.target.names)
        extra = [name for name in found.names if name not in self.target.names]
        if extra and not self.selected and self.drift is Drift.WIDEN:
            raise SchemaError(extra_columns(self.path, extra))
        for field in self.target:
            if field.name in found.names and not _widens(found.field(field.name), field):
                raise SchemaError(
                    f"{self.path}: column {field.name!r} is {found.field(field.name).type}, the stream's is "
                    f"{field.type}, which cannot hold it"
                )
        missing = [f.name for f in self.target if f.name not in found.names and not f.nullable]
        if missing:
            raise SchemaError(f"{self.path}: no column {missing}, which cannot be null, among {found.names}")
        return [name for name in self.target.names if name in found.names]

    def conform(self, batch: pa.RecordBatch) -> list[pa.Array]:
        """The columns of the stream: cast, and null where the file has none."""
        columns: list[pa.Array] = []
        for field in self.target:
            index = batch.schema.get_field_index(field.name)
            if index < 0:
                columns.append(pa.nulls(batch.num_rows, field.type))
                continue
            column = batch.column(index)
            try:
                columns.append(column if column.type == field.type else column.cast(field.type))
            except pa.ArrowException as e:
                raise BadInputError(f"{self.path}: column {field.name!r} is not {field.type}: {e}") from e
        return columns

    def _require_same(self, found: pa.Schema) -> None:
        missing = [name for name in self.target.names if found.get_field_index(name) < 0]
        if missing and self.selected:
            raise SchemaError(f"{self.path}: no single column {missing} among {found.names}")
        same = pa.schema([found.field(name) for name in self.target.names]) if self.selected else found
        if not (_holds(self.target, same) if self.selected else same.equals(self.target)):
            raise SchemaError(
                f"{self.path} has columns\n{same}\nbut {self.first or 'the stream'} has\n{self.target}\n"
                'read files of different columns with schema_drift="widen" or "ignore_extra"'
            )


def extra_columns(path: str, names: Sequence[str]) -> str:
    """The message that a file has columns which the stream does not have."""
    return (
        f"{path} has the columns {list(names)}, which the stream does not have; "
        'leave them out with schema_drift="ignore_extra", or name all columns with schema='
    )


def _holds(target: pa.Schema, found: pa.Schema) -> bool:
    """Whether the types are the same, and what may be null may be null."""
    return all(t.type == f.type and (t.nullable or not f.nullable) for t, f in zip(target, found, strict=True))


def _widens(found: pa.Field, target: pa.Field) -> bool:
    """Whether every value of one type is one of the other."""
    if found.type == target.type:
        return True
    try:
        both = pa.unify_schemas(
            [pa.schema([pa.field("c", found.type)]), pa.schema([pa.field("c", target.type)])],
            promote_options="permissive",
        )
    except pa.ArrowException:
        return False
    return bool(both.field(0).type == target.type)
