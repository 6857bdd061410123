"""Whatever the bytes in the storage are: an error of ours that names the object, never a crash, a hang, or gigabytes.

The same cases run here, and once more in a process of their own that may use little memory, where a crash of the
interpreter is seen too. ``make soak`` runs many more.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import msgpack
import numpy as np
import pyarrow as pa
import pytest

from operators.nexmark.memory import peak_bytes
from statebackend import CorruptionError, StateStoreError
from statebackend.aggregate_declaration import Declaration
from statebackend.format import ObjectKind
from statebackend.ids import AttemptId, ManifestNumber, WriterId
from statebackend.manifest_codec import decode_manifest, encode_manifest
from statebackend.sstable import read_blocks, read_filter, read_index
from tests.support import hostile
from tests.support.hostile import (
    ENVELOPE_BYTES,
    MANIFEST,
    OneObject,
    enveloped,
    hostile_sstable,
    mutated_value,
    refusal,
    try_manifest,
)
from tests.unit.test_golden import aggregation

ROOT = Path(__file__).resolve().parents[2]
CASES = 1500
SOAK_CASES = int(os.environ.get("FUZZ_CASES", "200000"))
MEMORY_MB = 400
"""How much more than before the cases may take."""
HANG_S = 30


def try_sstable(seed: int) -> str:
    hostile = hostile_sstable(seed)
    objects, meta = OneObject(hostile.data), hostile.encoded.meta
    try:
        index, bloom = asyncio.run(read_index(objects, meta))  # type: ignore[arg-type]
        if bloom is None and index.filter_bytes:
            bloom = asyncio.run(read_filter(objects, meta, index))  # type: ignore[arg-type]
        numbers = range(len(index.entries))
        blocks = asyncio.run(read_blocks(objects, meta, index, numbers, hostile.layout))  # type: ignore[arg-type]
    except StateStoreError as error:
        return refusal(error, meta.name)
    # What was accepted is safe to compute on, though it may be nonsense.
    index.overlapping(0, 1)
    if bloom is not None:
        hashes = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
        assert bloom.may_hold(hashes).tolist() == [bloom.may_hold_one(h) for h in hashes.tolist()]
    for block in blocks:
        block.validate(full=True)
        assert block.take(pa.array(range(block.num_rows))).num_rows == block.num_rows
        block.sort_by(block.schema.names[0])
    hostile.layout.merge(blocks)
    return "read"


TRIES: dict[str, Callable[[int], str]] = {"manifest": try_manifest, "sstable": try_sstable}


@contextmanager
def not_for_ever(case: str) -> Iterator[None]:
    def late(_: int, __: FrameType | None) -> None:
        raise AssertionError(f"{case} hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_cases(kind: str, first: int, last: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for seed in range(first, last):
        with not_for_ever(f"{kind} {seed}"):
            try:
                outcomes[TRIES[kind](seed)] += 1
            except Exception as error:
                raise AssertionError(f"{kind} {seed}: {type(error).__name__}: {error}") from error
    return outcomes


@pytest.mark.parametrize("kind", TRIES)
def test_hostile_bytes_give_an_error_of_ours_or_values_that_can_be_used(kind: str) -> None:
    outcomes = run_cases(kind, 0, CASES)
    assert outcomes["refused"] > CASES / 2
    assert outcomes["read"] > CASES / 50, "mutations that are always refused test only the first check"


@pytest.mark.parametrize("kind", TRIES)
def test_hostile_bytes_neither_crash_the_process_nor_take_its_memory(kind: str) -> None:
    in_a_small_process(kind, CASES, 2 * CASES)


@pytest.mark.soak
@pytest.mark.parametrize("kind", TRIES)
def test_very_many_hostile_bytes(kind: str) -> None:
    for first in range(10_000, 10_000 + SOAK_CASES, 20_000):
        in_a_small_process(kind, first, min(first + 20_000, 10_000 + SOAK_CASES))


def in_a_small_process(kind: str, first: int, last: int) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.faults.test_hostile_bytes", kind, str(first), str(last)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, f"after {done.stdout[-300:]}: {done.stderr[-3000:]}"


def main(kind: str, first: int, last: int) -> None:
    """Run cases under a limit of address space, and compare the peak of memory before and after."""
    run_cases(kind, 0, 6)  # what is loaded and allocated once
    before = peak_bytes()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = size + (2 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for start in range(first, last, 100):
        print(f"{kind} {start}", flush=True)
        run_cases(kind, start, min(start + 100, last))
    grown_mb = (peak_bytes() - before) >> 20
    assert grown_mb < MEMORY_MB, f"took {grown_mb:.0f} MB"


class Boom:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def test_a_pickle_in_a_schema_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow once unpickled the metadata of an extension type while reading a schema."""
    monkeypatch.chdir(tmp_path)
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Boom()),
    }
    schema = pa.schema([pa.field("key", pa.int64(), metadata=metadata)]).serialize().to_pybytes()
    read = pa.ipc.read_schema(pa.py_buffer(schema))
    repr(read)
    assert not Path("executed").exists()


