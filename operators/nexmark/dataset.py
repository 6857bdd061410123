"""Writes events as three directories of Parquet files, whole or not at all.

Threads make and write one range of events each, all three kinds of it, below ``.partial``; when all
is written the three directories are renamed to their places. A run that fails or is interrupted removes
what it wrote; one that was killed leaves ``.partial``, which no reader looks at and the next run removes.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from operators.errors import BadInputError
from operators.nexmark.generator import generate
from operators.nexmark.model import SCHEMAS, Kind, NexmarkConfig

__all__ = ["DatasetSettings", "write_dataset"]

_PARTIAL = ".partial"
_CHUNK = 50_000
_WAIT_S = 0.1
_DICTIONARY = ("name", "city", "state", "category", "channel", "url")  # other columns hardly repeat


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSettings:
    """``events``: how many, of all kinds.

    ``file_events``: events in one file of each kind; ``group_events``: in one row group, which a thread holds
    in memory (about 150 bytes each).
    """

    events: int
    file_events: int = 2_500_000
    group_events: int = 500_000
    threads: int = max(1, min(4, os.cpu_count() or 1))

    def __post_init__(self) -> None:
        if min(self.events, self.file_events, self.group_events, self.threads) < 1:
            raise ValueError("events, file_events, group_events and threads must be at least 1")


def write_dataset(
    directory: Path,
    config: NexmarkConfig,
    settings: DatasetSettings,
    on_progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write ``person``, ``auction`` and ``bid`` below a directory, which is made if it does not exist.

    ``on_progress`` is called with the events written so far. Raises `BadInputError` if one of the three is
    there already.
    """
    if taken := [kind for kind in Kind if (directory / kind).exists()]:
        raise BadInputError(f"{directory / taken[0]} exists already; choose another directory or delete it")
    made = not directory.exists()
    partial = directory / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for kind in Kind:
            (partial / kind).mkdir(parents=True)
        _write_files(partial, config, settings, on_progress)
        for kind in Kind:
            (partial / kind).rename(directory / kind)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if made:
            with suppress(OSError):  # not empty: it worked
                directory.rmdir()


def _write_files(
    directory: Path, config: NexmarkConfig, settings: DatasetSettings, on_progress: Callable[[int], None]
) -> None:
    stop = threading.Event()
    written = [0] * -(-settings.events // settings.file_events)

    def write(number: int) -> None:
        start = number * settings.file_events
        end = min(start + settings.file_events, settings.events)
        with ExitStack() as stack:
            writers = {kind: stack.enter_context(_writer(directory, kind, number)) for kind in Kind}
            for at in range(start, end, settings.group_events):
                until = min(at + settings.group_events, end)
                for kind in Kind:
                    writers[kind].write_table(_group(config, kind, at, until, stop))
                if stop.is_set():
                    return
                written[number] = until - start

    pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="nexmark")
    try:
        pending = {pool.submit(write, number) for number in range(len(written))}
        while pending:
            done, pending = wait(pending, timeout=_WAIT_S, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            on_progress(sum(written))
    finally:  # whatever ends it, also Ctrl-C between two submissions: nobody waits for what is not written yet
        stop.set()
        pool.shutdown(cancel_futures=True)


def _group(config: NexmarkConfig, kind: Kind, start: int, end: int, stop: threading.Event) -> pa.Table:
    """One row group; in chunks, for a quick stop."""
    chunks = []
    for at in range(start, end, _CHUNK):
        if stop.is_set():
            break
        chunks.append(generate(config, kind, at, min(at + _CHUNK, end)))
    return pa.Table.from_batches(chunks, SCHEMAS[kind])


def _writer(directory: Path, kind: Kind, number: int) -> pq.ParquetWriter:
    schema = SCHEMAS[kind]
    path = directory / kind / f"part-{number:05d}.parquet"
    dictionary = [name for name in _DICTIONARY if name in schema.names]
    return pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=dictionary)
