"""The door to `confluent_kafka`, which comes with an extra."""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["kafka", "kafka_admin", "librdkafka_logger"]

librdkafka_logger = logging.getLogger("operators.kafka.librdkafka")
"""What the client library says; it never tells credentials."""

_MISSING = "Kafka needs the extra 'kafka': pip install 'datafusion-statebackend[kafka]'"


def kafka() -> Any:
    """The module; raises `ImportError` with what to install."""
    try:
        import confluent_kafka
    except ImportError as error:
        raise ImportError(_MISSING) from error
    return confluent_kafka


def kafka_admin() -> Any:
    """Its module for administration."""
    try:
        import confluent_kafka.admin
    except ImportError as error:
        raise ImportError(_MISSING) from error
    return confluent_kafka.admin