def test_a_huge_declared_length_of_an_lz4_buffer_is_refused_and_not_allocated() -> None:
    table, layout = hostile.TABLES[1], hostile.LAYOUTS[0]
    data = bytearray(table.data)
    entry = table.index.entries[0]
    start = int(entry["offset"])
    metadata = 8 + int.from_bytes(data[start + 4 : start + 8], "little")
    # The body begins with the first buffer: eight bytes of its length before compression, then the frame.
    at = start + metadata
    for length in (2**40, 2**62, 2**63 - 1):
        data[at : at + 8] = length.to_bytes(8, "little")
        entries = table.index.entries.copy()
        entries[0]["checksum"] = hostile.envelope.checksum(bytes(data[start : start + int(entry["length"])]))
        changed = hostile._with_index(data, {"blocks": entries.tobytes()}, random.Random(0))
        case = hostile._table(layout, table, changed, tail=True)
        objects = OneObject(case.data)
        index, _ = asyncio.run(read_index(objects, case.encoded.meta))  # type: ignore[arg-type]
        with pytest.raises(CorruptionError, match="block 0"):
            asyncio.run(read_blocks(objects, case.encoded.meta, index, [0], layout))  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["offset", "length"])
@pytest.mark.parametrize("value", [0, 1, 2**40, 2**63, 2**64 - 1])
def test_an_index_that_points_outside_its_file_is_refused_before_anything_is_read(field: str, value: int) -> None:
    table, layout = hostile.TABLES[0], hostile.LAYOUTS[0]
    entries = table.index.entries.copy()
    entries[-1][field] = value
    data = hostile._with_index(bytearray(table.data), {"blocks": entries.tobytes()}, random.Random(0))
    case = hostile._table(layout, table, data, tail=True)
    with pytest.raises(CorruptionError, match="do not fill the file"):
        asyncio.run(read_index(OneObject(case.data), case.encoded.meta))  # type: ignore[arg-type]


def test_every_wrong_field_of_a_manifest_is_named() -> None:
    value = msgpack.unpackb(MANIFEST[ENVELOPE_BYTES:], strict_map_key=False)
    for field in value:
        broken = value | {field: [[1]] if not isinstance(value[field], list) else {"x": 1}}
        with pytest.raises(CorruptionError, match="manifest/7: not a manifest"):
            decode_manifest(enveloped(ObjectKind.MANIFEST, msgpack.packb(broken)), "manifest/7")
        without = {k: v for k, v in value.items() if k != field}
        with pytest.raises(CorruptionError, match=f"manifest/7: not a manifest: KeyError: '{field}'"):
            decode_manifest(enveloped(ObjectKind.MANIFEST, msgpack.packb(without)), "manifest/7")


@pytest.mark.parametrize("field", ["number", "checkpoint_id", "writer_epoch", "compactor_epoch"])
@pytest.mark.parametrize("value", [-1, 2**63, 2**64 - 1])
def test_a_number_that_the_next_manifest_could_not_hold_is_refused(field: str, value: int) -> None:
    found = msgpack.unpackb(MANIFEST[ENVELOPE_BYTES:], strict_map_key=False) | {field: value}
    with pytest.raises(CorruptionError, match="out of bounds"):
        decode_manifest(enveloped(ObjectKind.MANIFEST, msgpack.packb(found)), "m")


def test_no_manifest_is_written_that_could_not_be_read() -> None:
    last = dataclasses.replace(hostile.manifest(), number=ManifestNumber((1 << 62) - 1))
    assert decode_manifest(encode_manifest(last), "manifest/7") == last
    following = last.next(writer_id=WriterId("w"), attempt_id=AttemptId("a"), created_ms=0)
    with pytest.raises(CorruptionError, match="cannot follow what was read: 4611686018427387904"):
        encode_manifest(following)


def test_a_file_name_that_leaves_the_store_is_refused() -> None:
    value = msgpack.unpackb(MANIFEST[ENVELOPE_BYTES:], strict_map_key=False)
    value["tables"]["log"]["files"][0][0] = "sst/../../etc/passwd"
    with pytest.raises(CorruptionError, match="relative path"):
        decode_manifest(enveloped(ObjectKind.MANIFEST, msgpack.packb(value)), "m")


@pytest.mark.parametrize("seed", range(300))
def test_a_malformed_declaration_of_an_aggregation_is_a_value_error(seed: int) -> None:
    declaration = mutated_value(aggregation().declaration, random.Random(seed))
    try:
        Declaration.decode(declaration)
    except (ValueError, StateStoreError):
        return


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
