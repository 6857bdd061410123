"""Reads a whole table in bounded memory: one range of its physical order after the other.

The ranges are those of a compaction (`plan_ranges`): cut where blocks begin, each of a bounded number of bytes, and
never through a key. So every range is merged, or finalised, for itself.

Blocks may be left out beforehand by a predicate on the time column. That is sound, since the time is part of
the key: all versions of a row have the same. Whether a predicate can be true for some block is decided by Arrow, which
simplifies it under the guarantee that the time lies in the range of the block (`may_match`); nothing is parsed here.

Invariants:

* All ranges show one moment, that of the view; they are disjoint and cover everything.
* What is left out cannot match the predicate; what is read may still hold rows that do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow.fs import LocalFileSystem

from statebackend.compaction import KeyRange, plan_ranges
from statebackend.sstable_index import SSTableIndex
from statebackend.table_view import TableView
from statebackend.tables import TableKind, TableSpec

__all__ = ["SWEEP_BYTES", "Selection", "Sweep", "may_match"]

SWEEP_BYTES = 16 << 20
"""Bytes of decoded blocks that are merged at once, about."""

Selection = Mapping[str, tuple[int, ...]]
"""Numbers of blocks by the name of their file."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """One moment of a table, to be read range by range.

    ``memory``: what is in no file yet, as one sorted stored piece; ``indexes`` of all files of the view, by name;
    ``wanted``: by file, which blocks to read, of a file that is not in it all.
    """

    view: TableView
    memory: pa.RecordBatch
    indexes: Mapping[str, SSTableIndex]
    wanted: Mapping[str, npt.NDArray[np.bool_]]

    @classmethod
    def of(
        cls,
        view: TableView,
        memory: pa.RecordBatch,
        indexes: Mapping[str, SSTableIndex],
        predicate: pc.Expression | None = None,
    ) -> Sweep:
        """``predicate``: only rows that match it are wanted, so that blocks without any need not be read."""
        spec = view.layout.spec
        wanted = {}
        if predicate is not None and spec.time_field is not None:
            wanted = {name: may_match(predicate, spec, index) for name, index in indexes.items()}
        return cls(view, memory, indexes, wanted)

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Live rows as a reader understands them: of an aggregate table the finalised results."""
        for keys in self.ranges():
            yield from self.rows_of(keys, self.selection(keys))

    def states(self) -> Iterator[pa.RecordBatch]:
        """Live rows without finalising them; partial states as they were written: a key may be there several times."""
        for keys in self.ranges():
            yield from self._states_of(keys, self.selection(keys))

    def ranges(self, bytes_max: int = SWEEP_BYTES) -> list[KeyRange]:
        """Ranges that cover the table."""
        return plan_ranges(self.view.layout.spec, list(self.indexes.values()), bytes_max)

    def selection(self, keys: KeyRange) -> Selection:
        """The blocks that may hold wanted rows of the range."""
        spec, watermark = self.view.layout.spec, self.view.watermark
        chosen = {}
        for name, index in self.indexes.items():
            numbers = index.overlapping_keys(spec, keys.low, keys.high, watermark)
            if (keep := self.wanted.get(name)) is not None:
                numbers = [n for n in numbers if keep[n]]
            if numbers:
                chosen[name] = tuple(numbers)
        return chosen

    def rows_of(self, keys: KeyRange, selection: Selection) -> list[pa.RecordBatch]:
        """Live rows of one range; see `rows`."""
        states = self._states_of(keys, selection)
        if (merger := self.view.layout.merger) is None:
            return states
        # Inline where it can be: DataFusion may be waiting for these very rows (see ``relation.py``).
        results = merger.final_inline(states) if merger.simple else merger.final(states)
        return [batch for batch in results if batch.num_rows]

    def _states_of(self, keys: KeyRange, selection: Selection) -> list[pa.RecordBatch]:
        layout = self.view.layout
        if layout.spec.kind is not TableKind.AGGREGATE:
            merged = layout.merge(self._pieces(keys, selection), watermark=self.view.watermark, drop_tombstones=True)
            return [layout.to_user(merged, None)] if merged.num_rows else []
        alive = (layout.alive(p, self.view.watermark, None) for p in self._pieces(keys, selection))
        return [layout.to_user(batch, None) for batch in alive if batch.num_rows]

    def _pieces(self, keys: KeyRange, selection: Selection) -> list[pa.RecordBatch]:
        """Stored rows of the range, not merged, from oldest to newest; each piece is sorted."""
        files = [meta for meta in self.view.files if meta.name in selection]
        blocks = self.view.blocks(files, lambda meta, _: selection[meta.name])
        pieces = (*(block.batch for block in blocks), self.memory)
        return [piece[keys.select(self.view.layout.order_columns(piece))] for piece in pieces]


def may_match(predicate: pc.Expression, spec: TableSpec, index: SSTableIndex) -> npt.NDArray[np.bool_]:
    """Which blocks may hold rows for which the predicate is true, by the times in them.

    ``predicate`` may name any column of the table. A block of deletions alone matches nothing.
    """
    assert spec.time_field is not None
    kind = spec.schema.field(spec.time_field).type
    time = pc.field(spec.time_field)
    # Fragments of a dataset that is never read: Arrow drops those whose guarantee contradicts the predicate.
    form, nowhere = ds.IpcFileFormat(), LocalFileSystem()
    spans = zip(pa.array(index.time_min).cast(kind), pa.array(index.time_max).cast(kind), strict=True)
    fragments = [
        form.make_fragment(str(number), nowhere, partition_expression=(time >= low) & (time <= high))
        for number, (low, high) in enumerate(spans)
    ]
    blocks = ds.FileSystemDataset(fragments, spec.schema, form, nowhere)
    keep = np.zeros(len(fragments), dtype=bool)
    keep[[int(fragment.path) for fragment in blocks.get_fragments(predicate)]] = True
    return keep
