"""Where batches go, and what each place promises.

``base.py`` says what a sink is and draws the commit; ``file_sink.py`` is exactly once, with ``formats.py``
(Parquet, CSV, JSON lines, Arrow), ``rolls.py`` (stage and publish), ``commit_log.py`` (what was published, and its
readers), ``partitions.py`` (hive directories), ``pending.py`` (rows that wait in the state) and ``files.py`` (what is
asked of a filesystem); ``delta.py`` and ``postgres.py`` (with ``postgres_session.py``) are exactly once, ``kafka.py``
too, or at least once; ``callback.py``, ``console.py`` and ``memory.py`` are at least once. ``kept.py`` is output that
waits in the state until it is known to have arrived.
"""

from operators.sinks.base import BoundedSink, Guarantee, Prepared, Sink, SinkContext
from operators.sinks.callback import CallbackSink, CommittedFunction, ImmediateCallbackSink
from operators.sinks.commit_log import PublishedFile, PublishedRoll, published_rolls, read_published
from operators.sinks.console import PrintSink
from operators.sinks.delta import DeltaSink
from operators.sinks.file_sink import ArrowSink, CsvSink, FileSink, JsonSink, ParquetSink
from operators.sinks.kafka import ImmediateKafkaSink, KafkaSink
from operators.sinks.memory import MemorySink
from operators.sinks.postgres import PostgresSink

__all__ = [
    "ArrowSink",
    "BoundedSink",
    "CallbackSink",
    "CommittedFunction",
    "CsvSink",
    "DeltaSink",
    "FileSink",
    "Guarantee",
    "ImmediateCallbackSink",
    "ImmediateKafkaSink",
    "JsonSink",
    "KafkaSink",
    "MemorySink",
    "ParquetSink",
    "PostgresSink",
    "Prepared",
    "PrintSink",
    "PublishedFile",
    "PublishedRoll",
    "Sink",
    "SinkContext",
    "published_rolls",
    "read_published",
]
