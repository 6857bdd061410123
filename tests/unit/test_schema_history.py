"""Which changes of a table's columns are allowed, and what becomes of the rows; the rest is refused with the reason."""

from __future__ import annotations

import asyncio
import threading
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from statebackend import SchemaChanges, SchemaMismatchError, StateStore, StoreSettings, TableKind, TableOrder, TableSpec
from statebackend.keys import hash_columns
from statebackend.schema_history import SchemaHistory, _keeps_hash, _widens
from tests.support.stores import KV, World, job, put
from tests.unit.test_golden import aggregation, states

COLUMNS = {"id": pa.int32(), "at": pa.timestamp("ms"), "note": pa.string(), "price": pa.decimal128(5, 2)}


def spec(columns: dict[str, pa.DataType] | None = None, **more: Any) -> TableSpec:
    changes = {k: more.pop(k) for k in ("renamed", "dropped", "defaults") if k in more}
    strict = more.pop("strict", ())
    schema = pa.schema([pa.field(n, t, nullable=n not in strict) for n, t in (columns or COLUMNS).items()])
    given = {"name": "t", "key": ("id",), "kind": TableKind.UPSERT, "ttl_field": "at"} | more
    return TableSpec(schema=schema, changes=SchemaChanges(**changes), **given)


def changed(**columns: pa.DataType | None) -> dict[str, pa.DataType]:
    return {n: t for n, t in (COLUMNS | columns).items() if t is not None}


HISTORY = SchemaHistory.begin(spec().schema)

REFUSED = {
    "narrowed": (spec(changed(id=pa.int16())), "'id' cannot change from int32 to int16"),
    "another sign": (spec(changed(id=pa.uint64())), "from int32 to uint64"),
    "an integer as text": (spec(changed(id=pa.string())), "from int32 to string"),
    "another scale": (spec(changed(price=pa.decimal128(9, 3))), r"from decimal128\(5, 2\) to decimal128\(9, 3\)"),
    "fewer digits": (spec(changed(price=pa.decimal128(4, 2))), "without loss"),
    "another unit": (spec(changed(at=pa.timestamp("us"))), r"from timestamp\[ms\] to timestamp\[us\]"),
    "another zone": (spec(changed(at=pa.timestamp("ms", "UTC"))), "tz=UTC"),
    "missing": (spec(changed(note=None)), r"'note' is missing: name it in SchemaChanges"),
    "not null": (spec(strict=["note"]), "'note' may hold nulls"),
    "new and not null": (spec(changed(more=pa.int8()), strict=["more"]), "'more' is not null: say SchemaChanges"),
    "a longer key": (spec(key=("id", "note")), r"the key \['id'\] cannot change to \['id', 'note'\]"),
    "another key": (spec(changed(other=pa.int32()), key=("other",)), "the key"),
    "a key that is dropped": (spec(changed(id=None), key=("note",), dropped=["id"]), "the key"),
    "another ttl": (spec(changed(until=pa.int64()), ttl_field="until"), "ttl_field 'at' cannot change to 'until'"),
    "no ttl": (spec(ttl_field=None), "ttl_field 'at' cannot change to None"),
    "another kind": (spec(kind=TableKind.APPEND), "kind 'upsert' of a table cannot change to 'append'"),
    "another order": (
        spec(changed(id=pa.string()), order=TableOrder.KEY),
        "order 'hash' of a table cannot change to 'key'",
    ),
    "renamed and kept": (spec(changed(text=pa.string()), renamed={"text": "note"}), "which is asked for too"),
    "renamed twice": (
        spec(changed(note=None, a=pa.string(), b=pa.string()), renamed={"a": "note", "b": "note"}),
        "two columns are to be the renamed 'note'",
    ),
    "renamed from nothing": (spec(changed(note=None, a=pa.string()), renamed={"a": "x"}), "'note' is missing"),
    "renamed into another type": (spec(changed(note=None, a=pa.int8()), renamed={"a": "note"}), "from string to int8"),
}


