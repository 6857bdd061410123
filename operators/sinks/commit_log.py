"""The commit log of a sink's directory: what was published, and by whom.

One JSON object for each roll, in ``_committed/<store>/<operator>/<roll>.json``, written once and never changed::

    {"version": 1,                         a reader refuses newer ones
     "store": ..., "operator": ...,        whose output it is
     "roll": "0000000007-<attempt>-0",     checkpoint, attempt, number: entries of one operator sort by time
     "rows": 1000,                         of all files
     "format": {"kind": "parquet", ...},   how the files are to be read
     "schema": ...,                        of the rows, partition columns among them: Arrow IPC, base64
     "partition_by": ["origin"],
     "files": [{"final": "origin=EWR/part-....parquet", "staged": ..., "rows": 400, "bytes": 7312,
                "check": ...}, ...],       XXH3-64 of the bytes of the file, 16 hexadecimal digits
     "check": ...}                         the same of this object without it: sorted keys, no spaces

The index of a staged roll is the same object. An entry that is no whole JSON is one that is being written, on a
filesystem where a write is not atomic: there is none yet. One that is whole and does not fit its checksum is an error.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import xxhash

from operators.errors import OutputVanishedError, SchemaError
from operators.hive import partition_columns
from operators.sinks.files import OutputFiles, output_files
from operators.sinks.formats import format_of
from statebackend import CorruptionError, UnsupportedFormatError

__all__ = [
    "CLAIM",
    "COMMITTED",
    "PublishedFile",
    "PublishedRoll",
    "checksum",
    "decode",
    "encode",
    "is_entry",
    "published_rolls",
    "read_published",
]

VERSION = 1
COMMITTED = "_committed"
CLAIM = "_claim.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFile:
    """One file of the commit log; ``name`` is relative to the sink's directory, ``check`` is of its bytes."""

    name: str
    rows: int
    bytes: int
    check: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRoll:
    """One entry of the commit log: the output of one checkpoint of one sink. ``schema``: of its rows."""

    store_id: str
    operator_id: str
    roll: str
    rows: int
    format: Mapping[str, Any]
    schema: pa.Schema
    partition_by: tuple[str, ...]
    files: tuple[PublishedFile, ...]


