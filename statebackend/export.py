"""A checkpoint as plain files: what pandas, DuckDB or Polars open without this library.

::

    DIRECTORY/manifest.json              checkpoint, positions, watermarks, plan; per table its file, key, kind, columns
    DIRECTORY/tables/NAME.parquet        (or .arrow) the rows: keys, windows and finalised results

Names of tables are percent-encoded where a file cannot be called so. Rows are read in pieces of bounded size. All is
written into a directory beside the wanted one and renamed when it is complete and durable, so that a directory of that
name is a whole export.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from statebackend.aggregate_declaration import Declaration
from statebackend.catalog import StateCatalog, open_state
from statebackend.errors import StateStoreError
from statebackend.relation import Relation
from statebackend.tables import TableSpec
from statebackend.toolbox import Options, RootOptions

if TYPE_CHECKING:
    from datafusion.user_defined import AggregateUDF

__all__ = ["EXPORT_FORMATS", "ExportedTable", "export_state"]

EXPORT_FORMATS = ("parquet", "arrow")

_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedTable:
    """One file of an export; ``file`` is relative to its directory."""

    name: str
    file: str
    rows: int
    bytes: int


def export_state(
    url: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    checkpoint_id: int | None = None,
    *,
    savepoint: str | None = None,
    tables: Collection[str] | None = None,
    raw: bool = False,
    file_format: str = "parquet",
    udafs: Mapping[str, AggregateUDF] | None = None,
    storage_options: Options = None,
    root_options: RootOptions = None,
) -> list[ExportedTable]:
    """Write a retained checkpoint (default: the newest) or a savepoint into a local directory, which is created.

    ``tables``: by name; None for all. ``raw``: partial states as they are stored instead of finalised results.
    The store is only read, beside whoever owns it.

    Raises ``FileExistsError`` when there is something at ``directory``, ``KeyError`` for an unknown table,
    `CheckpointNotFoundError`, and `StateStoreError` when Parquet cannot hold the columns of a table.
    """
    if file_format not in EXPORT_FORMATS:
        raise ValueError(f"format {file_format!r}: there are {EXPORT_FORMATS}")
    target = Path(directory).absolute()
    if target.exists():
        raise FileExistsError(f"{directory}: exists; an export makes a directory of its own")
    unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    with open_state(
        url, checkpoint_id, savepoint=savepoint, udafs=udafs, storage_options=storage_options, root_options=root_options
    ) as catalog:
        wanted = sorted(catalog.tables if tables is None else tables)
        try:
            (unfinished / "tables").mkdir(parents=True)
            done = [_write(catalog, name, unfinished, file_format, raw=raw) for name in wanted]
            described = _describe(catalog, done, raw=raw)
            _durable(unfinished / "manifest.json", json.dumps(described, indent=1, ensure_ascii=False).encode())
            for place in (unfinished / "tables", unfinished):
                _sync(place)
            unfinished.rename(target)
            _sync(target.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return done


def _write(catalog: StateCatalog, name: str, into: Path, file_format: str, *, raw: bool) -> ExportedTable:
    relation = catalog.raw_table(name) if raw else catalog.table(name)
    file = f"tables/{quote(name, safe='')}.{file_format}"
    path = into / file
    try:
        rows = _write_parquet(relation, path) if file_format == "parquet" else _write_arrow(relation, path)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise StateStoreError(f"table {name!r} cannot be written as {file_format}: {error}; try arrow") from error
    _sync(path)
    return ExportedTable(name=name, file=file, rows=rows, bytes=path.stat().st_size)


def _write_parquet(relation: Relation, path: Path) -> int:
    rows = 0
    with pq.ParquetWriter(path, relation.schema, compression="zstd") as writer:
        for batch in relation.batches():
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


def _write_arrow(relation: Relation, path: Path) -> int:
    rows = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, relation.schema) as writer:
        for batch in relation.batches():
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


def _describe(catalog: StateCatalog, done: Collection[ExportedTable], *, raw: bool) -> dict[str, Any]:
    checkpoint, manifest = catalog.checkpoint, catalog.manifest
    job = checkpoint.job
    return {
        "format": "statebackend export",
        "version": _VERSION,
        "store_id": manifest.store_id,
        "timeline": manifest.timeline,
        "checkpoint_id": int(checkpoint.checkpoint_id),
        "created": datetime.fromtimestamp(checkpoint.created_ms / 1000, UTC).isoformat(),
        "job": _plain({"sources": job.sources, "watermarks": job.watermarks, "plan": job.plan}),
        "tables": [_described(table, manifest.tables[table.name].spec, catalog, raw=raw) for table in done],
    }


def _described(table: ExportedTable, spec: TableSpec, catalog: StateCatalog, *, raw: bool) -> dict[str, Any]:
    relation = catalog.raw_table(table.name) if raw else catalog.table(table.name)
    declared = None if spec.aggregation is None else Declaration.decode(spec.aggregation)
    results = None if declared is None else {o.name: declared.calls[o.call].described() for o in declared.outputs}
    return {
        "name": table.name,
        "file": table.file,
        "rows": table.rows,
        "kind": spec.kind.value,
        "order": spec.order.value,
        "key": list(spec.key),
        "time_field": spec.time_field,
        "ttl_field": spec.ttl_field,
        "watermark": catalog.manifest.tables[table.name].watermark,
        "values": "rows" if declared is None else "partial states" if raw else "finalised",
        "results": results,
        "columns": [{"name": f.name, "type": str(f.type), "nullable": f.nullable} for f in relation.schema],
    }


def _plain(value: Any) -> Any:
    """As a value of JSON; bytes as hexadecimal digits."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return bytes(value).hex() if isinstance(value, bytes | bytearray | memoryview) else value


def _durable(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
