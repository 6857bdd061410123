"""The user's face: a `DataStream` has the verbs of a DataFusion DataFrame, over batches without end.

Expressions are datafusion's own (``col``, ``lit``, ``functions``). A verb checks its columns and
types when it is called and returns a new stream; nothing runs before `StreamContext.run`.
"""

from __future__ import annotations

from operators.verbs.broadcast import BroadcastVerbs
from operators.verbs.ends import EndVerbs
from operators.verbs.flow import FlowVerbs
from operators.verbs.functions import FunctionVerbs
from operators.verbs.joins import JoinVerbs
from operators.verbs.kafka import KafkaVerbs
from operators.verbs.keyed import KeyedVerbs
from operators.verbs.postgres import PostgresVerbs
from operators.verbs.process import ProcessVerbs
from operators.verbs.stateless import StatelessVerbs
from operators.verbs.windows import WindowVerbs

__all__ = ["DataStream"]


class DataStream(
    StatelessVerbs,
    FlowVerbs,
    WindowVerbs,
    JoinVerbs,
    BroadcastVerbs,
    KeyedVerbs,
    FunctionVerbs,
    ProcessVerbs,
    KafkaVerbs,
    PostgresVerbs,
    EndVerbs,
):
    """A stream of record batches with one schema; immutable, and usable by several consumers.

    Streams begin at a `StreamContext`; every verb returns a new one.
    """
