"""The Nexmark queries: each as the job that a user runs, beside DuckDB computing the same in one batch.

A run is the command ``python -m operators nexmark run`` in a process of its own, with checkpoints, from Parquet files
to Parquet files. DuckDB reads the same files and writes its result to one Parquet file (zstd, as ours), with as many
threads as there are cores; it keeps no state and cannot be resumed. Runs alternate, so that both meet the same
machine.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from operators.nexmark.queries import QUERIES
from tests.nexmark.reference import REFERENCES, views

__all__ = ["draw", "run"]


def run(
    *, events: int = 6_000_000, repeats: int = 3, queries: Sequence[str] = (), checkpoint_s: float = 1.0, **_: Any
) -> dict[str, Any]:
    """Figures by query: events per second of either, their ratio, memory, checkpoints."""
    figures: dict[str, Any] = {"events": events, "checkpoint interval in s": checkpoint_s}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        began = time.perf_counter()
        _command("generate", "--events", str(events), "--output", str(place / "events"))
        figures["generated events per second"] = events / (time.perf_counter() - began)
        for query in queries or QUERIES:
            ours, peer = [], []
            for number in range(repeats):
                ours.append(_job(query, place, f"{query}-{number}", checkpoint_s))
                peer.append(_duckdb(query, place / "events", place / "duckdb.parquet"))
            figures[query] = _summary(ours, peer, events)
            print(f"{query:<4} {figures[query]}", file=sys.stderr, flush=True)  # it takes minutes
    return figures


def _job(query: str, place: Path, name: str, checkpoint_s: float) -> dict[str, Any]:
    began = time.perf_counter()
    last = _command(
        *("run", query, "--input", str(place / "events"), "--checkpoint-interval", str(checkpoint_s)),
        *("--state", str(place / name / "state"), "--output", str(place / name / "out")),
    )
    report: dict[str, Any] = json.loads(last)
    return {**report, "start_up_s": time.perf_counter() - began - report["seconds"]}


def _command(*arguments: str) -> str:
    command = [sys.executable, "-m", "operators", "nexmark", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout.splitlines()[-1] if done.stdout else ""


def _duckdb(query: str, events: Path, out: Path) -> float:
    """Seconds of one batch."""
    with duckdb.connect() as connection:
        views(connection, events)
        began = time.perf_counter()
        connection.sql(f"COPY ({REFERENCES[query]}) TO '{out}' (FORMAT parquet, COMPRESSION zstd)")
        return time.perf_counter() - began


def _summary(ours: list[dict[str, Any]], peer: list[float], events: int) -> dict[str, float]:
    def median(name: str) -> float:
        return float(statistics.median(report[name] or 0 for report in ours))

    rate, batch = median("events_per_second"), events / statistics.median(peer)
    return {
        "events_per_second": rate,
        "duckdb_events_per_second": batch,
        "ratio": rate / batch,
        "slowest": min(report["events_per_second"] for report in ours),
        "fastest": max(report["events_per_second"] for report in ours),
        "peak_rss_mib": median("peak_rss_mib"),
        "checkpoints": median("checkpoints"),
        "checkpoint_sync_ms_max": median("checkpoint_sync_ms_max"),
        "checkpoint_bytes": median("checkpoint_bytes"),
        "rows_out": median("rows_out"),
        "start_up_s": median("start_up_s"),
    }


def draw(figures: dict[str, Any], path: Path) -> None:
    """Both rates of every query as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    by_query = {name: row for name, row in figures.items() if isinstance(row, dict)}
    names = list(by_query)
    figure, axes = plt.subplots(figsize=(1.5 + 0.55 * len(names), 4.2))
    for shift, (key, label) in enumerate(
        (("events_per_second", "stream, with checkpoints"), ("duckdb_events_per_second", "DuckDB, one batch"))
    ):
        axes.bar(
            [i + 0.4 * shift for i in range(len(names))], [by_query[n][key] / 1e6 for n in names], 0.4, label=label
        )
    axes.set_yscale("log")
    axes.set_xticks([i + 0.2 for i in range(len(names))], names)
    axes.set_ylabel("million events per second")
    axes.set_title(f"Nexmark, {figures['events']:,} events")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
