"""Records as they are: one column of bytes, or of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from operators.formats.base import FormatError

__all__ = ["RawFormat"]


class RawFormat:
    """One column, ``value``: binary, or with ``text`` a string, which has to be UTF-8. No value is a null."""

    takes_nulls = True

    def __init__(self, *, text: bool = False, column: str = "value") -> None:
        self.schema = pa.schema([(column, pa.string() if text else pa.binary())])

    def describe(self) -> Mapping[str, Any]:
        """The column."""
        return {"format": "raw", "schema": self.schema.to_string()}

    def decode(self, values: Sequence[bytes | None]) -> pa.RecordBatch:
        """See `Format.decode`."""
        try:
            column = pa.array(values, pa.binary()).cast(self.schema.field(0).type)
        except pa.ArrowException as error:
            raise FormatError("no UTF-8 text") from error
        return pa.RecordBatch.from_arrays([column], schema=self.schema)
