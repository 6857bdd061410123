"""Figures of an open store: as values, as rows, as Prometheus text, over HTTP, and their absence after closing."""

from __future__ import annotations

import builtins
import urllib.error
import urllib.request
from math import inf
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from prometheus_client.parser import text_string_to_metric_families

from statebackend import StateStore, StateStoreError, StoreSettings, TaskState
from statebackend.cli import main
from statebackend.histogram import HistogramRecorder
from statebackend.inspect_metrics import inspect_metrics
from statebackend.maintenance import create_savepoint
from statebackend.metrics import METRICS_SCHEMA, Sample, SampleKind, to_arrow, to_prometheus
from tests.support.faulty_objectstore import FaultPlan
from tests.support.stores import QUICK, World, contents, job, put

ALONE = StoreSettings(block_rows=64, l0_files_max=100, gc_interval_s=None, commit_timeout_s=0.2)


def served(port: int | None) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def figures(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = list(text_string_to_metric_families(text))
    return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


def test_figures_follow_what_the_store_does(world: World) -> None:
    with world.open(settings=ALONE) as store:
        assert store.metrics().checkpoint_id == 0
        assert store.metrics().amplification.write is None
        for step in range(3):
            put(store, a=step, b=step)
            store.checkpoint(job(step)).result(10)
        put(store, c=1)
        found = store.metrics()
        table = found.table("kv")
        assert (table.l0_files, table.sorted_runs, table.files, table.rows, table.memtable_rows) == (3, 0, 3, 6, 1)
        assert table.bytes == sum(f.size for f in store.manifest.files.values())
        assert found.memory.memtables == table.memtable_bytes > 0
        assert found.memory.total > found.memory.memtables
        assert (found.checkpoint_id, found.manifest_number, found.writer_epoch, found.commits) == (3, 4, 1, 3)
        assert found.checkpoints.count == 3
        assert found.amplification.read == 3
        flushed = found.requests["put_if_absent", "flushed"]
        manifests = found.requests["put_if_absent", "manifest"]
        assert (flushed.requests, flushed.bytes_written, flushed.latency.count) == (3, table.bytes, 3)
        assert found.amplification.write == (flushed.bytes_written + manifests.bytes_written) / flushed.bytes_written
        assert found.bytes_written == flushed.bytes_written + manifests.bytes_written
        assert contents(store) == {"a": 2, "b": 2, "c": 1}
        block = store.metrics().caches[0]
        assert (block.name, block.hits, block.misses) == ("block", 3, 0)


def test_a_table_that_is_only_in_the_manifest_is_shown_too(world: World) -> None:
    with world.open(settings=ALONE) as store:
        put(store, a=1)
        store.checkpoint(job(1)).result(10)
    with world.open(settings=ALONE) as again:
        assert again.metrics().table("kv").rows == 1


def test_a_task_that_fails_is_failed_until_it_succeeds(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan, settings=ALONE) as store:
        assert {t.state for t in store.metrics().tasks} == {TaskState.IDLE}
        plan.fail("put_if_absent", "sst/*", times=inf)
        put(store, a=1)
        with pytest.raises(StateStoreError):
            store.checkpoint(job(1)).result(10)
        flusher = store.metrics().task("flusher")
        assert (flusher.state, flusher.completed, flusher.failures, flusher.backlog) == (TaskState.FAILED, 0, 1, 1)
        assert flusher.last_error is not None
        assert "StorageUnavailableError" in flusher.last_error
        assert flusher.last_run_ms is not None
        plan.clear()
        store.checkpoint(job(2)).result(10)
        flusher = store.metrics().task("flusher")
        assert (flusher.state, flusher.last_error, flusher.completed, flusher.backlog) == (TaskState.IDLE, None, 1, 0)


def test_a_task_at_work_is_running(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan, settings=ALONE) as store:
        held = plan.hang("put_if_absent", "sst/*")
        put(store, a=1)
        commit = store.checkpoint(job(1))
        held.wait_until_reached()
        assert store.metrics().task("flusher").state is TaskState.RUNNING
        held.release()
        commit.result(10)


def test_conflicts_unknown_outcomes_and_retries_are_counted(world: World) -> None:
    plan = FaultPlan()
    with world.open(plan, settings=ALONE) as store:
        plan.fail("get", "manifest/*")
        put(store, a=1)
        store.checkpoint(job(1)).result(10)
        assert store.metrics().retries == 1
        plan.fail("put_if_absent", "manifest/*", times=inf)
        with pytest.raises(StateStoreError):
            store.checkpoint(job(2)).result(10)
        found = store.metrics()
        assert found.unknown_outcomes == 1
        assert found.requests["put_if_absent", "manifest"].errors > 1
        plan.clear()
        store.checkpoint(job(3)).result(10)


def test_waiting_for_the_storage_is_a_write_stall(world: World) -> None:
    plan = FaultPlan()
    tight = StoreSettings(memory_bytes=10, gc_interval_s=None, commit_timeout_s=0.05)
    with world.open(plan, settings=tight) as store:
        held = plan.hang("put_if_absent", "sst/*")
        put(store, a=1)
        held.wait_until_reached()
        assert 10 < store.metrics().memory.memtables <= 20
        assert store.metrics().write_stalls == 0
        put(store, b=2)
        found = store.metrics()
        assert found.write_stalls == 1
        assert found.write_stall_s > 0
        held.release()


def test_the_rows_the_text_and_the_port_say_the_same(world: World) -> None:
    with world.open(settings=StoreSettings(l0_files_max=100, gc_interval_s=None, metrics_port=0)) as store:
        put(store, a=1)
        store.checkpoint(job(1)).result(10)
        text, http = store.metrics().to_prometheus(), served(store.metrics_port)
        assert figures(text) == {k: v for k, v in figures(http).items() if not k[0].endswith("_created")}
        rows = store.metrics().to_arrow()
        assert rows.schema == METRICS_SCHEMA
        plain = {(r["name"], frozenset(r["labels"])): r["value"] for r in rows.to_pylist()}
        shared = plain.keys() & figures(text).keys()
        assert len(shared) > 50
        assert {k: plain[k] for k in shared} == {k: figures(text)[k] for k in shared}
        assert {n for n, _ in plain if n.endswith(("_p50", "_p99"))} == {
            f"statebackend_{h}_duration_seconds_{q}" for h in ("checkpoint", "request") for q in ("p50", "p99")
        }


def test_names_and_labels_are_valid_whatever_tables_are_called() -> None:
    recorder = HistogramRecorder()
    recorder.record(0.01)
    odd = 'a "quoted"\nback\\slash'
    samples = [
        Sample(name="x_total", kind=SampleKind.COUNTER, help="one\ntwo", labels={"table": odd}, value=1),
        Sample(name="y_seconds", kind=SampleKind.HISTOGRAM, help="h", labels={}, value=recorder.snapshot()),
    ]
    found = figures(to_prometheus(samples))
    assert found["x_total", frozenset({("table", odd)})] == 1
    assert found["y_seconds_count", frozenset()] == 1
    assert found["y_seconds_bucket", frozenset({("le", "+Inf")})] == 1
    assert to_arrow(samples).num_rows == 5
    assert to_arrow([]).schema == METRICS_SCHEMA


def test_every_figure_has_a_help_text_and_a_unit_in_its_name(world: World) -> None:
    with world.open(settings=ALONE) as store:
        put(store, a=1)
        for sample in store.samples():
            assert sample.help
            stem = sample.name.removesuffix("_total").removesuffix("_max")
            assert stem.endswith(sample.unit), sample.name


def test_the_port_is_closed_with_the_store(world: World) -> None:
    with world.open(settings=StoreSettings(metrics_port=0)) as store:
        port = store.metrics_port
        served(port)
    assert store.metrics_port is None
    with pytest.raises(urllib.error.URLError):
        served(port)


def test_two_stores_of_one_process_have_a_port_and_figures_each(world: World, tmp_path: Path) -> None:
    settings = StoreSettings(metrics_port=0)
    with world.open(settings=settings) as one, StateStore.open(tmp_path / "db", settings) as two:
        put(one, a=1)
        one.flush()
        assert one.metrics_port != two.metrics_port
        written = ("statebackend_commits_total", frozenset[tuple[str, str]]())
        assert figures(served(one.metrics_port))[written] == 1
        assert figures(served(two.metrics_port))[written] == 0


def test_a_port_that_is_taken_is_a_clear_error_and_leaves_nothing_behind(world: World, tmp_path: Path) -> None:
    with world.open(settings=StoreSettings(metrics_port=0)) as store:
        taken = StoreSettings(metrics_port=store.metrics_port)
        with pytest.raises(StateStoreError, match=f"metrics port 127.0.0.1:{store.metrics_port}"):
            StateStore.open(tmp_path / "db", taken)
    StateStore.open(tmp_path / "db").close()


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("prometheus_client"):
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="extra 'metrics'"):
        StateStore.open(tmp_path / "db", StoreSettings(metrics_port=0))
    with StateStore.open(tmp_path / "db") as store:
        put(store, a=1)
        assert pa.types.is_float64(store.metrics().to_arrow().schema.field("value").type)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match="metrics_port"):
        StoreSettings(metrics_port=port)


