"""Streams whose rows replace earlier ones, and the words with which they say so.

Most streams are append-only: every row is a fact of its own. Some operators correct themselves. They either
emit a *changelog*, whose column `OP` tells what each row does to the rows before it, or *upserts*:
a row replaces the earlier one with the same key. A verb that cannot take corrections refuses such a stream
when it is built (`require_append_only`); none ever counts a correction as a new fact.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa

from operators.errors import SchemaError

__all__ = ["OP", "OP_FIELD", "Op", "Updates", "require_append_only"]

OP = "op"
"""Name of the column that tells what a row of a changelog does."""

OP_FIELD = pa.field(OP, pa.string(), nullable=False)


class Op(StrEnum):
    """What a row of a changelog does.

    An update is two rows, next to each other: what no longer holds, then what holds instead.
    """

    INSERT = "insert"
    UPDATE_BEFORE = "update-before"
    UPDATE_AFTER = "update-after"
    DELETE = "delete"


@dataclass(frozen=True, slots=True, kw_only=True)
class Updates:
    """That a stream corrects itself.

    ``key``: the columns of which there is one valid row each. ``changelog``: the stream has the column `OP`;
    else each row replaces the earlier one of its key. ``because``: which verb made it so, for messages.
    """

    key: tuple[str, ...]
    changelog: bool
    because: str


def require_append_only(verb: str, updates: Updates | None, hint: str = "") -> None:
    """Raise `SchemaError` where the input of a verb corrects itself, since its rows would be counted twice."""
    if updates is not None:
        kind = "a changelog" if updates.changelog else "upserts"
        raise SchemaError(
            f"{verb}: the input is {kind} ({updates.because}): corrected rows would be counted twice{hint}"
        )
