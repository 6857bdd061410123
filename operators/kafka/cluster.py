"""Asks a Kafka cluster about its topics and offsets.

Every question has a deadline and ends at once when ``stop`` is set, so that whoever asks can be stopped while no
broker answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from operators.errors import SourceUnavailableError
from operators.kafka.library import kafka, kafka_admin, librdkafka_logger
from operators.kafka.settings import Fault, KafkaSettings, fault_of

__all__ = ["ClusterDownError", "KafkaCluster", "Partition", "StoppedError", "TopicInfo", "make_client", "refusal"]

K = TypeVar("K", bound=Hashable)

Partition = tuple[str, int]
"""A topic, and the number of one of its partitions."""

_LOOK_S = 0.05


class ClusterDownError(Exception):
    """Nobody answers, or not now; it may pass."""


class StoppedError(Exception):
    """The one who asked was stopped."""


@dataclass(frozen=True, slots=True)
class TopicInfo:
    """A topic: its id, which another topic of the same name has not (None: the broker has no ids), its partitions."""

    topic_id: str | None
    partitions: frozenset[int]


class KafkaCluster:
    """Questions to one cluster, from one thread. ``answer_s``: seconds to wait for an answer.

    All raise `ClusterDownError` if nobody answers, `SourceUnavailableError` if we are not let in, `StoppedError`.
    """

    def __init__(self, settings: KafkaSettings, stop: threading.Event, answer_s: float = 5.0) -> None:
        self._settings = settings
        self._stop = stop
        self._answer_s = answer_s
        self._refused: str | None = None
        self._down: str | None = None
        config = settings.connection({"error_cb": self._on_error})
        self._admin = make_client(settings, lambda: kafka_admin().AdminClient(config, logger=librdkafka_logger))

    def topics(self, names: Iterable[str]) -> dict[str, TopicInfo | None]:
        """The topics of these names; None for one that does not exist."""
        asked = kafka().TopicCollection(list(names))
        answers = self._answers(self._admin.describe_topics(asked, request_timeout=self._answer_s))
        found: dict[str, TopicInfo | None] = {}
        for name, answer in answers.items():
            if answer is None:
                found[name] = None
                continue
            topic_id = str(answer.topic_id)
            # An id of zeros is that of a broker without ids.
            known = topic_id if topic_id.strip("A=0-") else None
            found[name] = TopicInfo(known, frozenset(p.id for p in answer.partitions))
        return found

    def offsets(self, partitions: Iterable[Partition], at: str | int, isolation: str) -> dict[Partition, int]:
        """The first offset (``"earliest"``), the one after the last (``"latest"``), or the first one at a time.

        A time is in epoch milliseconds; where all records are older it is the offset after the last. What is after
        the last depends on the ``isolation``: for ``read_committed`` records of open transactions are not there yet.
        """
        admin = kafka_admin()
        level = getattr(kafka().IsolationLevel, isolation.upper())
        spec = {"earliest": admin.OffsetSpec.earliest, "latest": admin.OffsetSpec.latest}
        wanted = spec[at]() if isinstance(at, str) else admin.OffsetSpec.for_timestamp(at)
        asked = {kafka().TopicPartition(topic, number): wanted for topic, number in partitions}
        if not asked:
            return {}
        answers = self._answers(
            self._admin.list_offsets(asked, isolation_level=level, request_timeout=self._answer_s), missing=False
        )
        found = {(tp.topic, tp.partition): int(answer.offset) for tp, answer in answers.items()}
        late = [partition for partition, offset in found.items() if offset < 0]
        return {**found, **(self.offsets(late, "latest", isolation) if late else {})}

    def _answers(self, futures: Mapping[K, Future[Any]], *, missing: bool = True) -> dict[K, Any]:
        """What was answered; None for what does not exist, if ``missing`` may be."""
        deadline = time.monotonic() + self._answer_s + 1
        self._down = None
        while wait(futures.values(), _LOOK_S).not_done:
            self._admin.poll(0)
            if self._stop.is_set():
                raise StoppedError
            if self._refused is not None:
                raise SourceUnavailableError(self._refused)
            if self._down is not None or time.monotonic() > deadline:
                raise ClusterDownError(self._down or f"no answer within {self._answer_s:.0f} s")
        return {key: self._answer(future, missing) for key, future in futures.items()}

    def _answer(self, future: Future[Any], missing: bool) -> Any:
        try:
            return future.result()
        except kafka().KafkaException as failure:
            error = failure.args[0]
        fault = fault_of(error)
        said = self._settings.redact(error.str())
        if fault is Fault.MISSING and missing:
            return None
        if fault is Fault.REFUSED:
            raise SourceUnavailableError(refusal(self._settings, said))
        raise ClusterDownError(said)

    def _on_error(self, error: Any) -> None:
        fault = fault_of(error)
        said = self._settings.redact(error.str())
        if fault is Fault.REFUSED:
            self._refused = refusal(self._settings, said)
        elif fault is Fault.DOWN:
            self._down = said


def refusal(settings: KafkaSettings, said: str) -> str:
    """The message of an error that says that we are not let in."""
    return f"the Kafka cluster at {settings.servers} refuses: {said}; check credentials and rights (options=)"


def make_client(settings: KafkaSettings, make: Callable[[], Any]) -> Any:
    """A client of the library; `ValueError` for options that it does not know, without their secret values."""
    try:
        return make()
    except (kafka().KafkaException, TypeError, ValueError) as error:
        said = error.args[0].str() if isinstance(error, kafka().KafkaException) else error
        raise ValueError(f"Kafka options: {settings.redact(said)}") from None
