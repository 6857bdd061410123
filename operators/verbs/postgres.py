"""Streams that end in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from operators.errors import SchemaError
from operators.sinks import PostgresSink
from operators.verbs.ends import EndVerbs
from operators.verbs.tombstones import split_changelog

__all__ = ["PostgresVerbs"]


class PostgresVerbs(EndVerbs):
    """The end of a stream in a table of a database."""

    def write_postgres(
        self,
        table: str,
        connection: str,
        key: str | Sequence[str] | None = None,
        *,
        name: str | None = None,
        **options: Any,
    ) -> Self:
        """Write rows to a table of PostgreSQL, exactly once; arguments as for `operators.sinks.PostgresSink`.

        Without ``key`` rows are appended. With it the table has the newest row of each key. A changelog, or upserts,
        are written under the key of the stream, and what a changelog deletes is deleted.

        Raises `SchemaError` if the key does not fit.
        """
        updates, keys = self._updates, [key] if isinstance(key, str) else list(key or ())
        if updates is not None:
            if keys and set(keys) != set(updates.key):
                raise SchemaError(
                    f"write_postgres: the key of this stream is {list(updates.key)} ({updates.because}), not {keys}"
                )
            keys = list(updates.key)
            if not keys:
                raise SchemaError(f"write_postgres: this stream has one row without a key ({updates.because}); add one")
        self._require("write_postgres", keys)
        changes = split_changelog if updates is not None and updates.changelog else None
        return self._end(PostgresSink(table, connection, keys, changes=changes, **options), name, "postgres", table)
