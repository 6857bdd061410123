"""What sources and sinks of Kafka share.

``library.py`` is the door to the client library, ``settings.py`` how to reach a cluster without telling secrets,
``cluster.py`` asks it about topics and offsets. Of the sinks alone: ``records.py`` makes records of rows,
``producer.py`` sends them, ``transactions.py`` sends them exactly once.
"""

from operators.kafka.cluster import (
    ClusterDownError,
    KafkaCluster,
    Partition,
    StoppedError,
    TopicInfo,
    make_client,
    refusal,
)
from operators.kafka.library import kafka, kafka_admin, librdkafka_logger
from operators.kafka.settings import Fault, KafkaSettings, fault_of

__all__ = [
    "ClusterDownError",
    "Fault",
    "KafkaCluster",
    "KafkaSettings",
    "Partition",
    "StoppedError",
    "TopicInfo",
    "fault_of",
    "kafka",
    "kafka_admin",
    "librdkafka_logger",
    "make_client",
    "refusal",
]
