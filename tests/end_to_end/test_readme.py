"""README and guide tell the truth: examples run, commands are understood, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators import DataStream, StreamContext
from operators.cli import _parser as operators_parser
from operators.cli import main as operators_main
from statebackend.cli import _parser as statebackend_parser
from statebackend.cli import main as statebackend_main

ROOT = Path(__file__).resolve().parents[2]
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "operators/GUIDE.md")}
ALL = "\n".join(PAGES.values())
ROWS = 2000
TOO_LARGE = ("bench", "s3://")
"""Of the commands of a store, those that are not run here, only understood."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", ALL, re.DOTALL)


def commands() -> list[list[str]]:
    """The words of every command line, comments left out."""
    text = "".join(blocks("console")).replace("\\\n", " ")
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in text.splitlines() if line.startswith("$ ")]


def of_module(module: str) -> list[list[str]]:
    """The arguments of every ``python -m module``."""
    return [words[3:] for words in commands() if words[:3] == ["python", "-m", module]]


@pytest.fixture(scope="module")
def flights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with some flights in the directory ``flights``."""
    place = tmp_path_factory.mktemp("readme")
    start = datetime(2013, 1, 1)  # noqa: DTZ001  (the column has no zone)
    rows = pa.table(
        {
            "sched_time": [start + timedelta(minutes=5 * i) for i in range(ROWS)],
            "origin": [("JFK", "LGA", "EWR")[i % 3] for i in range(ROWS)],
            "carrier": [("AA", "UA")[i % 2] for i in range(ROWS)],
            "flight": [i % 70 for i in range(ROWS)],
            "dep_delay": [None if i % 50 == 0 else float(i % 40) for i in range(ROWS)],
        }
    )
    (place / "flights").mkdir()
    pq.write_table(rows, place / "flights" / "part-0.parquet")
    return place


def test_the_python_examples_run_one_after_the_other_and_then_the_commands(
    flights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(flights)
    assert len(blocks("python")) >= 6
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    written = pq.read_table("out/hourly")
    assert sum(written["departures"].to_pylist()) == 6 * sum(i % 50 != 0 for i in range(ROWS))
    capsys.readouterr()
    ran = [words for words in of_module("statebackend") if not any(w.startswith(TOO_LARGE) for w in words)]
    assert len(ran) >= 8
    for words in ran:
        here = [word.replace("/tmp/", f"{flights}/") for word in words]
        assert statebackend_main(here) == 0, (words, capsys.readouterr())
        assert capsys.readouterr().out, words


def test_the_script_runs_as_the_command_below_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert operators_main(["nexmark", "generate", "--events", "2000", "--output", "events"]) == 0
    (script,) = blocks("sql")
    (words,) = [words for words in of_module("operators") if words[:2] == ["sql", "busy.sql"]]
    Path("busy.sql").write_text(script)
    assert operators_main(words) == 0
    assert sum(pq.read_table("out/busy")["bids"].to_pylist()) == pq.read_table("events/bid").num_rows


def test_every_command_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MY_KEY", "MY_SECRET"):
        monkeypatch.setenv(name, "x")
    for words in of_module("statebackend"):
        statebackend_parser().parse_args(words)
    for words in of_module("operators"):
        operators_parser().parse_args(words)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = {words[1] for words in commands() if words[0] == "make"}
    made |= {words.split()[0] for words in re.findall(r"`make ([^`]+)`", ALL)}
    assert made
    assert made <= targets


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_of_the_project_and_a_heading_of_it(page: str) -> None:
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", prose) if "://" not in link]
    assert len(links) >= 3
    for link in links:
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.is_file(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles], link


def test_every_verb_that_is_named_exists() -> None:
    """In the tables of what a stream can do, what it is read from and written by, and that of joins."""
    rows = [line for line in ALL.splitlines() if line.startswith("| ")]
    verbs = {verb for row in rows for verb in re.findall(r"(?<!extra )`(?:a\.)?([a-z_]+)(?:\(|`)", row)}
    assert len(verbs) > 30
    assert [verb for verb in sorted(verbs) if not hasattr(DataStream, verb) and not hasattr(StreamContext, verb)] == []