@pytest.mark.parametrize(("wanted", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_lose_or_confuse_rows_is_refused_and_both_schemas_and_the_reason_are_named(
    wanted: TableSpec, reason: str
) -> None:
    with pytest.raises(SchemaMismatchError, match=reason) as refusal:
        HISTORY.evolved(spec(), wanted, "state/x")
    assert "state/x: table 't' has (id: int32, at: timestamp[ms], note: string, price: decimal128(5, 2))" in str(
        refusal.value
    )
    assert "asked for (" in str(refusal.value)


def test_the_states_of_an_aggregation_keep_their_columns() -> None:
    known = states(aggregation())
    longer = TableSpec(
        name=known.name, schema=known.schema.append(pa.field("more", pa.int8())), key=known.key, kind=known.kind,
        order=known.order, time_field=known.time_field, aggregation=known.aggregation,
    )  # fmt: skip
    with pytest.raises(SchemaMismatchError, match="'more' is no column of the states"):
        SchemaHistory.begin(known.schema).evolved(known, longer, "x")


@pytest.mark.parametrize(
    ("default", "kind"), [("x", pa.int8()), (300, pa.int8()), (1.5, pa.int64()), ([1], pa.list_(pa.int8()))]
)
def test_a_default_that_is_no_value_of_its_column_is_an_argument_error(default: Any, kind: pa.DataType) -> None:
    with pytest.raises(ValueError, match=r"default .* of column 'more' is no"):
        HISTORY.evolved(spec(), spec(changed(more=kind), defaults={"more": default}), "x")


def test_changes_that_contradict_the_declaration_are_argument_errors() -> None:
    with pytest.raises(ValueError, match="dropped and declared"):
        spec(dropped=["note"])
    with pytest.raises(ValueError, match=r"defaults of \['nope'\]"):
        spec(defaults={"nope": 1})
    with pytest.raises(ValueError, match="comes from itself"):
        spec(renamed={"a": "b", "b": "a"})


def test_what_a_table_has_gone_through_is_passed_over_and_what_it_missed_is_made_up_for() -> None:
    first = spec(changed(text=pa.string(), note=None), renamed={"text": "note"})
    second = spec(
        changed(words=pa.string(), note=None, price=None), renamed={"text": "note", "words": "text"}, dropped=["price"]
    )
    one = HISTORY.evolved(spec(), first, "x")
    two = one.evolved(first, second, "x")
    assert two.evolved(second, second, "x") is two
    at_once = HISTORY.evolved(spec(), second, "x")
    assert at_once.current == two.current
    assert (len(at_once.versions), len(two.versions)) == (2, 3)
    note = HISTORY.current.id_of("note")
    assert [v.id_of(n) for v, n in zip(two.versions, ["note", "text", "words"], strict=True)] == [note] * 3


def test_a_column_that_comes_back_is_another_column() -> None:
    without = spec(changed(note=None), dropped=["note"])
    dropped = HISTORY.evolved(spec(), without, "x")
    back = dropped.evolved(without, spec(defaults={"note": "new"}), "x")
    assert back.current.id_of("note") not in HISTORY.current.ids
    rows = pa.record_batch([[1], [5], ["old"], pa.array([Decimal("1.50")], COLUMNS["price"])], schema=spec().schema)
    assert back.upgraded(rows, 0, back.current.schema.types)[2].to_pylist() == ["new"]


def test_a_default_widens_with_its_column_and_stays_what_it_was_when_the_column_was_added() -> None:
    added = spec(changed(more=pa.decimal128(3, 1)), defaults={"more": Decimal("2.5")})
    wider = spec(changed(more=pa.decimal256(50, 1)), defaults={"more": Decimal("9.9")})
    history = HISTORY.evolved(spec(), added, "x").evolved(added, wider, "x")
    rows = pa.record_batch([[1], [5], ["x"], pa.array([None], COLUMNS["price"])], schema=spec().schema)
    (more,) = history.upgraded(rows, 0, history.current.schema.types)[4:]
    assert more.to_pylist() == [Decimal("2.5")]
    assert more.type == pa.decimal256(50, 1)


SIMPLE: list[pa.DataType] = [
    *(pa.type_for_alias(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)),
    pa.float16(), pa.float32(), pa.float64(), pa.bool_(), pa.string(), pa.large_string(), pa.binary(), pa.date32(),
    pa.date64(), pa.timestamp("s"), pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("ns"), pa.duration("ms"),
    pa.decimal32(5, 1), pa.decimal64(9, 1), pa.decimal128(9, 1), pa.decimal128(20, 1), pa.decimal256(9, 1),
    pa.decimal256(50, 1), pa.list_(pa.int8()), pa.list_(pa.int64()), pa.dictionary(pa.int8(), pa.string()),
]  # fmt: skip


def extremes(kind: pa.DataType) -> pa.Array:
    """Least, greatest and middle values of a type, and null."""
    if pa.types.is_integer(kind) or pa.types.is_temporal(kind):
        bits = kind.bit_width
        low, high = (
            (0, 2**bits - 1) if pa.types.is_unsigned_integer(kind) else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        )
        values = pa.array([low, high, 5, None], pa.int64() if low else pa.uint64())
        return values.cast(pa.int32() if bits == 32 and pa.types.is_temporal(kind) else values.type).cast(kind)
    if pa.types.is_floating(kind):
        return pa.array([1.5, float("inf"), -float("inf"), 65504.0, None]).cast(kind)
    if pa.types.is_decimal(kind):
        return pa.array([Decimal("9" * (kind.precision - 1) + ".9"), -Decimal(1), None], kind)
    if pa.types.is_boolean(kind):
        return pa.array([True, False, None])
    if pa.types.is_list(kind):
        return pa.array([[1], None], kind)
    return pa.array(["a", None]).cast(pa.string()).cast(kind)


@pytest.mark.parametrize("old", SIMPLE, ids=str)
def test_every_value_of_a_type_is_one_of_each_type_that_it_may_become(old: pa.DataType) -> None:
    values = extremes(old)
    plain = values.dictionary_decode() if pa.types.is_dictionary(old) else values
    wider = [new for new in SIMPLE if _widens(old, new)]
    assert old in wider
    for new in wider:
        target = pa.string() if pa.types.is_dictionary(new) else new
        cast = plain.cast(target)
        if not pa.types.is_dictionary(new):
            assert cast.cast(plain.type).equals(plain), f"{old} to {new}"
        if _keeps_hash(old, new):
            assert (hash_columns([plain]) == hash_columns([cast])).all(), f"{old} to {new}"


def merge(store: StateStore) -> None:
    """Do what is due, and wait for the merges that a commit has started."""

    async def due() -> None:
        await store._compactor.run_if_due()
        while store._compactor.running:  # noqa: ASYNC110  (it tells nobody)
            await asyncio.sleep(0.001)

    store._runtime.call(due)


def test_a_merge_writes_the_columns_that_the_manifest_knows(world: World) -> None:
    """A table may be opened with other columns while a checkpoint from before is on its way."""
    with world.open(settings=StoreSettings(l0_files_max=9)) as store:
        for i in range(5):
            put(store, **{f"k{i}": i})
            store.checkpoint(job(i)).result(10)
    wider = TableSpec(
        name="kv", schema=KV.schema.append(pa.field("more", pa.int8())), key=("key",), kind=TableKind.UPSERT
    )
    with world.open(settings=StoreSettings(l0_files_max=2)) as store:
        held = threading.Event()
        commit = store.checkpoint(job(6), prepare=[lambda: held.wait(10) and None])
        table = store.table(wider)
        held.set()
        commit.result(10)
        merge(store)
        assert [f.schema for f in store.manifest.tables["kv"].files] == [0]
        assert table.scan()[0].schema == wider.schema
    with world.open(settings=StoreSettings(l0_files_max=2)) as store:  # the change was not committed
        assert store.table(KV).scan()[0].num_rows == 5
    with world.open(settings=StoreSettings(l0_files_max=2)) as store:
        for i in range(4):
            store.table(wider).write(pa.record_batch([["k0"], [i], [i]], schema=wider.schema))
            store.checkpoint(job(7)).result(10)
        merge(store)
        assert {f.schema for f in store.manifest.tables["kv"].files} == {1}
        assert store.manifest.tables["kv"].spec.schema == wider.schema
