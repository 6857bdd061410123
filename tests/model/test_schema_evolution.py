"""Tables whose columns change at random, against dictionaries that share no code with the store.

A history writes, deletes, commits, crashes, rolls back, and opens the table with other columns: added with and without
a default, dropped, renamed, widened, in another order. Files of many versions lie below each other and are merged.
Whatever was committed is read right: live, by a checkpoint reader, and after a rollback to before a change.
"""

from __future__ import annotations

import datetime as dt
import random
import uuid
from copy import deepcopy
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from statebackend import SchemaChanges, StateStore, StoreSettings, TableKind, TableSpec, open_checkpoint
from statebackend.keys import Hasher
from statebackend.maintenance import rollback
from statebackend.verification import verify
from tests.support.stores import job

LADDERS = [
    [pa.int8(), pa.int16(), pa.int32(), pa.int64()],
    [pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()],
    [pa.float32(), pa.float64()],
    [pa.decimal128(3, 1), pa.decimal128(9, 1), pa.decimal256(40, 1)],
    [pa.date32(), pa.timestamp("ms")],
    [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())],
    [pa.list_(pa.int8())],
]
SETTINGS = StoreSettings(block_rows=4, l0_files_max=2, cache_bytes=2000, retained_checkpoints=4, gc_interval_s=None)


def value_of(kind: pa.DataType, rng: random.Random) -> Any:
    number = rng.randrange(0, 100)
    if pa.types.is_decimal(kind):
        return Decimal(number) / 2
    if pa.types.is_date(kind):
        return dt.date(2000, 1, 1) + dt.timedelta(number)
    if pa.types.is_timestamp(kind):
        return dt.datetime(2000, 1, 1) + dt.timedelta(number)  # noqa: DTZ001  (the column has no zone)
    if pa.types.is_list(kind):
        return [number, None]
    if pa.types.is_floating(kind):
        return number / 4
    return number if pa.types.is_integer(kind) else f"text {number}"


@dataclass
class Column:
    """One column: where its type stands on a ladder, and whether rows may lack it."""

    name: str
    ladder: list[pa.DataType]
    step: int = 0
    nullable: bool = True

    @property
    def type(self) -> pa.DataType:
        return self.ladder[self.step]


@dataclass
class Model:
    """The table as it must be: columns in order, the two key columns among them, and rows by key."""

    columns: list[Column]
    key: tuple[str, str]
    rows: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)

    def spec(self, changes: SchemaChanges | None = None) -> TableSpec:
        schema = pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in self.columns])
        return TableSpec(name="t", schema=schema, key=self.key, kind=TableKind.UPSERT, changes=changes)

    def key_of(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[k] for k in self.key)

    def column(self, name: str) -> Column:
        return next(c for c in self.columns if c.name == name)

    def sorted_rows(self) -> list[list[Any]]:
        return sorted(([row[c.name] for c in self.columns] for row in self.rows.values()), key=str)


