"""What the thread of a Kafka source does: find the partitions, consume, decode, follow what changes.

Partitions are assigned by us, never by a consumer group, and every offset is said, never asked of the broker: a reset
is an error (`check_offset`). A cluster that does not answer is waited for (`Patience`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeAlias

from operators.errors import BadInputError, SourceUnavailableError
from operators.kafka import (
    ClusterDownError,
    Fault,
    KafkaCluster,
    KafkaSettings,
    Partition,
    StoppedError,
    TopicInfo,
    fault_of,
    kafka,
    librdkafka_logger,
    make_client,
    refusal,
)
from operators.sources.kafka.patience import Patience
from operators.sources.kafka.position import KafkaPosition, check_offset, check_topic, partition_of, split_of
from operators.sources.kafka.records import Piece, RecordDecoder, Records

__all__ = ["FINISHED", "Assigned", "Ended", "Event", "Finished", "KafkaReader", "ReadOptions"]

logger = logging.getLogger(__name__)

_CONSUME_S = 0.05
"""How long records are gathered into one batch at most."""
_GROUP_REFUSED = "GROUP_AUTHORIZATION_FAILED"
_ANSWER_S = 5.0
_FIRST_RECORDS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How a source reads; see `KafkaSource`. Seconds end in ``_s``."""

    start: str | int | Mapping[str, int]
    bounded: bool
    isolation: str
    skip_lost: bool
    unavailable_s: float
    discovery_s: float | None
    batch_records: int
    batch_bytes: int
    group_id: str
    tells_group: bool


@dataclass(frozen=True, slots=True)
class Assigned:
    """These partitions are read from now on, from these offsets; ``ends``: where each ends, if the read is bounded."""

    offsets: Mapping[str, int]
    topic_ids: Mapping[str, str]
    ends: Mapping[str, int] | None


@dataclass(frozen=True, slots=True)
class Ended:
    """Nothing more comes of a partition."""

    split: str


class Finished(Enum):
    """Type of `FINISHED`."""

    FINISHED = "finished"


FINISHED: Literal[Finished.FINISHED] = Finished.FINISHED
"""Every partition has ended."""

Event: TypeAlias = Assigned | Ended | Piece | Literal[Finished.FINISHED]


