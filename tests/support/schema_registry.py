"""A schema registry for tests, on loopback, that answers as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


@dataclass
class Registry:
    """What a registry knows, and how it answers."""

    url: str = ""
    schemas: dict[int, Any] = field(default_factory=dict)
    subjects: dict[str, Any] = field(default_factory=dict)
    failures: int = 0
    asked: list[str] = field(default_factory=list)
    authorization: str | None = None
    refuses: str | None = None
    """Why it does not take a schema that is to be registered."""

    def answer(self, path: str) -> tuple[int, Any]:
        if self.failures:
            self.failures -= 1
            return 503, {}
        if path.startswith("/schemas/ids/"):
            found = self.schemas.get(int(path.rpartition("/")[2]))
        else:
            found = self.subjects.get(path.split("/")[2])
        return (404, {}) if found is None else (200, {"schema": json.dumps(found)})

    def register(self, subject: str, schema: Any) -> tuple[int, Any]:
        if self.refuses is not None:
            return 409, {"message": self.refuses}
        number = next((n for n, known in self.schemas.items() if known == schema), len(self.schemas) + 1)
        self.schemas[number] = self.subjects[subject] = schema
        return 200, {"id": number}


@contextmanager
def registry() -> Iterator[Registry]:
    known = Registry()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(lambda: known.answer(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(lambda: known.register(self.path.split("/")[2], json.loads(body["schema"])))

        def reply(self, answer: Callable[[], tuple[int, Any]]) -> None:
            known.asked.append(self.path)
            refused = known.authorization is not None and self.headers.get("Authorization") != known.authorization
            status, body = (401, {}) if refused else answer()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    known.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield known
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