class History:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.url = f"memory://{uuid.uuid4().hex}/state"
        self.hasher = Hasher(self.rng.choice([1, 64]))
        self.names: list[str] = []
        self.model = Model([Column("k1", LADDERS[0], nullable=False), Column("k2", LADDERS[5])], ("k1", "k2"))
        self.columns_may_grow()
        self.committed: dict[int, Model] = {}
        self.newest = deepcopy(self.model)
        self.open(None)

    def open(self, changes: SchemaChanges | None) -> None:
        self.store = StateStore.open(self.url, SETTINGS, hasher=self.hasher)
        self.table = self.store.table(self.model.spec(changes))

    def crash(self) -> None:
        """Open the table again as it was at the last checkpoint; what was not committed is lost."""
        self.store.close()
        self.model = deepcopy(self.newest)
        self.open(None)

    def columns_may_grow(self) -> None:
        for ladder in self.rng.sample(LADDERS, 3):
            self.model.columns.append(Column(self.fresh_name(), ladder))

    def fresh_name(self) -> str:
        """A name that no column has; often one that some column had before."""
        gone = [n for n in self.names if all(c.name != n for c in self.model.columns)]
        if gone and self.rng.random() < 0.5:
            return self.rng.choice(gone)
        self.names.append(f"c{len(self.names)}")
        return self.names[-1]

    # --- steps ---

    def write(self) -> None:
        rng, model = self.rng, self.model
        rows = []
        for _ in range(rng.randrange(1, 8)):
            row = {c.name: None if c.nullable and rng.random() < 0.2 else value_of(c.type, rng) for c in model.columns}
            row[model.key[0]], row[model.key[1]] = rng.randrange(6), rng.choice(["a", "b", None])
            rows.append(row)
            model.rows[model.key_of(row)] = row
        schema = model.spec().schema
        self.table.write(
            pa.RecordBatch.from_arrays([pa.array([r[f.name] for r in rows], f.type) for f in schema], schema=schema)
        )

    def delete(self) -> None:
        keys = [(self.rng.randrange(6), self.rng.choice(["a", None])) for _ in range(3)]
        self.table.delete(self.batch_of(keys))
        for key in keys:
            self.model.rows.pop(key, None)

    def batch_of(self, keys: list[tuple[Any, ...]]) -> pa.RecordBatch:
        fields = [self.model.spec().schema.field(k) for k in self.model.key]
        columns = [pa.array(values, f.type) for values, f in zip(zip(*keys, strict=True), fields, strict=True)]
        return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))

    def checkpoint(self) -> None:
        done = self.store.checkpoint(job(len(self.committed))).result(20)
        self.newest = deepcopy(self.model)
        self.committed[int(done.checkpoint_id)] = deepcopy(self.model)

    def change(self) -> None:
        """Open the table with other columns; what was not committed is lost."""
        self.store.close()
        self.model = deepcopy(self.newest)
        renamed: dict[str, str] = {}
        dropped: list[str] = []
        defaults: dict[str, Any] = {}
        before = {c.name for c in self.model.columns}
        for _ in range(self.rng.randrange(1, 4)):
            step = self.rng.choice([self.add, self.drop, self.rename, self.widen, self.widen, self.shuffle, self.relax])
            step(before, renamed, dropped, defaults)
        self.open(SchemaChanges(renamed=renamed, dropped=dropped, defaults=defaults))

    def roll_back(self) -> None:
        kept = [int(r.checkpoint_id) for r in self.store.manifest.retained]
        self.store.close()
        if kept:
            target = self.rng.choice(kept)
            made = rollback(self.url, checkpoint_id=target)
            self.newest = deepcopy(self.committed[target])
            self.committed[int(made.checkpoint_id)] = deepcopy(self.newest)
        self.model = deepcopy(self.newest)
        self.open(None)

    # --- changes ---

    def add(self, before: set[str], renamed: dict[str, str], dropped: list[str], defaults: dict[str, Any]) -> None:
        ladder, name = self.rng.choice(LADDERS), self.fresh_name()
        if name in before or any(c.name == name for c in self.model.columns):
            return
        kind, filled = ladder[0], None
        if not pa.types.is_list(kind) and self.rng.random() < 0.5:
            filled = defaults[name] = value_of(kind, self.rng)
        column = Column(name, ladder, nullable=filled is None or self.rng.random() < 0.5)
        self.model.columns.insert(self.rng.randrange(len(self.model.columns) + 1), column)
        for row in self.model.rows.values():
            row[name] = filled

    def drop(self, before: set[str], renamed: dict[str, str], dropped: list[str], _: dict[str, Any]) -> None:
        names = [c.name for c in self.model.columns if c.name in before and c.name not in self.model.key]
        if not names:
            return
        name = self.rng.choice(names)
        dropped.append(name)
        self.model.columns = [c for c in self.model.columns if c.name != name]
        for row in self.model.rows.values():
            del row[name]

    def rename(self, before: set[str], renamed: dict[str, str], dropped: list[str], _: dict[str, Any]) -> None:
        column = self.rng.choice([c for c in self.model.columns if c.name in before] or self.model.columns)
        new = self.fresh_name()
        if column.name not in before or new in before or any(c.name == new for c in self.model.columns):
            return
        renamed[new], old = column.name, column.name
        column.name = new
        self.model.key = tuple(new if k == old else k for k in self.model.key)  # type: ignore[assignment]
        for row in self.model.rows.values():
            row[new] = row.pop(old)

    def widen(self, before: set[str], *_: Any) -> None:
        column = self.rng.choice(self.model.columns)
        if column.step + 1 < len(column.ladder):
            column.step += 1
            if pa.types.is_timestamp(column.type):
                for row in self.model.rows.values():
                    day = row[column.name]
                    row[column.name] = day and dt.datetime(day.year, day.month, day.day)  # noqa: DTZ001

    def shuffle(self, *_: Any) -> None:
        self.rng.shuffle(self.model.columns)

    def relax(self, *_: Any) -> None:
        self.rng.choice(self.model.columns).nullable = True

    # --- checks ---

    def check(self) -> None:
        model = self.model
        found = [[r[c.name] for c in model.columns] for b in self.table.scan() for r in b.to_pylist()]
        assert sorted(found, key=str) == model.sorted_rows()
        keys = [(k, s) for k in range(6) for s in ("a", "b", None)]
        answer = self.table.lookup(self.batch_of(keys))
        assert answer.hit.to_pylist() == [k in model.rows for k in keys]
        for key, row in zip(keys, answer.batch.to_pylist(), strict=True):
            assert row == model.rows.get(key, dict.fromkeys(row))
        wanted = keys[::2]
        matched = self.table.matches(self.batch_of(wanted))
        assert matched.batch.schema.names == [c.name for c in model.columns]
        assert matched.batch.to_pylist() == [
            {n: model.rows[k][n] for n in row_names(model)} for k in wanted if k in model.rows
        ]

    def check_what_is_kept(self) -> None:
        for retained in self.store.manifest.retained:
            checkpoint_id = int(retained.checkpoint_id)
            model = self.committed[checkpoint_id]
            with open_checkpoint(self.url, checkpoint_id=checkpoint_id) as checkpoint:
                table = checkpoint.table("t")
                assert table.spec.schema == model.spec().schema
                found = [[r[c.name] for c in model.columns] for b in table.scan() for r in b.to_pylist()]
                assert sorted(found, key=str) == model.sorted_rows()


def row_names(model: Model) -> list[str]:
    return [c.name for c in model.columns]


@pytest.mark.parametrize("seed", range(20))
def test_a_table_that_changes_at_random_holds_what_it_must(seed: int) -> None:
    history = History(seed)
    steps = [history.write] * 4 + [history.delete] + [history.checkpoint] * 3 + [history.change] * 2
    steps += [history.crash, history.roll_back]
    try:
        for _ in range(40):
            history.rng.choice(steps)()
            history.check()
        history.checkpoint()
        history.check_what_is_kept()
    finally:
        history.store.close()
    if history.hasher.bits == 64:
        assert verify(history.url).problems == ()
