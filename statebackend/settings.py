"""Settings of a store: numbers with units, defaults and what each one trades."""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["StoreSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """How a store behaves; every field has a default that suits a job on one machine.

    ``block_rows``, ``block_bytes``: rows of one block of an SSTable at most, and about how many bytes they take in
    memory, unless one row takes more. Smaller reads less per lookup or narrow time range; larger compresses better and
    keeps the index small. A block is what is read, decoded and cached at least.

    ``compression``: codec of SSTable blocks, ``"lz4"``, ``"zstd"`` or None. lz4 costs little and
    saves more than half of the bytes of typical state.

    ``filter_bits_per_key``: size of the Bloom filter of a file. At 10 about one missing key in a hundred costs a read
    in vain; 0: no filters.

    ``cache_bytes``: bytes of decoded blocks, filters and indexes kept in memory; what was just flushed is kept first.

    ``disk_cache_dir``, ``disk_cache_bytes``: keep chunks of SSTables in this local directory, up to so many bytes,
    so that a remote store is read once; for storage that is slower than the local disk. Processes may share it.
    None: no such cache. It holds rows in plain form; delete it when a backup of a store is put in the store's place.

    ``memory_bytes``: bytes of rows not yet in files. Beyond it the largest MemTables are flushed early, before
    their checkpoint; beyond twice it, writers wait until the storage has taken some. Stores of one process can share
    this limit and that of the cache, see `MemoryBudget`.

    ``compaction``: who merges files. ``"embedded"``: this process, on the CPU threads of the isolated runtime.
    ``"process"``: a process of its own on this machine, started and watched by the store, so that merging
    never takes the interpreter from the job; should it make no progress, this process takes over. ``"none"``:
    nobody here; `python -m statebackend compact` does it, or nothing does and reads grow slower.

    ``compaction_takeover_s``: how long merges may be due while the compactor elsewhere that claimed them
    shows no progress in the manifest, before this process takes them over. One that is at work shows some every
    minute, or four times in its own ``compaction_takeover_s``; too short wastes work, too long lets flushed files
    pile up after a compactor died.

    ``l0_files_max``: flushed files of one table before they are merged into a sorted run. Fewer
    means cheaper reads, more means less rewriting.

    ``runs_max``: sorted runs of one table. More are merged even where their sizes alone would not ask for it:
    fewer means cheaper reads, more means less rewriting of large tables.

    ``compaction_bytes``: bytes of rows, as they are in memory, that all merges together read and have not merged yet;
    less makes more and smaller steps, but a step needs at least one block of each file that is merged.
    ``file_bytes_max``: bytes of rows after which a merge begins another file of its run (they wait in memory until
    then; the file is smaller by what the compression saves).

    ``commit_timeout_s``: how long a commit tries again after conflicts and unknown outcomes before
    it gives up with `CommitUnknownError` or `StorageUnavailableError`.

    ``request_timeout_s``: how long one storage request may take before it counts as failed.

    ``retained_checkpoints``: how many of the latest checkpoints stay restorable.

    ``gc_interval_s``: how often objects that no kept checkpoint needs are looked for and deleted (a listing
    each time); None: never by this process, `python -m statebackend gc` does it.

    ``flush_interval_s``: commit by itself every so many seconds while there are new rows (for use
    without a job); None: only when asked.

    ``metrics_port``: serve the figures of `StateStore.metrics` for Prometheus at this port of ``metrics_host`` (0: any
    free port) while the store is open, needs the extra ``metrics``; None: not. Whoever reaches the port can read them.

    ``io_threads``, ``cpu_threads``: size of the pools of the isolated runtime.
    """

    block_rows: int = 32_768
    block_bytes: int = 1 << 20
    compression: str | None = "lz4"
    filter_bits_per_key: int = 10
    cache_bytes: int = 256 << 20
    disk_cache_dir: str | os.PathLike[str] | None = None
    disk_cache_bytes: int = 4 << 30
    memory_bytes: int = 512 << 20
    compaction: str = "embedded"
    compaction_takeover_s: float = 300.0
    l0_files_max: int = 8
    runs_max: int = 8
    compaction_bytes: int = 64 << 20
    file_bytes_max: int = 128 << 20
    commit_timeout_s: float = 60.0
    request_timeout_s: float = 30.0
    retained_checkpoints: int = 10
    gc_interval_s: float | None = 60.0
    flush_interval_s: float | None = None
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    io_threads: int = 8
    cpu_threads: int = 2

    def __post_init__(self) -> None:
        if self.compression not in (None, "lz4", "zstd"):
            raise ValueError(f"compression must be 'lz4', 'zstd' or None, not {self.compression!r}")
        for name in (
            "block_rows",
            "block_bytes",
            "disk_cache_bytes",
            "memory_bytes",
            "l0_files_max",
            "runs_max",
            "compaction_bytes",
            "file_bytes_max",
            "retained_checkpoints",
            "io_threads",
            "cpu_threads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.metrics_port is not None and not 0 <= self.metrics_port < 1 << 16:
            raise ValueError(f"metrics_port must be a port number or None, not {self.metrics_port}")
        if self.compaction not in ("embedded", "process", "none"):
            raise ValueError(f"compaction must be 'embedded', 'process' or 'none', not {self.compaction!r}")
        if not 0 <= self.filter_bits_per_key <= 64:
            raise ValueError(f"filter_bits_per_key must be between 0 and 64, not {self.filter_bits_per_key}")
        for name in ("commit_timeout_s", "request_timeout_s", "compaction_takeover_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("flush_interval_s", "gc_interval_s"):
            if (interval := getattr(self, name)) is not None and interval <= 0:
                raise ValueError(f"{name} must be positive or None, not {interval}")
