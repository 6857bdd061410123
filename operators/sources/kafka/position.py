"""Positions in topics, and what to do with one when the topics are not what they were. Pure values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from operators.errors import SourceChangedError
from operators.kafka import Partition, TopicInfo
from operators.sources.base import Position

__all__ = ["KafkaPosition", "check_offset", "check_topic", "partition_of", "split_of"]

_IDS, _ENDS = "topic_ids", "ends"
"""No names of splits: those have a slash."""


def split_of(topic: str, partition: int) -> str:
    """The name of a partition as a split of the source."""
    return f"{topic}/{partition}"


def partition_of(split: str) -> Partition:
    """The partition of that name."""
    topic, _, number = split.rpartition("/")
    return topic, int(number)


@dataclass(frozen=True, slots=True)
class KafkaPosition:
    """The next offset of every partition by split name; the ids of the topics; where a bounded read ends."""

    offsets: Mapping[str, int] = field(default_factory=dict)
    topic_ids: Mapping[str, str] = field(default_factory=dict)
    ends: Mapping[str, int] | None = None

    @classmethod
    def restored(cls, position: Position | None) -> KafkaPosition:
        """From what a checkpoint holds."""
        found = dict(position or {})
        ids, ends = found.pop(_IDS, {}), found.pop(_ENDS, None)
        return cls(found, ids, ends)

    def stored(self) -> dict[str, Any]:
        """For a checkpoint."""
        bounds = {} if self.ends is None else {_ENDS: dict(self.ends)}
        return {**self.offsets, _IDS: dict(self.topic_ids), **bounds}


def check_topic(topic: str, known_id: str | None, was_read: bool, info: TopicInfo | None) -> None:
    """Whether the topic is the one that was read; raises `SourceChangedError` if it was deleted or made again."""
    advice = "its records are not those that were read before; to begin with the new ones, start with a new state"
    if info is None:
        if was_read:
            raise SourceChangedError(
                f"topic {topic!r}", expected="the topic that was read before", found=f"no such topic; if it is {advice}"
            )
        return
    if known_id is not None and info.topic_id is not None and known_id != info.topic_id:
        raise SourceChangedError(
            f"topic {topic!r}",
            expected=f"the topic with id {known_id}",
            found=f"another topic of that name, with id {info.topic_id}: it was deleted and made again, and {advice}",
        )


def check_offset(split: str, offset: int, first: int, end: int, *, skip: bool) -> int:
    """The offset to go on at; raises `SourceChangedError` if the records from ``offset`` on are not all there.

    ``first``, ``end``: what the partition holds now. ``skip``: go on with the first record that is left.
    """
    if first <= offset <= end:
        return offset
    topic, number = partition_of(split)
    if offset > end:
        found = (
            f"only offsets up to {end}: the partition has lost records, or is another one; to begin with what it holds "
            "now, start with a new state"
        )
    elif skip:
        return first
    else:
        found = (
            f"only offsets from {first} to {end}: {first - offset} records were deleted before they were read; to go "
            f"on without them, read it with on_data_loss='skip' (from offset {first}), and give the topic a longer "
            "retention than the job may stand still"
        )
    raise SourceChangedError(f"topic {topic!r}, partition {number}", expected=f"offset {offset}", found=found)
