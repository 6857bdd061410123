"""Where batches go, and what each place promises.

``base.py`` says what a sink is and draws the commit; ``parquet.py`` is exactly once, with ``rolls.py``
(stage and publish), ``partitions.py`` (hive directories), ``pending.py`` (rows that wait in the state)
and ``files.py`` (what is asked of a filesystem); ``callback.py``, ``console.py`` and
``memory.py`` are at least once.
"""

from operators.sinks.base import Guarantee, Prepared, Sink, SinkContext
from operators.sinks.callback import CallbackSink, CommittedFunction, ImmediateCallbackSink
from operators.sinks.console import PrintSink
from operators.sinks.memory import MemorySink
from operators.sinks.parquet import ParquetSink
from operators.sinks.rolls import PublishedFile, PublishedRoll, published_rolls

__all__ = [
    "CallbackSink",
    "CommittedFunction",
    "Guarantee",
    "ImmediateCallbackSink",
    "MemorySink",
    "ParquetSink",
    "Prepared",
    "PrintSink",
    "PublishedFile",
    "PublishedRoll",
    "Sink",
    "SinkContext",
    "published_rolls",
]
