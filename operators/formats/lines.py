"""Many records as the lines of one text, for readers of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from operators.windows import Int64Array

__all__ = ["Lines", "join_lines"]


@dataclass(frozen=True, slots=True)
class Lines:
    """The text, and where in it each record begins and ends (without its line break)."""

    data: bytes
    starts: Int64Array
    ends: Int64Array

    @property
    def longest(self) -> int:
        """Bytes of the longest record."""
        return int((self.ends - self.starts).max(initial=0))

    @property
    def has_empty(self) -> bool:
        """Whether one of the records has no bytes."""
        return bool((self.ends == self.starts).any())

    @property
    def are_single(self) -> bool:
        """Whether no record has a line break in it."""
        return self.data.count(b"\n") == len(self.starts) - 1

    def begin_and_end_with(self, first: bytes, last: bytes) -> bool:
        """Whether every record begins and ends with these bytes, one each; not the same one."""
        if (self.ends - self.starts < 2).any():
            return False
        raw = np.frombuffer(self.data, np.uint8)
        return bool((raw[self.starts] == first[0]).all() and (raw[self.ends - 1] == last[0]).all())


def join_lines(values: Sequence[bytes]) -> Lines:
    """The values with line breaks between them."""
    lengths = np.fromiter(map(len, values), np.int64, len(values))
    ends = np.cumsum(lengths + 1) - 1
    return Lines(b"\n".join(values), ends - lengths, ends)
