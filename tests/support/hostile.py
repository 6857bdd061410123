"""Bytes that somebody made to do harm: random, mutated, and mutated behind a checksum that is right again.

Every case is a function of one seed, so that a failing one replays.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import random
import re
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa

from statebackend import CorruptionError, JobState, StateStoreError, TableKind, TableOrder, TableSpec
from statebackend import format as envelope
from statebackend.format import ObjectKind
from statebackend.ids import AttemptId, CheckpointId, ManifestNumber, SequenceNumber, StoreId, WriterEpoch, WriterId
from statebackend.keys import Hasher
from statebackend.manifest import (
    Branch,
    CheckpointCommit,
    Manifest,
    Pin,
    RetainedCheckpoint,
    Root,
    Savepoint,
    TableCut,
    TableState,
)
from statebackend.manifest_codec import decode_manifest, encode_manifest
from statebackend.merge import TableLayout
from statebackend.schema_history import SchemaHistory, SchemaVersion
from statebackend.settings import StoreSettings
from statebackend.sstable import EncodedSSTable, encode_sstable
from statebackend.sstable_index import ENTRY

SPECS = [
    TableSpec(
        name="log",
        schema=pa.schema([("at", pa.timestamp("ms")), ("key", pa.string()), ("tags", pa.list_(pa.string()))]),
        key=("at", "key"),
        kind=TableKind.APPEND,
        order=TableOrder.TIME,
        time_field="at",
    ),
    TableSpec(
        name="users",
        schema=pa.schema([("id", pa.int64()), ("row", pa.struct([("a", pa.decimal128(9, 2)), ("b", pa.binary())]))]),
        key=("id",),
        kind=TableKind.UPSERT,
    ),
]
LAYOUTS = [TableLayout.of(spec, Hasher(), {}) for spec in SPECS]
HISTORIES = {spec.name: SchemaHistory.begin(spec.schema) for spec in SPECS}
HISTORIES["users"] = SchemaHistory((
    SchemaVersion(schema=pa.schema([("key", pa.int16()), ("note", pa.string())]), ids=(1, 2)),
    SchemaVersion(schema=SPECS[1].schema, ids=(1, 3)),
))  # fmt: skip
ENVELOPE_BYTES = 24


def sstable(layout: TableLayout, compression: str | None) -> EncodedSSTable:
    rows = 40
    if layout.spec.name == "log":
        at = pa.array(np.arange(rows) // 4).cast(pa.timestamp("ms"))
        columns = [at, pa.array([f"k{n}" for n in range(rows)]), pa.array([["x", None], []] * (rows // 2))]
    else:
        structs = [None if n % 7 == 0 else {"a": None, "b": b"v" * n} for n in range(rows)]
        columns = [pa.array(range(rows)), pa.array(structs, layout.spec.schema.field("row").type)]
    batch = pa.record_batch(columns, schema=layout.spec.schema)
    settings = StoreSettings(block_rows=16, compression=compression)
    return encode_sstable(
        layout, layout.merge([layout.to_stored(batch)]), "sst/w1-0-0-1.arrow", 1, None, settings=settings
    )


def manifest() -> Manifest:
    files = {layout.spec.name: (sstable(layout, "lz4").meta,) for layout in LAYOUTS}
    states = {
        s.name: TableState(
            spec=s, history=HISTORIES[s.name], files=files[s.name], watermark=0 if s.time_field else None
        )
        for s in SPECS
    }
    return Manifest(
        number=ManifestNumber(7),
        parent_attempt=AttemptId("a6"),
        store_id=StoreId("s"),
        writer_epoch=WriterEpoch(2),
        writer_id=WriterId("w"),
        attempt_id=AttemptId("a7"),
        checkpoint_id=CheckpointId(3),
        created_ms=1_700_000_000_000,
        low_marks={"w2-0-0": SequenceNumber(4)},
        tables=states,
        job=JobState(sources={"s": {"next": [1, 2.5, b"x", None]}}, watermarks={"s": -5}, committables={"k": [{}]}),
        retained=(RetainedCheckpoint(checkpoint_id=CheckpointId(3), manifest_number=ManifestNumber(7), created_ms=1),),
        savepoints={"x": Savepoint(object_name="savepoint/6-ab", checkpoint_id=CheckpointId(2), created_ms=1)},
        branches={"b": Branch(object_name="savepoint/6-ac", checkpoint_id=CheckpointId(2), created_ms=1, url="/b")},
        pins={"p": Pin(object_name="savepoint/6-ad", checkpoint_id=CheckpointId(2), created_ms=1, expires_ms=2)},
        roots={1: Root(url="/a", store_id=StoreId("a"))},
    )


MANIFEST = encode_manifest(manifest())
TABLES = [sstable(layout, compression) for layout in LAYOUTS for compression in (None, "lz4", "zstd")]


# --- mutations ---

_ODD: list[Callable[[random.Random], Any]] = [
    lambda _: None,
    lambda _: True,
    lambda _: "",
    lambda _: b"\xff" * 9,
    lambda _: [],
    lambda _: {},
    lambda _: 1.5,
    lambda _: float("nan"),
    lambda r: r.choice([-1, 0, 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]),
    lambda r: "../" * r.randrange(1, 5) + "x",
    lambda r: "\x00" * r.randrange(1, 5),
    lambda r: nested(r.randrange(1, 300)),
    lambda r: [0] * r.randrange(1, 1000),
    lambda r: {str(n): n for n in range(r.randrange(1, 50))},
    lambda r: r.randbytes(r.randrange(64)),
]


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut, repeat, insert; also the extreme values of a length."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(out)) if out else 0
        size = rng.choice([1, 2, 4, 8])
        match rng.randrange(7):
            case 0 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + size] = rng.choice([b"\xff", b"\x00", b"\x7f", b"\x80"]) * size
            case 2:
                del out[at : at + rng.choice([1, 4, 64, len(out)])]
            case 3:
                out[at:at] = rng.randbytes(size)
            case 4:
                out[at:at] = out[at : at + 64]
            case 5:
                out[at : at + size] = rng.choice([2**31 - 1, 2**16, 2**24, 3]).to_bytes(8, "little")[:size]
            case _:
                out[at : at + size] = rng.randbytes(size)
    return bytes(out)


def mutated_value(value: Any, rng: random.Random) -> Any:
    """The same tree with one node replaced, dropped or doubled."""
    value = copy.deepcopy(value)
    paths: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in list(items):
            paths.append((node, key))
            walk(child)

    walk(value)
    node, key = rng.choice(paths)
    action = rng.randrange(6)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, dict):
        node[rng.choice(["", "number", "x" * 300])] = node.pop(key)
    elif action == 2 and isinstance(node, list):
        node.append(node[key])
    elif action == 3 and isinstance(node[key], bytes):
        node[key] = mutated_bytes(node[key], rng)
    else:
        node[key] = rng.choice(_ODD)(rng)
    return value


def enveloped(kind: int, payload: bytes, *, version: int = 1, length: int | None = None) -> bytes:
    """An envelope whose checksum is right whatever is in it."""
    header = envelope._HEADER.pack(envelope.MAGIC, kind, 0, version, len(payload) if length is None else length)
    return header + envelope._CHECKSUM.pack(envelope.checksum(header, payload)) + payload


def msgpack_bomb(rng: random.Random) -> bytes:
    """A few bytes that declare much: nested arrays, maps, strings and extensions of enormous length."""
    kind = rng.choice([b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9", b"\xdc", b"\x91", b"\x81\xa1x"])
    header = kind + (rng.choice([b"\xff\xff\xff\xff", b"\x00\x0f\xff\xff"]) if kind[0] > 0xC0 else b"")
    payload = header * rng.choice([1, 10, 500, 1500])
    return payload + bytes(rng.choice([0, 1, 1 << 16]))


def hostile_manifest(seed: int) -> bytes:
    rng = random.Random(f"manifest {seed}")
    payload = MANIFEST[ENVELOPE_BYTES:]
    match seed % 8:
        case 0:
            return rng.randbytes(rng.randrange(400))
        case 1:
            return mutated_bytes(MANIFEST, rng)
        case 2:
            return enveloped(ObjectKind.MANIFEST, mutated_bytes(payload, rng))
        case 3:
            return enveloped(ObjectKind.MANIFEST, msgpack_bomb(rng))
        case 4:
            data = mutated_bytes(payload, rng)
            return enveloped(
                rng.choice([0, 1, 2, 255]), data, version=rng.choice([0, 1, 2, 65535]), length=rng.choice([None, 2**63])
            )
        case _:
            value = msgpack.unpackb(payload, strict_map_key=False)
            for _ in range(rng.choice([1, 1, 3])):
                value = mutated_value(value, rng)
            return enveloped(ObjectKind.MANIFEST, msgpack.packb(value))


@dataclasses.dataclass(frozen=True)
class HostileTable:
    """A file and what a manifest says of it."""

    layout: TableLayout
    encoded: EncodedSSTable

    @property
    def data(self) -> bytes:
        return bytes(self.encoded.data)


def hostile_sstable(seed: int) -> HostileTable:
    rng = random.Random(f"sstable {seed}")
    which = rng.randrange(len(TABLES))
    layout, table = LAYOUTS[which // 3], TABLES[which]
    data = bytearray(table.data)
    match seed % 8:
        case 0:  # nothing fits any more
            return _table(layout, table, mutated_bytes(bytes(data), rng))
        case 1:  # the footer and its checksum
            at = table.meta.size - table.meta.tail_bytes
            return _table(layout, table, bytes(data[:at]) + mutated_bytes(bytes(data[at:]), rng), tail=True)
        case 2:  # the index behind two right checksums, entries of 72 bytes
            entries = bytearray(table.index.entries.tobytes())
            at = rng.randrange(0, len(entries), 8)
            entries[at : at + 8] = rng.choice([0, 1, 8, 2**31, 2**63, 2**64 - 1, 2**64 - 64]).to_bytes(8, "little")
            return _table(layout, table, _with_index(data, {"blocks": bytes(entries)}, rng), tail=True)
        case 3:  # its other fields
            field = rng.choice(["rows", "entry_bytes", "hash_version", "blocks", "table"])
            return _table(layout, table, _with_index(data, {field: rng.choice(_ODD)(rng)}, rng), tail=True)
        case 4:  # what the manifest says
            meta = dataclasses.replace(
                table.meta, **{rng.choice(["size", "tail_bytes", "rows", "tail_checksum"]): rng.randrange(1 << 40)}
            )
            return HostileTable(layout, dataclasses.replace(table, meta=meta))
        case 5:  # the filter behind its right checksums, where it is read with the index and where it is not
            return _separate(_with_filter(layout, table, rng), apart=rng.random() < 0.5)
        case 6:  # where the filter is said to be
            place = [rng.choice(_ODD)(rng) if rng.random() < 0.5 else rng.randrange(1 << 12) for _ in range(2)]
            place = place if rng.random() < 0.7 else rng.choice(_ODD)(rng)
            return _table(layout, table, _with_index(data, {"filter": place}, rng), tail=True)
        case _:  # a block, Arrow's metadata first of all, behind its right checksum
            return _table(layout, table, _with_block(data, table, rng), tail=True)


def _table(layout: TableLayout, table: EncodedSSTable, data: bytes, *, tail: bool = False) -> HostileTable:
    meta = dataclasses.replace(table.meta, size=len(data), tail_bytes=min(table.meta.tail_bytes, len(data)))
    if tail:
        tail_bytes = max(0, len(data) - (table.meta.size - table.meta.tail_bytes))
        checksum = envelope.checksum(data[len(data) - tail_bytes :])
        meta = dataclasses.replace(meta, tail_bytes=tail_bytes, tail_checksum=checksum)
    return HostileTable(layout, dataclasses.replace(table, data=memoryview(data), meta=meta))


def _with_index(data: bytearray, changes: dict[str, Any], rng: random.Random) -> bytes:
    match = re.search(rb"SSTX([A-Za-z0-9+/]+=*) *", bytes(data))
    assert match is not None
    value = envelope.decode(ObjectKind.SSTABLE_INDEX, base64.b64decode(match.group(1)), "x") | changes
    if rng.random() < 0.1:
        value = rng.choice(_ODD)(rng)
    text = b"SSTX" + base64.b64encode(enveloped(ObjectKind.SSTABLE_INDEX, msgpack.packb(value)))
    data[match.start() : match.end()] = text.ljust(match.end() - match.start())
    return bytes(data)


def _with_filter(layout: TableLayout, table: EncodedSSTable, rng: random.Random) -> HostileTable:
    """Another filter in the same place, of any length."""
    start, end = table.index.filter_offset, table.index.filter_offset + table.index.filter_bytes
    payload = bytes(table.data[start + ENVELOPE_BYTES : end])
    words = msgpack.unpackb(payload)["words"]
    match rng.randrange(4):
        case 0:
            payload = mutated_bytes(payload, rng)
        case 1:
            payload = msgpack.packb({"words": rng.randbytes(32 * rng.randrange(9))})  # any bits are a filter
        case 2:
            payload = msgpack.packb({"words": mutated_bytes(words, rng)})
        case _:
            payload = msgpack.packb(rng.choice([{"words": rng.choice(_ODD)(rng)}, rng.choice(_ODD)(rng)]))
    bloom = enveloped(ObjectKind.SSTABLE_FILTER, payload)
    footer = bytes(table.data[end + -table.index.filter_bytes % 8 :])
    data = bytes(table.data[:start]) + bloom + bytes(-len(bloom) % 8) + footer
    data = _with_index(bytearray(data), {"filter": [start, len(bloom)]}, random.Random(0))
    blocks_end = table.meta.size - table.meta.tail_bytes
    meta = dataclasses.replace(
        table.meta,
        size=len(data),
        tail_bytes=len(data) - blocks_end,
        tail_checksum=envelope.checksum(data[blocks_end:]),
    )
    index = dataclasses.replace(table.index, filter_bytes=len(bloom))
    return HostileTable(layout, dataclasses.replace(table, data=memoryview(data), meta=meta, index=index))


def _separate(table: HostileTable, *, apart: bool) -> HostileTable:
    """The file as it is, or with a tail that begins behind the filter, as that of a large one does."""
    index, data = table.encoded.index, table.data
    end = index.filter_offset + index.filter_bytes + -index.filter_bytes % 8
    if not apart:
        return table
    meta = dataclasses.replace(
        table.encoded.meta, tail_bytes=len(data) - end, tail_checksum=envelope.checksum(data[end:])
    )
    return HostileTable(table.layout, dataclasses.replace(table.encoded, meta=meta))


def _with_block(data: bytearray, table: EncodedSSTable, rng: random.Random) -> bytes:
    entries = table.index.entries.copy()
    number = rng.randrange(len(entries))
    start, length = int(entries[number]["offset"]), int(entries[number]["length"])
    block = bytes(data[start : start + length])
    metadata_bytes = 8 + int.from_bytes(block[4:8], "little")
    if rng.random() < 0.7:
        block = _overwritten(block[:metadata_bytes], rng) + block[metadata_bytes:]
    else:
        block = block[:metadata_bytes] + _overwritten(block[metadata_bytes:], rng)
    data[start : start + length] = block
    entries[number]["checksum"] = envelope.checksum(block)
    return _with_index(data, {"blocks": entries.astype(ENTRY).tobytes()}, random.Random(0))


def _overwritten(data: bytes, rng: random.Random) -> bytes:
    """Mutated without a change of length."""
    return mutated_bytes(data, rng)[: len(data)].ljust(len(data), b"\x00")


# --- what must come of it ---


def refusal(error: StateStoreError, name: str) -> str:
    if name not in str(error):
        raise AssertionError(f"the message does not name the object {name}: {error}") from error
    return "refused"


def try_manifest(seed: int) -> str:
    """``refused`` or ``read``; whatever else a hostile manifest does is an error of ours."""
    try:
        found = decode_manifest(hostile_manifest(seed), "manifest/7")
    except StateStoreError as error:
        return refusal(error, "manifest/7")
    # What was accepted can be used: committed onto, looked through, written again.
    following = found.next(writer_id=WriterId("w"), attempt_id=AttemptId("b"), created_ms=0).opened_by_writer()
    commit = CheckpointCommit(
        checkpoint_id=CheckpointId(2**61),
        owner="w3-0-0",
        low_mark=SequenceNumber(1),
        job=found.job,
        tables={
            name: TableCut(spec=state.spec, history=state.history, fingerprint=None, watermark=state.watermark)
            for name, state in found.tables.items()
        },
        files={},
        retained_max=3,
    )
    committed = commit.apply(following)
    try:
        written = encode_manifest(committed)
    except CorruptionError as error:  # its numbers cannot grow any more
        return refusal(error, "manifest/")
    assert decode_manifest(written, "again").files.keys() == committed.files.keys()
    assert committed.checkpoint is not None
    return "read"


class OneObject:
    """An object store of one object, without threads."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def get_range(self, name: str, start: int, end: int | None = None) -> bytes:
        return self._data[start:end]
