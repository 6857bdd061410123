"""A real PostgreSQL server for tests, from the packages of the distribution, on loopback with a password."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUIRED = "REQUIRE_POSTGRES"
"""Environment variable: where it is set, tests that cannot start the server fail instead of being skipped."""

USER, PASSWORD = "app", "never-to-be-seen-either"
_START_S = 60.0


class PostgresMissingError(Exception):
    """The server cannot be started on this machine; the message says why."""


@dataclass
class PostgresServer:
    """A server with one superuser; `kill` and `start` keep its data and port."""

    programs: Path
    directory: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        command = [self.programs / "postgres", "-D", self.directory / "data", "-p", str(self.port)]
        command += ["-k", self.directory, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, **_as_user())
        deadline = time.monotonic() + _START_S
        while True:
            try:
                self.query("SELECT 1")
                return
            except Exception:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((self.directory / "log").read_text()[-2000:]) from None
                time.sleep(0.02)

    def kill(self) -> None:
        """At once, as in a crash; the children notice (SIGQUIT)."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(30)

    def query(self, statement: str) -> list[Any]:
        import psycopg

        with psycopg.connect(self.url, autocommit=True, connect_timeout=10) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def table(self) -> str:
        """A name that no table has."""
        return f"t_{uuid.uuid4().hex[:12]}"


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Raises `PostgresMissingError` if there is none here."""
    programs = _programs()
    # Its own user has to reach it, and the name of a socket is short.
    directory = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        secret = directory / "password"
        secret.write_text(PASSWORD)
        if (user := _as_user()) and "user" in user:
            for path in (directory, secret):
                os.chown(path, user["user"], user["group"])
        command = [programs / "initdb", "-D", directory / "data", "-U", USER, "--auth=scram-sha-256"]
        command += [f"--pwfile={secret}", "--encoding=UTF8", "--no-locale", "--no-sync", "--no-instructions"]
        done = subprocess.run(command, capture_output=True, text=True, **user)
        if done.returncode != 0:
            raise AssertionError(done.stdout + done.stderr)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = PostgresServer(programs, directory, port)
        stack.callback(server.kill)
        server.start()
        yield server


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[4]))
    path = found[-1] if found else shutil.which("initdb")
    if path is None:
        raise PostgresMissingError("no PostgreSQL server here: apt-get install postgresql")
    return Path(path).parent


def _as_user() -> dict[str, Any]:
    """The server refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    try:
        entry = pwd.getpwnam("postgres")
    except KeyError:
        raise PostgresMissingError("PostgreSQL does not run as root and there is no user postgres") from None
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