def published_rolls(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> list[PublishedRoll]:
    """The commit log of a sink directory: every roll that counts, by store, operator and checkpoint.

    Raises `CorruptionError` for an entry whose checksum is wrong, `UnsupportedFormatError` for one of a newer version.
    """
    return _rolls(output_files(path, storage_options))


def read_published(
    path: str | os.PathLike[str],
    *,
    schema: pa.Schema | None = None,
    verify: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> pa.RecordBatchReader:
    """The rows that file sinks have published in a directory, and no others, whatever else lies there.

    Batch by batch, in the order of the log, a file at a time, with the columns that the sink was given; as an Arrow
    stream it goes straight into DuckDB, Polars or DataFusion, and ``.read_all()`` is a table. Only whole rolls are
    read: all or nothing of what one checkpoint wrote. ``schema``: the columns that are expected; without it a directory
    in which nothing was published yet is an error. ``verify``: read every file whole and compare its checksum.

    Raises `OutputVanishedError` for a file that is not there, `CorruptionError` for one whose bytes are not those that
    were written, `SchemaError` if the rolls have not all the same columns, or there is none.
    """
    files = output_files(path, storage_options)
    rolls = _rolls(files)
    if schema is None and not rolls:
        reason = "nothing was published there, so its columns are not known; schema= tells them"
        raise SchemaError(f"{os.fspath(path)}: {reason}")
    expected = f"but {rolls[0].operator_id} published" if schema is None else "expected"
    schema = rolls[0].schema if schema is None else schema.remove_metadata()
    for roll in rolls:
        if roll.schema != schema:
            raise SchemaError(
                f"{os.fspath(path)}: {roll.operator_id} published the columns\n{roll.schema}\nin the roll {roll.roll}, "
                f"{expected}\n{schema}"
            )

    def batches() -> Iterator[pa.RecordBatch]:
        for roll in rolls:
            for file in roll.files:
                yield from _read(files, os.fspath(path), roll, file, verify=verify).to_batches()

    return pa.RecordBatchReader.from_batches(schema, batches())


def encode(
    *,
    store_id: str,
    operator_id: str,
    roll: str,
    rows: int,
    format: Mapping[str, Any],  # noqa: A002 - what it is called
    schema: pa.Schema,
    partition_by: Sequence[str],
    files: Sequence[Mapping[str, Any]],
) -> bytes:
    """The bytes of an entry."""
    entry = {
        "version": VERSION,
        "store": store_id,
        "operator": operator_id,
        "roll": roll,
        "rows": rows,
        "format": dict(format),
        "schema": base64.b64encode(schema.serialize().to_pybytes()).decode(),
        "partition_by": list(partition_by),
        "files": list(files),
    }
    return json.dumps({**entry, "check": _check_of(entry)}).encode()


def decode(data: bytes | None, where: str) -> dict[str, Any] | None:
    """An entry; None if it is missing, or torn by a filesystem without atomic writes."""
    try:
        entry = None if data is None else json.loads(data)
    except ValueError:
        return None
    if not isinstance(entry, dict):
        return None
    version = entry.get("version")
    if not isinstance(version, int):
        raise CorruptionError(f"{where}: no entry of a commit log: it has no version")
    if version > VERSION:
        raise UnsupportedFormatError(f"{where}: written in version {version}, this release reads up to {VERSION}")
    check = entry.pop("check", None)
    if check != _check_of(entry):
        raise CorruptionError(f"{where}: the checksum is {check}, its contents have {_check_of(entry)}")
    return entry


def checksum(data: bytes) -> str:
    """As the log writes it."""
    return xxhash.xxh3_64_hexdigest(data)


def is_entry(name: str) -> bool:
    """Neither a claim nor what a crash left of one that was being written."""
    return name.endswith(".json") and name != CLAIM


def _rolls(files: OutputFiles) -> list[PublishedRoll]:
    found: list[PublishedRoll] = []
    for store in files.names(COMMITTED):
        for operator in files.names(f"{COMMITTED}/{store}"):
            directory = f"{COMMITTED}/{store}/{operator}"
            names = (f"{directory}/{name}" for name in files.names(directory) if is_entry(name))
            entries = (decode(files.read(name), name) for name in names)
            found += [_published(entry) for entry in entries if entry is not None]
    return found


def _read(files: OutputFiles, path: str, roll: PublishedRoll, file: PublishedFile, *, verify: bool) -> pa.Table:
    inside = pa.schema([field for field in roll.schema if field.name not in roll.partition_by])

    def rows_of(opened: BinaryIO) -> pa.Table:
        return format_of(roll.format).read(opened, inside)

    try:
        if verify:
            data = files.read(file.name)
            if data is None:
                raise FileNotFoundError(file.name)
            if (found := checksum(data)) != file.check:
                raise CorruptionError(f"{path}: {file.name} has the checksum {found}, {file.check} was published")
            rows = rows_of(pa.BufferReader(data))
        else:
            with files.open(file.name) as opened:
                rows = rows_of(opened)
    except FileNotFoundError as error:
        raise OutputVanishedError(f"{path}: {file.name} ({file.rows} rows) was published and is not there") from error
    except pa.ArrowException as error:
        raise CorruptionError(f"{path}: {file.name} cannot be read: {error}") from error
    if rows.num_rows != file.rows:
        raise CorruptionError(f"{path}: {file.name} has {rows.num_rows} rows, {file.rows} were published")
    by = partition_columns(file.name, [roll.schema.field(name) for name in roll.partition_by], rows.num_rows)
    columns = [by[f.name] if f.name in by else rows.column(f.name) for f in roll.schema]
    return pa.table(columns, schema=roll.schema)


def _published(entry: Mapping[str, Any]) -> PublishedRoll:
    return PublishedRoll(
        store_id=entry["store"],
        operator_id=entry["operator"],
        roll=entry["roll"],
        rows=entry["rows"],
        format=entry["format"],
        schema=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(entry["schema"]))),
        partition_by=tuple(entry["partition_by"]),
        files=tuple(
            PublishedFile(name=f["final"], rows=f["rows"], bytes=f["bytes"], check=f["check"]) for f in entry["files"]
        ),
    )


def _check_of(entry: Mapping[str, Any]) -> str:
    return checksum(json.dumps(entry, sort_keys=True, separators=(",", ":")).encode())
