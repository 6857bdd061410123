"""Sends records to a topic, and finds out what became of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from operators.errors import SinkRefusedError
from operators.kafka.cluster import make_client
from operators.kafka.library import kafka, librdkafka_logger
from operators.kafka.records import describe_record
from operators.kafka.settings import Fault, KafkaSettings, fault_of

__all__ = ["RecordSender", "TryAgainError", "message_bytes_max"]

_POLL_S = 0.1
_POLL_EVERY = 10_000
_OVERHEAD_BYTES = 100
_MESSAGE_BYTES_MAX = 1_000_000
_PASSING_DELIVERY = ("_MSG_TIMED_OUT", "_PURGE_QUEUE", "_PURGE_INFLIGHT", "_FENCED", "_FATAL", "_STATE")


class TryAgainError(Exception):
    """The brokers are not there, or the session is lost: a new one may do better."""


def message_bytes_max(settings: KafkaSettings) -> int:
    """How many bytes the key and value of a record may have for the client library to take it."""
    return int(settings.options.get("message.max.bytes", _MESSAGE_BYTES_MAX)) - _OVERHEAD_BYTES


class RecordSender:
    """A producer for one topic. ``config``: settings of librdkafka beside those of the user.

    ``producer`` is the library's. Records of one key go to the partition that Java's default partitioner would choose.
    """

    def __init__(self, settings: KafkaSettings, topic: str, config: Mapping[str, Any]) -> None:
        self._settings = settings
        self._topic = topic
        self._refused: str | None = None
        self._refused_bytes = 0
        own = {
            "enable.idempotence": True,
            "partitioner": "murmur2_random",
            "delivery.report.only.error": True,
            "on_delivery": self._on_delivery,
            "error_cb": self._on_error,
            "linger.ms": 5,
            "retry.backoff.ms": 20,  # a transaction waits for the end of the one before
            "topic.metadata.propagation.max.ms": 10_000,  # a topic that is gone is not waited for longer
            "socket.timeout.ms": 10_000,  # some calls of the library wait for so long, whatever they are told
            "queue.buffering.max.messages": 500_000,
            **config,
        }
        self.producer = make_client(settings, lambda: kafka().Producer(settings.config(own), logger=librdkafka_logger))

    def poll(self, seconds: float = 0.0) -> None:
        """Let the library tell what happened; raises what `check` and `failure` have for it."""
        try:
            self.producer.poll(seconds)
        except kafka().KafkaException as failure:
            raise self.failure(failure.args[0]) from None
        self.check()

    def check_topic(self, deadline: float) -> None:
        """Raise `SinkRefusedError` if there is no such topic, `TryAgainError` if no broker answers."""
        while True:
            try:
                found = self.producer.list_topics(self._topic, timeout=max(0.05, min(1.0, deadline - time.monotonic())))
            except kafka().KafkaException as failure:
                self.poll()
                if time.monotonic() > deadline:
                    raise self.failure(failure.args[0]) from None
                time.sleep(_POLL_S)  # it may have failed at once
            else:
                error = found.topics[self._topic].error
                if error is not None:
                    raise self.failure(error)
                return

    def send(self, records: pa.RecordBatch, deadline: float) -> None:
        """Hand records (`RECORDS`) to the library, which sends them in the background.

        When its queue is full this waits. Raises `TryAgainError` after the deadline, and what `check` raises.
        """
        produce, topic = self.producer.produce, self._topic
        columns = [column.to_pylist() for column in records.columns]
        for number, (key, value, partition, timestamp, headers) in enumerate(zip(*columns, strict=True)):
            while True:
                try:
                    where = -1 if partition is None else partition
                    produce(topic, value, key, where, None, None, timestamp or 0, headers)
                    break
                except BufferError:
                    if time.monotonic() > deadline:
                        raise TryAgainError("the queue of unsent records is full") from None
                    self.poll(_POLL_S)
                except kafka().KafkaException as failure:
                    raise self._failure_of(failure.args[0], key, value) from None
            if number % _POLL_EVERY == 0:
                self.poll()

    def flush(self, deadline: float) -> None:
        """Wait until all records have arrived; `TryAgainError` after the deadline, and what `check` raises."""
        while self._flushed(min(1.0, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() > deadline:
                raise TryAgainError("records did not arrive in time")

    def _flushed(self, seconds: float) -> int:
        """How many records are still on their way."""
        try:
            left: int = self.producer.flush(seconds)
        except kafka().KafkaException as failure:
            raise self.failure(failure.args[0]) from None
        except SystemError:  # how the binding tells of a fatal error here
            self.poll()
            raise TryAgainError("the session was lost") from None
        self.check()
        return left

    def check(self) -> None:
        """Raise what the library has told: `SinkRefusedError`."""
        if self._refused is not None:
            raise SinkRefusedError(self._refused)

    def failure(self, error: Any) -> Exception:
        """The exception for an error of the library."""
        said = self._settings.redact(error.str())
        if fault_of(error) in (Fault.REFUSED, Fault.MISSING):
            return SinkRefusedError(self._refusal(said))
        return TryAgainError(said)

    def discard(self) -> None:
        """Let go: what has not been sent is not sent any more."""
        with contextlib.suppress(kafka().KafkaException):
            self.producer.purge()
            self.producer.poll(0)
        del self.producer

    def _failure_of(self, error: Any, key: bytes | None, value: bytes | None) -> Exception:
        codes = kafka().KafkaError
        if error.code() in {getattr(codes, name) for name in _PASSING_DELIVERY} or fault_of(error) in (
            Fault.DOWN,
            Fault.DISCONNECTED,
        ):
            return TryAgainError(self._settings.redact(error.str()))
        said = self._settings.redact(error.str())
        size = _size(key, value)
        return SinkRefusedError(f"{self._refusal(said)}; the record: {size} bytes, {describe_record(key, value)}")

    def _refusal(self, said: str) -> str:
        return f"topic {self._topic!r} at {self._settings.servers} takes no records: {said}"

    def _on_delivery(self, error: Any, message: Any) -> None:
        """Records are refused in batches; the largest of them is the one that was too large, if one was."""
        size = _size(message.key(), message.value())
        if error is None or (self._refused is not None and size <= self._refused_bytes):
            return
        failure = self._failure_of(error, message.key(), message.value())
        if isinstance(failure, SinkRefusedError):
            self._refused, self._refused_bytes = str(failure), size

    def _on_error(self, error: Any) -> None:
        if fault_of(error) is Fault.REFUSED and self._refused is None:
            self._refused = self._refusal(self._settings.redact(error.str()))


def _size(key: bytes | None, value: bytes | None) -> int:
    return len(key or b"") + len(value or b"")
