"""How to reach a Kafka cluster, without ever telling its secrets.

Whatever ends in a log line, an error, a ``repr`` or a checkpoint goes through here: options are known by their names
alone, and `KafkaSettings.redact` takes their secret values out of what the client library says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from operators.kafka.library import kafka

__all__ = ["Fault", "KafkaSettings", "fault_of"]

_SECRET = re.compile(r"password|secret|token|jaas|key\.pem|certificate\.pem|oauthbearer\.config|credential|user.*info")
_HIDDEN = "***"
_SHARED = (
    "security.", "sasl.", "ssl.", "enable.ssl", "socket.", "broker.", "client.", "reconnect.", "retry.", "metadata.",
    "api.", "connections.", "https.", "debug", "log_level", "enable.sasl", "oauth", "test.mock.",
)  # fmt: skip
"""What the names of options begin with that make a difference to any client."""


@dataclass(frozen=True, slots=True)
class KafkaSettings:
    """A cluster: ``servers`` is a comma-separated list of ``host:port``.

    ``options``: further settings of librdkafka by their names there (``security.protocol``, ``sasl.username``, ...).
    """

    servers: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, bootstrap_servers: str | Sequence[str], options: Mapping[str, Any] | None, reserved: Mapping[str, str]
    ) -> KafkaSettings:
        """Check what a user gave. ``reserved``: options that are not the user's to set, and what to use instead."""
        servers = bootstrap_servers if isinstance(bootstrap_servers, str) else ",".join(bootstrap_servers)
        if not servers.strip():
            raise ValueError("bootstrap_servers: give host:port of at least one broker")
        if "@" in servers:
            raise ValueError("bootstrap_servers: host:port without credentials; those belong into options=")
        given = dict(options or {})
        for name in given:
            if name in reserved:
                raise ValueError(f"options: {name!r} is set by the package; {reserved[name]}")
        return cls(servers, given)

    def config(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """For a client of the library: ``own`` settings, and those of the user."""
        return {"bootstrap.servers": self.servers, **own, **self.options}

    def connection(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """For a client that only asks: without the options that it would warn of."""
        shared = {name: value for name, value in self.options.items() if name.startswith(_SHARED)}
        return {"bootstrap.servers": self.servers, **own, **shared}

    def redact(self, text: object) -> str:
        """The text without the values of secret options."""
        said = str(text)
        for name, value in self.options.items():
            if isinstance(value, str) and value and _SECRET.search(name.lower()):
                said = said.replace(value, _HIDDEN)
        return said


class Fault(Enum):
    """What an error of the library means for the one who waits."""

    DOWN = "down"
    """Nobody answers, or not now: it may pass."""
    DISCONNECTED = "disconnected"
    """One broker has gone; the library turns to others, or to it again."""
    REFUSED = "refused"
    """We are not let in: it does not pass."""
    MISSING = "missing"
    """The topic or partition is not there."""
    END = "end"
    """No error: the end of a partition."""
    RESET = "reset"
    """The offset to go on at is not there."""
    OTHER = "other"


_REFUSED = (
    "_AUTHENTICATION",
    "_SSL",
    "SASL_AUTHENTICATION_FAILED",
    "TOPIC_AUTHORIZATION_FAILED",
    "GROUP_AUTHORIZATION_FAILED",
    "CLUSTER_AUTHORIZATION_FAILED",
    "TRANSACTIONAL_ID_AUTHORIZATION_FAILED",
    "UNSUPPORTED_SASL_MECHANISM",
    "ILLEGAL_SASL_STATE",
)
_MISSING = ("UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_TOPIC", "_UNKNOWN_PARTITION", "UNKNOWN_TOPIC_ID")
_DOWN = (
    "_ALL_BROKERS_DOWN",
    "_TIMED_OUT",
    "_TIMED_OUT_QUEUE",
    "_RESOLVE",
    "_WAIT_COORD",
    "REQUEST_TIMED_OUT",
    "BROKER_NOT_AVAILABLE",
    "LEADER_NOT_AVAILABLE",
    "NOT_LEADER_FOR_PARTITION",
    "NETWORK_EXCEPTION",
    "COORDINATOR_LOAD_IN_PROGRESS",
    "COORDINATOR_NOT_AVAILABLE",
    "NOT_COORDINATOR",
)


_NAMES = (
    (_REFUSED, Fault.REFUSED),
    (_MISSING, Fault.MISSING),
    (_DOWN, Fault.DOWN),
    (("_TRANSPORT",), Fault.DISCONNECTED),
    (("_PARTITION_EOF",), Fault.END),
    (("_AUTO_OFFSET_RESET",), Fault.RESET),
)


def fault_of(error: Any) -> Fault:
    """What a `KafkaError` means."""
    codes = kafka().KafkaError
    for names, fault in _NAMES:
        if error.code() in {getattr(codes, name) for name in names if hasattr(codes, name)}:
            return fault
    return Fault.DOWN if error.retriable() else Fault.OTHER