class KafkaReader:
    """One opening of a source. `events` runs on a thread of its own; the other methods are called from another."""

    def __init__(
        self,
        topics: Sequence[str],
        settings: KafkaSettings,
        options: ReadOptions,
        decoder: RecordDecoder,
        position: KafkaPosition,
    ) -> None:
        self._topics = topics
        self._settings = settings
        self._options = options
        self._decoder = decoder
        self._from = position
        self._stop = threading.Event()
        self._wanted_paused: frozenset[str] = frozenset()
        self._commits: Mapping[str, int] | None = None
        # State below belongs to the thread that runs `events`.
        self._consumer: Any = None
        self._cluster: KafkaCluster | None = None
        self._ids: dict[str, str] = dict(position.topic_ids)
        self._known: set[Partition] = set()
        self._ends = dict(position.ends) if options.bounded and position.ends is not None else None
        self._active: set[str] = set()
        self._paused: frozenset[str] = frozenset()
        what = f"topics {', '.join(topics)}"
        who = f"the Kafka cluster at {settings.servers}"
        self._patience = Patience(who, what, options.unavailable_s, self._stop)
        self._said_down: str | None = None
        self._refused: str | None = None
        self._group_refused = False
        self._bytes_each = max(1, options.batch_bytes // _FIRST_RECORDS)

    def stop(self) -> None:
        """End soon."""
        self._stop.set()

    def pause(self, splits: frozenset[str]) -> None:
        """Fetch no more of these, and of all others."""
        self._wanted_paused = splits

    def commit(self, offsets: Mapping[str, int]) -> None:
        """Tell the consumer group, for people who watch its lag."""
        self._commits = offsets

    def events(self) -> Generator[Event, None, None]:
        """What happens, in order: up to `FINISHED` once every partition has ended, or until `stop` is called."""
        options = self._options
        config = {
            "group.id": options.group_id,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "enable.partition.eof": True,
            "isolation.level": options.isolation,
            # A full queue of the library is filled up again at once; the default leaves it alone for a second.
            "fetch.queue.backoff.ms": 10,
            "error_cb": self._on_error,
            "on_commit": self._on_commit,
        }
        full = self._settings.config(config)
        self._consumer = make_client(self._settings, lambda: kafka().Consumer(full, logger=librdkafka_logger))
        try:
            self._cluster = KafkaCluster(self._settings, self._stop, min(_ANSWER_S, options.unavailable_s))
            yield from self._assign(self._patience.ask(self._describe))
            yield from self._consume()
            if not self._stop.is_set():
                yield FINISHED
            # The group is still to be told of the last checkpoint.
            while not self._stop.wait(_CONSUME_S):
                self._follow_requests()
            self._follow_requests()
        except StoppedError:
            return
        finally:
            self._consumer.close()

    def _consume(self) -> Generator[Event, None, None]:
        interval = self._options.discovery_s
        due = None if interval is None else time.monotonic() + interval
        while self._active and not self._stop.is_set():
            self._follow_requests()
            count = max(1, min(self._options.batch_records, self._options.batch_bytes // self._bytes_each))
            messages = self._consumer.consume(count, _CONSUME_S)
            if messages:
                yield from self._take(messages)
            if self._refused is not None:
                raise SourceUnavailableError(self._refused)
            if self._said_down is not None:
                said, self._said_down = self._said_down, None
                self._patience.missed(said)
            if self._patience.is_tried:
                self._look_whether_back()
            if due is not None and time.monotonic() >= due:
                yield from self._assign(self._patience.ask(self._describe))
                due = time.monotonic() + (interval or 0.0)

    # -- records

    def _take(self, messages: list[Any]) -> Generator[Event, None, None]:
        errors = list(map(type(messages[0]).error, messages))
        ended: list[Event] = []
        if set(map(type, errors)) != {type(None)}:
            ended = [
                e
                for message, error in zip(messages, errors, strict=True)
                if error is not None
                for e in self._met(message)
            ]
            messages = [message for message, error in zip(messages, errors, strict=True) if error is None]
        if self._ends is not None and messages:
            messages, past = self._within_ends(messages)
            ended += past
        if messages:
            self._patience.answered()
            self._bytes_each = max(1, sum(map(len, messages)) // len(messages))
            yield from self._decoder.decode(Records.of(messages))
        yield from ended

    def _within_ends(self, messages: list[Any]) -> tuple[list[Any], list[Event]]:
        """The records before the ends of their partitions, and the partitions whose end was met."""
        assert self._ends is not None
        ends = {partition_of(split): end for split, end in self._ends.items()}
        kept = [m for m in messages if m.offset() < ends[m.topic(), m.partition()]]
        met = {(m.topic(), m.partition()) for m in messages if m.offset() >= ends[m.topic(), m.partition()] - 1}
        return kept, [e for topic, number in sorted(met) for e in self._end(split_of(topic, number))]

    def _end(self, split: str) -> Iterable[Event]:
        if split in self._active:
            self._active.remove(split)
            self._consumer.incremental_unassign([self._at(split)])
            yield Ended(split)

    def _met(self, message: Any) -> Iterable[Event]:
        """What an error in the place of a record means."""
        if message.error().name() == _GROUP_REFUSED:
            self._without_group()
            return
        fault = fault_of(message.error())
        said = self._settings.redact(message.error().str())
        if fault is Fault.END:
            self._patience.answered()
            split = split_of(message.topic(), message.partition())
            if self._ends is not None and message.offset() >= self._ends[split]:
                yield from self._end(split)
        elif fault is Fault.RESET:
            self._resume_at(split_of(message.topic(), message.partition()), message.offset())
        elif fault is Fault.REFUSED:
            raise SourceUnavailableError(refusal(self._settings, said))
        elif fault is Fault.MISSING:
            self._check_topics(self._patience.ask(self._describe))
        elif fault is Fault.DOWN:
            self._patience.missed(said)
        elif fault is Fault.OTHER:
            where = f"topic {message.topic()!r}, partition {message.partition()}, offset {message.offset()}"
            raise BadInputError(f"{where}: cannot be read: {said}")

    def _resume_at(self, split: str, offset: int) -> None:
        """The broker does not have the next record: an error, unless lost ones are to be skipped."""
        [at] = self._checked_offsets({split: offset}).values()
        self._consumer.incremental_unassign([self._at(split)])
        self._consumer.incremental_assign([self._at(split, at)])

    # -- partitions

    def _describe(self) -> dict[str, TopicInfo | None]:
        assert self._cluster is not None
        return self._cluster.topics(self._topics)

    def _check_topics(self, found: Mapping[str, TopicInfo | None]) -> None:
        for topic in self._topics:
            info = found[topic]
            read = any(known == topic for known, _ in self._known) or topic in self._ids
            check_topic(topic, self._ids.get(topic), read, info)
            if info is None:
                raise BadInputError(
                    f"topic {topic!r}: there is none of that name at {self._settings.servers}; create it, or mend the "
                    "name"
                )
            if info.topic_id is not None:
                self._ids[topic] = info.topic_id

    def _assign(self, found: Mapping[str, TopicInfo | None]) -> Generator[Event, None, None]:
        """Begin to read the partitions that are not read yet."""
        self._check_topics(found)
        new = [(t, p) for t in self._topics for p in sorted((found[t] or TopicInfo(None, frozenset())).partitions)]
        new = [partition for partition in new if partition not in self._known]
        first_time = not self._known
        if not new or (not first_time and self._options.bounded):
            return
        offsets = self._patience.ask(lambda: self._offsets_of_new(new, first_time=first_time))
        if self._options.bounded and self._ends is None:
            self._ends = self._patience.ask(lambda: self._named(new, "latest"))
        self._known.update(new)
        if not first_time:
            logger.info("Kafka source: found new partitions: %s", ", ".join(offsets))
        over = {s for s in offsets if self._ends is not None and offsets[s] >= self._ends.get(s, 0)}
        self._active |= offsets.keys() - over
        self._consumer.incremental_assign([self._at(s, o) for s, o in offsets.items() if s not in over])
        yield Assigned(offsets, dict(self._ids), self._ends)
        for split in sorted(over):
            yield Ended(split)

    def _offsets_of_new(self, new: Sequence[Partition], *, first_time: bool) -> dict[str, int]:
        """Where to begin: as restored, else where the user said; a partition that came later from its first record."""
        splits = {split_of(*p): p for p in new}
        restored = {s: self._from.offsets[s] for s in splits if s in self._from.offsets}
        if first_time and (gone := self._from.offsets.keys() - splits.keys()):
            raise BadInputError(f"partitions that were read before are not there any more: {', '.join(sorted(gone))}")
        start = "earliest" if self._from.offsets or not first_time else self._options.start
        given = start if isinstance(start, Mapping) else {}
        asked = {s: given[s] for s in splits if s in given and s not in restored}
        rest = [p for s, p in splits.items() if s not in restored and s not in asked]
        found = self._named(rest, "earliest" if isinstance(start, Mapping) else start)
        checked = self._checked_offsets({**restored, **asked})
        return {s: {**found, **checked}[s] for s in splits}

    def _checked_offsets(self, offsets: Mapping[str, int]) -> dict[str, int]:
        partitions = [partition_of(s) for s in offsets]
        first = self._patience.ask(lambda: self._named(partitions, "earliest"))
        # Records of open transactions are there, although they are not read yet.
        end = self._patience.ask(lambda: self._named(partitions, "latest", "read_uncommitted"))
        skip = self._options.skip_lost
        checked = {s: check_offset(s, o, first[s], end[s], skip=skip) for s, o in offsets.items()}
        for split, offset in checked.items():
            if offset != offsets[split]:
                logger.warning(
                    "Kafka source: %s: %d records from offset %d on were deleted before they were read; going on at %d",
                    split, offset - offsets[split], offsets[split], offset,
                )  # fmt: skip
        return checked

    def _named(self, partitions: Sequence[Partition], at: str | int, isolation: str | None = None) -> dict[str, int]:
        assert self._cluster is not None
        found = self._cluster.offsets(partitions, at, isolation or self._options.isolation)
        return {split_of(*p): found[p] for p in partitions}

    def _at(self, split: str, offset: int | None = None) -> Any:
        topic, number = partition_of(split)
        make = kafka().TopicPartition
        return make(topic, number) if offset is None else make(topic, number, offset)

    # -- requests of the other thread

    def _follow_requests(self) -> None:
        wanted = self._wanted_paused & self._active
        if wanted != self._paused:
            if back := (self._paused - wanted) & self._active:
                self._consumer.resume([self._at(split) for split in back])
            if more := wanted - self._paused:
                self._consumer.pause([self._at(split) for split in more])
            self._paused = frozenset(wanted)
        commits, self._commits = self._commits, None
        if commits and not self._group_refused:
            self._consumer.commit(offsets=[self._at(s, o) for s, o in commits.items()], asynchronous=True)

    def _without_group(self) -> None:
        """We may not use the group, which is of no consequence to what is read."""
        if self._options.tells_group and not self._group_refused:
            logger.warning("Kafka source: the group %r is not told positions: no right to it", self._options.group_id)
        self._group_refused = True

    def _on_commit(self, error: Any, _partitions: Sequence[Any]) -> None:
        if error is not None:
            said = self._settings.redact(error.str())
            logger.warning("Kafka source: the group %r could not be told positions: %s", self._options.group_id, said)

    # -- nobody answers

    def _on_error(self, error: Any) -> None:
        """Told by the library, while it consumes."""
        if error.name() == _GROUP_REFUSED:
            self._without_group()
            return
        fault = fault_of(error)
        if fault is Fault.REFUSED:
            self._refused = refusal(self._settings, self._settings.redact(error.str()))
        elif fault is Fault.DOWN:
            self._said_down = self._settings.redact(error.str())

    def _look_whether_back(self) -> None:
        try:
            self._check_topics(self._describe())
        except ClusterDownError as error:
            self._patience.missed(str(error))
        else:
            self._patience.answered()
