"""CSV, a line without a header in each record, decoded by Arrow's reader.

That a row is the record of its number follows from two facts: no record has a line break in it, so none makes more
than one row, and there are as many rows as records, so none goes on in the next. The first record is put behind the
last one once more, as a quote that nobody closes would go on to the end of the text without an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv

from operators.formats.base import FormatError
from operators.formats.lines import join_lines

__all__ = ["CsvFormat"]


class CsvFormat:
    """Values separated by ``delimiter`` (one character), one for each column, in their order.

    ``null_values``: unquoted texts that stand for null; Arrow's list (empty, ``NA``, ``null``, ...) by default.
    """

    takes_nulls = False

    def __init__(self, schema: pa.Schema, *, delimiter: str = ",", null_values: Sequence[str] | None = None) -> None:
        self.schema = schema.remove_metadata()
        self._delimiter = delimiter
        self._parse = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=False, ignore_empty_lines=False)
        self._convert = pacsv.ConvertOptions(
            column_types={f.name: f.type for f in self.schema},
            null_values=None if null_values is None else list(null_values),
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        )

    def describe(self) -> Mapping[str, Any]:
        """The columns and what separates them."""
        return {"format": "csv", "schema": self.schema.to_string(), "delimiter": self._delimiter}

    def decode(self, values: Sequence[bytes]) -> pa.RecordBatch:
        """See `Format.decode`."""
        lines = join_lines(values)
        if not lines.are_single:
            lines = join_lines([value.rstrip(b"\r\n") for value in values])
            if not lines.are_single:
                raise FormatError("a line break in a record")
        if len(self.schema) > 1 and lines.has_empty:
            raise FormatError("an empty record")
        first = lines.data[: lines.ends[0]]
        table = self._read(b"%s\n%s\n" % (lines.data, first))
        if table.num_rows != len(values) + 1:
            raise FormatError("a quote that is not closed")
        columns = [pa.concat_arrays(column.chunks)[:-1] for column in table.columns]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _read(self, data: bytes) -> pa.Table:
        # One block of Arrow's reader holds everything.
        read = pacsv.ReadOptions(column_names=self.schema.names, use_threads=False, block_size=len(data) + 1)
        try:
            return pacsv.read_csv(pa.BufferReader(data), read, self._parse, self._convert)
        except (pa.ArrowException, ValueError) as error:
            raise FormatError(str(error).removeprefix("CSV parse error: ")) from error
