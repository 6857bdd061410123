"""Joining a stream with a configuration stream."""

from __future__ import annotations

from typing import Self

import pyarrow as pa

from operators.changelog import OP
from operators.errors import SchemaError
from operators.graph import Port
from operators.stateful.broadcast import BroadcastNode
from operators.verbs.base import StreamBase
from operators.verbs.join_sides import Keys, join_how

__all__ = ["BroadcastVerbs"]


class BroadcastVerbs(StreamBase):
    """Rows and the configuration that holds for them."""

    def join_broadcast(self, configuration: Self, on: Keys, how: str = "left", *, name: str | None = None) -> Self:
        """Add the columns of the configuration that holds when a row comes.

        ``configuration``: a stream of which each row replaces the earlier one with the same ``on`` columns; a
        changelog or upserts with just this key are understood, deletions too. ``how``: ``"left"`` leaves the
        columns null where there is no configuration, ``"inner"`` leaves the row out. What holds is decided by
        the order in which rows come, not by event time; the event time of the result is that of the rows.
        Null keys match nothing. This stream may be one of upserts with ``how="left"``, but no changelog.

        State: one row per configuration key. Raises `SchemaError` for wrong columns and types.
        """
        verb = "join_broadcast"
        if join_how(verb, how) not in ("left", "inner"):
            raise ValueError(f"{verb}: how={how!r}: rows can be kept (left) or left out (inner) without configuration")
        keys = (on,) if isinstance(on, str) else tuple(on or ())
        if not keys:
            raise ValueError(f"{verb}: give at least one key column, on=")
        self._require(verb, keys)
        # What is taken back would meet another configuration than it met when it came.
        self._refuse_changelog(verb)
        if how == "inner":
            self._require_tellable(verb)
        updates = configuration.updates
        if updates is not None and set(updates.key) != set(keys):
            raise SchemaError(f"{verb}: the configuration has one row per {list(updates.key)}, not per {list(keys)}")
        schema = configuration.schema
        if updates is not None and updates.changelog:
            schema = schema.remove(schema.get_field_index(OP))
        if missing := [key for key in keys if key not in schema.names]:
            raise SchemaError(f"{verb}: the configuration has no column {missing[0]!r}, only {schema.names}")
        for key in keys:
            ours, theirs = self._schema.field(key).type, schema.field(key).type
            if ours != theirs:
                raise SchemaError(f"{verb}: {key!r} is {ours} here and {theirs} in the configuration: cast one of them")
        added = [f.with_nullable(True) for f in schema if f.name not in keys]
        if common := [f.name for f in added if f.name in self._schema.names]:
            raise SchemaError(f"{verb}: both sides have columns {common}: rename or drop them on one side")
        node = BroadcastNode(
            operator_id=self._claim(name, "broadcast", *keys),
            inputs=(self._port, configuration.port),
            schema=pa.schema([*self._schema, *added]),
            configuration=schema,
            on=keys,
            inner=how == "inner",
            updates=updates,
        )
        return self._derive(
            Port(node),
            node.schema,
            event_time=self._event_time,
            time_note=self._time_note,
            updates=self._updates,
        )
