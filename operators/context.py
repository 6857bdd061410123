"""`StreamContext`: where streams begin, and from where they are run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import pyarrow as pa
from datafusion import AggregateUDF, ScalarUDF, SessionContext, TableFunction

from operators.checkpoint import Hook, Trigger
from operators.explain import Explanation
from operators.graph import Graph, Port, SourceNode, derived_id
from operators.job import Job, JobSettings, ProgressCallback
from operators.live_state import LiveJob, LiveReader
from operators.plan_diff import Upgrade
from operators.reading import Readers, ReadOptions, event_time_spec, rate_limit
from operators.report import JobResult
from operators.sources import Source
from operators.sql.catalog import planning_session
from operators.sql.planner import plan_query
from operators.sql.script import Answer, Names, run_script
from operators.stream import DataStream
from statebackend import (
    MemoryStateBackend,
    StateBackend,
    StateCatalog,
    StateCheck,
    StoreSettings,
    create_savepoint,
    open_backend,
    open_state,
)
from statebackend.markup import card, facts

__all__ = ["StreamContext"]


class StreamContext(Readers):
    """A job under construction: sources, streams, sinks, and where its state lives.

    Args:
        name: of the job; part of its identity in the state directory.
        state: URL or path of the state store, a `StateBackend` (which stays open), or None to keep the
            state in memory.
        settings: of the state store at that URL, such as how many checkpoints it keeps.
        checkpoint_interval: seconds or a timedelta between checkpoints; None: on demand and at the end.
        checkpoint_trigger: asked between batches, on the job's thread; where it is true a checkpoint is taken
            right there, besides the interval, and the job waits until the one before is committed.
        tolerable_checkpoint_failures: so many may fail in a row before the job does.
        worker_threads: threads that aggregate while the job reads; the number of cores, at most 4.
        upgrade: what became of operators that are not those of the state any more (see `JobMismatchError`).
        handle_signals: SIGINT and SIGTERM stop the job gracefully when it runs in the main thread.
        stop_with_savepoint: a job that is stopped, by a signal or `Job.stop`, keeps its last checkpoint under this
            name; ``state`` must be a URL or path.
        udafs: Python aggregate functions that windows use.
        clock: wall-clock time in seconds since the epoch, for the limit on future event times.
        hook: called with the name of each step of the checkpoint protocol, for tests.
        storage_options: for the filesystem of ``state``, where that is a URL or path.
    """

    def __init__(
        self,
        name: str = "job",
        *,
        state: str | os.PathLike[str] | StateBackend | None = None,
        settings: StoreSettings | None = None,
        checkpoint_interval: float | timedelta | None = 1.0,
        checkpoint_trigger: Trigger | None = None,
        tolerable_checkpoint_failures: int = 3,
        worker_threads: int | None = None,
        upgrade: Upgrade | None = None,
        handle_signals: bool = True,
        stop_with_savepoint: str | None = None,
        udafs: Sequence[AggregateUDF] = (),
        clock: Callable[[], float] = time.time,
        hook: Hook | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if settings is not None and not isinstance(state, (str, os.PathLike)):
            raise ValueError("settings are of the store that is opened at state=URL; an open one has its own")
        interval = checkpoint_interval
        if isinstance(interval, timedelta):
            interval = interval.total_seconds()
        self.name = name
        self.graph = Graph()
        self.udafs = tuple(udafs)
        self._names = Names()
        self._state = state
        self._store_settings = settings
        self._storage_options = storage_options
        self._stop_with_savepoint = stop_with_savepoint
        self._live = LiveJob(name)
        threads = {} if worker_threads is None else {"worker_threads": worker_threads}
        self._settings = JobSettings(
            checkpoint_interval_s=interval,
            checkpoint_trigger=checkpoint_trigger,
            tolerable_checkpoint_failures=tolerable_checkpoint_failures,
            upgrade=upgrade,
            handle_signals=handle_signals,
            clock=clock,
            hook=hook,
            **threads,
        )

    def register_udaf(self, udaf: AggregateUDF) -> None:
        """A Python aggregate function that windows built from now on may use."""
        self.udafs = (*(u for u in self.udafs if u.name != udaf.name), udaf)

    # -- SQL

    def register(self, name: str, relation: DataStream | pa.Table) -> None:
        """Give a stream, or a table to join streams with, a name for `sql`.

        A source that was given a name is known by it, until something else is registered under that name. A table is
        read as it is now. Raises `ValueError` if the name is taken, or the stream is another job's.
        """
        names = self._names
        if name in names.streams or name in names.tables or name in names.sinks:
            raise ValueError(f"register: there is a {names.kind(name)} {name!r} already")
        if isinstance(relation, pa.Table):
            names.tables[name] = relation
            return
        if relation.context is not self:
            raise ValueError(f"register: the stream {name!r} belongs to another context")
        names.streams[name] = relation

    def register_udf(self, udf: ScalarUDF) -> None:
        """A Python scalar function that queries built from now on may call."""
        self._names.udfs[udf.name] = udf

    def register_udtf(self, udtf: TableFunction) -> None:
        """A Python table function (``datafusion.udtf``) that queries built from now on may join, as a table.

        It is called with constants while a query is planned, and must return the same rows whenever the job is built.
        """
        self._names.udtfs.append(udtf)

    def sql(self, query: str, *, name: str = "sql") -> DataStream:
        """The stream of the rows of a query, planned by DataFusion over the registered streams.

        What is known: SELECT, WHERE, expressions, ``unnest(list)``, CTEs, subqueries in FROM, UNION ALL; GROUP BY
        with a window (``tumble(ts, INTERVAL '10 seconds')``, ``hop(ts, slide, size)``, ``session(ts, gap)``,
        ``cumulate(ts, step, size)``, ``date_bin(size, ts)``), whose bounds are ``window_start_time()`` and
        ``window_end_time()``; GROUP BY without one, DISTINCT, UNION, INTERSECT and EXCEPT, as changelogs (column
        ``op``, see `DataStream.aggregate`); GROUPING SETS, ROLLUP and CUBE; joins by keys and BETWEEN on event time
        (see `DataStream.join_on`), by keys and ``tumble(a.t, …) = tumble(b.t, …)`` or ``hop``
        (`DataStream.window_join`), with registered tables and table functions (`DataStream.lookup_join`), and with
        versions (`DataStream.asof_join`): ``LEFT JOIN LATERAL (SELECT … FROM v WHERE v.k = o.k AND v.ts <= o.ts ORDER
        BY v.ts DESC LIMIT 1) AS x ON true``; ``row_number() OVER (PARTITION BY … ORDER BY …)`` bounded by ``<= n`` or
        ``= 1`` (`DataStream.top_n`, `DataStream.deduplicate`), with ``tumble(ts, …)`` in PARTITION BY for each window
        by itself.

        A Python function must give the same value for the same row, whatever volatility it was declared with.

        ``name`` begins the ids of the query's operators, which name their state: two queries of one job with the same
        kinds of operators need two names.

        The result differs from that of the same query over all rows at once where a stream does: late rows are left
        out of windows, which begin at multiples of their length since 1970-01-01 00:00 UTC whatever the time zone,
        and a GROUP BY over no rows at all has no row, even without keys.

        Raises `SchemaError` for a query that DataFusion does not understand or whose columns do not fit,
        `UnsupportedQueryError` for one that cannot run as a stream; it names the part, and what to write instead.
        """
        names = self._names
        session = planning_session(
            names.known_streams, names.tables, list(names.udfs.values()), self.udafs, udtfs=names.udtfs
        )
        return plan_query(query, session, names.known_streams, names.tables, name)

    @property
    def definitions(self) -> Mapping[str, str]:
        """The statements of `execute` that made the tables and views there are, by name, in their order."""
        return MappingProxyType(self._names.definitions)

    @property
    def columns(self) -> frozenset[str]:
        """The columns of everything that a query can name."""
        names = self._names
        schemas = [known.schema for known in (*names.known_streams.values(), *names.tables.values())]
        return frozenset(name for schema in schemas for name in schema.names)

    def execute(self, script: str) -> list[Answer]:
        """Carry out the statements of a script, which semicolons end; nothing runs before `run`.

        ``CREATE EXTERNAL TABLE name [(columns)] STORED AS … [PARTITIONED BY (…)] LOCATION '…' OPTIONS ('mode' '…', …)``
        makes, by mode:

        * ``bounded`` (the default) a stream of what is there, ``follow`` also of what comes later: PARQUET, CSV, JSON,
          ARROW, or KAFKA, whose location is a topic. Options: ``event_time``, ``watermark_delay``, ``idle_timeout``,
          ``max_drift``, ``future_limit``, ``bad_event_time``, ``max_rows_per_second``, and those of the source.
        * ``static`` a table to join streams with: any format and option of DataFusion.
        * ``sink`` what INSERT INTO writes to, exactly once: PARQUET, CSV, JSON, ARROW, KAFKA, with its columns.
          Options: ``emit`` (of rows that are corrected ``changelog``, with the column ``op``, or ``final``), of files
          ``roll_rows``, ``roll_interval``, ``compression``, ``existing``, of topics those of `DataStream.write_kafka`.

        A name that is no option is refused, with those there are. Lengths of time are written as in INTERVAL;
        ``storage.KEY`` is handed to the filesystem and ``kafka.KEY`` to librdkafka, where ``env:NAME`` stands for an
        environment variable. ``INSERT INTO sink SELECT …`` and ``COPY (SELECT …) TO '…' STORED AS …`` become parts of
        this job; the rows of all INSERTs of a script into one sink end in it together. ``CREATE [OR REPLACE] VIEW``,
        ``DROP TABLE`` and ``DROP VIEW`` are known for the statements after them, and for `sql`. A sink's name begins
        the ids of its operators, so it must stay the same when a job is restored.

        Returns the answers, in order: of a SELECT its stream, which has no sink yet, or a table if it reads tables
        alone; of SHOW TABLES and DESCRIBE a table; of EXPLAIN the operators, as text.

        Raises as `sql` does; a note of the error tells the line of the statement. What was carried out before it stays.
        """
        return run_script(self, self._names, script)

    # -- running

    def run(self, on_progress: ProgressCallback | None = None) -> JobResult:
        """Run everything that leads to a sink, to the end of its inputs; see `Job.run`."""
        return self.job(on_progress).run()

    def job(self, on_progress: ProgressCallback | None = None) -> Job:
        """A job that can be stopped and asked for checkpoints from other threads.

        ``on_progress`` is called on the job's thread, at most ten times a second. Raises
        `ValueError` if no stream ends in a sink.
        """
        nodes = self.graph.nodes()
        if not nodes:
            raise ValueError("nothing to run: no stream ends in a sink (write_parquet, for_each, print, sink)")
        return Job(
            self.name,
            nodes,
            self._open_backend,
            owns_backend=self._state is None or isinstance(self._state, (str, os.PathLike)),
            settings=self._settings,
            on_progress=on_progress,
            live=self._live,
            keep_savepoint=self._keep_savepoint if isinstance(self._state, (str, os.PathLike)) else None,
            savepoint=self._stop_with_savepoint,
        )

    def register_state(
        self, session: SessionContext | None = None, *, timeout_s: float = 30.0, memory_bytes: int = 512 << 20
    ) -> StateCatalog:
        """The state of this job as tables, live: to be asked with SQL from other threads while the job runs.

        A query sees all tables as they are between two batches, those of all operators at the same moment; it is
        planned when the job comes there, at most ``timeout_s`` seconds later, and runs beside it. The job writes what
        its operators hold back, as for a checkpoint, and waits for nothing else. ``system.tables`` tells which tables
        there are, see `statebackend.open_state`.

        ``session``: where to register the schemas ``state``, ``raw`` and ``system``, for queries that join tables of
        your own; queries of several tables go through `StateCatalog.sql` all the same, since DataFusion by itself looks
        up one table after the other. ``memory_bytes`` as in `statebackend.open_state`. Close the catalog when it is not
        needed any more; it may be made before the job runs.

        Queries raise ``TimeoutError`` when the job did not come to the end of a batch in time, ``RuntimeError`` after
        its end.
        """
        udafs = {udaf.name: udaf for udaf in self.udafs}
        return open_state(LiveReader(self._live, timeout_s), session=session, memory_bytes=memory_bytes, udafs=udafs)

    def explain(self) -> Explanation:
        """Everything that leads to a sink, as text, each sink with its inputs indented below it.

        An operator that leads to several is described once. State that can grow for ever says so. A notebook shows
        it as a picture.
        """
        return Explanation.of(*(Port(sink) for sink in self.graph.sinks))

    def _repr_html_(self) -> str:
        state = self._state if isinstance(self._state, (str, os.PathLike)) else type(self._state).__name__
        named = facts(
            {
                "state": "in memory" if self._state is None else state,
                "checkpoint every": None if (s := self._settings.checkpoint_interval_s) is None else f"{s:g} s",
                "sources": ", ".join(self._names.sources) or None,
                "streams and tables in SQL": ", ".join([*self._names.streams, *self._names.tables]) or None,
            }
        )
        return card(self.name, "StreamContext", named, self.explain().picture)

    def _open_backend(self, check: StateCheck) -> StateBackend:
        udafs = {udaf.name: udaf for udaf in self.udafs}
        if self._state is None:
            return MemoryStateBackend(udafs=udafs)
        if isinstance(self._state, (str, os.PathLike)):
            options: dict[str, Any] = {"settings": self._store_settings, "check": check}
            if self._storage_options is not None:
                options["storage_options"] = self._storage_options
            return open_backend(self._state, udafs=udafs, **options)
        return self._state

    def _keep_savepoint(self, name: str, checkpoint_id: int) -> None:
        assert isinstance(self._state, (str, os.PathLike))
        create_savepoint(
            os.fspath(self._state), name, checkpoint_id=checkpoint_id, storage_options=self._storage_options
        )

    def _read(self, source: Source, words: tuple[str, ...], options: ReadOptions) -> DataStream:
        schema = source.schema
        spec = event_time_spec(schema, options)
        limit = rate_limit(options)
        name = options.get("name")
        operator_id = self.graph.claim(name, lambda: derived_id(*words))
        node = SourceNode(operator_id=operator_id, source=source, schema=schema, event_time=spec, limit=limit)
        note = "the source was read without event_time="
        stream = DataStream(self, Port(node), schema, event_time=options.get("event_time"), time_note=note)
        if name is not None:
            self._names.sources[name] = stream
        return stream
