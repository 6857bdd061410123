"""Merges files by the numbers of their events, where one file does not simply follow the other.

Files may have been cut by time, by hash or by thread. Those whose ranges of numbers do not overlap form a chain
that is read one after the other; chains are merged. A merged batch holds, of the next batch of every chain, what
lies before the end of the one that ends first. Rows of one chain keep their order, whatever it is: where they
are not in the order of their numbers, the largest number so far stands for each.

Invariant: what a batch holds is a function of the files and of the position before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from operators.errors import SourceChangedError
from operators.nexmark.draws import Int64Array
from operators.nexmark.model import SEQ
from operators.sources import ParquetSource, Position, SourceBatch

__all__ = ["MergedFiles"]


@dataclass(slots=True)
class _Head:
    """The next rows of one chain, with the largest number up to each, and the position after them."""

    batch: pa.RecordBatch
    numbers: Int64Array
    position: Position


class MergedFiles:
    """All Parquet files of a directory as one source of batches in the order of `SEQ`.

    ``columns`` must hold `SEQ`. Errors are those of `ParquetSource`.
    """

    def __init__(self, path: str, columns: Sequence[str], *, batch_rows: int) -> None:
        chains = ParquetSource(path, [SEQ]).chains(SEQ)
        # A single chain is named by its directory, so that its position holds for a copy elsewhere.
        inputs = chains if len(chains) > 1 else [path]
        rows = max(1, batch_rows // len(inputs))
        self._path = path
        self._chains = [ParquetSource(files, columns, batch_rows=rows, order_by=SEQ) for files in inputs]
        self._heads: list[_Head | None] = []
        self._positions: list[Position | None] = []
        self._ended: list[bool] = []
        self.schema: pa.Schema = self._chains[0].schema
        """Columns as they are in the files."""
        self.total_rows = sum(chain.total_rows or 0 for chain in self._chains)

    @property
    def last_number(self) -> int | None:
        """The largest number; None without rows."""
        ranges = [chain.order_range for chain in self._chains if chain.order_range is not None]
        return max((int(high) for _, high in ranges), default=None)

    def open(self, position: Position | None) -> None:
        """Start at a position, or at the beginning; raises `SourceChangedError` for another input."""
        count = len(self._chains)
        self._positions = [None] * count if position is None else list(position)
        if len(self._positions) != count:
            expected = f"files in {len(self._positions)} chains that have to be merged"
            raise SourceChangedError(self._path, expected=expected, found=f"{count} chains")
        self._heads, self._ended = [None] * count, [False] * count
        for chain, at in zip(self._chains, self._positions, strict=True):
            chain.open(at)

    def poll(self) -> SourceBatch | None:
        """The next batch; None at the end."""
        if len(self._chains) == 1:
            item = self._chains[0].poll()
            return SourceBatch(item.batch, [item.position]) if isinstance(item, SourceBatch) else None
        for number, chain in enumerate(self._chains):
            if self._heads[number] is None and not self._ended[number]:
                self._heads[number] = self._next(chain)
                self._ended[number] = self._heads[number] is None
        waiting = [(number, head) for number, head in enumerate(self._heads) if head is not None]
        if not waiting:
            return None
        bound = min(int(head.numbers[-1]) for _, head in waiting)
        taken = [part for number, head in waiting if (part := self._take(number, head, bound))[0].num_rows]
        if len(taken) == 1:
            merged = taken[0][0]
        else:
            order = np.argsort(np.concatenate([numbers for _, numbers in taken]), kind="stable")
            merged = pa.concat_batches([batch for batch, _ in taken]).take(pa.array(order))
        return SourceBatch(merged, list(self._positions))

    def close(self) -> None:
        """Close every file."""
        for chain in self._chains:
            chain.close()

    def _next(self, chain: ParquetSource) -> _Head | None:
        item = chain.poll()
        if not isinstance(item, SourceBatch):
            return None
        numbers = item.batch.column(SEQ).to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
        return _Head(item.batch, np.maximum.accumulate(numbers), item.position)

    def _take(self, number: int, head: _Head, bound: int) -> tuple[pa.RecordBatch, Int64Array]:
        """The rows of a head up to the bound; the rest stays.

        It begins with a number above the bound, so the largest numbers so far are those that a restored
        chain, which begins there, counts anew.
        """
        rows = int(np.searchsorted(head.numbers, bound, side="right"))
        left = head.batch.num_rows - rows
        part = head.batch.slice(0, rows), head.numbers[:rows]
        if left:
            self._heads[number] = _Head(head.batch.slice(rows), head.numbers[rows:], head.position)
        else:
            self._heads[number] = None
        if rows:
            self._positions[number] = self._chains[number].position_before(head.position, left)
        return part
