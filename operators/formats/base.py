"""What a format is: bytes of many records in, Arrow columns out, one row for each record.

Records are decoded many at a time, by readers that know nothing of where one record ends. So a format has to
make sure of it: a row stands for the record of its number, or the whole call fails. `decode` then finds the records
that are to blame by halving, so that good ones pay nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

__all__ = ["Decoded", "Format", "FormatError", "Rejected", "decode"]


class FormatError(ValueError):
    """Some of the records are not what the format expects; the message is for people."""


class Format(Protocol):
    """Decodes the values of records."""

    @property
    def schema(self) -> pa.Schema:
        """The columns of a record."""

    @property
    def takes_nulls(self) -> bool:
        """Whether a record without a value is one like any other, and decodes to a null."""

    def describe(self) -> Mapping[str, Any]:
        """What must be the same when a job is restored; carried by msgpack."""

    def decode(self, values: Sequence[bytes]) -> pa.RecordBatch:
        """One row for each value, in their order, with exactly the schema.

        Raises `FormatError` if that is not possible; which of the values is to blame need not be said. What one
        value decodes to does not depend on the others.
        """


@dataclass(frozen=True, slots=True)
class Rejected:
    """A value that could not be decoded: its number among those that were given, and why."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Decoded:
    """Rows of the values that could be decoded, in order; and the others."""

    batch: pa.RecordBatch
    rejected: Sequence[Rejected]


def decode(format_: Format, values: Sequence[bytes]) -> Decoded:
    """Decode all values that can be decoded, and tell which cannot."""
    rejected: list[Rejected] = []
    pieces: list[pa.RecordBatch] = []
    # Pieces still to be decoded, the next one last.
    waiting = [(0, len(values))] if values else []
    while waiting:
        start, stop = waiting.pop()
        try:
            pieces.append(format_.decode(values[start:stop]))
        except FormatError as error:
            if stop - start == 1:
                rejected.append(Rejected(start, str(error)))
            else:
                middle = (start + stop) // 2
                waiting += [(middle, stop), (start, middle)]
    if len(pieces) == 1:
        return Decoded(pieces[0], rejected)
    return Decoded(pa.concat_batches(pieces) if pieces else _nothing(format_.schema), rejected)


def _nothing(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], f.type) for f in schema], schema=schema)
