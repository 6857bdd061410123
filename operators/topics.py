"""Topics of messages: the seam behind which a message broker stands, and one that lives in memory.

A message is bytes, its place in a topic an offset. `TopicSource` decodes messages, many at a time, and its position is
the next offset; `TopicSink` encodes rows as JSON.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import pyarrow as pa

from operators.errors import BadInputError, SourceChangedError
from operators.formats import Format, decode, infer_json
from operators.sinks.base import Guarantee, Prepared, SinkContext, conform
from operators.sources.base import IDLE, Idle, Position, SourceBatch

__all__ = ["MemoryTopics", "TopicSink", "TopicSource", "Transport", "schema_of_json"]

_MESSAGES = 1 << 16
"""Messages of one batch at most."""


class Transport(Protocol):
    """Where topics live. Calls come from any thread."""

    def fetch(self, topic: str, offset: int, most: int) -> Sequence[bytes]:
        """Messages from an offset on, at most so many, none if there are none at present."""

    def end(self, topic: str) -> int | None:
        """The offset after the last message, if no more will ever come, else None."""

    def send(self, topic: str, messages: Sequence[bytes]) -> None:
        """Append messages; they are there when this returns."""


class MemoryTopics:
    """Topics in this process, for tests and examples."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._topics: dict[str, list[bytes]] = {}
        self._ended: set[str] = set()

    def send(self, topic: str, messages: Sequence[bytes | Mapping[str, Any]]) -> None:
        """Append messages: bytes, or objects that become JSON."""
        encoded = [m if isinstance(m, bytes) else json.dumps(m).encode() for m in messages]
        with self._lock:
            self._topics.setdefault(topic, []).extend(encoded)

    def close(self, topic: str) -> None:
        """No more messages will come: streams over the topic end after the last one."""
        with self._lock:
            self._topics.setdefault(topic, [])
            self._ended.add(topic)

    def messages(self, topic: str) -> list[Any]:
        """All messages of a topic, decoded from JSON."""
        with self._lock:
            return [json.loads(message) for message in self._topics.get(topic, ())]

    def fetch(self, topic: str, offset: int, most: int) -> Sequence[bytes]:
        """See `Transport.fetch`."""
        with self._lock:
            return self._topics.get(topic, [])[offset : offset + most]

    def end(self, topic: str) -> int | None:
        """See `Transport.end`."""
        with self._lock:
            return len(self._topics[topic]) if topic in self._ended else None


def schema_of_json(sample: str | bytes) -> pa.Schema:
    """The columns of messages like this JSON object. Raises `BadInputError` if it is none."""
    return infer_json([sample.encode() if isinstance(sample, str) else sample])


class TopicSource:
    """Reads one topic of messages in a format."""

    def __init__(self, transport: Transport, topic: str, format_: Format) -> None:
        self.schema = format_.schema
        self.total_rows: int | None = None
        self._transport = transport
        self._topic = topic
        self._format = format_
        self._offset = 0

    def describe(self) -> Mapping[str, Any]:
        """The topic."""
        return {"kind": "topic", "topic": self._topic}

    def open(self, position: Position | None) -> None:
        """Go on at an offset."""
        self._offset = 0 if position is None else int(position)
        end = self._transport.end(self._topic)
        if end is not None and end < self._offset:
            raise SourceChangedError(
                f"topic {self._topic!r}", expected=f"{self._offset} messages at least", found=f"{end}"
            )

    def poll(self) -> SourceBatch | Literal[Idle.IDLE] | None:
        """The next messages as one batch."""
        messages = self._transport.fetch(self._topic, self._offset, _MESSAGES)
        if not messages:
            return None if self._transport.end(self._topic) == self._offset else IDLE
        decoded = decode(self._format, messages)
        if decoded.rejected:
            bad = decoded.rejected[0]
            raise BadInputError(f"topic {self._topic!r}, offset {self._offset + bad.index}: {bad.reason}")
        self._offset += len(messages)
        return SourceBatch(decoded.batch, self._offset)

    def close(self) -> None:
        """Nothing is held."""


class TopicSink:
    """Sends every row as a JSON object, at once.

    At least once: rows that were sent after the last committed checkpoint of a crashed job are sent again.
    """

    guarantee = Guarantee.AT_LEAST_ONCE

    def __init__(self, transport: Transport, topic: str) -> None:
        self._transport = transport
        self._topic = topic
        self._schema = pa.schema([])
        self._operator_id = topic

    def describe(self) -> Mapping[str, Any]:
        """The topic."""
        return {"kind": "topic", "topic": self._topic}

    def open(self, context: SinkContext, committables: Sequence[Any]) -> None:  # noqa: ARG002 - has none
        """Remember the columns."""
        self._schema, self._operator_id = context.schema, context.operator_id

    def write(self, batch: pa.RecordBatch) -> None:
        """Send the rows."""
        rows = conform(self._operator_id, self._schema, batch).to_pylist()
        self._transport.send(self._topic, [json.dumps(row, default=str).encode() for row in rows])

    def prepare(self, checkpoint_id: int, *, final: bool) -> Prepared:  # noqa: ARG002 - nothing to prepare
        """Nothing to commit."""
        return Prepared()

    def publish(self, committables: Sequence[Any]) -> None:
        """Nothing to publish."""

    def close(self) -> None:
        """Nothing is held."""
