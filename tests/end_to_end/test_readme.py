"""The examples of the README run, in their order, as one program."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_python_examples_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = 2000
    start = datetime(2013, 1, 1)  # noqa: DTZ001  (the column has no zone)
    flights = pa.table(
        {
            "sched_time": [start + timedelta(minutes=5 * i) for i in range(rows)],
            "origin": [("JFK", "LGA", "EWR")[i % 3] for i in range(rows)],
            "carrier": [("AA", "UA")[i % 2] for i in range(rows)],
            "flight": [i % 70 for i in range(rows)],
            "dep_delay": [None if i % 50 == 0 else float(i % 40) for i in range(rows)],
        }
    )
    Path("flights").mkdir()
    pq.write_table(flights, "flights/part-0.parquet")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    written = pq.read_table("out/hourly")
    assert sum(written["departures"].to_pylist()) == 6 * sum(d is not None for d in flights["dep_delay"].to_pylist())
