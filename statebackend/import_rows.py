"""New state from rows: of a file, of a query, or of anything that is an Arrow stream.

The rows become one checkpoint, committed by a writer of its own: whoever owned the store is *fenced*, as by a rollback,
for a job that goes on from memory would not see them. Positions and watermarks stay, a new timeline begins. Before
anybody is fenced the columns are checked; the rows are read after it, so that a query over the state itself sees the
checkpoint onto which they are committed.

A crash, a row that does not fit, or a storage that gives no answer leaves the state as it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.dataset as ds

from statebackend.backend import JobState
from statebackend.catalog import open_state
from statebackend.errors import CheckpointNotFoundError, CommitConflictError, SchemaMismatchError
from statebackend.inspect import read_store
from statebackend.manifest import Manifest
from statebackend.prepared import new_session
from statebackend.settings import StoreSettings
from statebackend.store import StateStore
from statebackend.tables import TableKind, TableOrder, TableSpec
from statebackend.toolbox import Options, RootOptions

if TYPE_CHECKING:
    from datafusion.user_defined import AggregateUDF

__all__ = ["Imported", "NewTable", "Rows", "import_table", "rows_of_file", "rows_of_query"]

Rows = Callable[[], AbstractContextManager[pa.RecordBatchReader]]
"""Opens the rows; called once for their columns and once, when the store is owned, to read them."""

_FORMATS = {".parquet": "parquet", ".csv": "csv", ".arrow": "ipc", ".feather": "ipc", ".ipc": "ipc", ".json": "json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTable:
    """How to declare a table that the store does not have; its columns are those of the rows."""

    key: Sequence[str]
    kind: TableKind = TableKind.UPSERT
    order: TableOrder = TableOrder.HASH
    time_field: str | None = None
    ttl_field: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What an import did."""

    table: str
    rows: int
    checkpoint_id: int
    timeline: int


def import_table(
    url: str | os.PathLike[str],
    name: str,
    rows: Rows,
    *,
    new: NewTable | None = None,
    replace: bool = False,
    at_checkpoint: int | None = None,
    udafs: Mapping[str, AggregateUDF] | None = None,
    storage_options: Options = None,
    root_options: RootOptions = None,
) -> Imported:
    """Write rows into a table of the store at ``url``, as one checkpoint; a running job is fenced.

    ``rows``: see `rows_of_file`, `rows_of_query`. Columns are found by name and cast where nothing is lost; those of an
    aggregate table are its partial states, as an export of ``raw`` tables has them. An upsert table takes the last row
    of a key, an aggregate table merges, an append table appends. ``replace``: what the table held goes.
    ``new``: declares the table, and creates the store if there is none. ``at_checkpoint``: refuse unless this is the
    newest checkpoint.

    Raises `SchemaMismatchError` when the rows do not fit, `CheckpointNotFoundError` when there is no store and no
    ``new``, `CommitConflictError` when the newest checkpoint is another one.
    """
    before = _latest(url, storage_options, required=new is None)
    _require_checkpoint(url, before, at_checkpoint)
    with rows() as found:
        spec = _spec_of(url, name, found.schema, before, new)
        _conformed(found.schema.empty_table(), spec)
    retained = 0 if before is None else len(before.retained)
    settings = StoreSettings(
        compaction="none", retained_checkpoints=max(StoreSettings().retained_checkpoints, retained + 1)
    )
    with StateStore.open(
        url, settings, udafs=udafs, storage_options=storage_options, root_options=root_options
    ) as store:
        _require_checkpoint(url, store.manifest, at_checkpoint)
        known = name in store.stored_tables()
        store.move_tables({name: None} if replace and known else {})
        table, count = store.table(spec), 0
        with rows() as found:
            for batch in found:
                piece = _conformed(pa.Table.from_batches([batch], found.schema), spec)
                for one in piece.to_batches():
                    table.write(one)
                    count += one.num_rows
        job = JobState() if store.restored is None else store.restored.job
        done = store.checkpoint(job).result()
        return Imported(table=name, rows=count, checkpoint_id=int(done.checkpoint_id), timeline=store.manifest.timeline)


def rows_of_file(path: str | os.PathLike[str]) -> Rows:
    """The rows of a Parquet, CSV, Arrow or JSON file, or of a directory of Parquet files.

    Raises ``ValueError`` for a name that tells no format, ``FileNotFoundError``.
    """
    dataset = _dataset(path)

    @contextmanager
    def rows() -> Iterator[pa.RecordBatchReader]:
        yield dataset.scanner().to_reader()

    return rows


