"""Manifests as bytes: msgpack of plain values in the envelope of ``format.py``.

::

    {"number", "parent_attempt", "store_id", "timeline", "writer_epoch", "compactor_epoch",
     "compactor_id": text | nil, "writer_id", "attempt_id", "checkpoint_id", "created_ms",
     "low_marks": {owner: sequence},
     "tables": {name: {"schemas": [[bytes of an Arrow IPC schema message, [field id], [[field id, default]]]],
                       "key": [name], "kind",
                       "order", "time_field", "ttl_field", "aggregation": declaration | nil,
                       "fingerprint", "watermark", "files": [[field of SSTableMeta, in order]]}},
     "job": {"sources", "watermarks", "committables", "plan"},
     "retained": [[checkpoint_id, manifest_number, created_ms, rows_written, bytes_written, duration_ms]],
     "savepoints": {name: [object_name, checkpoint_id, created_ms, expires_ms | nil]},
     "branches": {store id: [object_name, checkpoint_id, created_ms, url]},
     "pins": {id: [object_name, checkpoint_id, created_ms, expires_ms]},
     "roots": {number: [url, store_id]},
     "writer_reads": [manifest_number]}
"""

from __future__ import annotations

from dataclasses import astuple, fields
from functools import lru_cache
from operator import attrgetter
from typing import Any

import pyarrow as pa

from statebackend import format as envelope
from statebackend.backend import JobState
from statebackend.errors import CorruptionError
from statebackend.manifest import Branch, Manifest, Pin, RetainedCheckpoint, Root, Savepoint, TableState
from statebackend.manifest_check import check_manifest, check_numbers
from statebackend.schema_history import SchemaHistory, SchemaVersion
from statebackend.sstable import SSTableMeta
from statebackend.tables import TableKind, TableOrder, TableSpec

__all__ = ["decode_manifest", "encode_manifest"]

_SCALARS = (
    "number",
    "parent_attempt",
    "store_id",
    "timeline",
    "writer_epoch",
    "compactor_epoch",
    "compactor_id",
    "writer_id",
    "attempt_id",
    "checkpoint_id",
    "created_ms",
)
_FILE_FIELDS = tuple(f.name for f in fields(SSTableMeta))
_file_values = attrgetter(*_FILE_FIELDS)


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of a manifest object.

    Raises `CorruptionError` where one of its numbers has grown out of the bounds that a reader accepts.
    """
    try:
        check_numbers(manifest)
    except ValueError as error:
        raise CorruptionError(f"manifest/{manifest.number} cannot follow what was read: {error}") from error
    job = manifest.job
    value = {name: getattr(manifest, name) for name in _SCALARS} | {
        "low_marks": dict(manifest.low_marks),
        "tables": {name: _encode_table(state) for name, state in manifest.tables.items()},
        "job": {
            "sources": dict(job.sources),
            "watermarks": dict(job.watermarks),
            "committables": {k: list(v) for k, v in job.committables.items()},
            "plan": dict(job.plan),
        },
        "retained": [list(astuple(r)) for r in manifest.retained],
        "savepoints": {name: list(astuple(s)) for name, s in manifest.savepoints.items()},
        "branches": {store: list(astuple(b)) for store, b in manifest.branches.items()},
        "pins": {pin: list(astuple(p)) for pin, p in manifest.pins.items()},
        "roots": {number: list(astuple(r)) for number, r in manifest.roots.items()},
        "writer_reads": list(manifest.writer_reads),
    }
    return envelope.encode(envelope.ObjectKind.MANIFEST, value)


def decode_manifest(data: bytes, name: str) -> Manifest:
    """The manifest in the bytes of the object ``name``.

    Raises `CorruptionError`, or `UnsupportedFormatError` for a newer version; both name the object.
    """
    value = envelope.decode(envelope.ObjectKind.MANIFEST, data, name)
    try:
        manifest = Manifest(
            **{field: value[field] for field in _SCALARS},
            low_marks=value["low_marks"],
            tables={table: _decode_table(table, state) for table, state in value["tables"].items()},
            job=JobState(**value["job"]),
            retained=tuple(
                RetainedCheckpoint(
                    checkpoint_id=c, manifest_number=n, created_ms=t, rows_written=r, bytes_written=b, duration_ms=d
                )
                for c, n, t, r, b, d in value["retained"]
            ),
            savepoints={
                name: Savepoint(object_name=o, checkpoint_id=c, created_ms=t, expires_ms=e)
                for name, (o, c, t, e) in value["savepoints"].items()
            },
            branches={
                store: Branch(object_name=o, checkpoint_id=c, created_ms=t, url=u)
                for store, (o, c, t, u) in value["branches"].items()
            },
            pins={
                pin: Pin(object_name=o, checkpoint_id=c, created_ms=t, expires_ms=e)
                for pin, (o, c, t, e) in value["pins"].items()
            },
            roots={number: Root(url=u, store_id=s) for number, (u, s) in value["roots"].items()},
            writer_reads=tuple(value["writer_reads"]),
        )
        check_manifest(manifest)
    except Exception as error:  # whatever wrong values of any type raise
        raise CorruptionError(f"{name}: not a manifest: {type(error).__name__}: {error}") from error
    return manifest


def _encode_table(state: TableState) -> dict[str, Any]:
    spec = state.spec
    return {
        "schemas": [_encode_version(v) for v in state.history.versions],
        "key": list(spec.key),
        "kind": spec.kind.value,
        "order": spec.order.value,
        "time_field": spec.time_field,
        "ttl_field": spec.ttl_field,
        "aggregation": spec.aggregation,
        "fingerprint": state.fingerprint,
        "watermark": state.watermark,
        "files": [list(_file_values(f)) for f in state.files],
    }


def _encode_version(version: SchemaVersion) -> list[Any]:
    return [version.schema.serialize().to_pybytes(), list(version.ids), [list(d) for d in version.defaults.items()]]


def _decode_version(value: list[Any]) -> SchemaVersion:
    schema, ids, defaults = value
    return SchemaVersion(schema=_schema_of(schema), ids=tuple(ids), defaults=dict(defaults))


@lru_cache(maxsize=1024)
def _schema_of(data: bytes) -> pa.Schema:
    """Of one store nearly all manifests hold the same schemas."""
    return pa.ipc.read_schema(pa.py_buffer(data))


def _decode_table(name: str, value: dict[str, Any]) -> TableState:
    history = SchemaHistory(tuple(_decode_version(v) for v in value["schemas"]))
    spec = TableSpec(
        name=name,
        schema=history.current.schema,
        key=tuple(value["key"]),
        kind=TableKind(value["kind"]),
        order=TableOrder(value["order"]),
        time_field=value["time_field"],
        ttl_field=value["ttl_field"],
        aggregation=value["aggregation"],
    )
    files = tuple(_decode_file(f) for f in value["files"])
    if unknown := [f.name for f in files if not 0 <= f.schema <= history.number]:
        raise ValueError(f"table {name!r}: files {unknown} are of a schema that it never had")
    return TableState(
        spec=spec,
        history=history,
        fingerprint=value["fingerprint"],
        watermark=value["watermark"],
        files=files,
    )


def _decode_file(values: list[Any]) -> SSTableMeta:
    if len(values) != len(_FILE_FIELDS):
        raise ValueError(f"file entry of {len(values)} fields, expected {len(_FILE_FIELDS)}")
    return SSTableMeta(**dict(zip(_FILE_FIELDS, values, strict=True)))
