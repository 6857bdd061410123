"""The places where conformance is tested: one S3 server for all tests of a process, a fresh prefix for each test."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.s3_server import BUCKET, S3Server, s3_server


@dataclass(frozen=True)
class Place:
    """A URL where nothing is yet, and the options to open it with."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def place_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Place]:
    """The place of a kind: local, memory, s3, obstore-memory, obstore-s3. The server starts when it is asked for."""

    def place(kind: str) -> Place:
        name = uuid.uuid4().hex
        if kind == "local":
            return Place(str(tmp_path / "not yet" / name))
        if kind in ("memory", "obstore-memory"):
            return Place(f"{kind.replace('-', '+')}://{name}/state")
        server: S3Server = request.getfixturevalue("s3")
        transport = "obstore" if kind == "obstore-s3" else "s3fs"
        return Place(f"{'obstore+' if transport == 'obstore' else ''}s3://{BUCKET}/{name}", server.options(transport))

    return place
