"""Records sent to one topic in transactions, each of which moves a marker.

The marker is a committed offset of a consumer group that nobody consumes with: it says up to which ordinal the output
of a sink is in the topic, and it is sent in the same transaction as the records, so it moves exactly when they
become visible. A session begins with ``init_transactions``, which ends whatever an earlier session under the same
transactional id had begun (by committing it if its commit had reached the broker, else by aborting it) and fences it
for good; only then is the marker read. So nobody else moves it from there on unseen, and

    read the marker, send what is above it, move it

is exactly once whatever crashes, however often, and also while two processes both believe that they are the one.

The client library cannot take up a transaction that another process began, nor one that this process lost sight
of (there is no two-phase commit in it): no transaction is open for longer than it takes to send what the state
keeps, and after any failure the session is thrown away and a new one looks at the marker.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import pyarrow as pa

from operators.kafka.cluster import make_client
from operators.kafka.library import kafka, librdkafka_logger
from operators.kafka.producer import RecordSender, TryAgainError
from operators.kafka.settings import KafkaSettings

__all__ = ["KafkaTransactions", "Transactions"]

_SLICE_S = 1.0
_PAUSE_S = 0.02
_MARKER_PARTITION = 0


class Transactions(Protocol):
    """The steps of the protocol, in their order; a test fails, or crashes, at each.

    All raise `TryAgainError` if the session is lost, `SinkRefusedError` if trying again will not help. ``deadline``
    is a time of the monotonic clock.
    """

    def init(self, deadline: float) -> None:
        """Begin a session: end and fence every earlier one."""

    def marker(self, deadline: float) -> int | None:
        """What the last committed transaction said; None if there never was one, or the broker forgot it."""

    def begin(self) -> None:
        """Begin a transaction."""

    def send(self, records: pa.RecordBatch, deadline: float) -> None:
        """Send records (`RECORDS`) in it."""

    def mark(self, marker: int, deadline: float) -> None:
        """Move the marker in it."""

    def commit(self, deadline: float) -> None:
        """Make it visible. If this fails the outcome is unknown until a new session has begun."""

    def discard(self) -> None:
        """Let go of the session without a word to the broker."""


class KafkaTransactions:
    """See the module and `Transactions`. ``transactional_id`` is also the name of the marker's group."""

    def __init__(self, settings: KafkaSettings, topic: str, transactional_id: str) -> None:
        self._settings = settings
        self._topic = topic
        self._transactional_id = transactional_id
        self._sender: RecordSender | None = None
        self._group: Any = None

    def init(self, deadline: float) -> None:
        """See `Transactions.init`."""
        self.discard()
        sender = RecordSender(self._settings, self._topic, {"transactional.id": self._transactional_id})
        self._sender = sender
        sender.check_topic(deadline)
        self._call(lambda timeout: sender.producer.init_transactions(timeout), deadline)
        self._group = make_client(
            self._settings,
            lambda: kafka().Consumer(
                self._settings.connection({"group.id": self._transactional_id, "enable.auto.commit": False}),
                logger=librdkafka_logger,
            ),
        )

    def marker(self, deadline: float) -> int | None:
        """See `Transactions.marker`; the broker answers when no transaction is pending that moves it."""
        place = kafka().TopicPartition(self._topic, _MARKER_PARTITION)
        found = self._call(lambda timeout: self._group.committed([place], timeout=timeout), deadline)[0]
        if found.error is not None:
            raise self._opened().failure(found.error)
        return None if found.offset < 0 else int(found.offset)

    def begin(self) -> None:
        """See `Transactions.begin`."""
        self._call(lambda _: self._opened().producer.begin_transaction(), time.monotonic())

    def send(self, records: pa.RecordBatch, deadline: float) -> None:
        """See `Transactions.send`."""
        self._opened().send(records, deadline)

    def mark(self, marker: int, deadline: float) -> None:
        """See `Transactions.mark`; the records have arrived by then."""
        self._opened().flush(deadline)
        place = kafka().TopicPartition(self._topic, _MARKER_PARTITION, marker)
        group = self._group.consumer_group_metadata()
        producer = self._opened().producer
        self._call(lambda timeout: producer.send_offsets_to_transaction([place], group, timeout), deadline)

    def commit(self, deadline: float) -> None:
        """See `Transactions.commit`."""
        sender = self._opened()
        self._call(lambda timeout: sender.producer.commit_transaction(timeout), deadline)

    def discard(self) -> None:
        """See `Transactions.discard`."""
        sender, self._sender = self._sender, None
        group, self._group = self._group, None
        if sender is not None:
            sender.discard()
        if group is not None:
            with contextlib.suppress(Exception):
                group.close()

    def _opened(self) -> RecordSender:
        if self._sender is None:
            raise TryAgainError("the session was lost")
        return self._sender

    def _call(self, call: Callable[[float], Any], deadline: float) -> Any:
        """Call with a short timeout again and again: what the library is told in between is looked at."""
        sender = self._opened()
        while True:
            try:
                answer = call(max(0.05, min(_SLICE_S, deadline - time.monotonic())))
            except kafka().KafkaException as failure:
                error = failure.args[0]
                sender.poll()
                if not error.retriable() or time.monotonic() > deadline:
                    raise sender.failure(error) from None
                time.sleep(_PAUSE_S)
            else:
                sender.check()
                return answer
