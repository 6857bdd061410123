"""Counts, bytes and times as people read them: in the terminal, in notebooks."""

from __future__ import annotations

from datetime import UTC, datetime

import pyarrow as pa

__all__ = ["byte_size", "counted", "in_unit", "moment", "utc"]

_YEAR_1, _YEAR_10000 = -62_135_596_800_000, 253_402_300_800_000
_PER_MS = {"s": 1000, "ms": 1, "us": 1e-3, "ns": 1e-6}


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """So many of something: ``1 file``, ``1,200 files``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def byte_size(size: float) -> str:
    """Bytes: ``512 B``, ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def utc(ms: int) -> str:
    """Epoch milliseconds as date and time in UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def moment(ms: int) -> str:
    """Event time in epoch milliseconds, which may lie before or after all dates."""
    return utc(ms) if _YEAR_1 <= ms < _YEAR_10000 else ("end of time" if ms > 0 else "before time")


def in_unit(kind: pa.DataType, value: int) -> str:
    """A value of a time column: as a date when the column is a timestamp, else as the integer it is."""
    return moment(int(value * _PER_MS[kind.unit])) if pa.types.is_timestamp(kind) else str(value)
