"""A real Kafka broker for tests: one node, started from the jars of the distribution, on loopback.

The jars come through Maven into a cache folder of the user, once; ``python -m tests.support.kafka fetch`` does that
beforehand, where it may take longer than a test. `shared_broker` starts one broker for all processes
of a test run: the first one that needs it starts ``python -m tests.support.kafka``, the keeper, which starts the
broker and ends it when nobody needs it any more. Who needs it holds a shared lock on a file, which the kernel lets go
however a process ends: no broker outlives the tests, not even those that are killed.

The broker listens at three addresses: a plain one, one behind a `Gate` that a test can close and open (the broker is
down, for those who came through it), and one that asks for a password: `SASL_USER` may do everything, `SASL_GUEST` what
no access list forbids; both have `SASL_PASSWORD`.

`mock_cluster` is librdkafka's own imitation of a cluster: it starts in milliseconds, forgets everything when it ends,
and cannot be administered.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = "REQUIRE_KAFKA"
"""Environment variable: where it is set, tests that cannot start the broker fail instead of being skipped."""

SASL_USER, SASL_GUEST, SASL_PASSWORD = "app", "guest", "never-to-be-seen-in-a-message"

_VERSIONS = ("4.3.1", "4.2.1", "4.1.1", "4.0.0")
"""Of the distribution; the first that can be fetched."""

_START_S = 90.0
_FETCH_S = 900.0


class KafkaMissingError(Exception):
    """The broker cannot be started on this machine; the message says why."""


@dataclass(frozen=True)
class KafkaBroker:
    """Where the broker is. ``gated``: the address through the gate, ``gate_port`` what the gate leads to."""

    servers: str
    gated: str
    gate_port: int
    sasl: str
    directory: str

    def admin(self) -> Any:
        from confluent_kafka.admin import AdminClient

        return AdminClient({"bootstrap.servers": self.servers, **_QUIET})

    def create_topic(self, name: str | None = None, partitions: int = 1, **config: str) -> str:
        """A new topic; its name (a fresh one by default). ``config``: as ``retention_ms="1000"``."""
        from confluent_kafka.admin import NewTopic

        topic = name or f"t-{uuid.uuid4().hex[:12]}"
        settings = {key.replace("_", "."): value for key, value in config.items()}
        admin = self.admin()
        for future in admin.create_topics([NewTopic(topic, partitions, 1, config=settings)]).values():
            future.result(30)
        _until(lambda: len(_partitions(admin, topic)) == partitions, f"topic {topic} with {partitions} partitions")
        return topic

    def add_partitions(self, topic: str, total: int) -> None:
        from confluent_kafka.admin import NewPartitions

        admin = self.admin()
        for future in admin.create_partitions([NewPartitions(topic, total)]).values():
            future.result(30)
        _until(lambda: len(_partitions(admin, topic)) == total, f"topic {topic} with {total} partitions")

    def delete_topic(self, topic: str) -> None:
        admin = self.admin()
        for future in admin.delete_topics([topic]).values():
            future.result(30)
        _until(lambda: not _partitions(admin, topic), f"topic {topic} to be gone")

    def delete_records(self, topic: str, partition: int, before: int) -> None:
        """As retention does: the records before an offset are gone."""
        from confluent_kafka import TopicPartition

        admin = self.admin()
        for future in admin.delete_records([TopicPartition(topic, partition, before)]).values():
            future.result(30)

    def produce(
        self,
        topic: str,
        values: Iterable[bytes | str | Mapping[str, Any] | None],
        *,
        partition: int = 0,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes | None]] | None = None,
        timestamp_ms: int = 0,
    ) -> None:
        """Append records to one partition; mappings become JSON. They are there when this returns."""
        from confluent_kafka import Producer

        producer = Producer({"bootstrap.servers": self.servers, "linger.ms": 1, **_QUIET})
        given: dict[str, Any] = {} if headers is None else {"headers": list(headers)}
        for value in values:
            data = json.dumps(value) if isinstance(value, Mapping) else value
            while True:
                try:
                    producer.produce(topic, data, key, partition, timestamp=timestamp_ms, **given)
                    break
                except BufferError:
                    producer.poll(0.1)
        assert producer.flush(60) == 0, f"records of {topic} could not be sent"

    def records(self, topic: str, *, isolation: str = "read_committed") -> list[Any]:
        """All records of a topic that a reader sees at present, partition by partition (`confluent_kafka.Message`)."""
        from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, TopicPartition

        config = {"group.id": uuid.uuid4().hex, "isolation.level": isolation, "enable.auto.commit": False}
        config |= {"enable.partition.eof": True, "fetch.wait.max.ms": 10, "auto.offset.reset": "error"}
        consumer = Consumer({"bootstrap.servers": self.servers, **config, **_QUIET})
        try:
            partitions = sorted(_partitions(consumer, topic))
            consumer.assign([TopicPartition(topic, p, OFFSET_BEGINNING) for p in partitions])
            found, ended = [], set()
            deadline = time.monotonic() + 60
            while ended != set(partitions):
                assert time.monotonic() < deadline, f"topic {topic} has no end"
                for message in consumer.consume(10_000, 0.02):
                    if message.error() is None:
                        found.append(message)
                    elif message.error().code() == KafkaError._PARTITION_EOF:
                        ended.add(message.partition())
                    else:
                        raise AssertionError(message.error().str())
            return sorted(found, key=lambda m: (m.partition(), m.offset()))
        finally:
            consumer.close()

    def forbid(self, kind: str, name: str) -> None:
        """`SASL_GUEST` may do nothing to a ``"group"`` or ``"topic"`` of this name."""
        from confluent_kafka.admin import (
            AclBinding,
            AclOperation,
            AclPermissionType,
            ResourcePatternType,
            ResourceType,
        )

        admin = self.admin()
        binding = AclBinding(
            ResourceType[kind.upper()], name, ResourcePatternType.LITERAL, f"User:{SASL_GUEST}", "*", AclOperation.ALL,
            AclPermissionType.DENY,
        )  # fmt: skip
        for future in admin.create_acls([binding]).values():
            future.result(30)

    @contextmanager
    def gate(self, *, opened: bool = True) -> Iterator[Gate]:
        """The way to `gated`, for one test at a time."""
        with Path(self.directory, "gate.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            gate = Gate(int(self.gated.rpartition(":")[2]), self.gate_port)
            try:
                if opened:
                    gate.open()
                yield gate
            finally:
                gate.close()


_QUIET = {"log_level": 0}


def _partitions(client: Any, topic: str) -> set[int]:
    found = client.list_topics(topic, timeout=30).topics[topic]
    return set() if found.error is not None else set(found.partitions)


def _until(holds: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.01)


class Gate:
    """Passes connections on while it is open. Closed, it ends them all and refuses new ones."""

    def __init__(self, port: int, target: int) -> None:
        self._port = port
        self._target = target
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._ends: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    def open(self) -> None:
        listener = socket.create_server(("127.0.0.1", self._port))
        self._listener = listener
        self._start(lambda: self._accept(listener))

    def close(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            for end in self._ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._threads.clear()

    def _start(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name="kafka gate", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            with self._lock:
                self._ends |= {near, far}
            self._start(lambda near=near, far=far: self._copy(near, far))  # type: ignore[misc]
            self._start(lambda near=near, far=far: self._copy(far, near))  # type: ignore[misc]

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._lock:
            first = source in self._ends
            self._ends -= {source, target}
        if first:
            return
        source.close()
        target.close()


# -- one broker for all processes of a run


@contextmanager
def shared_broker(directory: Path) -> Iterator[KafkaBroker]:
    """The broker of a test run, which keeps its files in ``directory``; started by whoever needs it first.

    Raises `KafkaMissingError` if it cannot be started here.
    """
    classpath = _classpath()
    directory.mkdir(parents=True, exist_ok=True)
    told = directory / "broker.json"
    with (directory / "users.lock").open("w") as users, (directory / "start.lock").open("w") as start:
        # Waits for a keeper that is ending its broker; from here on none ends.
        fcntl.flock(users, fcntl.LOCK_SH)
        fcntl.flock(start, fcntl.LOCK_EX)
        if not told.exists():
            _start_keeper(directory, classpath, told)
        fcntl.flock(start, fcntl.LOCK_UN)
        yield KafkaBroker(**json.loads(told.read_text()))


def _start_keeper(directory: Path, classpath: str, told: Path) -> None:
    log = directory / "broker.log"
    with log.open("ab") as output:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "tests.support.kafka", str(directory), classpath],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=ROOT,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_S
    while not told.exists():
        if keeper.poll() is not None or time.monotonic() > deadline:
            keeper.kill()
            keeper.wait()
            raise AssertionError(f"the Kafka broker did not start:\n{log.read_text()[-4000:]}")
        time.sleep(0.05)


def keep(directory: Path, classpath: str) -> None:
    """The keeper: starts the broker, tells where it is, and ends it when nobody has a lock any more."""
    data = directory / "data"
    shutil.rmtree(data, ignore_errors=True)
    plain, gate_target, gate, sasl, controller = _free_ports(5)
    properties = directory / "server.properties"
    properties.write_text(_properties(data, plain, gate_target, gate, sasl, controller))
    _format(data, classpath)
    command = [_java(), *_JVM, "-cp", classpath, "kafka.Kafka", str(properties)]
    broker = subprocess.Popen(command, preexec_fn=_end_with_parent, env=_environment(directory))
    (directory / "broker.pid").write_text(str(broker.pid))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        _wait_for_port(plain, broker)
        told = directory / "broker.json"
        address = KafkaBroker(
            f"127.0.0.1:{plain}", f"127.0.0.1:{gate}", gate_target, f"127.0.0.1:{sasl}", str(directory)
        )
        told.with_suffix(".new").write_text(json.dumps(asdict(address)))
        told.with_suffix(".new").rename(told)
        with (directory / "users.lock").open("w") as users:
            fcntl.flock(users, fcntl.LOCK_EX)
            told.unlink()
            broker.kill()
            broker.wait()
            shutil.rmtree(data, ignore_errors=True)
    finally:
        broker.kill()


class OwnBroker:
    """A broker of one test, which it may kill and start again; its data and addresses stay."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._classpath = _classpath()
        directory.mkdir(parents=True)
        plain, gate_target, gate, sasl, controller = _free_ports(5)
        self._port = plain
        self._properties = directory / "server.properties"
        self._properties.write_text(_properties(directory / "data", plain, gate_target, gate, sasl, controller))
        _format(directory / "data", self._classpath)
        self._process: subprocess.Popen[bytes] | None = None
        servers = f"127.0.0.1:{plain}"
        self.broker = KafkaBroker(servers, servers, gate_target, f"127.0.0.1:{sasl}", str(directory))

    def start(self) -> None:
        command = [_java(), *_JVM, "-cp", self._classpath, "kafka.Kafka", str(self._properties)]
        with (self._directory / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, preexec_fn=_end_with_parent, env=_environment(self._directory), stdout=log, stderr=log
            )
        _wait_for_port(self._port, self._process)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> OwnBroker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)


