"""Checks a source against the `Source` protocol: the same rows from every position, positions that can be stored."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from operators.sources import IDLE, Position, Source, SourceBatch

__all__ = ["SourceContractError", "check_source"]

_PAUSE_S = 0.001


class SourceContractError(AssertionError):
    """A source does not keep what the `Source` protocol asks of it."""


def check_source(make_source: Callable[[], Source], *, places: int = 10) -> int:
    """Check that a source is replayable; returns the number of rows it gave.

    ``make_source`` makes the source anew for each reading of the same input. It is read from the beginning twice, and
    from ``places`` of its positions, the last one among them: each reading must give the rows after that position, by
    split and in order. Batches may be cut in other ways, as those of a live source are. Positions must be what
    msgpack carries, and `Source.describe` must not differ. The source must end; `ends_after` makes one end that does
    not by itself.

    Raises `SourceContractError` naming what differs, `ValueError` if there is no row to check.
    """
    first = make_source()
    whole = _read(first, None)
    if not sum(item.batch.num_rows for item in whole):
        raise ValueError("the source gave no row: the check could not find anything wrong")
    second = make_source()
    if dict(first.describe()) != dict(second.describe()):
        raise SourceContractError(f"describe() differs: {dict(first.describe())}, then {dict(second.describe())}")
    for item in whole:
        _check_position(item.position)
        if item.batch.schema != first.schema:
            raise SourceContractError(f"schema is\n{first.schema}\nbut a batch has\n{item.batch.schema}")
    numbers = {round(i * (len(whole) - 1) / max(1, places - 1)) for i in range(places)} if places else set()
    for number in (-1, *sorted(numbers)):
        position = None if number < 0 else whole[number].position
        _compare(
            _by_split(whole[number + 1 :], first.schema),
            _by_split(_read(make_source(), position), first.schema),
            "the beginning, for the second time" if position is None else f"the position {position}",
        )
    return sum(item.batch.num_rows for item in whole)


def _read(source: Source, position: Position | None) -> list[SourceBatch]:
    items: list[SourceBatch] = []
    source.open(position)
    try:
        while (item := source.poll()) is not None:
            if item is not IDLE:
                items.append(item)
            else:
                time.sleep(_PAUSE_S)
    finally:
        source.close()
        source.close()
    return items


def _by_split(items: list[SourceBatch], schema: pa.Schema) -> dict[str, pa.Table]:
    splits: dict[str, list[pa.RecordBatch]] = {}
    for item in items:
        if item.batch.num_rows:
            splits.setdefault(item.split, []).append(item.batch)
    return {split: pa.Table.from_batches(batches, schema) for split, batches in splits.items()}


def _compare(expected: dict[str, pa.Table], found: dict[str, pa.Table], where: str) -> None:
    for split in sorted(expected.keys() | found.keys()):
        name = f" of split {split!r}" if split else ""
        wanted, rows = expected.get(split), found.get(split)
        counts = [0 if table is None else table.num_rows for table in (wanted, rows)]
        if counts[0] != counts[1]:
            raise SourceContractError(f"read from {where}{name}: expected {counts[0]} rows, found {counts[1]}")
        assert wanted is not None
        assert rows is not None
        if not wanted.equals(rows):
            pairs = enumerate(zip(wanted.to_pylist(), rows.to_pylist(), strict=True))
            row, (left, right) = next((i, pair) for i, pair in pairs if repr(pair[0]) != repr(pair[1]))
            raise SourceContractError(f"read from {where}{name}: row {row}: expected {left}, found {right}")


def _check_position(position: Any) -> None:
    """What msgpack carries."""
    if isinstance(position, dict):
        for key, value in position.items():
            if not isinstance(key, str):
                raise SourceContractError(f"a position has the key {key!r}: keys must be text")
            _check_position(value)
    elif isinstance(position, list):
        for value in position:
            _check_position(value)
    elif not (position is None or isinstance(position, bool | int | float | str | bytes)):
        raise SourceContractError(f"a position holds a {type(position).__name__} ({position!r}), which is not stored")
