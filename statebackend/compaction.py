"""Which files of a table to merge: a pure function of the manifest.

Flushed files of a time-ordered table mostly expire before they are worth merging. What stays is
merged when more than ``l0_files_max`` flushed files have gathered; sorted runs that are not larger
than what is merged join in, so that runs grow geometrically and their number stays logarithmic.
"""

from __future__ import annotations

from dataclasses import dataclass

from statebackend.manifest import Manifest, TableState
from statebackend.settings import StoreSettings
from statebackend.sstable import SSTableMeta

__all__ = ["CompactionPlan", "plan_compaction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactionPlan:
    """Merge ``inputs``, contiguous and oldest first, into one run of ``table``.

    ``oldest`` tells that nothing older remains, so that tombstones may go.
    """

    table: str
    timeline: int
    inputs: tuple[SSTableMeta, ...]
    watermark: int | None
    oldest: bool


def plan_compaction(manifest: Manifest, settings: StoreSettings) -> CompactionPlan | None:
    """The most urgent merge, or None when no table has too many flushed files."""
    crowded = [(len(_flushed(s)), name) for name, s in manifest.tables.items()]
    if not crowded:
        return None
    count, name = max(crowded)
    if count <= settings.l0_files_max:
        return None
    state = manifest.tables[name]
    first = len(state.files) - count
    size = sum(f.size for f in state.files[first:])
    while first > 0 and state.files[first - 1].size <= size:
        first -= 1
        size += state.files[first].size
    return CompactionPlan(
        table=name,
        timeline=manifest.timeline,
        inputs=state.files[first:],
        watermark=state.watermark,
        oldest=first == 0,
    )


def _flushed(state: TableState) -> list[SSTableMeta]:
    return [f for f in state.files if f.level == 0]