def test_a_merge_changes_the_amplification(world: World) -> None:
    with world.open(settings=QUICK) as store:
        for step in range(10):
            put(store, a=step)
            store.checkpoint(job(step)).result(10)
        for _ in range(1000):
            if store.metrics().task("compactor").completed and not store.metrics().task("compactor").backlog:
                break
            store.checkpoint(job(99)).result(10)
        found = store.metrics()
        assert found.table("kv").sorted_runs >= 1
        assert found.requests["put_if_absent", "merged"].bytes_written > 0
        assert found.amplification.read <= QUICK.l0_files_max + 2


def test_from_outside_one_sees_sizes_what_is_kept_and_orphans(tmp_path: Path) -> None:
    url = str(tmp_path / "db")
    with StateStore.open(url, ALONE) as store:
        for step in range(3):
            put(store, **{f"{step}-{n}": n for n in range(200)})
            store.checkpoint(job(step)).result(10)
        inside = store.metrics()
        newest = store.manifest.number
    create_savepoint(url, "x", checkpoint_id=1)
    for n, size in enumerate((0, 1, 65_535, 65_536, 65_537, 200_001)):
        (tmp_path / "db" / "sst" / f"w1-0-0-{n + 900}.arrow").write_bytes(bytes(size))
    found = {(s.name.removeprefix("statebackend_"), *s.labels.values()): s.value for s in inspect_metrics(url)}
    assert found["manifest_number",] == newest + 1
    manifest = tmp_path / "db" / "manifest" / f"{newest + 1:020d}.manifest"
    assert found["manifest_bytes",] == manifest.stat().st_size
    assert found["table_level_files", "kv", "0"] == found["table_l0_files", "kv"] == 3
    assert found["live_bytes",] == found["kept_bytes",] == inside.table("kv").bytes
    assert found["amplification", "space"] == 1
    assert found["amplification", "read"] == inside.amplification.read == 3
    assert (found["kept_checkpoints", "retained"], found["kept_checkpoints", "savepoint"]) == (3, 1)
    assert (found["orphan_files",], found["orphan_bytes",]) == (6, 0 + 1 + 65_535 + 65_536 + 65_537 + 200_001)
    age_s = found["checkpoint_age_seconds",]
    assert isinstance(age_s, float)
    assert age_s > 0


def test_the_command_prints_figures_for_people_and_for_prometheus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(tmp_path / "db")
    with StateStore.open(url, ALONE) as store:
        put(store, a=1)
        store.checkpoint(job(1)).result(10)
    assert main(["metrics", url, "--prometheus"]) == 0
    found = figures(capsys.readouterr().out)
    assert found["statebackend_checkpoint_id", frozenset()] == 1
    assert main(["metrics", url]) == 0
    out = capsys.readouterr().out
    assert "checkpoint_age_seconds" in out
    assert "KiB" in out or " B" in out
    assert main(["metrics", f"{url}-nope"]) == 1
    assert "no state store" in capsys.readouterr().err
