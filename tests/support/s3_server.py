"""An S3 server in a process of its own, on loopback: moto's, which honours ``If-None-Match``.

``python -m tests.support.s3_server`` prints its port and serves until its standard input is closed, so that it cannot
outlive the tests, however they end. In front of it a `Gate` can lose, hold up or change single requests.
"""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = "state"
KEY, SECRET = "AKIATESTTESTTESTTEST", "not-to-be-seen-in-any-message"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class S3Server:
    """Where the server is, and how the two clients are told."""

    endpoint: str

    def options(self, transport: str = "s3fs") -> dict[str, Any]:
        if transport == "s3fs":
            return {
                "key": KEY,
                "secret": SECRET,
                "endpoint_url": self.endpoint,
                "client_kwargs": {"region_name": "us-east-1"},
            }
        return {
            "endpoint": self.endpoint,
            "access_key_id": KEY,
            "secret_access_key": SECRET,
            "region": "us-east-1",
            "client_options": {"allow_http": True},
        }


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A fresh server with one bucket, ended with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.s3_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()  # ends with the process, if it cannot start
        assert line.strip().isdigit(), f"the S3 server did not start: {process.wait(10)}"
        endpoint = f"http://127.0.0.1:{int(line)}"
        bucket = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
        with urllib.request.urlopen(bucket, timeout=30) as answer:
            assert answer.status == 200
        yield S3Server(endpoint)
    finally:
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()
        process.stdout.close()


def serve() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002
            pass

    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.buffer.read()
    os._exit(0)


# --- faults between a client and the server ---


@dataclass
class Request:
    """One request as the gate saw it."""

    method: str
    path: str
    headers: dict[str, str]


Answer = tuple[int, bytes]


@dataclass
class Rule:
    """What happens to the requests that ``matches`` picks, ``times`` times."""

    matches: Callable[[Request], bool]
    times: float = 1
    stall: bool = False
    """Never answer, not even to ``Expect: 100-continue``."""
    answer: Answer | None = None
    """Answer this instead of asking the server."""
    drop: bool = False
    """Let the server do it, then close the connection without an answer."""
    without: str = ""
    """Hide this header from the server."""
    met: int = 0


@dataclass
class Gate:
    """A proxy in front of the server; see `gate`."""

    server: S3Server
    rules: list[Rule] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, rule: Rule) -> Rule:
        self.rules.append(rule)
        return rule

    def rule_for(self, request: Request) -> Rule:
        with self.lock:
            self.requests.append(request)
            for rule in self.rules:
                if rule.met < rule.times and rule.matches(request):
                    rule.met += 1
                    return rule
        return Rule(lambda _: True)


@contextmanager
def gate(server: S3Server) -> Iterator[Gate]:
    """A proxy that obeys the rules added to ``rules`` and remembers the requests; without a rule it is transparent."""
    passage = Gate(server)
    host, port = server.endpoint.removeprefix("http://").split(":")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_expect_100(self) -> bool:
            self._decide()
            return False if self.rule.stall else super().handle_expect_100()

        def _decide(self) -> None:
            self.rule = passage.rule_for(Request(self.command, self.path, dict(self.headers)))
            if self.rule.stall:
                passage.ended.wait(30)
                self.close_connection = True

        def _handle(self) -> None:
            if "Expect" not in self.headers:
                self._decide()
            if self.rule.stall:
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, content = self._answer(body)
            if self.rule.drop:
                self.close_connection = True
                self.connection.close()
                return
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            if not any(name.lower() == "content-length" for name, _ in headers):
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _answer(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            if self.rule.answer is not None:
                status, content = self.rule.answer
                return status, [("Content-Type", "application/xml")], content
            hidden = {"expect", self.rule.without.lower()}
            headers = {k: v for k, v in self.headers.items() if k.lower() not in hidden}
            connection = http.client.HTTPConnection(host, int(port), timeout=30)
            try:
                connection.request(self.command, self.path, body=body, headers=headers)
                answer = connection.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            finally:
                connection.close()

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _handle  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that hung up

    proxy = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    passage.server = S3Server(f"http://127.0.0.1:{proxy.server_port}")
    try:
        yield passage
    finally:
        passage.ended.set()
        proxy.shutdown()
        thread.join()
        proxy.server_close()


def error_answer(status: int, code: str, extra: str = "") -> Answer:
    """An error as S3 words it."""
    return status, f"<Error><Code>{code}</Code><Message>{code} was injected</Message>{extra}</Error>".encode()


if __name__ == "__main__":
    serve()
