"""Where batches come from: bounded inputs with a position that a checkpoint can hold.

``base.py`` says what a source is; ``parquet.py``, ``csv.py`` and ``iterable.py`` are sources. The
first two share ``files.py`` (a set of files and a position in it) and ``readahead.py`` (the thread
that reads them). ``multi.py`` reads several sources as the splits of one.
"""

from operators.sources.base import IDLE, Position, Source, SourceBatch, SplitSource
from operators.sources.csv import CsvSource
from operators.sources.iterable import IterableSource
from operators.sources.multi import MultiSource
from operators.sources.parquet import ParquetSource

__all__ = [
    "IDLE",
    "CsvSource",
    "IterableSource",
    "MultiSource",
    "ParquetSource",
    "Position",
    "Source",
    "SourceBatch",
    "SplitSource",
]