_JVM = (
    "-Xms64m",
    "-Xmx384m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",
    "-Xshare:auto",
    "-Djava.awt.headless=true",
    "-Dlog4j2.level=ERROR",
)


def _end_with_parent() -> None:
    """The broker does not outlive its keeper, even if that is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _properties(data: Path, plain: int, gate_target: int, gate: int, sasl: int, controller: int) -> str:
    jaas = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    settings = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@127.0.0.1:{controller}",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAIN",
        "listener.security.protocol.map": "PLAIN:PLAINTEXT,GATED:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL:SASL_PLAINTEXT",
        "listeners": f"PLAIN://127.0.0.1:{plain},GATED://127.0.0.1:{gate_target},"
        f"SASL://127.0.0.1:{sasl},CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": f"PLAIN://127.0.0.1:{plain},GATED://127.0.0.1:{gate},SASL://127.0.0.1:{sasl}",
        "sasl.enabled.mechanisms": "PLAIN",
        "listener.name.sasl.plain.sasl.jaas.config": f'{jaas} user_{SASL_USER}="{SASL_PASSWORD}" '
        f'user_{SASL_GUEST}="{SASL_PASSWORD}";',
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": f"User:ANONYMOUS;User:{SASL_USER}",
        "allow.everyone.if.no.acl.found": "true",
        "log.dirs": data,
        "auto.create.topics.enable": "false",
        "num.network.threads": 2,
        "num.io.threads": 2,
        "background.threads": 2,
        "log.cleaner.dedupe.buffer.size": 2 << 20,
        "offsets.topic.num.partitions": 1,
        "offsets.topic.replication.factor": 1,
        "transaction.state.log.num.partitions": 1,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.max.timeout.ms": 3_600_000,
        "share.coordinator.state.topic.num.partitions": 1,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "group.initial.rebalance.delay.ms": 0,
        "log.initial.task.delay.ms": 100,
        "log.retention.ms": -1,
    }
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def _environment(directory: Path) -> dict[str, str]:
    return {**os.environ, "LOG_DIR": str(directory)}


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in held]


def _wait_for_port(port: int, broker: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while broker.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"the broker does not listen at port {port} (exit code {broker.poll()})")


# -- the distribution


def _java() -> str:
    found = shutil.which("java")
    if found is None:
        raise KafkaMissingError("the Kafka broker needs Java 17: no java on the PATH")
    return found


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "datafusion-statebackend" / "kafka"


def _classpath() -> str:
    """The jars of the distribution, fetched by Maven if they are not in the cache."""
    _java()
    cache = _cache()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "fetch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for version in _VERSIONS:
            if (cache / version / "complete").exists():
                return f"{cache / version / 'jars'}/*"
        failures = []
        for version in _VERSIONS:
            failure = _fetch(version, cache / version)
            if failure is None:
                return f"{cache / version / 'jars'}/*"
            failures.append(f"{version}: {failure}")
    raise KafkaMissingError("the Kafka broker's jars could not be fetched: " + "; ".join(failures))


_POM = """<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>tests</groupId><artifactId>kafka-broker</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{version}</version></dependency>
  </dependencies>
