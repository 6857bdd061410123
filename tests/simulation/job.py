"""The job that the simulated processes run, and what its state must be at every position.

Event i is a pure function of i, so every process that restores position p goes on alike, and the state
at p is known: `expected` computes it with dictionaries. One event moves money between accounts (through
lookups) and adds the amount to the totals of both (as partial states), sets or deletes a key, appends and
overwrites timed rows, counts itself, and now and then expires the old. All tables and the position of the
source are cut together.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pyarrow as pa
from datafusion import col
from datafusion import functions as f

from statebackend import Aggregation, JobState, StateMerger, StateStore, TableKind, TableOrder, TableSpec

__all__ = ["ACCOUNTS", "STOCK", "apply_event", "contents", "differences", "expected", "job_state", "the_merger"]

ACCOUNTS = 6
STOCK = 100
KEPT = 7
"""Timed rows live for about this many events."""
LARGE = {f"large{i}": "x" * 4000 for i in range(4)}
"""Keys that are there from the start, so large that merges leave their file alone for long."""


def _spec(name: str, kind: TableKind, columns: dict[str, pa.DataType], key: tuple[str, ...], **more: Any) -> TableSpec:
    return TableSpec(name=name, schema=pa.schema(list(columns.items())), key=key, kind=kind, **more)


BALANCES = _spec("balances", TableKind.UPSERT, {"account": pa.int64(), "balance": pa.int64()}, ("account",))
COUNTER = _spec("counter", TableKind.UPSERT, {"name": pa.string(), "events": pa.int64()}, ("name",))
KEYS = _spec("keys", TableKind.UPSERT, {"key": pa.string(), "value": pa.int64(), "text": pa.string()}, ("key",))
LOG = _spec(
    "log",
    TableKind.APPEND,
    {"at": pa.int64(), "text": pa.string()},
    ("at",),
    order=TableOrder.TIME,
    time_field="at",
)
SEEN = _spec(
    "seen",
    TableKind.UPSERT,
    {"key": pa.int64(), "at": pa.int64(), "value": pa.int64()},
    ("key", "at"),
    time_field="at",
)
LEASES = _spec(
    "leases",
    TableKind.UPSERT,
    {"key": pa.int64(), "until": pa.int64(), "value": pa.int64()},
    ("key",),
    ttl_field="until",
)
_MOVED = pa.schema([("account", pa.int64()), ("amount", pa.int64())])
_TOTALS = Aggregation.compile(
    _MOVED, [col("account")], [f.count(col("amount")).alias("moves"), f.sum(col("amount")).alias("moved")]
)
TOTALS = TableSpec(
    name="totals",
    schema=_TOTALS.merger.state_schema,
    key=("account",),
    kind=TableKind.AGGREGATE,
    aggregation=_TOTALS.declaration,
)
TABLES = (BALANCES, COUNTER, KEYS, LEASES, LOG, SEEN, TOTALS)


@dataclass(frozen=True, slots=True)
class Event:
    """What event ``at`` does."""

    at: int
    source: int
    target: int
    amount: int
    puts: tuple[str, ...]
    deletes: tuple[str, ...]
    seen: tuple[tuple[int, int], ...]  # key, at
    forgotten: tuple[tuple[int, int], ...]
    expires: int | None
    leases: tuple[tuple[int, int], ...]  # key, until


@cache
def event(at: int) -> Event:
    rng = random.Random(at * 7919 + 13)
    source, target = rng.sample(range(ACCOUNTS), 2)
    keys = [*(f"k{i}" for i in range(4)), *LARGE]
    rng.shuffle(keys)
    times = [(rng.randrange(3), max(0, at - rng.randrange(4))) for _ in range(4)]
    return Event(
        at=at,
        source=source,
        target=target,
        amount=rng.randrange(1, 20),
        puts=tuple(keys[: rng.randrange(3)]) if at else (),
        deletes=tuple(keys[3 : 3 + rng.randrange(3)]) if at else (),
        seen=tuple(dict.fromkeys(times[:3])),
        forgotten=tuple(times[3:]) if rng.random() < 0.5 else (),
        expires=at - KEPT if at % 3 == 2 and at > KEPT else None,
        # A later lease may end before an earlier one of the same key, which it must hide for ever.
        leases=tuple((key, at + rng.choice([-KEPT, -3, 0, 50])) for key in rng.sample(range(5), 2)),
    )


@dataclass(slots=True)
class State:
    """All tables at one position, as dictionaries."""

    position: int = 0
    balances: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(ACCOUNTS), STOCK))
    keys: dict[str, tuple[int, str]] = field(default_factory=dict)
    log: list[tuple[int, str]] = field(default_factory=list)
    seen: dict[tuple[int, int], int] = field(default_factory=dict)
    leases: dict[int, tuple[int, int]] = field(default_factory=dict)
    totals: dict[int, tuple[int, int]] = field(default_factory=dict)
    watermark: int = -1000

    def after(self, e: Event) -> State:
        new = replace(
            self,
            position=e.at + 1,
            balances=dict(self.balances),
            keys=dict(self.keys),
            log=list(self.log),
            seen=dict(self.seen),
        )
        new.totals = dict(self.totals)
        for account in (e.source, e.target):
            moves, moved = self.totals.get(account, (0, 0))
            new.totals[account] = (moves + 1, moved + e.amount)
        new.leases = self.leases | {key: (until, e.at) for key, until in e.leases}
        new.balances[e.source] -= e.amount
        new.balances[e.target] += e.amount
        if e.at == 0:
            new.keys |= {key: (0, text) for key, text in LARGE.items()}
        new.keys |= dict.fromkeys(e.puts, (e.at, "small"))
        for key in e.deletes:
            new.keys.pop(key, None)
        new.log += [(e.at, f"event {e.at}"), (e.at, "again")]
        new.seen |= dict.fromkeys(e.seen, e.at)
        for row in e.forgotten:
            new.seen.pop(row, None)
        if e.expires is not None:
            new.watermark = max(new.watermark, e.expires)
        new.log = [row for row in new.log if row[0] >= new.watermark]
        new.seen = {row: value for row, value in new.seen.items() if row[1] >= new.watermark}
        new.leases = {key: lease for key, lease in new.leases.items() if lease[0] >= new.watermark}
        return new

    def tables(self) -> dict[str, list[tuple[Any, ...]]]:
        began = self.position > 0
        return {
            "balances": sorted(self.balances.items()) if began else [],
            "counter": [("events", self.position)] if began else [],
            "keys": sorted((key, *value) for key, value in self.keys.items()),
            "leases": sorted((key, *lease) for key, lease in self.leases.items()),
            "log": sorted(self.log),
            "seen": sorted((*row, value) for row, value in self.seen.items()),
            "totals": sorted((account, *total) for account, total in self.totals.items()),
        }


@cache
def expected(position: int) -> State:
    return State() if position == 0 else expected(position - 1).after(event(position - 1))


def apply_event(store: StateStore, at: int) -> None:
    """Do to the tables what event ``at`` does."""
    e = event(at)
    balances = store.table(BALANCES)
    if at == 0:
        everyone = list(range(ACCOUNTS))
        balances.write(_rows(BALANCES, [(a, STOCK) for a in everyone]))
        store.table(KEYS).write(_rows(KEYS, [(key, 0, text) for key, text in LARGE.items()]))
    pair = pa.record_batch({"account": pa.array([e.source, e.target], pa.int64())})
    before, after = balances.lookup(pair).batch.column("balance").to_pylist()
    balances.write(_rows(BALANCES, [(e.source, before - e.amount), (e.target, after + e.amount)]))
    store.table(COUNTER).write(_rows(COUNTER, [("events", at + 1)]))
    moved = pa.record_batch([[e.source, e.target], [e.amount, e.amount]], schema=_MOVED)
    for states in _TOTALS.partial([moved]):
        store.table(TOTALS).write(states)
    keys, log, seen = store.table(KEYS), store.table(LOG), store.table(SEEN)
    if e.puts:
        keys.write(_rows(KEYS, [(k, at, "small") for k in e.puts]))
    if e.deletes:
        keys.delete(pa.record_batch({"key": pa.array(e.deletes, pa.string())}))
    log.write(_rows(LOG, [(at, f"event {at}"), (at, "again")]))
    seen.write(_rows(SEEN, [(*row, at) for row in e.seen]))
    leases = store.table(LEASES)
    leases.write(_rows(LEASES, [(key, until, at) for key, until in e.leases]))
    if e.forgotten:
        seen.delete(_rows(SEEN, list(e.forgotten), key_only=True))
    if e.expires is not None:
        leases.expire(e.expires)
        log.expire(e.expires)
        seen.expire(e.expires)


def the_merger(declaration: Any, udafs: Any = None) -> StateMerger:
    """In place of `StateMerger.from_declaration`, which takes its time for every table that is opened."""
    assert declaration == TOTALS.aggregation
    return _TOTALS.merger


def contents(store: Any) -> dict[str, list[tuple[Any, ...]]]:
    """All tables, read through the store."""
    found = {}
    for spec in TABLES:
        rows = [tuple(row.values()) for batch in store.table(spec).scan() for row in batch.to_pylist()]
        found[spec.name] = sorted(rows)
    return found


def differences(found: dict[str, list[tuple[Any, ...]]], position: int) -> str | None:
    """What is wrong with the tables at a position, or None."""
    for name, rows in expected(position).tables().items():
        if found[name] != rows:
            missing = [r[:3] for r in rows if r not in found[name]]
            extra = [r[:3] for r in found[name] if r not in rows]
            return (
                f"table {name} at position {position}: missing {missing}, extra {extra}, "
                f"{len(found[name])} rows instead of {len(rows)}"
            )
    if position and (total := sum(balance for _, balance in found["balances"])) != ACCOUNTS * STOCK:
        return f"the accounts hold {total}, not {ACCOUNTS * STOCK}"
    return None


def job_state(position: int) -> JobState:
    return JobState(sources={"events": position}, watermarks={"events": position})


def _rows(spec: TableSpec, rows: list[tuple[Any, ...]], *, key_only: bool = False) -> pa.RecordBatch:
    fields = [spec.schema.field(k) for k in spec.key] if key_only else list(spec.schema)
    columns = [pa.array(values, f.type) for values, f in zip(zip(*rows, strict=True), fields, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))
