"""Plays a changelog back, row by row, and holds it to its rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

Row = dict[str, Any]


def plain(value: Any) -> Any:
    """A value that equals itself: NaN as text, floats rounded."""
    if isinstance(value, float):
        return "NaN" if value != value else float(f"{value:.9g}") + 0.0
    return value


def rows_of(table: pa.Table) -> list[Row]:
    return [{name: plain(value) for name, value in row.items()} for row in table.to_pylist()]


def replayed(table: pa.Table, key: Sequence[str]) -> dict[tuple[Any, ...], Row]:
    """What is valid after all rows of a changelog, by key; fails on a row that breaks the rules."""
    valid: dict[tuple[Any, ...], Row] = {}
    pending: tuple[tuple[Any, ...], Row] | None = None
    for row in rows_of(table):
        op = row.pop("op")
        at = tuple(row[name] for name in key)
        if op == "update-after":
            assert pending is not None, f"nothing was taken back before {row}"
            assert pending[0] == at, f"an update goes from {pending[0]} to {at}"
            assert pending[1] != row, f"an update changes nothing: {row}"
            valid[at], pending = row, None
            continue
        assert pending is None, f"{pending} is not followed by its new row"
        if op == "insert":
            assert at not in valid, f"{at} is inserted again"
            valid[at] = row
        else:
            assert valid.pop(at) == row, f"what is taken back is not what was valid: {row}"
            pending = (at, row) if op == "update-before" else None
    assert pending is None
    return valid
