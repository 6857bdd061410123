"""State as tables: a checkpoint of any store, asked with SQL, without the job that wrote it.

``open_state`` reads a checkpoint from outside (see ``checkpoint_reader.py``) and shows it to DataFusion::

    state."TABLE"     the rows of a table; of an aggregate table the key, the window and the finalised results
    raw."TABLE"       of an aggregate table the partial states as they were written, several per key maybe
    state_at('TABLE', CHECKPOINT)              the same table at another kept checkpoint, or savepoint
    state_diff('TABLE', CHECKPOINT, CHECKPOINT)   what changed in it between two
    system.checkpoints, .tables, .files, .operators, .sources    what the manifests know

System tables have a schema of their own, for a job may well call a table ``files`` or ``checkpoints``; tables of the
job have no other names beside theirs in ``state``. A name reaches the store as a value that is looked up among those
that the manifest holds, never as text of a query. Queries only read: DDL and DML are refused.

Nothing is read before a query asks for it, and then in pieces of bounded size (``sweep.py``). A query that has to
gather (a large sort or join) spills to temporary files beyond ``memory_bytes``.

Invariants:

* All tables of a query are of the checkpoint that was opened, those of `state_at` and `state_diff` of theirs.
* DataFusion calls back into Python while it plans and scans; whatever needs DataFusion itself then, such as the plans
  that merge states, runs on a pool of the catalog (``relation.py``).
"""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from datafusion import DataFrame, Expr, RuntimeEnvBuilder, SessionConfig, SessionContext, SQLOptions, udtf
from datafusion.catalog import SchemaProvider

from statebackend import display
from statebackend.backend import Checkpoint
from statebackend.catalog_system import SYSTEM_TABLES, checkpoints, system_table
from statebackend.checkpoint_reader import CheckpointReader, CheckpointTable, open_checkpoint
from statebackend.errors import CheckpointGoneError, CheckpointNotFoundError, StateStoreError, StoreClosedError
from statebackend.manifest_store import Clock
from statebackend.relation import Relation, RelationDataset
from statebackend.state_diff import StateDiff
from statebackend.toolbox import Options, RootOptions

if TYPE_CHECKING:
    from datafusion.user_defined import AggregateUDF

__all__ = ["StateCatalog", "open_state"]

T = TypeVar("T")
At = int | str
"""A checkpoint by its id, or by the name of a savepoint."""

_THREADS = 4
_FAILURES_MAX = 16


def open_state(
    url: str | os.PathLike[str],
    checkpoint_id: int | None = None,
    *,
    savepoint: str | None = None,
    pin: bool = True,
    lease_s: float = 60.0,
    cache_bytes: int = 64 << 20,
    memory_bytes: int = 512 << 20,
    udafs: Mapping[str, AggregateUDF] | None = None,
    storage_options: Options = None,
    root_options: RootOptions = None,
    clock: Clock | None = None,
) -> StateCatalog:
    """Open a retained checkpoint (default: the newest) or a savepoint for SQL, beside whoever owns the store.

    ``udafs``: Python aggregate functions by name, to finalise states of theirs and to be used in queries.
    ``memory_bytes``: what the sorts, joins and aggregations of a query may hold before they spill. ``cache_bytes``:
    decoded blocks kept in memory, for every checkpoint that is read. All others as in `open_checkpoint`.

    Raises `CheckpointNotFoundError` when there is no such checkpoint.
    """
    opened = partial(
        open_checkpoint,
        url,
        pin=pin,
        lease_s=lease_s,
        cache_bytes=cache_bytes,
        udafs=udafs,
        storage_options=storage_options,
        root_options=root_options,
        clock=clock,
    )
    reader = opened(checkpoint_id, savepoint=savepoint)
    return StateCatalog(_Checkpoints(reader, opened), dict(udafs or {}), memory_bytes)


