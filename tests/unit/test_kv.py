"""The key-value face: ordered bytes, against a sorted dictionary."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest

from statebackend import StoreSettings, open_kv
from statebackend.merge import key_prefixes
from statebackend.verification import verify

SMALL = StoreSettings(block_rows=16, l0_files_max=2, compaction_bytes=1500, file_bytes_max=4000)


def test_put_get_delete_and_scan_in_key_order(tmp_path: Path) -> None:
    with open_kv(tmp_path / "kv") as kv:
        kv.put(b"b", b"2")
        kv.put_many({b"a": b"1", b"c": b"3"})
        assert kv.get(b"b") == b"2"
        assert kv.get(b"missing") is None
        kv.flush()
        kv.delete(b"b")
        kv.put(b"", b"empty key")
        assert kv.get_many([b"c", b"b", b""]) == [b"3", None, b"empty key"]
        assert list(kv.scan()) == [(b"", b"empty key"), (b"a", b"1"), (b"c", b"3")]
    with open_kv(tmp_path / "kv") as kv:
        assert list(kv.scan(start=b"a")) == [(b"a", b"1"), (b"c", b"3")]


def test_a_scan_by_prefix_stops_where_the_prefix_does(tmp_path: Path) -> None:
    with open_kv(tmp_path / "kv") as kv:
        kv.put_many(
            dict.fromkeys((b"a", b"ab", b"ab\xff", b"ab\xff\xff", b"ac", b"\xff", b"\xff\xff", b"\xff\xffz"), b"v")
        )
        assert [k for k, _ in kv.scan(prefix=b"ab")] == [b"ab", b"ab\xff", b"ab\xff\xff"]
        assert [k for k, _ in kv.scan(prefix=b"ab\xff")] == [b"ab\xff", b"ab\xff\xff"]
        assert [k for k, _ in kv.scan(prefix=b"\xff\xff")] == [b"\xff\xff", b"\xff\xffz"]
        assert [k for k, _ in kv.scan(start=b"ab\xff", end=b"\xff")] == [b"ab\xff", b"ab\xff\xff", b"ac"]
        with pytest.raises(ValueError, match="not both"):
            list(kv.scan(prefix=b"a", start=b"a"))


@pytest.mark.parametrize("seed", range(4))
def test_random_histories_agree_with_a_sorted_dictionary(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    expected: dict[bytes, bytes] = {}

    def key() -> bytes:
        return (
            b"user:0000" + str(rng.randrange(300)).encode() if rng.random() < 0.7 else rng.randbytes(rng.randrange(12))
        )

    kv = open_kv(tmp_path / "kv", SMALL)
    for step in range(250):
        match rng.randrange(6):
            case 0 | 1:
                items = {key(): rng.randbytes(5) for _ in range(rng.randrange(1, 40))}
                kv.put_many(items)
                expected.update(items)
            case 2:
                gone = [key() for _ in range(10)]
                kv.delete_many(gone)
                for k in gone:
                    expected.pop(k, None)
            case 3:
                kv.flush()
            case 4:
                low, high = sorted((key(), key()))
                found = list(kv.scan(start=low, end=high))
                assert found == sorted((k, v) for k, v in expected.items() if low <= k < high)
            case 5:
                probes = [key() for _ in range(20)]
                assert kv.get_many(probes) == [expected.get(k) for k in probes]
        if step % 60 == 59:
            kv.close()
            kv = open_kv(tmp_path / "kv", SMALL)
    assert list(kv.scan()) == sorted(expected.items())
    kv.close()
    assert verify(str(tmp_path / "kv")).problems == ()


def test_only_bytes_are_taken(tmp_path: Path) -> None:
    with open_kv(tmp_path / "kv") as kv, pytest.raises(TypeError, match="bytes, not str"):
        kv.put("text", b"x")  # type: ignore[arg-type]


def test_prefixes_are_ordered_as_the_keys_are() -> None:
    rng = random.Random(0)
    keys = sorted(rng.randbytes(rng.randrange(12)) for _ in range(500))
    prefixes = key_prefixes(pa.array(keys, pa.binary())).tolist()
    assert prefixes == sorted(prefixes)
    assert key_prefixes(pa.array(keys, pa.binary())[100:200]).tolist() == prefixes[100:200]


def test_what_the_table_refuses_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_kv(tmp_path, SMALL) as kv:
        kv.put(b"b", b"2")
        kv.flush()
        kv.put(b"a", b"1")
        kv.delete(b"b")
        with monkeypatch.context() as patch:
            patch.setattr(kv._table, "delete", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                kv.flush()
        assert kv.get_many([b"a", b"b"]) == [b"1", None]
        kv.flush()
    with open_kv(tmp_path, SMALL) as kv:
        assert list(kv.scan()) == [(b"a", b"1")]


def test_leaving_a_block_by_an_error_flushes_nothing(tmp_path: Path) -> None:
    def puts_and_fails() -> None:
        with open_kv(tmp_path, SMALL) as kv:
            kv.put(b"a", b"1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        puts_and_fails()
    with open_kv(tmp_path, SMALL) as kv:
        assert kv.get(b"a") is None
