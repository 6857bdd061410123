"""What several operators do with their tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from statebackend import Aggregation, StateTable

__all__ = ["keeps_every_value", "sweep", "unused_name"]

_HASHES = 1 << 64
_SWEEP_ROWS = 1 << 17
"""Rows that `sweep` reads at once, about."""


def sweep(table: StateTable, *, merged: bool = True) -> Iterator[list[pa.RecordBatch]]:
    """All live rows of a table in pieces of bounded size, by ranges of the hash of the partition key.

    All rows of one key are in one piece. The table must not be written to meanwhile.
    """
    low, width = 0, _HASHES >> 6
    while low < _HASHES:
        high = min(low + width, _HASHES)
        found = table.scan(hash_range=(low, high), merged=merged)
        if found:
            yield found
        # Hashes are evenly spread, so the next range holds as many rows for its width.
        rows = sum(batch.num_rows for batch in found)
        width = max(1, min(width * _SWEEP_ROWS // max(1, rows), 8 * width))
        low = high


def keeps_every_value(aggregation: Aggregation) -> bool:
    """Whether the state of a group grows with its rows: array_agg, distinct values, an exact median."""
    return any(pa.types.is_list(kind) or pa.types.is_large_list(kind) for kind in aggregation.merger.state_schema.types)


def unused_name(base: str, names: Sequence[str]) -> str:
    """``base``, with as many underscores behind it as it takes to differ from all names."""
    while base in names:
        base += "_"
    return base