def rows_of_query(
    query: str,
    url: str | os.PathLike[str],
    files: Mapping[str, str | os.PathLike[str]] | None = None,
    *,
    udafs: Mapping[str, AggregateUDF] | None = None,
    storage_options: Options = None,
    root_options: RootOptions = None,
) -> Rows:
    """The rows of a query over the state at ``url`` (``state."TABLE"`` and all that `open_state` shows) and files.

    ``files``: paths by the names under which the query knows them. Where there is no store yet, the query sees the
    files alone. Raises ``ValueError`` for a query that cannot be planned.
    """
    datasets = {name: _dataset(path) for name, path in (files or {}).items()}

    @contextmanager
    def rows() -> Iterator[pa.RecordBatchReader]:
        try:
            catalog = open_state(url, udafs=udafs, storage_options=storage_options, root_options=root_options)
        except CheckpointNotFoundError:
            session = new_session(1, udafs=tuple((udafs or {}).values()))
            for name, dataset in datasets.items():
                session.register_dataset(name, dataset)
            try:
                frame = session.sql(query)
            except Exception as error:  # the binding raises bare exceptions
                raise ValueError(str(error)) from error
            yield pa.RecordBatchReader.from_batches(
                frame.schema(), (batch.to_pyarrow() for batch in frame.execute_stream())
            )
            return
        with catalog:
            for name, dataset in datasets.items():
                catalog.context.register_dataset(name, dataset)
            yield catalog.query(query)

    return rows


def _dataset(path: str | os.PathLike[str]) -> ds.Dataset:
    found = Path(path)
    if not found.exists():
        raise FileNotFoundError(f"{path}: no such file")
    kind = "parquet" if found.is_dir() else _FORMATS.get(found.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: its name must end in one of {', '.join(_FORMATS)}")
    return ds.dataset(found, format=kind)


def _latest(url: str | os.PathLike[str], options: Options, *, required: bool) -> Manifest | None:
    try:
        return read_store(os.fspath(url), manifests_max=1, storage_options=options).latest
    except CheckpointNotFoundError:
        if required:
            raise
        return None


def _require_checkpoint(url: str | os.PathLike[str], manifest: Manifest | None, wanted: int | None) -> None:
    newest = 0 if manifest is None else int(manifest.checkpoint_id)
    if wanted is not None and newest != wanted:
        raise CommitConflictError(f"{os.fspath(url)}: the newest checkpoint is {newest}, not {wanted}")


def _spec_of(
    url: str | os.PathLike[str], name: str, schema: pa.Schema, manifest: Manifest | None, new: NewTable | None
) -> TableSpec:
    """The table to write to: as it is, or as ``new`` declares it over the columns of the rows."""
    if manifest is not None and name in manifest.tables:
        spec = manifest.tables[name].spec
        if new is not None and (tuple(new.key), new.kind) != (spec.key, spec.kind):
            raise SchemaMismatchError(
                f"{os.fspath(url)}: table {name!r} is there: {spec.kind.value} with the key {list(spec.key)}; "
                "leave out what declares it, or take another name"
            )
        return spec
    if new is None:
        known = [] if manifest is None else sorted(manifest.tables)
        raise SchemaMismatchError(
            f"{os.fspath(url)}: no table {name!r}; there are {known}. A new one needs at least a key"
        )
    return TableSpec(
        name=name,
        schema=schema.remove_metadata(),
        key=tuple(new.key),
        kind=new.kind,
        order=new.order,
        time_field=new.time_field,
        ttl_field=new.ttl_field,
    )


def _conformed(rows: pa.Table, spec: TableSpec) -> pa.Table:
    """The rows in the columns of the table. Raises `SchemaMismatchError` for other names and for values that differ."""
    wanted, given = spec.schema.names, rows.column_names
    if sorted(wanted) != sorted(given):
        hint = ""
        if spec.aggregation is not None:
            hint = "; a table of states takes states, as export --raw writes them"
        raise SchemaMismatchError(f"table {spec.name!r} has the columns {wanted}, the rows have {given}{hint}")
    columns = []
    for field in spec.schema:
        column = rows.column(field.name)
        try:
            columns.append(column if column.type == field.type else column.cast(field.type))
        except pa.ArrowException as error:
            raise SchemaMismatchError(f"table {spec.name!r}: column {field.name!r}: {error}") from error
        if not field.nullable and column.null_count:
            raise SchemaMismatchError(f"table {spec.name!r}: column {field.name!r} has nulls and must not")
    return pa.Table.from_arrays(columns, schema=spec.schema)
