"""State as tables: a checkpoint of any store, or an open one as it is now, asked with SQL.

``open_state`` reads a checkpoint from outside, without the job that wrote it (see ``checkpoint_reader.py``), or what is
open in this process (see ``catalog_states.py``), and shows it to DataFusion::

    state."TABLE"     the rows of a table; of an aggregate table the key, the window and the finalised results
    raw."TABLE"       of an aggregate table the partial states as they were written, several per key maybe
    state_at('TABLE', CHECKPOINT)              the same table at a kept checkpoint, or savepoint
    state_diff('TABLE', CHECKPOINT, CHECKPOINT)   what changed in it between two
    NAME."TABLE"      of another store, attached under that name: a branch beside the store that it came from
    system.checkpoints, .tables, .files, .compactions, .health, .operators, .sources     what the store knows of itself

An operator that has one table gives it its name: ``state.orders_agg`` is ``state."orders_agg:groups"``.
System tables have a schema of their own, for a job may well call a table ``files`` or ``checkpoints``. In ``state``
they are found too, as ``state.checkpoints``, unless the job has a table of that name. A name reaches the store as a
value that is looked up among those that the manifest holds, never as text of a query. Queries only read: DDL and DML
are refused.

Nothing is read before a query asks for it, and then in pieces of bounded size (``sweep.py``). A query that has to
gather (a large sort or join) spills to temporary files beyond ``memory_bytes``.

Invariants:

* All tables of a query are of the checkpoint that was opened, or of one moment of what is open; those of `state_at` and
  `state_diff` are of their checkpoints.
* DataFusion calls back into Python while it plans and scans; whatever needs DataFusion itself then, such as the plans
  that merge states, runs on a pool of the catalog (``relation.py``).
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from datafusion import DataFrame, Expr, RuntimeEnvBuilder, SessionConfig, SessionContext, SQLOptions, udtf
from datafusion.catalog import SchemaProvider

from statebackend import display
from statebackend.aggregate_declaration import Declaration
from statebackend.backend import Checkpoint
from statebackend.catalog_states import At, CommittedState, LiveStates, Moment, States, SweptTable
from statebackend.catalog_system import SYSTEM_TABLES, operators_of_one_table, system_table
from statebackend.checkpoint_reader import CheckpointReader, open_checkpoint
from statebackend.errors import CheckpointNotFoundError, StateStoreError
from statebackend.manifest import Manifest
from statebackend.manifest_store import Clock
from statebackend.relation import Relation, RelationDataset
from statebackend.snapshot import LiveState, StoreLocation
from statebackend.state_diff import StateDiff
from statebackend.sweep import SWEEP_BYTES, ReadCount
from statebackend.tables import TableSpec
from statebackend.toolbox import Options, RootOptions

if TYPE_CHECKING:
    from datafusion.user_defined import AggregateUDF

__all__ = ["ReadMetrics", "StateCatalog", "open_state"]

T = TypeVar("T")

_THREADS = 4
_RANGE_BYTES_MIN = 1 << 20
_SPILL_RESERVE_BYTES_MAX = 10 << 20
_FAILURES_MAX = 16


def open_state(
    source: str | os.PathLike[str] | LiveState,
    checkpoint_id: int | None = None,
    *,
    savepoint: str | None = None,
    pin: bool = True,
    lease_s: float = 60.0,
    cache_bytes: int = 64 << 20,
    memory_bytes: int = 512 << 20,
    session: SessionContext | None = None,
    udafs: Mapping[str, AggregateUDF] | None = None,
    storage_options: Options = None,
    root_options: RootOptions = None,
    clock: Clock | None = None,
) -> StateCatalog:
    """Open state for SQL: a retained checkpoint (default: the newest) or a savepoint of the store at a URL, beside
    whoever owns it; or what is open in this process, *live*.

    ``source``: a URL or path; or a `StateStore` or `MemoryStateBackend` that is open, of which every query then sees
    all tables at the moment at which it is planned. (A job gives its own: ``StreamContext.register_state``.)
    ``udafs``: Python aggregate functions by name, to finalise states of theirs and to be used in queries.
    ``memory_bytes``: what the sorts, joins and aggregations of a query may hold before they spill; where it is small,
    smaller pieces of a table are in memory at once. ``cache_bytes``: decoded blocks kept in memory, for every
    checkpoint that is read. ``session``: where to register the schemas ``state``, ``raw`` and ``system``, for queries
    that join tables of one's own; None: a session of the catalog's. All others as in `open_checkpoint`.

    Raises `CheckpointNotFoundError` when there is no such checkpoint, ``ValueError`` when a checkpoint is named
    together with open state, or the session has such schemas already.
    """

    def opened(location: StoreLocation, *args: Any, **which: Any) -> CheckpointReader:
        return open_checkpoint(
            location.url,
            *args,
            **which,
            pin=pin,
            lease_s=lease_s,
            cache_bytes=cache_bytes,
            udafs=udafs,
            storage_options=location.storage_options,
            root_options=location.root_options,
            clock=clock,
        )

    states: States
    if isinstance(source, str | os.PathLike):
        location = StoreLocation(url=os.fspath(source), storage_options=storage_options, root_options=root_options)
        at_location = partial(opened, location)
        states = CommittedState(at_location(checkpoint_id, savepoint=savepoint), at_location)
    elif not isinstance(source, LiveState):
        raise TypeError(f"open_state: {type(source).__name__} is neither a URL nor open state that can be read live")
    elif checkpoint_id is not None or savepoint is not None:
        raise ValueError("open state is shown as it is now; checkpoints are in state_at('TABLE', CHECKPOINT)")
    else:
        states = LiveStates(source, opened, cache_bytes)
    try:
        return StateCatalog(states, dict(udafs or {}), memory_bytes, session, opened)
    except BaseException:
        states.close()
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadMetrics:
    """What the queries of a catalog have read so far, and from how much.

    ``files``, ``stored_bytes``: of the tables that were scanned, once per scan; ``blocks``: of those of these files
    whose index was read. ``files_read``, ``blocks_read``, ``read_bytes``: what predicates did not leave out, wherever
    it was found. ``requests``, ``fetched_bytes``: what came from the storage and not from the catalog's cache, indexes
    and filters among it; a live catalog of a store that no URL leads to reads through the store, whose figures have it.
    """

    files: int
    files_read: int
    blocks: int
    blocks_read: int
    stored_bytes: int
    read_bytes: int
    requests: int
    fetched_bytes: int


class StateCatalog:
    """State as tables; a context manager. See `open_state`."""

    def __init__(
        self,
        states: States,
        udafs: Mapping[str, AggregateUDF],
        memory_bytes: int,
        session: SessionContext | None,
        opened: Callable[..., CheckpointReader],
    ) -> None:
        self._states = states
        self._opened = opened
        self._attached: dict[str, CheckpointReader] = {}
        self._count = ReadCount()
        self._range_bytes = max(_RANGE_BYTES_MIN, min(SWEEP_BYTES, memory_bytes // 32))
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="statestore-catalog")
        self._spool = tempfile.TemporaryDirectory(prefix="statestore-catalog-")
        self._spooled = itertools.count()
        self._failures: deque[StateStoreError | ValueError] = deque(maxlen=_FAILURES_MAX)
        if session is None:
            config = SessionConfig().with_target_partitions(1)
            # What a sort keeps back for merging what it has spilled; by default 10 MB, however little there is in all.
            reserved = min(_SPILL_RESERVE_BYTES_MAX, memory_bytes // 8)
            config = config.set("datafusion.execution.sort_spill_reservation_bytes", str(reserved))
            runtime = RuntimeEnvBuilder().with_disk_manager_os().with_fair_spill_pool(memory_bytes)
            session = SessionContext(config, runtime)
        self._context = session
        schemas: dict[str, tuple[Callable[[], frozenset[str]], Callable[[str], Relation]]] = {
            "state": (lambda: self._names() | SYSTEM_TABLES.keys(), self._state_or_system_table),
            "raw": (self._names, self.raw_table),
            "system": (lambda: frozenset(SYSTEM_TABLES), self._system_table),
        }
        if taken := schemas.keys() & session.catalog().names():
            raise ValueError(f"the session has the schemas {sorted(taken)} already: it shows other state")
        for name, (names, relation) in schemas.items():
            session.catalog().register_schema(name, _Schema(names, partial(self._provide, relation)))
        self._context.register_udtf(udtf(self._state_at, "state_at"))
        self._context.register_udtf(udtf(self._state_diff, "state_diff"))
        for udaf in udafs.values():
            self._context.register_udaf(udaf)

    @property
    def checkpoint(self) -> Checkpoint:
        """Which checkpoint is read, and what the job committed with it; of a live catalog the newest one.

        Raises `CheckpointNotFoundError` before the first.
        """
        if (found := self._states.now().manifest.checkpoint) is None:
            raise CheckpointNotFoundError("there is no checkpoint yet")
        return found

    @property
    def manifest(self) -> Manifest:
        """What a manifest says of the moment that is shown."""
        return self._states.now().manifest

    @property
    def tables(self) -> list[str]:
        """The names of the tables there are."""
        return sorted(self._states.now().tables)

    @property
    def reads(self) -> ReadMetrics:
        """What the queries of this catalog have read so far."""
        count, (requests, fetched) = asdict(self._count), self._states.fetched()
        return ReadMetrics(
            stored_bytes=count.pop("bytes"),
            read_bytes=count.pop("bytes_read"),
            requests=requests,
            fetched_bytes=fetched,
            **count,
        )

    @property
    def context(self) -> SessionContext:
        """The session in which queries run: register tables of your own here to join them."""
        return self._context

    def sql(self, query: str) -> DataFrame:
        """Plan a query; it runs when the DataFrame is collected, and while the catalog is open.

        Of a live catalog all its tables are of one moment, that of this call, however late it is collected.

        Raises ``ValueError`` for a query that cannot be planned, and the errors of the store for checkpoints that
        are not kept and tables that cannot be read. What goes wrong later, DataFusion reports in words only;
        `query` raises it as what it is.
        """
        options = SQLOptions().with_allow_ddl(False).with_allow_dml(False).with_allow_statements(False)
        with self._states.planning():
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

        ``at``: a kept checkpoint, or the name of a savepoint. Of a live catalog the moment of this call; see `moment`
        for several tables.
        Raises ``KeyError`` when there is no such table, `CheckpointNotFoundError`, and `SchemaMismatchError` or
        `UnsupportedAggregateError` when its states cannot be finalised here.
        """
        shown: Moment = self._states.now() if at is None else self._at(at)
        return self._table_of(shown, name)

    def moment(self, *names: str) -> dict[str, Relation]:
        """Several tables of one moment, by their names (default: all). Raises as `table`."""
        shown = self._states.now()
        return {name: self._table_of(shown, name) for name in names or sorted(shown.tables)}

    def raw_table(self, name: str) -> Relation:
        """A table with the partial states as they are stored; other tables as they are. Raises ``KeyError``."""
        shown = self._states.now()
        table = shown.raw_table(_resolved(shown, name))
        if table.spec.aggregation is None:
            return self._table_of(shown, name)
        return self._relation(table.spec.schema, partial(self._sweep, table, raw=True))

    def attach(
        self,
        name: str,
        url: str | os.PathLike[str],
        checkpoint_id: int | None = None,
        *,
        savepoint: str | None = None,
        storage_options: Options = None,
        root_options: RootOptions = None,
    ) -> None:
        """Show a checkpoint of another store as the schema ``name``: a branch beside the store that it came from.

        Its tables are ``name."TABLE"``, and ``name`` is a checkpoint for `state_at` and `state_diff` (where it comes
        before a savepoint of that name). Options as in `open_checkpoint`; the checkpoint is pinned as this one is.

        Raises ``ValueError`` when the session has such a schema already, `CheckpointNotFoundError`.
        """
        if name in self._context.catalog().names():
            raise ValueError(f"attach: there is a schema {name!r} already")
        location = StoreLocation(url=os.fspath(url), storage_options=storage_options, root_options=root_options)
        reader = self._opened(location, checkpoint_id, savepoint=savepoint)
        self._attached[name] = reader
        names = _names_of(reader)
        provide = partial(self._provide, partial(self._table_of, reader))
        self._context.catalog().register_schema(name, _Schema(lambda: names, provide))

    def diff(self, name: str, before: At, after: At) -> Relation:
        """What changed in a table between two checkpoints, attached ones among them; see `StateDiff`."""
        old, new = self._at(before), self._at(after)
        known = new if _resolved(new, name) in new.tables else old
        diff = StateDiff.of(_resolved(known, name), old, new)
        return self._relation(diff.schema, lambda _: diff.rows(), inline=diff.inline)

    def close(self) -> None:
        """Let go of every checkpoint and stop every thread; queries that were planned cannot run any more.

        What a live catalog shows stays open.
        """
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._spool.cleanup()
        for reader in self._attached.values():
            reader.close()
        self._states.close()

    def __enter__(self) -> StateCatalog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _repr_html_(self) -> str:
        try:
            shown = self._states.now()
        except (RuntimeError, TimeoutError, StateStoreError) as error:  # a live one whose job does not run, a lost pin
            return display.no_catalog(error)
        short = {table: operator for operator, table in operators_of_one_table(shown.manifest).items()}
        columns = {short.get(name, name): _columns(spec) for name, spec in shown.tables.items()}
        sizes = {short.get(name, name): table for name, table in shown.manifest.tables.items()}
        return display.catalog(shown.manifest.checkpoint, shown.url, sizes, columns, SYSTEM_TABLES)

    def _at(self, at: At) -> CheckpointReader:
        reader = self._attached.get(at) if isinstance(at, str) else None
        return self._states.at(at) if reader is None else reader

    def _names(self) -> frozenset[str]:
        return _names_of(self._states.now())

    def _table_of(self, shown: Moment, name: str) -> Relation:
        table = shown.table(_resolved(shown, name))
        layout = table.layout
        return self._relation(layout.result_schema, partial(self._sweep, table), inline=layout.inline)

    def _sweep(
        self, table: SweptTable, predicate: pc.Expression | None, *, raw: bool = False
    ) -> Iterator[pa.RecordBatch]:
        with table.sweep(predicate, count=self._count, range_bytes=self._range_bytes) as sweep:
            yield from sweep.states() if raw else sweep.rows()

    def _state_or_system_table(self, name: str) -> Relation:
        return self.table(name) if name in self._names() else self._system_table(name)

    def _system_table(self, name: str) -> Relation:
        shown = self._states.now()

        def rows(_: pc.Expression | None) -> Iterator[pa.RecordBatch]:
            yield from system_table(name, shown).to_batches()

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

    def __init__(self, names: Callable[[], frozenset[str]], provide: Callable[[str], RelationDataset]) -> None:
        self._names = names
        self._provide = provide

    @property
    def table_names(self) -> list[str]:  # type: ignore[override]  # the binding reads an attribute
        return sorted(self._names())

    def table_exist(self, name: str) -> bool:
        return name in self._names()

    def table(self, name: str) -> Any:
        return self._provide(name) if name in self._names() else None


def _columns(spec: TableSpec) -> list[str]:
    """The columns under which ``state`` shows a table."""
    if spec.aggregation is None:
        return list(spec.schema.names)
    return [*spec.key, *(output.name for output in Declaration.decode(spec.aggregation).outputs)]


def _names_of(shown: Moment) -> frozenset[str]:
    """Under which names its tables are found."""
    return frozenset(shown.tables) | operators_of_one_table(shown.manifest).keys()


def _resolved(shown: Moment, name: str) -> str:
    """The table that is meant by a name."""
    return operators_of_one_table(shown.manifest).get(name, name)


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
