"""The store against slatedb, rocksdict and sqlite3: one process, local disk, and memory where a peer has it.

``rows`` upserts of random 8-byte keys and 100-byte values in random order, durable at the end; lookups of keys that
are there and of keys that are not; scans; what a store of ``large`` rows costs to reopen, on disk and in a
checkpoint of 1 % changed rows; aggregate states (count and sum), which the peers read, add up and write back.
So that all of it ends within minutes, an engine that is slow gets fewer keys to write and smaller large tables (see
`engines`), and lookups end after `SECONDS_MAX`; the rate is that of the keys until then.
"""

from __future__ import annotations

import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datafusion import col, lit
from datafusion import functions as f

from statebackend import Aggregation, JobState, StateStore, TableKind, TableSpec
from tests.benchmarks.engines import ENGINES, Engine, Keys, Ours, raw_keys

__all__ = ["run"]

BATCHES = (1_000, 65_536)
LOOKUPS = (1, 10, 1_000, 65_536)
SECONDS_MAX = 4.0
"""Of one row of lookups."""

_ADDED = struct.Struct("<qd")


def run(*, rows: int = 1_000_000, large: int = 10_000_000, **_: Any) -> dict[str, Any]:
    """All figures by row; each row by engine."""
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for engine in ENGINES:
            for kind, place in (("disk", Path(directory)), ("memory", None)):
                try:
                    _basics(figures, engine, kind, place, rows)
                except NotImplementedError:
                    continue
            _space_and_reopening(figures, engine, Path(directory), large)
            _states(figures, engine, Path(directory), rows)
        for count in (large // 10, large):
            _checkpoints(figures, Path(directory), count)
    return figures


def _basics(figures: dict[str, Any], engine: type[Engine], kind: str, place: Path | None, rows: int) -> None:
    count = min(rows, engine.writes_max or rows)
    keys = np.random.default_rng(1).integers(0, 1 << 63, count)
    absent = np.random.default_rng(2).integers(0, 1 << 63, count)
    for size in BATCHES:
        at = place / f"{engine.name}-{size}" if place is not None else None
        opened = engine(at)
        began = time.perf_counter()
        for start in range(0, count, size):
            opened.upsert(keys[start : start + size])
        opened.flush()
        _put(figures, f"{kind}: upserts/s in batches of {size:,}", engine, count / (time.perf_counter() - began))
        if size != BATCHES[-1]:
            opened.close()
    for size in LOOKUPS:
        for what, asked in (("existing", keys), ("missing", absent)):
            _put(
                figures, f"{kind}: lookups/s of {what} keys, {size:,} at a time", engine, _lookups(opened, asked, size)
            )
    for part in (1.0, 0.01):
        seconds, found = _timed(lambda part=part: opened.scan(part))
        _put(figures, f"{kind}: rows/s of a scan of {part:.0%} of the keys", engine, found / seconds)
    opened.close()


def _lookups(opened: Engine, keys: Keys, size: int) -> float:
    """Keys per second."""
    count = min(len(keys), opened.reads_max or len(keys))
    order = np.random.default_rng(size).permutation(len(keys))[:count]
    began = time.perf_counter()
    for start in range(0, count, size):
        opened.lookup(keys[order[start : start + size]])
        if (took := time.perf_counter() - began) > SECONDS_MAX:
            break
    return min(start + size, count) / took


def _space_and_reopening(figures: dict[str, Any], engine: type[Engine], place: Path, large: int) -> None:
    count = min(large, engine.large_max or large)
    at = place / f"{engine.name}-large"
    opened = engine(at)
    keys = np.random.default_rng(3).permutation(count)
    for start in range(0, count, 65_536):
        opened.upsert(keys[start : start + 65_536])
    opened.flush()
    opened.close()
    seconds, again = _timed(lambda: engine(at))
    first, _ = _timed(lambda: again.lookup(keys[:1]))
    again.close()
    _put(figures, f"ms to reopen {large:,} rows", engine, seconds * 1e3)
    _put(figures, "ms to the first row after that", engine, first * 1e3)
    at = place / f"{engine.name}-space"
    opened = engine(at)
    for start in range(0, count, 65_536):  # every key ten times
        opened.upsert(keys[start : start + 65_536] % max(count // 10, 1))
        if start // 65_536 % 8 == 7:
            opened.flush()
    opened.flush()
    opened.compact()
    if isinstance(opened, Ours):
        size = opened.live_bytes
    opened.close()
    if not issubclass(engine, Ours):
        size = sum(p.stat().st_size for p in at.rglob("*") if p.is_file())
    _put(figures, f"bytes on disk per key after {large:,} upserts of a tenth as many keys", engine, size * 10 / count)


def _states(figures: dict[str, Any], engine: type[Engine], place: Path, rows: int) -> None:
    count = min(rows, engine.writes_max or rows)
    keys = np.random.default_rng(4).integers(0, max(count // 10, 1), count)
    for size in BATCHES:
        at = place / f"{engine.name}-states-{size}"
        if issubclass(engine, Ours):
            seconds = _our_states(at, keys, size)
        else:
            seconds, _ = _timed(lambda at=at, size=size: _peer_states(engine(at), keys, size))
        _put(figures, f"disk: updates/s of count and sum in batches of {size:,}", engine, count / seconds)


def _our_states(place: Path, keys: Keys, size: int) -> float:
    schema = pa.schema([("key", pa.int64()), ("value", pa.float64())])
    of = Aggregation.compile(schema, [col("key")], [f.count(lit(1)).alias("n"), f.sum(col("value")).alias("total")])
    spec = TableSpec(
        name="states",
        schema=of.merger.state_schema,
        key=("key",),
        kind=TableKind.AGGREGATE,
        aggregation=of.declaration,
    )
    with StateStore.open(place) as store:
        table = store.table(spec)
        began = time.perf_counter()
        for start in range(0, len(keys), size):
            part = keys[start : start + size]
            batch = pa.record_batch([pa.array(part), pa.array(np.ones(len(part)))], schema=schema)
            for states in of.partial([batch]):
                table.write(states)
        store.flush()
        return time.perf_counter() - began


def _peer_states(opened: Engine, keys: Keys, size: int) -> None:
    """Read, add, write. The sums are kept beside; what is read and written is as large as a row."""
    held: dict[bytes, bytes] = {}
    for start in range(0, len(keys), size):
        part = keys[start : start + size]
        opened.lookup(part)
        for key in raw_keys(part):
            count, total = _ADDED.unpack(held.get(key, bytes(16)))
            held[key] = _ADDED.pack(count + 1, total + 1.0)
        opened.upsert(part)
    opened.flush()
    opened.close()


def _checkpoints(figures: dict[str, Any], place: Path, count: int) -> None:
    """A checkpoint of 1 % changed rows: bytes written, and how long the caller is held up."""
    opened = Ours(place / f"checkpoint-{count}")
    keys = np.random.default_rng(5).permutation(count)
    for start in range(0, count, 65_536):
        opened.upsert(keys[start : start + 65_536])
    opened.store.checkpoint(JobState()).result()
    whole = opened.live_bytes  # some of it was flushed before, when memory was short
    pauses, written = [], []
    for step in range(5):
        changed = keys[step * count // 100 : (step + 1) * count // 100]
        for start in range(0, len(changed), 65_536):
            opened.upsert(changed[start : start + 65_536])
        began = time.perf_counter()
        future = opened.store.checkpoint(JobState())
        pauses.append(time.perf_counter() - began)
        written.append(future.result().bytes_written)
    opened.close()
    figures[f"checkpoint of 1 % of {count:,} rows"] = {
        "bytes": float(np.median(written)), "bytes_of_all": float(whole), "pause_ms": float(np.median(pauses)) * 1e3,
    }  # fmt: skip


def _timed(work: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def _put(figures: dict[str, Any], row: str, engine: type[Engine], value: float) -> None:
    figures.setdefault(row, {})[engine.name] = value
    print(f"{engine.name:<10} {row}: {value:,.0f}", file=sys.stderr, flush=True)  # it takes minutes