class StateCatalog:
    """A checkpoint as tables; a context manager. See `open_state`."""

    def __init__(self, kept: _Checkpoints, udafs: Mapping[str, AggregateUDF], memory_bytes: int) -> None:
        self._kept = kept
        self._reader = kept.current
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="statestore-catalog")
        self._spool = tempfile.TemporaryDirectory(prefix="statestore-catalog-")
        self._spooled = itertools.count()
        self._failures: deque[StateStoreError | ValueError] = deque(maxlen=_FAILURES_MAX)
        config = SessionConfig().with_target_partitions(1)
        runtime = RuntimeEnvBuilder().with_disk_manager_os().with_fair_spill_pool(memory_bytes)
        self._context = SessionContext(config, runtime)
        tables = frozenset(self._reader.tables)
        schemas: dict[str, tuple[frozenset[str], Callable[[str], Relation]]] = {
            "state": (tables, self.table),
            "raw": (tables, self.raw_table),
            "system": (frozenset(SYSTEM_TABLES), self._system_table),
        }
        for name, (names, relation) in schemas.items():
            self._context.catalog().register_schema(name, _Schema(names, partial(self._provide, relation)))
        self._context.register_udtf(udtf(self._state_at, "state_at"))
        self._context.register_udtf(udtf(self._state_diff, "state_diff"))
        for udaf in udafs.values():
            self._context.register_udaf(udaf)

    @property
    def checkpoint(self) -> Checkpoint:
        """Which checkpoint is read, and what the job committed with it."""
        return self._reader.checkpoint

    @property
    def tables(self) -> list[str]:
        """The names of the tables of the checkpoint."""
        return sorted(self._reader.tables)

    @property
    def context(self) -> SessionContext:
        """The session in which queries run: register tables of your own here to join them."""
        return self._context

    def sql(self, query: str) -> DataFrame:
        """Plan a query; it runs when the DataFrame is collected, and while the catalog is open.

        Raises ``ValueError`` for a query that cannot be planned, and the errors of the store for checkpoints that
        are not kept and tables that cannot be read. What goes wrong later, DataFusion reports in words only;
        `query` raises it as what it is.
        """
        options = SQLOptions().with_allow_ddl(False).with_allow_dml(False).with_allow_statements(False)
        try:
            return self._context.sql_with_options(query, options)
        except Exception as error:  # the binding raises bare exceptions
            raise self._told(error) from error

    def query(self, query: str) -> pa.RecordBatchReader:
        """Run a query; the answer is a stream, computed as it is read. Raises as `sql`, also while it is read."""
        frame = self.sql(query)
        schema = frame.schema()

        def batches() -> Iterator[pa.RecordBatch]:
            try:
                for batch in frame.execute_stream():
                    if (found := batch.to_pyarrow()).num_rows:
                        yield pa.RecordBatch.from_arrays(found.columns, schema=schema)
            except Exception as error:  # the binding raises bare exceptions
                raise self._told(error) from error

        return pa.RecordBatchReader.from_batches(schema, batches())

    def table(self, name: str, at: At | None = None) -> Relation:
        """A table, for everything that takes an Arrow stream: DuckDB, Polars, pandas, pyarrow. Rows as in ``state``.

        ``at``: another kept checkpoint, or the name of a savepoint.
        Raises ``KeyError`` when there is no such table, `CheckpointNotFoundError`, and `SchemaMismatchError` or
        `UnsupportedAggregateError` when its states cannot be finalised here.
        """
        reader = self._kept.at(at)
        table = reader.table(name)
        return self._relation(table.result_schema, partial(_rows, table), inline=table.inline)

    def raw_table(self, name: str) -> Relation:
        """A table with the partial states as they are stored; other tables as they are. Raises ``KeyError``."""
        table = self._reader.raw_table(name)
        if table.spec.aggregation is None:
            return self.table(name)
        return self._relation(table.spec.schema, partial(_states, table))

    def diff(self, name: str, before: At, after: At) -> Relation:
        """What changed in a table between two checkpoints; see `StateDiff` for columns and errors."""
        diff = StateDiff.of(name, self._kept.at(before), self._kept.at(after))
        return self._relation(diff.schema, lambda _: diff.rows(), inline=diff.inline)

    def close(self) -> None:
        """Let go of every checkpoint and stop every thread; queries that were planned cannot run any more."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._spool.cleanup()
        self._kept.close()

    def __enter__(self) -> StateCatalog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _repr_html_(self) -> str:
        return display.catalog(self.checkpoint, self._reader.url, self._reader.manifest, SYSTEM_TABLES)

    def _system_table(self, name: str) -> Relation:
        def rows(_: pc.Expression | None) -> Iterator[pa.RecordBatch]:
            if name == "checkpoints":
                yield from checkpoints(self._reader.kept()).to_batches()
            else:
                yield from system_table(name, self._reader.manifest).to_batches()

        return self._relation(SYSTEM_TABLES[name], rows)

    def _relation(
        self,
        schema: pa.Schema,
        rows: Callable[[pc.Expression | None], Iterator[pa.RecordBatch]],
        *,
        inline: bool = True,
    ) -> Relation:
        def remembered(predicate: pc.Expression | None) -> Iterator[pa.RecordBatch]:
            with self._remembering():
                yield from rows(predicate)

        return Relation(schema.remove_metadata(), remembered, inline)

    # --- what DataFusion calls back, on its own thread: nothing of DataFusion may be called on it ---

    def _provide(self, relation: Callable[..., Relation], *args: Any) -> RelationDataset:
        """The table of DataFusion for a relation, which is looked up on the pool."""

        def made() -> Relation:
            with self._remembering():
                found = relation(*args)
                return found if found.inline else found.spooled(Path(self._spool.name) / str(next(self._spooled)))

        return RelationDataset(self._pool.submit(made).result(), self._pool)

    def _state_at(self, *args: Any) -> RelationDataset:
        return self._provide(self._at_of, args)

    def _state_diff(self, *args: Any) -> RelationDataset:
        return self._provide(self._diff_of, args)

    def _at_of(self, args: tuple[Any, ...]) -> Relation:
        usage = "state_at('TABLE', CHECKPOINT): a table by name and a checkpoint id, or the name of a savepoint"
        name, at = _literals(args, 2, usage)
        return _known(lambda: self.table(name, at))

    def _diff_of(self, args: tuple[Any, ...]) -> Relation:
        usage = "state_diff('TABLE', CHECKPOINT, CHECKPOINT): a table by name, and ids of checkpoints or savepoints"
        name, before, after = _literals(args, 3, usage)
        return _known(lambda: self.diff(name, before, after))

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        """Keep what goes wrong, since DataFusion passes on words only."""
        try:
            yield
        except (StateStoreError, ValueError) as error:
            self._failures.append(error)
            raise

    def _told(self, error: Exception) -> Exception:
        """The failure behind an error of DataFusion's; a ``ValueError`` where the query itself is at fault."""
        said = str(error)
        for failure in reversed(tuple(self._failures)):
            if str(failure) in said:
                return failure
        hint = f"; tables are {self.tables}" if "not found" in said else ""
        return ValueError(f"{said}{hint}")


