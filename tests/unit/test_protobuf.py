"""Protocol Buffers become columns as Google's own library wrote them, or are refused."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2

from operators import SchemaError
from operators.formats import ProtobufFormat, decode

_T = descriptor_pb2.FieldDescriptorProto
SCALARS: dict[str, tuple[int, list[Any]]] = {
    "double": (_T.TYPE_DOUBLE, [0.0, 0.1, -1e300]),
    "float": (_T.TYPE_FLOAT, [0.0, 0.5, float("inf")]),
    "int64": (_T.TYPE_INT64, [0, 1, -1, 2**63 - 1, -(2**63)]),
    "uint64": (_T.TYPE_UINT64, [0, 300, 2**64 - 1]),
    "int32": (_T.TYPE_INT32, [0, 127, 128, -1, 2**31 - 1, -(2**31)]),
    "fixed64": (_T.TYPE_FIXED64, [0, 2**64 - 1]),
    "fixed32": (_T.TYPE_FIXED32, [0, 2**32 - 1]),
    "bool": (_T.TYPE_BOOL, [False, True]),
    "string": (_T.TYPE_STRING, ["", "ä😀", "x" * 300]),
    "bytes": (_T.TYPE_BYTES, [b"", b"\x00\xff"]),
    "uint32": (_T.TYPE_UINT32, [0, 2**32 - 1]),
    "sfixed32": (_T.TYPE_SFIXED32, [0, -(2**31)]),
    "sfixed64": (_T.TYPE_SFIXED64, [0, -(2**63)]),
    "sint32": (_T.TYPE_SINT32, [0, -1, 2**31 - 1, -(2**31)]),
    "sint64": (_T.TYPE_SINT64, [0, 5, -(2**63)]),
}


def build() -> dict[str, Any]:
    """The classes of a file with one message of every kind of field."""
    file = descriptor_pb2.FileDescriptorProto(name="t.proto", package="t", syntax="proto3")
    file.dependency.append("google/protobuf/timestamp.proto")
    color = file.enum_type.add(name="Color")
    for number, name in ((0, "NONE"), (7, "RED"), (-1, "ODD")):
        color.value.add(name=name, number=number)
    inner = file.message_type.add(name="Inner")
    inner.field.add(name="x", number=1, type=_T.TYPE_INT64, label=_T.LABEL_OPTIONAL)
    inner.field.add(name="tags", number=3, type=_T.TYPE_STRING, label=_T.LABEL_REPEATED)
    all_ = file.message_type.add(name="All")
    for number, (name, (kind, _)) in enumerate(SCALARS.items(), 1):
        all_.field.add(name=name, number=number, type=kind, label=_T.LABEL_OPTIONAL)
        all_.field.add(name=f"{name}s", number=100 + number, type=kind, label=_T.LABEL_REPEATED)
    all_.oneof_decl.add(name="_maybe")
    all_.field.add(
        name="maybe", number=50, type=_T.TYPE_INT32, label=_T.LABEL_OPTIONAL, oneof_index=0, proto3_optional=True
    )
    all_.field.add(name="color", number=51, type=_T.TYPE_ENUM, type_name=".t.Color", label=_T.LABEL_OPTIONAL)
    all_.field.add(name="inner", number=52, type=_T.TYPE_MESSAGE, type_name=".t.Inner", label=_T.LABEL_OPTIONAL)
    all_.field.add(name="inners", number=53, type=_T.TYPE_MESSAGE, type_name=".t.Inner", label=_T.LABEL_REPEATED)
    stamp = ".google.protobuf.Timestamp"
    all_.field.add(name="at", number=54, type=_T.TYPE_MESSAGE, type_name=stamp, label=_T.LABEL_OPTIONAL)
    entry = all_.nested_type.add(name="CountsEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_T.TYPE_STRING, label=_T.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=_T.TYPE_INT32, label=_T.LABEL_OPTIONAL)
    all_.field.add(
        name="counts", number=2000, type=_T.TYPE_MESSAGE, type_name=".t.All.CountsEntry", label=_T.LABEL_REPEATED
    )
    loop = file.message_type.add(name="Loop")
    loop.field.add(name="loop", number=1, type=_T.TYPE_MESSAGE, type_name=".t.Loop", label=_T.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    names = ("All", "Inner", "Loop")
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"t.{name}")) for name in names}


CLASSES = build()
All, Inner = CLASSES["All"], CLASSES["Inner"]


def random_message(rng: random.Random) -> tuple[Any, dict[str, Any]]:
    """A message, and the row that it is."""
    row: dict[str, Any] = {}
    message = All()
    for name, (_, values) in SCALARS.items():
        row[name] = rng.choice(values)
        setattr(message, name, row[name])
        row[f"{name}s"] = rng.choices(values, k=rng.randrange(4))
        getattr(message, f"{name}s").extend(row[f"{name}s"])
    row["maybe"] = rng.choice([None, 0, -5])
    if row["maybe"] is not None:
        message.maybe = row["maybe"]
    row["color"], message.color = rng.choice([("NONE", 0), ("RED", 7), ("ODD", -1), ("99", 99)])
    inners = [
        {"x": rng.randrange(-3, 3), "tags": rng.choices("abc", k=rng.randrange(3))} for _ in range(rng.randrange(3))
    ]
    row["inners"] = inners
    message.inners.extend([Inner(**inner) for inner in inners])
    row["inner"] = rng.choice([None, {"x": 0, "tags": []}, {"x": 5, "tags": ["", "z"]}])
    if row["inner"] is not None:
        message.inner.CopyFrom(Inner(**row["inner"]))
    row["at"] = rng.choice([None, datetime(1969, 1, 1, 0, 0, 0, 5, UTC), datetime(2024, 5, 1, tzinfo=UTC)])
    if row["at"] is not None:
        message.at.FromDatetime(row["at"])
    counts = rng.choice([{}, {"a": 1}, {"": 0}])
    row["counts"] = list(counts.items())
    message.counts.update(counts)
    return message, row


@pytest.mark.parametrize("seed", range(5))
def test_messages_are_read_as_they_were_written(seed: int) -> None:
    rng = random.Random(seed)
    made = [random_message(rng) for _ in range(200)]
    format_ = ProtobufFormat(All)
    found = format_.decode([message.SerializeToString() for message, _ in made])
    found.validate(full=True)
    assert found.to_pylist() == [{name: row[name] for name in format_.schema.names} for _, row in made]


def test_the_last_value_of_a_field_counts_and_lists_may_come_in_any_way() -> None:
    once, again = All(int32=1, string="a", int32s=[1, 2]), All(int32=2, int32s=[3])
    both = once.SerializeToString() + again.SerializeToString()
    # An unpacked element of a packed list: tag of field 105, then the number.
    loose = bytes([0xC8, 0x06, 9])
    row = ProtobufFormat(All).decode([both + loose]).to_pylist()[0]
    assert (row["int32"], row["string"], row["int32s"]) == (2, "a", [1, 2, 3, 9])


def test_unknown_fields_are_passed_over() -> None:
    written = All(int64=1, string="x", double=0.5, fixed32=3, inners=[Inner(x=2)]).SerializeToString()
    row = ProtobufFormat(Inner).decode([written, Inner(x=7).SerializeToString(), b""]).to_pylist()
    assert [r["x"] for r in row] == [0, 7, 0]


@pytest.mark.parametrize("seed", range(2))
def test_torn_and_flipped_messages_are_rejected_or_read_and_never_a_crash(seed: int) -> None:
    rng = random.Random(seed)
    message, row = random_message(rng)
    good, format_ = message.SerializeToString(), ProtobufFormat(All)
    for _ in range(25):
        bad = bytearray(good[: rng.randrange(len(good))] if rng.random() < 0.5 else good)
        for _ in range(rng.randrange(3)):
            if bad:
                bad[rng.randrange(len(bad))] = rng.randrange(256)
        found = decode(format_, [good, bytes(bad), good])
        assert found.batch.num_rows + len(found.rejected) == 3
        found.batch.validate(full=True)
        rows = found.batch.to_pylist()
        assert rows[0] == rows[-1] == {name: row[name] for name in format_.schema.names}
        if not found.rejected:
            All.FromString(bytes(bad))


def test_frames_name_the_message() -> None:
    # The second message of its file, in a list of one number; numbers are zigzag.
    first, second = Inner(x=5).SerializeToString(), All(int64=6).SerializeToString()
    schema = b"\0\0\0\0\7"
    records = [schema + b"\2\2" + second, schema + b"\0" + second, b"\1" + schema[1:] + b"\2\2" + second, second[:1]]
    found = decode(ProtobufFormat(All, framed=True), records)
    assert [(r["int64"]) for r in found.batch.to_pylist()] == [6]
    assert [r.index for r in found.rejected] == [1, 2, 3]
    found = decode(ProtobufFormat(Inner, framed=True), [schema + b"\0" + first, schema + b"\2\0" + first, records[0]])
    assert [r["x"] for r in found.batch.to_pylist()] == [5, 5]
    assert [r.index for r in found.rejected] == [2]


def test_what_has_no_columns_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"'t.Loop' contains itself"):
        ProtobufFormat(CLASSES["Loop"])
    with pytest.raises(SchemaError, match="neither a generated class"):
        ProtobufFormat("Order")
    assert ProtobufFormat(All.DESCRIPTOR).schema.field("at").type == pa.timestamp("us", "UTC")
