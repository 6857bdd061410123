"""Kafka: every row a record, exactly once by transactions, or at least once.

`KafkaSink` keeps the records of a checkpoint in the state and sends them once it is committed, together with a marker
that says how far the output has come (`operators.kafka.transactions` has the order of the steps and why it holds).
`ImmediateKafkaSink` sends at once and lets a checkpoint be committed only when everything before it has arrived.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from operators.errors import SinkUnavailableError
from operators.kafka.producer import RecordSender, TryAgainError, message_bytes_max
from operators.kafka.records import RECORDS, RecordColumns, RecordMaker
from operators.kafka.settings import KafkaSettings
from operators.kafka.transactions import KafkaTransactions, Transactions
from operators.sinks.base import Guarantee, Prepared, SinkContext, conform
from operators.sinks.kept import KeptOutput, in_parts

__all__ = ["ImmediateKafkaSink", "KafkaSink"]

logger = logging.getLogger(__name__)

_PAUSE_S = 0.1
_PAUSE_MAX_S = 2.0
_TRANSACTION_BYTES = 64 << 20
_FORGETS = "brokers forget it offsets.retention.minutes after the last output, or when the topic is deleted"

_RESERVED = {
    "bootstrap.servers": "it is bootstrap_servers=",
    "transactional.id": "give transactional_id_prefix=",
    "enable.idempotence": "it is always on",
    "group.id": "give transactional_id_prefix=",
    "delivery.report.only.error": "failed records are errors of the job",
    "on_delivery": "failed records are errors of the job",
    "error_cb": "errors are those of the job",
}


Split = Callable[[pa.RecordBatch], tuple[pa.RecordBatch, pa.Array]]
"""Rows of a changelog: those that become records, and which of them say that their key is no more."""

MakeTransactions = Callable[[KafkaSettings, str, str], Transactions]


class _KafkaRecords:
    """What both sinks do with rows."""

    def __init__(
        self,
        topic: str,
        bootstrap_servers: str | Sequence[str],
        columns: RecordColumns,
        changes: Split | None,
        timeout_s: float,
        options: Mapping[str, Any] | None,
    ) -> None:
        if not topic:
            raise ValueError("the topic has no name")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, not {timeout_s}")
        self.topic = topic
        self.settings = KafkaSettings.of(bootstrap_servers, options, _RESERVED)
        self.timeout_s = timeout_s
        self._columns = columns
        self._changes = changes
        self._maker: RecordMaker | None = None
        self._operator_id = "kafka"
        self._schema = pa.schema([])

    def open(self, context: SinkContext) -> None:
        self._operator_id = context.operator_id
        self._schema = context.schema.remove_metadata()
        rows = self._schema if self._changes is None else self._changes(_no_rows(self._schema))[0].schema
        self._maker = RecordMaker(rows, self._columns, message_bytes_max(self.settings))

    def make(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if self._maker is None:
            raise RuntimeError(f"the sink to the topic {self.topic!r} is not open")
        batch = conform(self._operator_id, self._schema, batch)
        if self._changes is None:
            return self._maker.make(batch)
        return self._maker.make(*self._changes(batch))

    def close(self) -> None:
        self._maker = None

    def unreachable(self, reason: object) -> SinkUnavailableError:
        return SinkUnavailableError(
            f"{self._operator_id}: the topic {self.topic!r} at {self.settings.servers} did not take records for "
            f"{self.timeout_s:.0f} s: {reason}"
        )


class KafkaSink:
    """Sends every row as a record to a topic, exactly once for those who read with ``read_committed``.

    Args:
        topic: it has to exist.
        bootstrap_servers: ``host:port`` of some brokers, a list or separated by commas.
        columns: what becomes the key, the value and so on.
        changes: for a changelog, which rows become records, and which of those are tombstones.
        transactional_id_prefix: begins the transactional id of the sink, ``<prefix>-<store>-<operator>``, which is
            also the name of a consumer group; where the cluster has access lists it must be allowed for both.
        timeout_s: how long a publication tries to reach the brokers before it fails. A failed one comes again with
            the next checkpoint, as often as the job tolerates; its records wait in the state.
        buffer_bytes: of records that wait; with more the job stops reading until they are published.
        assume_published: what an `OutputUncertainError` asked for, and only then.
        options: further settings of librdkafka, by their names there.
        transactions: makes the client side of the protocol; for tests.

    The records of a checkpoint become visible together, once its manifest is committed, in one transaction for
    each 64 MB. They are in the order of the stream for each key. What is kept in the state is the finished record.

    Raises on opening: `SinkRefusedError` (no such topic, no access), `SinkUnavailableError`, `OutputUncertainError`.
    """

    guarantee = Guarantee.EXACTLY_ONCE

    def __init__(
        self,
        topic: str,
        bootstrap_servers: str | Sequence[str],
        columns: RecordColumns | None = None,
        *,
        changes: Split | None = None,
        transactional_id_prefix: str = "streams",
        timeout_s: float = 60.0,
        buffer_bytes: int = 256 << 20,
        assume_published: int | None = None,
        options: Mapping[str, Any] | None = None,
        transactions: MakeTransactions = KafkaTransactions,
    ) -> None:
        self._records = _KafkaRecords(topic, bootstrap_servers, columns or RecordColumns(), changes, timeout_s, options)
        self._prefix = transactional_id_prefix
        self._buffer_bytes = buffer_bytes
        self._assume_published = assume_published
        self._transactions = transactions
        self._publication: _Publication | None = None

    def describe(self) -> Mapping[str, Any]:
        """The topic; a job is restored only with the same one."""
        return {"kind": "kafka", "topic": self._records.topic}

    def open(self, context: SinkContext, committables: Sequence[Any]) -> None:
        """End what earlier attempts have begun, and publish what they committed and did not publish.

        The manifest names the transactional ids that were used, in case the prefix was changed.
        """
        self._records.open(context)
        self._kept = KeptOutput(context, RECORDS, committables)
        self._transactional_id = f"{self._prefix}-{context.store_id}-{context.operator_id}"
        earlier = dict.fromkeys(c["transactional_id"] for c in committables)
        for transactional_id in [*(i for i in earlier if i != self._transactional_id), self._transactional_id]:
            self._close_publication()
            self._publication = self._publish_as(transactional_id, context.operator_id)
            self._publication.publish([c for c in committables if c["transactional_id"] == transactional_id])

    def write(self, batch: pa.RecordBatch) -> None:
        """Make the records and keep them until their checkpoint is committed."""
        self._kept.write(self._records.make(batch))

    def prepare(self, checkpoint_id: int, *, final: bool) -> Prepared:  # noqa: ARG002 - the last one is no other
        """Name the records since the last barrier, and those that are not known to be published."""
        return Prepared(self._kept.cut(checkpoint_id, transactional_id=self._transactional_id))

    def publish(self, committables: Sequence[Any]) -> None:
        """Send what is not in the topic yet."""
        if self._publication is None:
            raise RuntimeError(f"the sink to the topic {self._records.topic!r} is not open")
        self._publication.publish(committables)

    @property
    def full(self) -> bool:
        """Whether as many records wait as may."""
        return self._kept.bytes >= self._buffer_bytes

    def close(self) -> None:
        """Let go; what is committed and not published is published when the job is opened again."""
        self._records.close()
        self._close_publication()

    def _publish_as(self, transactional_id: str, operator_id: str) -> _Publication:
        transactions = self._transactions(self._records.settings, self._records.topic, transactional_id)
        return _Publication(
            transactions,
            self._kept,
            self._records,
            self._assume_published,
            f"{operator_id}: group {transactional_id!r}",
        )

    def _close_publication(self) -> None:
        publication, self._publication = self._publication, None
        if publication is not None:
            publication.close()


class _Publication:
    """Brings kept records into the topic under one transactional id, through as many sessions as it takes."""

    def __init__(
        self,
        transactions: Transactions,
        kept: KeptOutput,
        records: _KafkaRecords,
        assume_published: int | None,
        place: str,
    ) -> None:
        self._transactions = transactions
        self._kept = kept
        self._records = records
        self._assume_published = assume_published
        self._place = f"{place} in the topic {records.topic!r}"
        self._lock = threading.Lock()
        self._in_session = False

    def publish(self, committables: Sequence[Mapping[str, Any]]) -> None:
        """Send what is not in the topic; retries until ``timeout_s`` is over."""
        deadline = time.monotonic() + self._records.timeout_s
        pause = _PAUSE_S
        with self._lock:
            while True:
                try:
                    return self._publish(committables, deadline)
                except TryAgainError as failure:
                    self._lose_session()
                    if time.monotonic() + pause > deadline:
                        raise self._records.unreachable(failure) from None
                    logger.warning("%s: beginning again: %s", self._place, failure)
                except BaseException:
                    self._lose_session()
                    raise
                time.sleep(pause)
                pause = min(2 * pause, _PAUSE_MAX_S)

    def close(self) -> None:
        with self._lock:
            self._lose_session()

    def _publish(self, committables: Sequence[Mapping[str, Any]], deadline: float) -> None:
        if not self._in_session:
            self._begin_session(deadline)
        waiting = [kept for committable in committables for kept in self._kept.batches(committable)]
        for part in in_parts(waiting, _TRANSACTION_BYTES):
            self._transactions.begin()
            for kept in part:
                self._transactions.send(kept.batch, deadline)
            self._commit(part[-1].ordinal + 1, deadline)

    def _begin_session(self, deadline: float) -> None:
        self._transactions.init(deadline)
        found = self._transactions.marker(deadline)
        marker = self._kept.resolve(found, self._assume_published, self._place, _FORGETS)
        if marker == found:
            self._kept.acknowledge(marker)
        else:
            self._transactions.begin()
            self._commit(marker, deadline)
        self._in_session = True

    def _commit(self, marker: int, deadline: float) -> None:
        self._transactions.mark(marker, deadline)
        self._transactions.commit(deadline)
        self._kept.acknowledge(marker)

    def _lose_session(self) -> None:
        self._in_session = False
        self._transactions.discard()


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


class ImmediateKafkaSink:
    """Sends every row as a record to a topic, at once; arguments as for `KafkaSink`.

    At least once: what came after the last committed checkpoint of a crashed job is sent again by its successor. A
    checkpoint is committed only when everything before it has arrived; while that is waited for the job writes
    nothing more. A record that the broker does not take ends the job.
    """

    guarantee = Guarantee.AT_LEAST_ONCE

    def __init__(
        self,
        topic: str,
        bootstrap_servers: str | Sequence[str],
        columns: RecordColumns | None = None,
        *,
        changes: Split | None = None,
        timeout_s: float = 60.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._records = _KafkaRecords(topic, bootstrap_servers, columns or RecordColumns(), changes, timeout_s, options)
        self._lock = threading.Lock()
        self._sender: RecordSender | None = None

    def describe(self) -> Mapping[str, Any]:
        """The topic; a job is restored only with the same one."""
        return {"kind": "immediate_kafka", "topic": self._records.topic}

    def open(self, context: SinkContext, committables: Sequence[Any]) -> None:  # noqa: ARG002 - has none
        """Look whether the topic is there."""
        self._records.open(context)
        records = self._records
        # Records wait for the brokers for as long as it takes: only a checkpoint, or a full queue, runs out of time.
        sender = RecordSender(records.settings, records.topic, {"message.timeout.ms": 0})
        self._sender = sender
        self._reach(lambda deadline: sender.check_topic(deadline))

    def write(self, batch: pa.RecordBatch) -> None:
        """Hand the records to the client library."""
        records = self._records.make(batch)
        with self._lock:
            self._reach(lambda deadline: self._opened().send(records, deadline))

    def prepare(self, checkpoint_id: int, *, final: bool) -> Prepared:  # noqa: ARG002 - nothing is named
        """The checkpoint waits until what was written has arrived."""
        self._opened()
        return Prepared(stage=self._flush)

    def publish(self, committables: Sequence[Any]) -> None:
        """Nothing to publish."""

    def close(self) -> None:
        """Let go; what has not arrived is sent again after the restart."""
        self._records.close()
        with self._lock:
            sender, self._sender = self._sender, None
            if sender is not None:
                sender.discard()

    def _flush(self) -> None:
        with self._lock:
            self._reach(lambda deadline: self._opened().flush(deadline))

    def _reach(self, action: Callable[[float], None]) -> None:
        try:
            action(time.monotonic() + self._records.timeout_s)
        except TryAgainError as failure:
            raise self._records.unreachable(failure) from None

    def _opened(self) -> RecordSender:
        if self._sender is None:
            raise RuntimeError(f"the sink to the topic {self._records.topic!r} is not open")
        return self._sender
