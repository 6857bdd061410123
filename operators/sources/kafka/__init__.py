"""Topics of Kafka as a source.

``source.py`` is the source, on the job's thread; ``reader.py`` what its own thread does, with ``patience.py`` where
nobody answers; ``records.py`` makes rows of records, ``position.py`` says what a position is and when it still fits;
``formats.py`` finds out the columns.
"""

from operators.sources.kafka.source import KafkaSource

__all__ = ["KafkaSource"]
