"""Schemas by number, from a schema registry over HTTP (the interface of Confluent's, which others have too)."""

from __future__ import annotations

import base64
import json
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from operators.errors import BadInputError, SchemaError, SourceUnavailableError

__all__ = ["SchemaRegistry"]

logger = logging.getLogger(__name__)

_ANSWER_S = 10.0
_RETRY_S = 0.5
_REFUSED = (401, 403)
_MISSING = 404
_UNFIT = (409, 422)
_REASON_BYTES = 500


@dataclass(frozen=True, slots=True)
class SchemaRegistry:
    """A registry at an ``http://`` or ``https://`` URL.

    ``auth``: user and password, never shown. ``unavailable_s``: seconds for which it may not answer.
    """

    url: str
    auth: tuple[str, str] | None = field(default=None, repr=False)
    unavailable_s: float = 60.0

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError("schema registry: give a URL that begins with http:// or https://")
        if parts.username is not None:
            raise ValueError("schema registry: give user and password as SchemaRegistry(url, auth=(user, password))")

    def schema(self, number: int) -> str | None:
        """The schema of a number; None if it has none. Raises `SourceUnavailableError`."""
        found = self._ask(f"/schemas/ids/{number}")
        return None if found is None else str(found["schema"])

    def latest(self, subject: str) -> str:
        """The newest schema of a subject. Raises `BadInputError` if there is none, `SourceUnavailableError`."""
        found = self._ask(f"/subjects/{urllib.parse.quote(subject, safe='')}/versions/latest")
        if found is None:
            raise BadInputError(f"schema registry {self.url}: there is no subject {subject!r}; give schema=")
        return str(found["schema"])

    def register(self, subject: str, schema: str) -> int:
        """The number of a schema, which becomes one of the subject if it is not.

        Raises `SchemaError` if the registry does not take it, `SourceUnavailableError`.
        """
        body = json.dumps({"schema": schema}).encode()
        found = self._ask(f"/subjects/{urllib.parse.quote(subject, safe='')}/versions", body)
        if found is None:
            raise BadInputError(f"schema registry {self.url}: it has no subjects")
        return int(found["id"])

    def _ask(self, path: str, body: bytes | None = None) -> Any:
        began = time.monotonic()
        while True:
            try:
                return self._send(path, body)
            except urllib.error.HTTPError as error:
                if error.code == _MISSING:
                    return None
                if error.code in _REFUSED:
                    raise SourceUnavailableError(
                        f"the schema registry {self.url} refuses ({error.code}); check auth="
                    ) from None
                if body is not None and error.code in _UNFIT:
                    reason = error.read(_REASON_BYTES).decode("utf-8", "replace")
                    raise SchemaError(f"the schema registry {self.url} does not take the schema: {reason}") from None
                said = f"status {error.code}"
            except (OSError, ValueError) as error:
                said = str(error)
            if time.monotonic() - began >= self.unavailable_s:
                raise SourceUnavailableError(
                    f"the schema registry {self.url} did not answer for {self.unavailable_s:.0f} s: {said}"
                )
            logger.warning("the schema registry %s does not answer (%s); trying again", self.url, said)
            time.sleep(_RETRY_S)

    def _send(self, path: str, body: bytes | None) -> Any:
        request = urllib.request.Request(self.url.rstrip("/") + path, body)  # noqa: S310 - checked above
        if body is not None:
            request.add_header("Content-Type", "application/vnd.schemaregistry.v1+json")
        if self.auth is not None:
            token = base64.b64encode(":".join(self.auth).encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:  # noqa: S310
            return json.load(answer)
