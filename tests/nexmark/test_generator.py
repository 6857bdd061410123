"""Events are a function of the seed and their number, and look like those of the suite."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from operators.cli import main
from operators.errors import BadInputError
from operators.nexmark.dataset import DatasetSettings, write_dataset
from operators.nexmark.generator import generate
from operators.nexmark.model import BASE_TIME_MS, SCHEMAS, Kind, NexmarkConfig

EVENTS = 100_000
CONFIG = NexmarkConfig(seed=7)


def column(batch: pa.RecordBatch, name: str) -> np.ndarray:
    values = batch.column(name)
    return (values.cast(pa.int64()) if pa.types.is_timestamp(values.type) else values).to_numpy(zero_copy_only=False)


@pytest.fixture(scope="module")
def bids() -> pa.RecordBatch:
    return generate(CONFIG, Kind.BID, 0, EVENTS)


@pytest.fixture(scope="module")
def auctions() -> pa.RecordBatch:
    return generate(CONFIG, Kind.AUCTION, 0, EVENTS)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("disorder", [1, 1000])
def test_any_slice_of_events_can_be_made_alone(kind: Kind, disorder: int) -> None:
    config = NexmarkConfig(seed=3, disorder_events=disorder)
    whole = generate(config, kind, 0, 120_000)
    cuts = [0, 1, 2, 49, 50, 1234, 77_777, 120_000]
    assert pa.concat_batches([generate(config, kind, a, b) for a, b in pairwise(cuts)]) == whole
    assert generate(config, kind, 500, 500).num_rows == 0


@pytest.mark.parametrize("kind", Kind)
def test_columns_can_be_picked_without_changing_them(kind: Kind) -> None:
    whole = generate(CONFIG, kind, 100, 2_000)
    assert whole.schema == SCHEMAS[kind]
    names = tuple(reversed(whole.schema.names))
    assert generate(CONFIG, kind, 100, 2_000, names) == whole.select(names)


def test_another_seed_gives_other_events_at_the_same_numbers(bids: pa.RecordBatch) -> None:
    other = generate(NexmarkConfig(seed=8), Kind.BID, 0, EVENTS)
    assert other.column("seq") == bids.column("seq")
    assert (column(other, "price") != column(bids, "price")).mean() > 0.99


def test_each_fifty_events_hold_one_person_three_auctions_and_46_bids() -> None:
    numbers = {kind: column(generate(CONFIG, kind, 0, 500), "seq") for kind in Kind}
    assert sorted(np.concatenate(list(numbers.values())).tolist()) == list(range(500))
    within = {kind: set((n % 50).tolist()) for kind, n in numbers.items()}
    assert within == {Kind.PERSON: {0}, Kind.AUCTION: {1, 2, 3}, Kind.BID: set(range(4, 50))}


def test_ids_count_up_and_times_follow_the_event_number(bids: pa.RecordBatch, auctions: pa.RecordBatch) -> None:
    persons = generate(CONFIG, Kind.PERSON, 0, EVENTS)
    for batch in (persons, auctions):
        assert column(batch, "id").tolist() == list(range(1000, 1000 + batch.num_rows))
    for batch in (persons, auctions, bids):
        assert (column(batch, "dateTime") == BASE_TIME_MS + column(batch, "seq") // 10).all()


def test_bids_are_skewed_to_hot_auctions_bidders_and_channels(bids: pa.RecordBatch) -> None:
    auction, bidder = column(bids, "auction") - 1000, column(bids, "bidder") - 1000
    groups = column(bids, "seq") // 50
    newest = groups * 3 + 2
    hot = auction == newest // 100 * 100
    assert 0.5 < hot.mean() < 0.53
    assert ((auction >= np.maximum(newest - 100, 0)) & (auction <= newest + 10) | hot).all()
    hot_bidder = bidder == groups // 100 * 100 + 1
    assert 0.75 < hot_bidder.mean() < 0.77
    assert (bidder <= groups + 10).all()
    counts = {v["values"]: v["counts"] for v in pc.value_counts(bids.column("channel")).to_pylist()}
    for channel in ("Google", "Facebook", "Baidu", "Apple"):
        assert abs(counts[channel] / bids.num_rows - 1 / 8) < 0.01
    assert len(counts) > 9_000


def test_prices_are_log_uniform_over_six_decades(bids: pa.RecordBatch) -> None:
    decades = np.log10(column(bids, "price") / 100)
    assert 0 <= decades.min() < 0.01
    assert 5.99 < decades.max() <= 6
    assert abs(decades.mean() - 3) < 0.03


def test_a_channel_has_one_url_and_nine_in_ten_name_the_channel_in_it(bids: pa.RecordBatch) -> None:
    pairs = pa.table({"channel": bids.column("channel"), "url": bids.column("url")}).group_by(["channel", "url"])
    urls = pairs.aggregate([])
    assert urls.num_rows == len(pc.unique(bids.column("channel")))
    named = pc.match_substring_regex(urls["url"], r"^https://www\.nexmark\.com/\w{5}/\w{5}/\w{5}/item\.htm\?query=1&ch")
    assert 0.88 < pc.mean(named.cast(pa.float64())).as_py() < 0.92


def test_auctions_expire_after_their_start_and_sellers_are_skewed(auctions: pa.RecordBatch) -> None:
    length = column(auctions, "expires") - column(auctions, "dateTime")
    assert length.min() >= 1
    assert length.max() <= 332
    assert 150 < length.mean() < 180
    assert (column(auctions, "reserve") > column(auctions, "initialBid")).all()
    assert set(column(auctions, "category").tolist()) == {10, 11, 12, 13, 14}
    hot = column(auctions, "seller") - 1000 == column(auctions, "seq") // 50 // 100 * 100
    assert 0.75 < hot.mean() < 0.77


def test_extra_fills_the_events_to_their_average_size(bids: pa.RecordBatch, auctions: pa.RecordBatch) -> None:
    assert abs(pc.mean(pc.utf8_length(bids.column("extra"))).as_py() + 32 - 100) < 1
    texts = [auctions.column(name) for name in ("itemName", "description", "extra")]
    assert abs(sum(pc.mean(pc.utf8_length(text)).as_py() for text in texts) + 48 - 500) < 5
    assert pc.all(pc.match_substring_regex(bids.column("extra"), "^[a-z]{54,81}$")).as_py()
    items = auctions.column("itemName")
    assert pc.all(pc.match_substring_regex(items, "^[a-z][a-z ]{1,17}[a-z]$")).as_py()
    assert pc.any(pc.match_substring(items, " ")).as_py()


def test_disorder_permutes_events_within_their_group_and_counts_places() -> None:
    ordered = generate(CONFIG, Kind.BID, 0, 4_000)
    shuffled = generate(NexmarkConfig(seed=7, disorder_events=2_000), Kind.BID, 0, 4_000)
    assert (np.diff(column(shuffled, "seq")) > 0).all()
    times = column(shuffled, "dateTime")
    assert (np.diff(times) < 0).any()
    assert (np.maximum.accumulate(times) - times).max() < 200
    events = [b.drop_columns("seq").to_pylist() for b in (ordered, shuffled)]
    assert sorted(map(str, events[0])) == sorted(map(str, events[1]))
    with pytest.raises(ValueError, match="953"):
        NexmarkConfig(disorder_events=953)


def test_files_hold_the_events_in_order_however_they_are_cut(tmp_path: Path) -> None:
    settings = DatasetSettings(events=10_000, file_events=3_300, group_events=700, threads=2)
    seen: list[int] = []
    write_dataset(tmp_path / "out", CONFIG, settings, seen.append)
    assert seen[-1] == 10_000
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["auction", "bid", "person"]
    for kind in Kind:
        files = sorted((tmp_path / "out" / kind).iterdir())
        assert len(files) == 4
        table = pa.concat_tables(pq.read_table(file) for file in files)
        assert table.combine_chunks().to_batches()[0] == generate(CONFIG, kind, 0, 10_000)


def test_the_command_writes_what_it_says(tmp_path: Path) -> None:
    arguments = ["nexmark", "generate", "--events", "5000", "--seed", "7", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert pads.dataset(tmp_path / "out" / "bid").count_rows() == 4_600
    assert main(arguments) == 1  # never over what is there
    assert pads.dataset(tmp_path / "out" / "bid").count_rows() == 4_600


def test_a_failed_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail)
    with pytest.raises(OSError, match="no space"):
        write_dataset(tmp_path / "out", CONFIG, DatasetSettings(events=1_000))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".partial" / "bid").mkdir(parents=True)
    (tmp_path / ".partial" / "bid" / "part-00000.parquet").write_bytes(b"torn")
    write_dataset(tmp_path, CONFIG, DatasetSettings(events=1_000))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["auction", "bid", "person"]
    with pytest.raises(BadInputError, match="exists already"):
        write_dataset(tmp_path, CONFIG, DatasetSettings(events=1_000))


def test_ctrl_c_ends_the_command_and_removes_what_it_wrote(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["nexmark", "generate", "--events", "500_000_000", "--output", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "operators", *arguments], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (out / ".partial" / "bid").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.decode().strip().splitlines()[-1] == "interrupted"
    assert list(tmp_path.iterdir()) == []
