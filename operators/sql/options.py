"""OPTIONS of a definition: texts by name, read once each as what they stand for.

An option that nothing has read is refused by `Options.close`, so that a misspelt one is never passed over.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import pyarrow as pa
from datafusion import SessionContext, lit

from operators.errors import SchemaError

__all__ = ["Options"]

T = TypeVar("T")

_STORAGE = "storage."
_ENVIRONMENT = "env:"
_NS_PER_MS = 1_000_000
_MS_PER_DAY = 86_400_000
_INTERVAL = pa.month_day_nano_interval()


class Options:
    """The options of the definition of ``owner``; every reader raises `SchemaError` for a text that does not fit."""

    def __init__(self, owner: str, found: Mapping[str, str], session: SessionContext) -> None:
        self._owner = owner
        self._found = dict(found)
        self._session = session
        self._known: list[str] = []

    def text(self, name: str, default: T) -> str | T:
        """As it stands."""
        self._known.append(name)
        return self._found.pop(name, default)

    def word(self, name: str, words: Sequence[str], default: str) -> str:
        """One of some words."""
        found = self.text(name, default)
        return found if found in words else self._refuse(name, found, f"one of {', '.join(words)}")

    def words(self, name: str) -> list[str]:
        """Several, separated by commas."""
        return [word.strip() for word in self.text(name, "").split(",") if word.strip()]

    def flag(self, name: str, *, default: bool) -> bool:
        """true or false."""
        return self.word(name, ("true", "false"), "true" if default else "false") == "true"

    def count(self, name: str, default: int) -> int:
        """A number of at least 1."""
        found = self.text(name, None)
        if found is None:
            return default
        if not found.isascii() or not found.isdigit() or int(found) < 1:
            self._refuse(name, found, "a number of at least 1")
        return int(found)

    def number(self, name: str) -> float | None:
        """A positive number, None if it is not there."""
        found = self.text(name, None)
        if found is None:
            return None
        try:
            number = float(found)
        except ValueError:
            number = 0.0
        return number if 0 < number < float("inf") else self._refuse(name, found, "a positive number")

    def span(self, name: str, default: T) -> int | T:
        """A length of time in milliseconds, written as an INTERVAL is: ``4 seconds``, ``1 hour 30 minutes``."""
        found = self.text(name, None)
        if found is None:
            return default
        frame = self._session.read_empty().select(lit(found).cast(_INTERVAL))
        try:
            months, days, nanoseconds = frame.to_arrow_table().column(0)[0].as_py()
        except Exception:  # noqa: BLE001 - the binding raises bare exceptions
            return self._refuse(name, found, "a length of time, as '4 seconds' or '1 hour 30 minutes'")
        whole, rest = divmod(nanoseconds, _NS_PER_MS)
        if months or rest or days < 0 or whole < 0:
            self._refuse(name, found, "a length of time in days, hours, minutes, seconds or milliseconds, not negative")
        return int(days * _MS_PER_DAY + whole)

    def storage(self) -> dict[str, Any] | None:
        """``storage.KEY``, for the filesystem; ``env:NAME`` is the value of an environment variable."""
        found: dict[str, Any] = {}
        for name, value in self.below(_STORAGE).items():
            *above, last = name.split(".")
            into = found
            for part in above:
                into = into.setdefault(part, {})
            into[last] = {"true": True, "false": False}.get(value, value)
        return found or None

    def below(self, prefix: str) -> dict[str, str]:
        """The options that begin with this, without it; ``env:NAME`` is the value of an environment variable."""
        found = {}
        for name in [name for name in self._found if name.startswith(prefix)]:
            value = self._found.pop(name)
            if value.startswith(_ENVIRONMENT):
                variable = value.removeprefix(_ENVIRONMENT)
                if variable not in os.environ:
                    raise SchemaError(f"{self._owner}: {name}: there is no environment variable {variable}")
                value = os.environ[variable]
            found[name.removeprefix(prefix)] = value
        return found

    def close(self) -> None:
        """Refuse what was not read."""
        if self._found:
            known = ", ".join(self._known)
            raise SchemaError(
                f"{self._owner}: no option {next(iter(self._found))!r}; there are {known} and {_STORAGE}KEY"
            )

    def _refuse(self, name: str, found: object, expected: str) -> NoReturn:
        raise SchemaError(f"{self._owner}: option {name!r} is {found!r}, and must be {expected}")