</project>
"""


def _fetch(version: str, target: Path) -> str | None:
    """Fetch one version; why it failed, or None."""
    maven = shutil.which("mvn")
    if maven is None:
        raise KafkaMissingError("the Kafka broker's jars come through Maven: no mvn on the PATH")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    pom = target / "pom.xml"
    pom.write_text(_POM.format(version=version))
    command = [maven, "-q", "-B", "-f", str(pom), "dependency:copy-dependencies", "-DincludeScope=runtime"]
    command.append(f"-DoutputDirectory={target / 'jars'}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_S)
    except subprocess.TimeoutExpired:
        return f"Maven took more than {_FETCH_S:.0f} s"
    if done.returncode != 0:
        return (done.stdout + done.stderr).strip()[:500]
    (target / "complete").touch()
    return None


def _format(data: Path, classpath: str) -> None:
    """What ``kafka-storage format`` writes; done once and kept, as it would be a second start of Java every time."""
    template = Path(classpath).parent.parent / "formatted"
    if not template.exists():
        with tempfile.TemporaryDirectory(dir=template.parent) as temporary:
            made = Path(temporary, "data")
            properties = Path(temporary, "format.properties")
            properties.write_text(_properties(made, 1, 2, 3, 4, 5))
            command = [_java(), *_JVM, "-cp", classpath, "kafka.tools.StorageTool", "format"]
            command += ["--cluster-id", "dGVzdHMtb2Yta2Fma2FAMQ", "--config", str(properties)]
            done = subprocess.run(command, capture_output=True, text=True, env=_environment(Path(temporary)))
            if done.returncode != 0:
                raise SystemExit(f"formatting the storage failed:\n{done.stdout}{done.stderr}")
            with contextlib.suppress(OSError):  # somebody else was first
                made.rename(template)
    shutil.copytree(template, data)


# -- librdkafka's imitation


@contextmanager
def mock_cluster(brokers: int = 1) -> Iterator[str]:
    """The ``bootstrap.servers`` of an imitated cluster, which ends with the block.

    Topics come into being when they are named, with four partitions.
    """
    from confluent_kafka import Producer

    keeper = Producer({"bootstrap.servers": "imitated", "test.mock.num.brokers": brokers, **_QUIET})
    try:
        found = keeper.list_topics(timeout=10).brokers.values()
        yield ",".join(f"{broker.host}:{broker.port}" for broker in found)
    finally:
        del keeper


if __name__ == "__main__":
    if sys.argv[1:] == ["fetch"]:
        print("Kafka's jars are in", _classpath())
    else:
        keep(Path(sys.argv[1]), sys.argv[2])
