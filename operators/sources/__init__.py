"""Where batches come from: inputs with a position that a checkpoint can hold.

``base.py`` says what a source is; ``parquet.py``, ``csv.py``, ``json.py`` and ``arrow.py`` read files. They share
``file_source.py``, which puts together ``files.py`` (a set of files and a position in it), ``following.py`` (a
directory that grows), ``drift.py`` (files whose columns differ), ``text.py`` (blocks of lines, plain or compressed)
and ``readahead.py`` (the thread that reads). ``iterable.py`` reads what Python code supplies, ``multi.py`` several
sources as the splits of one; ``rate.py`` limits how fast one is read. ``kafka`` reads topics.
"""

from operators.sources.arrow import ArrowSource
from operators.sources.asynchronous import AsyncSource
from operators.sources.base import IDLE, DeadLetterSource, Position, Source, SourceBatch, SplitSource, TrackedSource
from operators.sources.csv import CsvSource
from operators.sources.file_source import FileOptions, FileSource
from operators.sources.following import Follow
from operators.sources.iterable import IterableSource
from operators.sources.json import JsonSource
from operators.sources.kafka import KafkaSource
from operators.sources.multi import MultiSource
from operators.sources.parquet import ParquetSource
from operators.sources.rate import RateLimit
from operators.sources.then import ThenSource

__all__ = [
    "IDLE",
    "ArrowSource",
    "AsyncSource",
    "CsvSource",
    "DeadLetterSource",
    "FileOptions",
    "FileSource",
    "Follow",
    "IterableSource",
    "JsonSource",
    "KafkaSource",
    "MultiSource",
    "ParquetSource",
    "Position",
    "RateLimit",
    "Source",
    "SourceBatch",
    "SplitSource",
    "ThenSource",
    "TrackedSource",
]
