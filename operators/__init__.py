"""Streaming operators on DataFusion whose state survives a crash.

General layout, from the ground up (each module imports only from those above it)::

    errors                        the error tree
    hive                          partitions in the names of directories
    windows  watermark            pure event-time logic
    kafka  formats  encoders      clusters of Kafka; how bytes become columns, and columns bytes
    sources  sinks                where batches come from and go to
    changelog                     streams that correct themselves
    engine                        stateless verbs as one prepared plan
    rows  ordering  pairs         vectorised helpers
    runtime                       what an operator is, batch by batch
    graph  picture  explain       what the user built, and how it is shown
    flow  functions               operators that direct rows, and that call functions of the user
    process                       functions with keyed state and timers: what the user writes
    stateful                      operators that keep state, one module per family
    source_driver  pipeline       how what was built becomes what runs
    wrapped_backend  plan_diff  upgrade*   from the state of one plan to another
    report  checkpoint  job       the run: barriers, commits, the loop
    verbs  stream  sql  reading   the user's face
    context
    testing                       a harness for tests of streams
    topics  denormalized          topics of messages; the API of Denormalized
    exit_codes  flights  demo  nexmark  console  cli   ``python -m operators``
"""

from operators.context import StreamContext
from operators.errors import (
    BadEventTimeError,
    BadInputError,
    JobMismatchError,
    OperatorError,
    OutputUncertainError,
    OutputVanishedError,
    SchemaError,
    SinkOccupiedError,
    SinkRefusedError,
    SinkUnavailableError,
    SourceChangedError,
    SourceNotReplayableError,
    SourceUnavailableError,
    UnsupportedQueryError,
    UserFunctionError,
)
from operators.job import Job
from operators.plan_diff import Upgrade
from operators.process import (
    KeyedBatch,
    KeyedBatchProcess,
    KeyedProcess,
    ListState,
    MapState,
    ProcessContext,
    ValueState,
)
from operators.report import CheckpointStats, JobOutcome, JobProgress, JobResult, OperatorStats
from operators.sinks import read_published
from operators.stream import DataStream

__all__ = [
    "BadEventTimeError",
    "BadInputError",
    "CheckpointStats",
    "DataStream",
    "Job",
    "JobMismatchError",
    "JobOutcome",
    "JobProgress",
    "JobResult",
    "KeyedBatch",
    "KeyedBatchProcess",
    "KeyedProcess",
    "ListState",
    "MapState",
    "OperatorError",
    "OperatorStats",
    "OutputUncertainError",
    "OutputVanishedError",
    "ProcessContext",
    "SchemaError",
    "SinkOccupiedError",
    "SinkRefusedError",
    "SinkUnavailableError",
    "SourceChangedError",
    "SourceNotReplayableError",
    "SourceUnavailableError",
    "StreamContext",
    "UnsupportedQueryError",
    "Upgrade",
    "UserFunctionError",
    "ValueState",
    "read_published",
]
