"""Reads a whole table in bounded memory: one range of its physical order after the other.

The ranges are those of a compaction (`plan_ranges`): cut where blocks begin, each of a bounded number of bytes, and
never through a key. So every range is merged, or finalised, for itself. A predicate leaves out files and blocks
beforehand, see ``pruning.py``.

Rows that are in no file yet are sorted and not merged when partial states are read: finalising merges them anyway, and
needs no threads of DataFusion, which may be waiting for these very rows (see ``relation.py``).

Invariants:

* All ranges show one moment, that of the view; they are disjoint and cover everything.
* What is left out cannot match the predicate; what is read may still hold rows that do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from statebackend.cache import OpenFile
from statebackend.compaction import KeyRange, plan_ranges
from statebackend.pruning import Pruning
from statebackend.sstable import SSTableMeta
from statebackend.sstable_index import SSTableIndex
from statebackend.table_view import TableView, gather
from statebackend.tables import TableKind

__all__ = ["SWEEP_BYTES", "ReadCount", "Selection", "Sweep"]

SWEEP_BYTES = 16 << 20
"""Bytes of decoded blocks that are merged at once, about."""

Selection = Mapping[str, tuple[int, ...]]
"""Numbers of blocks by the name of their file."""


@dataclass(slots=True)
class ReadCount:
    """What sweeps have chosen to read, and from how much. Added to by several threads: figures for people.

    ``files``, ``blocks``, ``bytes``: of the tables; ``files_read``, ``blocks_read``, ``bytes_read``: what was not left
    out for the sake of a predicate, in bytes as stored. A block that lies across two ranges is counted twice.
    """

    files: int = 0
    files_read: int = 0
    blocks: int = 0
    blocks_read: int = 0
    bytes: int = 0
    bytes_read: int = 0


@dataclass(frozen=True, slots=True)
class Sweep:
    """One moment of a table, to be read range by range.

    ``memory``: what is in no file yet, as one sorted stored piece; ``indexes`` of the files that may hold wanted rows,
    by name; ``wanted``: by file, which blocks to read, of a file that is not in it all.
    """

    view: TableView
    memory: pa.RecordBatch
    indexes: Mapping[str, SSTableIndex]
    wanted: Mapping[str, npt.NDArray[np.bool_]]
    count: ReadCount
    range_bytes: int = SWEEP_BYTES

    @classmethod
    def begin(
        cls,
        view: TableView,
        predicate: pc.Expression | None = None,
        count: ReadCount | None = None,
        range_bytes: int = SWEEP_BYTES,
    ) -> Sweep:
        """Read the indexes that are needed.

        ``predicate``: only rows that match it are wanted. ``count``: where to count what is read. ``range_bytes``: of
        decoded blocks to merge at once.
        """
        # Not reduced: that may need threads of DataFusion.
        layout = replace(view.layout, merger=None)
        memory = layout.merge([
            layout.to_stored(p.batch) if view.layout.reduces else p.to_stored(layout) for p in view.pieces
        ])  # fmt: skip
        count = count if count is not None else ReadCount()
        pruning = None if predicate is None else Pruning.of(view.layout, predicate)
        files = list(view.files) if pruning is None else pruning.files(view.files)
        opened = _opened(view, files, filters=pruning is not None and pruning.known is not None)
        wanted = {} if pruning is None else {f.meta.name: pruning.blocks(f) for f in opened}
        count.files += len(view.files)
        count.files_read += sum(bool(wanted[f.meta.name].any()) if wanted else True for f in opened)
        count.bytes += sum(f.size for f in view.files)
        count.blocks += sum(len(f.index.entries) for f in opened)
        return cls(view, memory, {f.meta.name: f.index for f in opened}, wanted, count, range_bytes)

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Live rows as a reader understands them: of an aggregate table the finalised results."""
        for keys in self.ranges():
            yield from self.rows_of(keys, self.selection(keys))

    def states(self) -> Iterator[pa.RecordBatch]:
        """Live rows without finalising them; partial states as they were written: a key may be there several times."""
        for keys in self.ranges():
            yield from self._states_of(keys, self.selection(keys))

    def ranges(self) -> list[KeyRange]:
        """Ranges that cover the table."""
        wanted = [
            SSTableIndex(index.entries[self.wanted[name]]) if name in self.wanted else index
            for name, index in self.indexes.items()
        ]
        return plan_ranges(self.view.layout.spec, wanted, self.range_bytes)

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
        for name, numbers in selection.items():
            self.count.blocks_read += len(numbers)
            self.count.bytes_read += int(self.indexes[name].entries["length"][list(numbers)].sum())
        pieces = (*(block.batch for block in blocks), self.memory)
        return [piece[keys.select(self.view.layout.order_columns(piece))] for piece in pieces]


def _opened(view: TableView, files: Sequence[SSTableMeta], *, filters: bool) -> list[OpenFile]:
    """The indexes of some files, and their filters if they are asked for."""
    if not files:
        return []
    reader = view.reader

    async def without_filter(meta: SSTableMeta) -> OpenFile:
        return OpenFile(meta, await reader.index(meta), None)

    return view.host.read(lambda: gather((reader.open if filters else without_filter)(meta) for meta in files))
