"""What the package logs: one set of fields on every record, sensible levels, no credential, nothing printed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from math import inf
from pathlib import Path

import pytest

from statebackend import FencedError, StateStore, StateStoreError, StoreSettings
from statebackend.logs import context
from tests.support.faulty_objectstore import FaultPlan
from tests.support.stores import World, contents, job, put

FIELDS = frozenset(context())
ROOT = Path(__file__).resolve().parents[2]


class Recording(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def of(self, level: int) -> list[logging.LogRecord]:
        return [r for r in self.records if r.levelno == level]

    def lines(self) -> list[str]:
        """Everything that a formatter could write."""
        return [json.dumps({**r.__dict__, "message": r.getMessage()}, default=str) for r in self.records]


@pytest.fixture
def log() -> Iterator[Recording]:
    handler, logger = Recording(), logging.getLogger("statebackend")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def a_run_with_everything(world: World, plan: FaultPlan) -> str:
    """Checkpoints, an early flush, a merge, a collection, a retry, a failure, a fence; returns the store's id."""
    settings = StoreSettings(l0_files_max=1, memory_bytes=2000, gc_interval_s=0.01, commit_timeout_s=0.1)
    with world.open(plan, settings=settings) as store:
        for step in range(5):
            put(store, **{f"{step}-{n}": n for n in range(100)})
            store.checkpoint(job(step)).result(10)
        plan.fail("list", "sst/*")
        contents(store)
        while not (store.metrics().objects_collected and store.metrics().task("compactor").completed):
            store.checkpoint(job(6)).result(10)
        plan.fail("put_if_absent", "sst/w*", times=inf)
        put(store, a=1)
        with pytest.raises(StateStoreError):
            store.checkpoint(job(7)).result(10)
        plan.clear()
        with world.open(seed=1), pytest.raises(FencedError):
            store.checkpoint(job(8)).result(10)
        return store.store_id


def test_every_record_carries_the_same_fields_and_says_what_happened(world: World, log: Recording) -> None:
    store_id = a_run_with_everything(world, FaultPlan())
    assert len(log.records) > 20
    for record in log.records:
        assert record.__dict__.keys() >= FIELDS, record
        assert record.name.startswith("statebackend.")
        assert record.getMessage().strip()
        assert record.__dict__["store_id"] in (None, store_id)
    committed = [r for r in log.of(logging.INFO) if "committed" in r.getMessage()]
    assert [r.__dict__["checkpoint_id"] for r in committed][:5] == [1, 2, 3, 4, 5]
    assert all(r.__dict__["duration_s"] >= 0 for r in committed)
    flushed = [r for r in log.of(logging.DEBUG) if "flushed" in r.getMessage()]
    assert {(r.__dict__["table"], r.__dict__["object"][:6]) for r in flushed} == {("kv", "sst/w1")}
    said = " ".join(r.getMessage() for r in log.of(logging.INFO))
    for word in ("opened", "closed", "merged", "collected", "try 1 of"):
        assert word in said, word


def test_levels_tell_what_needs_a_person(world: World, log: Recording) -> None:
    with world.open() as store:
        put(store, a=1)
        store.checkpoint(job(1)).result(10)
    assert {r.levelno for r in log.records} <= {logging.DEBUG, logging.INFO}
    log.records.clear()
    a_run_with_everything(world, FaultPlan())
    assert [r for r in log.of(logging.WARNING) if "checkpoint 1" in r.getMessage()] == []
    assert any("checkpoint" in r.getMessage() and "failed" in r.getMessage() for r in log.of(logging.WARNING))
    errors = log.of(logging.ERROR)
    assert errors
    assert all("nothing is written any more" in r.getMessage() and "epoch" in r.getMessage() for r in errors)


def test_no_credential_is_logged(tmp_path: Path, log: Recording) -> None:
    secret = "hunter2-of-this-test"
    options = {"token": secret, "secret": secret}
    with StateStore.open(f"file://{tmp_path}/db", storage_options=options) as store:
        put(store, a=1)
        store.flush()
    with pytest.raises(ValueError, match=r"\*\*\*") as error:
        StateStore.open(f"s3://user:{secret}@bucket/db")
    assert secret not in str(error.value)
    assert log.records
    assert not [line for line in log.lines() if secret in line]


def test_nothing_is_printed_by_a_program_that_configures_no_logging(tmp_path: Path) -> None:
    script = """
from tests.support.faulty_objectstore import FaultPlan
from tests.support.stores import World
from tests.unit.test_logging import a_run_with_everything
world = World()
a_run_with_everything(world, FaultPlan())
world.close()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == ""
    assert done.stderr == ""