class _Schema(SchemaProvider):
    """Tables that are made when a query names them."""

    def __init__(self, names: frozenset[str], provide: Callable[[str], RelationDataset]) -> None:
        self._names = names
        self._provide = provide

    @property
    def table_names(self) -> list[str]:  # type: ignore[override]  # the binding reads an attribute
        return sorted(self._names)

    def table_exist(self, name: str) -> bool:
        return name in self._names

    def table(self, name: str) -> Any:
        return self._provide(name) if name in self._names else None


class _Checkpoints:
    """The checkpoint that was opened, and others of its store, opened when they are asked for; thread-safe."""

    def __init__(self, current: CheckpointReader, opened: Callable[..., CheckpointReader]) -> None:
        self.current = current
        self._open = opened
        # State below is protected by _lock.
        self._lock = threading.Lock()
        self._others: dict[At, CheckpointReader] = {}
        self._closed = False

    def at(self, at: At | None) -> CheckpointReader:
        """The reader of a checkpoint. Raises `CheckpointNotFoundError`, `CheckpointGoneError`."""
        if at is None or at == int(self.current.checkpoint.checkpoint_id):
            return self.current
        with self._lock:
            if self._closed:
                raise StoreClosedError(f"{self.current.url}: the catalog is closed")
            if at not in self._others:
                self._others[at] = self._opened(at)
            return self._others[at]

    def _opened(self, at: At) -> CheckpointReader:
        if isinstance(at, str):
            return self._open(savepoint=at)
        try:
            return self._open(at)
        except CheckpointNotFoundError as error:
            latest = self.current.latest()
            for name, savepoint in latest.savepoints.items():
                if savepoint.checkpoint_id == at:
                    return self._open(savepoint=name)
            if 0 < at <= latest.checkpoint_id:
                raise CheckpointGoneError(f"{error}; it was there and is kept no longer") from error
            raise

    def close(self) -> None:
        with self._lock:
            self._closed = True
            readers, self._others = [self.current, *self._others.values()], {}
        for reader in readers:
            reader.close()


def _rows(table: CheckpointTable, predicate: pc.Expression | None) -> Iterator[pa.RecordBatch]:
    with table.sweep(predicate) as sweep:
        yield from sweep.rows()


def _states(table: CheckpointTable, predicate: pc.Expression | None) -> Iterator[pa.RecordBatch]:
    with table.sweep(predicate) as sweep:
        yield from sweep.states()


def _literals(args: tuple[Any, ...], count: int, usage: str) -> list[Any]:
    """The arguments of a table function: a text, then integers or texts."""
    values = []
    for arg in args:
        try:
            values.append((arg if isinstance(arg, Expr) else Expr(arg)).python_value().as_py())
        except Exception as error:  # the binding raises bare exceptions
            raise ValueError(f"{usage}; {arg} is not a literal") from error
    rest_fits = all(isinstance(value, int | str) and not isinstance(value, bool) for value in values)
    if len(values) != count or not rest_fits or not isinstance(values[0], str):
        raise ValueError(f"{usage}; not {values}")
    return values


def _known(look_up: Callable[[], T]) -> T:
    try:
        return look_up()
    except KeyError as error:
        raise ValueError(str(error.args[0])) from error
