"""Durable state for streaming operators: tables of Arrow batches in an LSM store of immutable files.

General layout, from the ground up (each module imports only from those above it)::

    markup  quantities  display           what a notebook shows of an object
    errors  ids  tables  settings         foundations
    histogram  logs  progress             what is counted and logged
    objectstore*                          the storage seam: one module per kind of storage, wrappers, roots of branches
    daemon_pool  runtime                  the isolated runtime
    format  keys                          envelope, canonical keys and their hash
    prepared  plan_surgery  aggregate_*   DataFusion: partial, reduce and final plans of one aggregation,
    state_layout  accumulators            and their face
    state_changes  schema_history         how the columns of a table change
    merge  ranges  bloom  sstable_index  sstable  pieces of tables in memory and in files, filters,
    probe                                 vectorised lookups
    memtable  cache  table_view           and everything of one table at one moment
    scalar_hash  points                   lookups of a few keys
    manifest  manifest_*                  the manifest, its transitions, its bytes, its publication
    flusher  compaction  compact*_*       background work: merging is planned, carried out,
    compactor                             claimed and committed, here or in a process of its own
    metrics  metrics_server               figures as values, rows, Prometheus text, over HTTP
    pruning  sweep                        a whole table in pieces of bounded size, without what no predicate needs
    buffered_table  table  states_check   one table of an open store,
    snapshot                              all of them at one moment
    memory_budget  early_flush  background     when memory is short, and what is done now and then
    observer  store                       the store
    kv                                    a plain key-value face
    lsm_backend  memory_backend           implementations of the StateBackend protocol in `backend`;
    slatedb_backend  slatedb_*            SlateDB as another, registered as a third party would
    retention  toolbox                    old states that stay: savepoints, branches, pins; what every tool needs
    garbage_collector  inspect_metrics    what nobody needs any more; what can be known from outside
    checkpoint_reader                     a checkpoint read from another process,
    relation  state_diff  catalog*        and as tables for SQL, or what is open, with what changed between two
    export  import_rows                   a checkpoint as plain files, rows as state
    maintenance  branches  verification  repair  inspect  render  cli*  *_cli   tools

``ARCHITECTURE.md`` beside this file tells how it works and draws the formats.
"""

import logging

from statebackend import markup
from statebackend.accumulators import Aggregation, StateMerger
from statebackend.backend import (
    Checkpoint,
    Health,
    JobState,
    LookupResult,
    Matches,
    StateBackend,
    StateCheck,
    StateTable,
    StoredTable,
)
from statebackend.branches import clone
from statebackend.catalog import ReadMetrics, StateCatalog, open_state
from statebackend.checkpoint_reader import CheckpointReader, CheckpointTable, open_checkpoint
from statebackend.cli_options import Redacted, add_storage_option, storage_options
from statebackend.errors import (
    AtomicCreateError,
    CheckpointGoneError,
    CheckpointNotFoundError,
    CommitConflictError,
    CommitUnknownError,
    CorruptionError,
    FencedError,
    ObjectMissingError,
    SchemaMismatchError,
    StateStoreError,
    StorageFullError,
    StorageUnavailableError,
    StoreClosedError,
    UnsupportedAggregateError,
    UnsupportedFormatError,
)
from statebackend.export import ExportedTable, export_state
from statebackend.ids import CheckpointId, StoreId
from statebackend.import_rows import Imported, NewTable, import_table, rows_of_file, rows_of_query
from statebackend.keys import rows_equal
from statebackend.kv import KeyValueStore, open_kv
from statebackend.lsm_backend import backend_names, open_backend
from statebackend.maintenance import create_savepoint
from statebackend.memory_backend import MemoryStateBackend, MemoryStateSpace
from statebackend.memory_budget import MemoryBudget
from statebackend.metrics import BackgroundStatus, StoreMetrics, TableMetrics, TaskState
from statebackend.plan_surgery import read_wire, write_wire
from statebackend.prepared import PreparedPlan
from statebackend.settings import StoreSettings
from statebackend.snapshot import LiveBackend, LiveState, StateSnapshot
from statebackend.store import StateStore
from statebackend.tables import SchemaChanges, TableKind, TableOrder, TableSpec

__all__ = [
    "Aggregation",
    "AtomicCreateError",
    "BackgroundStatus",
    "Checkpoint",
    "CheckpointGoneError",
    "CheckpointId",
    "CheckpointNotFoundError",
    "CheckpointReader",
    "CheckpointTable",
    "CommitConflictError",
    "CommitUnknownError",
    "CorruptionError",
    "ExportedTable",
    "FencedError",
    "Health",
    "Imported",
    "JobState",
    "KeyValueStore",
    "LiveBackend",
    "LiveState",
    "LookupResult",
    "Matches",
    "MemoryBudget",
    "MemoryStateBackend",
    "MemoryStateSpace",
    "NewTable",
    "ObjectMissingError",
    "PreparedPlan",
    "ReadMetrics",
    "Redacted",
    "SchemaChanges",
    "SchemaMismatchError",
    "StateBackend",
    "StateCatalog",
    "StateCheck",
    "StateMerger",
    "StateSnapshot",
    "StateStore",
    "StateStoreError",
    "StateTable",
    "StorageFullError",
    "StorageUnavailableError",
    "StoreClosedError",
    "StoreId",
    "StoreMetrics",
    "StoreSettings",
    "StoredTable",
    "TableKind",
    "TableMetrics",
    "TableOrder",
    "TableSpec",
    "TaskState",
    "UnsupportedAggregateError",
    "UnsupportedFormatError",
    "add_storage_option",
    "backend_names",
    "clone",
    "create_savepoint",
    "export_state",
    "import_table",
    "markup",
    "open_backend",
    "open_checkpoint",
    "open_kv",
    "open_state",
    "read_wire",
    "rows_equal",
    "rows_of_file",
    "rows_of_query",
    "storage_options",
    "write_wire",
]

# A library says nothing by itself: without this, logging prints warnings that no handler of the application takes.
logging.getLogger(__name__).addHandler(logging.NullHandler())
