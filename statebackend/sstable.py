"""SSTables: immutable sorted Arrow IPC files with their index and statistics in the footer.

Any Arrow reader opens one. The rows are cut into blocks (IPC record batches); the footer's custom
metadata holds, under ``statebackend``, the index: one entry per block with its place, its
checksum and the range of times and hashes in it. Footer metadata has to be given to Arrow before
the first block is written, so space is reserved for it and filled in at the end, when the places
are known; entries have a fixed size for that. Between the blocks and the footer lies the filter (see
``bloom.py``), where Arrow readers, who find blocks by the footer, never look.

::

    "ARROW1" | schema message | block 0 | block 1 | ... | EOS | filter | Arrow footer | length | "ARROW1"
                                                                          └ metadata["statebackend"]
    filter   = envelope of kind SSTABLE_FILTER of {"words": bytes}, zeros up to a multiple of 8 bytes; or nothing
    value    = "SSTX" + base64(envelope of kind SSTABLE_INDEX, padded) of
               {"table", "rows", "blocks": bytes, "entry_bytes", "hash_version", "filter": [offset, length] or None}
    blocks   = per block, little-endian: offset u64, length u64, rows u64, memory u64 (bytes when decoded),
               xxh3-64 u64, hash_min u64, hash_max u64, time_min i64, time_max i64

The tail, which is read first and in one request, begins with the filter if that is small, else with the footer.

Invariants:

* A file is written once, complete, under a name that no other bytes ever had.
* A block has at most ``block_rows`` rows, and takes about ``block_bytes`` in memory at most, or is a single row.
* A block that is read shares no memory with its neighbours: what the cache lets go of is free.
* Nothing of a block is decoded before its checksum agreed; the index carries its own checksum, and
  the manifest holds the file's size and the checksum of its tail.
* ``time_min`` and ``time_max`` are of the column by which rows expire; where there is none they are zero
  and mean nothing.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from statebackend import format as envelope
from statebackend.bloom import BloomFilter
from statebackend.errors import CorruptionError, ObjectMissingError, UnsupportedFormatError
from statebackend.keys import HASH_VERSION
from statebackend.merge import HASH_COLUMN, HashRange, TableLayout
from statebackend.objectstore import ObjectStore
from statebackend.settings import StoreSettings
from statebackend.sstable_index import ENTRY, SSTableIndex

__all__ = [
    "READ_BYTES",
    "EncodedSSTable",
    "SSTableMeta",
    "encode_sstable",
    "read_blocks",
    "read_filter",
    "read_index",
]

_MARK = b"SSTX"
_INDEX_SLACK = 512  # envelope, msgpack framing, place of the filter and the table's name
_EOS_BYTES = 8
_FILTER_BYTES_EAGER = 1 << 16  # filters up to this size are read with the index
READ_BYTES = 8 << 20  # of one request: large enough to make the latency of a remote store small
_FOOTER_END = struct.Struct("<i6s")  # length of the footer, magic
_BASE64 = re.compile(re.escape(_MARK) + rb"([A-Za-z0-9+/]+=*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class SSTableMeta:
    """What the manifest knows of one file.

    ``size`` and ``tail_bytes`` in bytes; ``tail_checksum`` is xxh3-64 over the last ``tail_bytes``
    bytes, which hold the footer and, if it is small, the filter; ``sequence`` orders the flushes of one
    writer; ``level`` is 0 for a flushed file and 1 for a merged one; ``run`` names the sorted run that a
    merged file is a part of, None for a flushed one. Times are those by which rows expire (see
    `TableLayout.time_range`), None if they do not. ``schema`` is the version of the table's schema that the rows
    have (see `SchemaHistory`).
    """

    name: str
    level: int
    run: str | None
    sequence: int
    rows: int
    size: int
    tail_bytes: int
    tail_checksum: int
    hash_min: int
    hash_max: int
    time_min: int | None
    time_max: int | None
    schema: int = 0

    def overlaps(self, start: int | None, end: int | None, hash_range: HashRange = (None, None)) -> bool:
        """Whether the file may hold rows with ``start <= time < end`` and a hash in the range."""
        low, high = hash_range
        if (low is not None and self.hash_max < low) or (high is not None and self.hash_min >= high):
            return False
        if self.time_min is None or self.time_max is None:
            return True
        return (start is None or self.time_max >= start) and (end is None or self.time_min < end)

    def expired(self, watermark: int | None) -> bool:
        """Whether every row lies below the watermark, deletions aside."""
        return watermark is not None and self.time_max is not None and self.time_max < watermark


@dataclass(frozen=True, slots=True)
class EncodedSSTable:
    """The bytes of a file, what the manifest shall say of it, and its blocks and filter (to be cached)."""

    layout: TableLayout
    data: memoryview
    meta: SSTableMeta
    index: SSTableIndex
    blocks: tuple[pa.RecordBatch, ...]
    filter: BloomFilter | None


def encode_sstable(
    layout: TableLayout, rows: pa.RecordBatch, name: str, sequence: int, run: str | None, *, settings: StoreSettings
) -> EncodedSSTable:
    """Encode sorted stored rows (as `TableLayout.merge` returns them; at least one row)."""
    blocks = _cut(rows, settings)
    reserved = len(_MARK) + _base64_bytes(_INDEX_SLACK + len(blocks) * ENTRY.itemsize + len(layout.spec.name) * 4)
    sink = io.BytesIO()
    entries = np.zeros(len(blocks), dtype=ENTRY)
    options = pa.ipc.IpcWriteOptions(compression=settings.compression)
    placeholder = {b"statebackend": _MARK + b" " * (reserved - len(_MARK))}
    with pa.ipc.new_file(sink, layout.stored, options=options, metadata=placeholder) as writer:
        for i, block in enumerate(blocks):
            before = sink.tell()
            writer.write_batch(block)
            # The schema is written with the first block; that block begins after it.
            offset = before or _end_of_schema(sink.getbuffer()[:16])
            entries[i] = _entry(layout, block, offset, sink.getbuffer()[offset : sink.tell()])
    end = int(entries[-1]["offset"] + entries[-1]["length"])
    index, bloom = _insert_filter(sink, layout, rows, entries, settings.filter_bits_per_key)
    data = sink.getbuffer()
    _fill_index(data, layout.spec.name, rows.num_rows, index, reserved)
    tail_start = end if index.filter_bytes <= _FILTER_BYTES_EAGER else _filter_end(index)
    timed = layout.spec.expiry_field is not None
    meta = SSTableMeta(
        name=name,
        level=0 if run is None else 1,
        run=run,
        sequence=sequence,
        rows=rows.num_rows,
        size=len(data),
        tail_bytes=len(data) - tail_start,
        tail_checksum=envelope.checksum(data[tail_start:]),
        hash_min=int(entries["hash_min"].min()),
        hash_max=int(entries["hash_max"].max()),
        time_min=int(entries["time_min"].min()) if timed else None,
        time_max=int(entries["time_max"].max()) if timed else None,
        schema=layout.history.number,
    )
    return EncodedSSTable(layout, data.toreadonly(), meta, index, tuple(blocks), bloom)


async def read_index(objects: ObjectStore, meta: SSTableMeta) -> tuple[SSTableIndex, BloomFilter | None]:
    """Read and check the index of a file, and its filter if that is small: one request.

    Raises `CorruptionError` or `ObjectMissingError`, both naming the file.
    """
    tail = await _get(objects, meta.name, meta.size - meta.tail_bytes, meta.size)
    found = envelope.checksum(tail)
    if found != meta.tail_checksum:
        raise CorruptionError(
            f"{meta.name}: checksum of the footer is {found:016x}, expected {meta.tail_checksum:016x}"
        )
    match = _BASE64.search(tail, max(0, _footer_start(tail))) if len(tail) >= _FOOTER_END.size else None
    if match is None:
        raise CorruptionError(f"{meta.name}: no index in the footer")
    index = _decode_index(match.group(1), meta)
    begin = index.filter_offset - (meta.size - meta.tail_bytes)
    if not index.filter_bytes or begin < 0:
        return index, None
    return index, BloomFilter.decode(tail[begin : begin + index.filter_bytes], meta.name)


async def read_filter(objects: ObjectStore, meta: SSTableMeta, index: SSTableIndex) -> BloomFilter:
    """Read and check the filter of a file that has one: one request.

    Raises `CorruptionError` or `ObjectMissingError`, both naming the file.
    """
    data = await _get(objects, meta.name, index.filter_offset, index.filter_offset + index.filter_bytes)
    return BloomFilter.decode(data, meta.name)


async def read_blocks(
    objects: ObjectStore, meta: SSTableMeta, index: SSTableIndex, numbers: Sequence[int], layout: TableLayout
) -> list[pa.RecordBatch]:
    """Read, check and decode some blocks; neighbours are fetched together, some `READ_BYTES` in one request.

    The rows come in the newest version of the table's schema, whatever version the file was written under.

    Raises `CorruptionError` or `ObjectMissingError`, both naming the file.
    """
    blocks: list[pa.RecordBatch] = []
    schema = layout.stored_as(meta.schema)
    for first, last in _requests(index, numbers):
        start = int(index.entries[first]["offset"])
        end = int(index.entries[last]["offset"] + index.entries[last]["length"])
        data = memoryview(await _get(objects, meta.name, start, end))
        for number in range(first, last + 1):
            entry = index.entries[number]
            begin = int(entry["offset"]) - start
            # A copy: Arrow leaves what was not compressed where it is, and one block would hold all of the request.
            part = bytes(data[begin : begin + int(entry["length"])])
            block = _decode_block(meta.name, number, entry, part, schema)
            blocks.append(layout.upgraded(block, meta.schema))
    return blocks


def _decode_block(name: str, number: int, entry: np.void, data: bytes, schema: pa.Schema) -> pa.RecordBatch:
    found = envelope.checksum(data)
    if found != int(entry["checksum"]):
        raise CorruptionError(
            f"{name}: block {number}: checksum is {found:016x}, expected {int(entry['checksum']):016x}"
        )
    try:
        batch = pa.ipc.read_record_batch(pa.py_buffer(data), schema)
        batch.validate(full=True)  # offsets and lengths that lie would be read past the buffers
    except Exception as error:  # Arrow raises many kinds, KeyError and MemoryError among them
        raise CorruptionError(f"{name}: block {number} is not a record batch of ({schema.names}): {error}") from error
    if any(column.null_count for field, column in zip(schema, batch.columns, strict=True) if not field.nullable):
        raise CorruptionError(f"{name}: block {number} has nulls where the schema has none")
    if batch.num_rows != int(entry["rows"]):
        raise CorruptionError(f"{name}: block {number} has {batch.num_rows} rows, expected {int(entry['rows'])}")
    return batch


def _cut(rows: pa.RecordBatch, settings: StoreSettings) -> list[pa.RecordBatch]:
    """The blocks: by the average size of the rows; where they turn out to be larger than that, by halves."""
    average = max(1, rows.nbytes // rows.num_rows)
    step = max(1, min(settings.block_rows, settings.block_bytes // average))
    parts = [rows.slice(i, step) for i in reversed(range(0, rows.num_rows, step))]
    blocks: list[pa.RecordBatch] = []
    while parts:
        part = parts.pop()
        first, second = part.slice(0, part.num_rows // 2), part.slice(part.num_rows // 2)
        too_large = first.num_rows and part.nbytes > 2 * settings.block_bytes
        # Not where halves are as large as the whole: views below the top level refer to shared bytes.
        if too_large and 2 * (first.nbytes + second.nbytes) < 3 * part.nbytes:
            parts += [second, first]
        else:
            blocks.append(part)
    return blocks


def _entry(layout: TableLayout, block: pa.RecordBatch, offset: int, data: memoryview) -> tuple[int, ...]:
    hashes = block.column(HASH_COLUMN).to_numpy()
    low, high = layout.time_range(block) or (0, 0)
    digest = envelope.checksum(data)
    return offset, len(data), block.num_rows, block.nbytes, digest, int(hashes.min()), int(hashes.max()), low, high


def _insert_filter(
    sink: io.BytesIO, layout: TableLayout, rows: pa.RecordBatch, entries: npt.NDArray[np.void], bits_per_key: int
) -> tuple[SSTableIndex, BloomFilter | None]:
    """Put the filter between the blocks of a written file and its footer."""
    hashes = layout.filter_hashes(rows) if bits_per_key else None
    if hashes is None:
        return SSTableIndex(entries), None
    bloom = BloomFilter.of(hashes, bits_per_key)
    data = bloom.encode()
    at = int(entries[-1]["offset"] + entries[-1]["length"]) + _EOS_BYTES
    footer = bytes(sink.getbuffer()[at:])
    sink.seek(at)
    sink.write(data + bytes(-len(data) % 8) + footer)
    return SSTableIndex(entries, at, len(data)), bloom


def _footer_start(tail: bytes | memoryview) -> int:
    """Where the Arrow footer begins in the end of a file."""
    length, _ = _FOOTER_END.unpack_from(tail, len(tail) - _FOOTER_END.size)
    return len(tail) - _FOOTER_END.size - int(length)


def _fill_index(data: memoryview, table: str, rows: int, index: SSTableIndex, reserved: int) -> None:
    value = {
        "table": table,
        "rows": rows,
        "entry_bytes": ENTRY.itemsize,
        "hash_version": HASH_VERSION,
        "blocks": index.entries.tobytes(),
        "filter": [index.filter_offset, index.filter_bytes] if index.filter_bytes else None,
    }
    text = _MARK + base64.b64encode(envelope.encode(envelope.ObjectKind.SSTABLE_INDEX, value))
    footer = _footer_start(data)
    at = footer + bytes(data[footer:]).index(_MARK + b" ")
    assert len(text) <= reserved, "the reserved space holds every index of this many blocks"
    data[at : at + reserved] = text.ljust(reserved)


def _decode_index(text: bytes, meta: SSTableMeta) -> SSTableIndex:
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise CorruptionError(f"{meta.name}: index is not base64: {error}") from error
    value = envelope.decode(envelope.ObjectKind.SSTABLE_INDEX, raw, meta.name)
    try:
        if value["hash_version"] > HASH_VERSION:
            raise UnsupportedFormatError(
                f"{meta.name}: keys hashed by version {value['hash_version']}; this library knows up to {HASH_VERSION}"
            )
        entries = np.frombuffer(value["blocks"], dtype=ENTRY)
        counted, entry_bytes = value["rows"], value["entry_bytes"]
        offset, length = (int(n) for n in value["filter"] or (0, 0))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError(f"{meta.name}: not an index: {type(error).__name__}: {error}") from error
    if entry_bytes != ENTRY.itemsize or counted != meta.rows or sum(entries["rows"].tolist()) != meta.rows:
        raise CorruptionError(f"{meta.name}: index counts {counted} rows, the manifest {meta.rows}")
    index = SSTableIndex(entries, offset, length)
    _check_places(index, meta)
    return index


def _check_places(index: SSTableIndex, meta: SSTableMeta) -> None:
    """Raise `CorruptionError` unless blocks and filter lie one behind the other, from the schema to the footer."""
    # As integers that cannot overflow.
    offsets, lengths = index.entries["offset"].tolist(), index.entries["length"].tolist()
    ends = [offset + length for offset, length in zip(offsets, lengths, strict=True)]
    tail = meta.size - meta.tail_bytes
    blocks_end = tail
    if index.filter_bytes:
        blocks_end = index.filter_offset - _EOS_BYTES
        if tail not in (blocks_end, _filter_end(index)) or not blocks_end < _filter_end(index) < meta.size:
            raise CorruptionError(f"{meta.name}: the filter in the index does not lie before the footer")
    if not ends or offsets[0] < len(b"ARROW1") or ends != [*offsets[1:], blocks_end]:
        raise CorruptionError(f"{meta.name}: the blocks in the index do not fill the file")


def _filter_end(index: SSTableIndex) -> int:
    """Where the filter ends, its padding included."""
    return index.filter_offset + index.filter_bytes + -index.filter_bytes % 8


async def _get(objects: ObjectStore, name: str, start: int, end: int) -> bytes:
    try:
        data = await objects.get_range(name, start, end)
    except ObjectMissingError as error:
        raise ObjectMissingError(f"{name}: SSTable is named by the manifest, but does not exist: {error}") from error
    if len(data) != end - start:
        raise CorruptionError(f"{name}: truncated: {len(data)} bytes at {start}, expected {end - start}")
    return data


def _requests(index: SSTableIndex, numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of consecutive blocks as (first, last), of about `READ_BYTES` at most."""
    runs: list[tuple[int, int]] = []
    gathered = 0
    for number in sorted(numbers):
        length = int(index.entries[number]["length"])
        if runs and number == runs[-1][1] + 1 and gathered + length <= READ_BYTES:
            runs[-1] = (runs[-1][0], number)
            gathered += length
        else:
            runs.append((number, number))
            gathered = length
    return runs


def _end_of_schema(head: memoryview) -> int:
    """Where the first block begins: magic (8), continuation (4), length (4), schema message."""
    return 16 + int(struct.unpack_from("<i", head, 12)[0])


def _base64_bytes(size: int) -> int:
    return (size + 2) // 3 * 4
