"""What S3 can do to a store, by both transports, over HTTP: lost answers, stalls, refusals, caches."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from statebackend import StateStore, StoreSettings
from statebackend.cli import main
from statebackend.errors import (
    AtomicCreateError,
    ObjectMissingError,
    StateStoreError,
    StorageUnavailableError,
    StoreClosedError,
)
from statebackend.objectstore import ObjectStore, PutResult, open_object_store
from statebackend.objectstore_base import RefusedError
from statebackend.objectstore_s3 import s3_options
from statebackend.objectstore_wrappers import RetryingObjectStore
from tests.conformance.conftest import Place
from tests.support.s3_server import BUCKET, KEY, SECRET, Gate, Request, Rule, S3Server, error_answer, gate
from tests.support.stores import contents, job, put

run = asyncio.run
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Client:
    """Opens stores by one transport, directly or through the gate."""

    transport: str
    direct: S3Server
    gate: Gate
    executor: ThreadPoolExecutor

    def place(self, *, bucket: str = BUCKET, server: S3Server | None = None) -> Place:
        prefix = "obstore+" if self.transport == "obstore" else ""
        options = (server or self.gate.server).options(self.transport)
        return Place(f"{prefix}s3://{bucket}/{uuid.uuid4().hex}", options)

    def open(self, place: Place | None = None, *, timeout_s: float = TIMEOUT_S, **options: Any) -> ObjectStore:
        place = place or self.place()
        return open_object_store(
            place.url, self.executor, storage_options=place.options, timeout_s=timeout_s, **options
        )


@pytest.fixture(params=["s3fs", "obstore"])
def client(request: pytest.FixtureRequest, s3: S3Server) -> Iterator[Client]:
    with gate(s3) as passage, ThreadPoolExecutor(4) as executor:
        yield Client(request.param, s3, passage, executor)


def creates(part: str) -> Callable[[Request], bool]:
    """The conditional PUTs of names with this part."""
    return lambda r: r.method == "PUT" and part in r.path and any(h.lower() == "if-none-match" for h in r.headers)


def anything(_: Request) -> bool:
    return True


# --- commits ---


@pytest.mark.parametrize("times", [1, 3])
def test_a_lost_answer_to_a_manifest_is_recognised_as_ones_own(client: Client, times: int) -> None:
    """The server applies the PUT and the connection breaks; some clients then send it again by themselves."""
    place = client.place()
    settings = StoreSettings(request_timeout_s=TIMEOUT_S)
    with StateStore.open(place.url, settings, storage_options=place.options) as store:
        put(store, a=1)
        lost = client.gate.add(Rule(creates("manifest/"), times=times, drop=True))
        assert store.checkpoint(job(1)).result(30).checkpoint_id == 1
        assert lost.met >= 1
        assert store.manifest.number == 2, "the attempt must not be repeated under another number"
        put(store, b=2)
        assert store.checkpoint(job(2)).result(30).checkpoint_id == 2
        assert sum(f.rows for f in store.manifest.files.values()) == 2
    with StateStore.open(place.url, settings, storage_options=place.options) as again:
        assert contents(again) == {"a": 1, "b": 2}
        assert again.restored is not None
        assert again.restored.job == job(2)


def test_a_lost_answer_while_opening_does_not_fence_the_opener(client: Client) -> None:
    lost = client.gate.add(Rule(creates("manifest/"), drop=True))
    place = client.place()
    with StateStore.open(place.url, storage_options=place.options) as store:
        assert lost.met == 1
        put(store, a=1)
        store.checkpoint(job(1)).result(30)
        assert store.manifest.writer_epoch == 1


def test_a_lost_answer_to_an_sstable_is_recognised_by_its_bytes(client: Client) -> None:
    place = client.place()
    with StateStore.open(place.url, storage_options=place.options) as store:
        put(store, a=1)
        lost = client.gate.add(Rule(creates("sst/"), drop=True))
        store.checkpoint(job(1)).result(30)
        assert lost.met == 1
        assert contents(store) == {"a": 1}


def test_a_conflict_in_progress_is_tried_again_and_committed_once(client: Client) -> None:
    """409: another request for this name was under way; it says nothing about whether there is an object."""
    place = client.place()
    with StateStore.open(place.url, storage_options=place.options) as store:
        put(store, a=1)
        answer = error_answer(409, "ConditionalRequestConflict")
        conflict = client.gate.add(Rule(creates("manifest/"), times=2, answer=answer))
        store.checkpoint(job(1)).result(30)
        assert conflict.met == 2
        assert contents(store) == {"a": 1}
        assert store.manifest.number == 2


# --- creating ---


@pytest.mark.parametrize("extra", ["", "<Condition>If-None-Match</Condition>"])
def test_every_form_of_a_failed_condition_means_exists(client: Client, extra: str) -> None:
    store = client.open()
    client.gate.add(Rule(anything, answer=error_answer(412, "PreconditionFailed", extra)))
    assert run(store.put_if_absent("manifest/1", b"x")) is PutResult.EXISTS


def test_a_server_that_ignores_the_condition_is_refused_unless_the_user_insists(client: Client) -> None:
    client.gate.add(Rule(anything, times=1000, without="If-None-Match"))
    place = client.place()
    with pytest.raises(AtomicCreateError, match="ignores If-None-Match"):
        StateStore.open(place.url, storage_options=place.options)
    with StateStore.open(place.url, storage_options=place.options, allow_unsafe_create=True) as store:
        put(store, a=1)
        store.checkpoint(job(1)).result(30)


def test_the_condition_is_checked_once(client: Client) -> None:
    async def story() -> None:
        store = client.open()
        for number in range(4):
            assert await store.put_if_absent(f"manifest/{number}", b"x") is PutResult.CREATED

    run(story())
    assert [r.method for r in client.gate.requests] == ["PUT"] * 5


def test_a_check_without_an_answer_is_made_at_the_next_create(client: Client) -> None:
    async def story() -> None:
        store = client.open()
        unanswered = client.gate.add(
            Rule(lambda r: len(client.gate.requests) == 2, answer=error_answer(503, "SlowDown"))
        )
        assert await store.put_if_absent("manifest/1", b"x") is PutResult.CREATED
        assert unanswered.met == 1
        client.gate.add(Rule(anything, times=1000, without="If-None-Match"))
        with pytest.raises(AtomicCreateError):
            await store.put_if_absent("manifest/2", b"x")

    run(story())


# --- reading and listing ---


def test_a_read_is_one_request(client: Client) -> None:
    async def story() -> None:
        store = client.open()
        await store.put("sst/1", b"0123456789")
        client.gate.requests.clear()
        assert await store.get("sst/1") == b"0123456789"
        assert await store.get_range("sst/1", 2, 5) == b"234"
        assert await store.get_range("sst/1", -3) == b"789"
        assert [r.method for r in client.gate.requests] == ["GET"] * 3

    run(story())


def test_what_another_client_does_is_seen_at_once(client: Client) -> None:
    async def story() -> None:
        place = client.place()
        one, two = client.open(place), client.open(place)
        await one.put("manifest/1", b"1")
        assert await one.list("manifest/") == await two.list("manifest/") == ["manifest/1"]
        await two.put_if_absent("manifest/2", b"2")
        assert await one.list("manifest/") == ["manifest/1", "manifest/2"]
        assert await one.get("manifest/2") == b"2"
        await two.delete("manifest/1")
        assert await one.list("manifest/") == ["manifest/2"]
        with pytest.raises(ObjectMissingError):
            await one.get("manifest/1")

    run(story())


@pytest.fixture(scope="module")
def many(s3: S3Server) -> tuple[str, list[str]]:
    """A prefix with more objects than one answer to a listing holds."""
    prefix, names = uuid.uuid4().hex, [f"sst/{i:04}" for i in range(1100)]

    async def fill() -> None:
        with ThreadPoolExecutor(1) as executor:
            url = f"obstore+s3://{BUCKET}/{prefix}"
            store = open_object_store(url, executor, storage_options=s3.options("obstore"))
            for start in range(0, len(names), 50):
                await asyncio.gather(*(store.put(n, b"") for n in names[start : start + 50]))

    run(fill())
    return prefix, names


def test_the_caches_of_s3fs_cannot_be_switched_on() -> None:
    options = s3_options({"use_listings_cache": True, "skip_instance_cache": False, "key": KEY}, 1.0)
    assert (options["use_listings_cache"], options["skip_instance_cache"], options["key"]) == (False, True, KEY)


def test_a_listing_of_several_pages_is_complete(client: Client, many: tuple[str, list[str]]) -> None:
    place, (prefix, names) = client.place(), many
    store = client.open(Place(f"{place.url.rpartition('/')[0]}/{prefix}", place.options))
    assert run(store.list("sst/")) == names


# --- failures ---


@pytest.mark.parametrize("operation", ["get", "put", "put_if_absent", "list", "delete"])
def test_a_server_that_stalls_is_unavailable_after_the_timeout(client: Client, operation: str) -> None:
    """Also when it does not even answer ``Expect: 100-continue``, a wait that botocore does not bound."""
    store = client.open(timeout_s=0.3)
    client.gate.add(Rule(anything, times=1000, stall=True))
    began = time.monotonic()
    with pytest.raises(StorageUnavailableError, match="no answer in time"):
        run(call(store, operation))
    assert time.monotonic() - began < 3


def call(store: ObjectStore, operation: str) -> Any:
    args: dict[str, tuple[Any, ...]] = {"get_range": (0, 1), "put": (b"x",), "put_if_absent": (b"x",)}
    return getattr(store, operation)("sst/" if operation == "list" else "sst/1", *args.get(operation, ()))


PASSING = [(503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests"), (400, "RequestTimeout")]
REFUSING = [(403, "AccessDenied"), (403, "SignatureDoesNotMatch"), (400, "ExpiredToken"), (501, "NotImplemented")]


@pytest.mark.parametrize(("status", "code"), PASSING)
def test_what_passes_is_tried_again_and_only_by_the_wrapper(client: Client, status: int, code: str) -> None:
    store = client.open()
    client.gate.add(Rule(anything, times=2, answer=error_answer(status, code)))
    with pytest.raises(StorageUnavailableError, match=code):
        run(store.put_if_absent("manifest/1", b"x"))
    assert len(client.gate.requests) == 1, "a create is never repeated by itself"
    run(RetryingObjectStore(store).put("sst/1", b"x"))
    assert len(client.gate.requests) == 3


@pytest.mark.parametrize(("status", "code"), REFUSING)
@pytest.mark.parametrize("operation", ["get", "put", "put_if_absent", "list", "delete"])
def test_a_refusal_is_told_at_once(client: Client, status: int, code: str, operation: str) -> None:
    store = RetryingObjectStore(client.open())
    client.gate.add(Rule(anything, times=1000, answer=error_answer(status, code)))
    with pytest.raises(StorageUnavailableError) as caught:
        run(call(store, operation))
    assert isinstance(caught.value.__cause__, RefusedError)
    assert len(client.gate.requests) == 1


@pytest.mark.parametrize("operation", ["get", "get_range", "put", "put_if_absent", "list", "delete"])
def test_a_missing_bucket_is_neither_an_empty_store_nor_a_missing_object(client: Client, operation: str) -> None:
    store = RetryingObjectStore(client.open(client.place(bucket="nobody-made-this")))
    with pytest.raises(StorageUnavailableError, match="NoSuchBucket") as caught:
        run(call(store, operation))
    assert isinstance(caught.value.__cause__, RefusedError)


def test_no_message_holds_a_credential(client: Client) -> None:
    """Nor a traceback, with everything that is chained to it."""
    nowhere = S3Server("http://127.0.0.1:1")
    stores = [client.open(), client.open(client.place(server=nowhere)), client.open(client.place(bucket="nobody"))]
    client.gate.add(Rule(anything, times=1000, answer=error_answer(403, "InvalidAccessKeyId")))
    for store in stores:
        for operation in ("get", "put", "put_if_absent", "list", "delete"):
            with pytest.raises(StateStoreError) as caught:
                run(call(store, operation))
            told = "".join(traceback.format_exception(caught.value)) + store.describe() + repr(caught.value)
            assert SECRET not in told
            assert KEY not in told


# --- opening ---


@pytest.mark.parametrize("scheme", ["s3", "obstore+s3", "ftp", "https"])
def test_a_url_with_a_password_is_refused_without_repeating_it(client: Client, scheme: str) -> None:
    with pytest.raises(ValueError, match="storage_options") as caught:
        open_object_store(f"{scheme}://me:{SECRET}@bucket/x", client.executor)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(("url", "extra"), [("s3://bucket/x", "s3"), ("obstore+s3://bucket/x", "obstore")])
def test_a_missing_extra_is_named(client: Client, monkeypatch: pytest.MonkeyPatch, url: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, f"statebackend.objectstore_{extra}", None)
    with pytest.raises(ImportError, match=f"extra '{extra}'"):
        open_object_store(url, client.executor)


def test_a_bucket_is_needed(client: Client) -> None:
    for url in ("s3://", "obstore+s3://", "obstore+s3:///x"):
        with pytest.raises(ValueError, match="bucket"):
            open_object_store(url, client.executor)


def test_obstore_is_refused_where_it_is_not_durable_and_where_it_was_never_tried() -> None:
    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(ValueError, match=r"does not sync.*file:///tmp/x"):
            open_object_store("obstore+file:///tmp/x", executor, allow_unsafe_create=True)
        with pytest.raises(AtomicCreateError, match="gs://bucket"):
            open_object_store("obstore+gs://bucket/x", executor)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_obstore_says_that_it_did_not_survive_a_fork_instead_of_waiting_for_ever() -> None:
    story = f"""
import asyncio, os
from concurrent.futures import ThreadPoolExecutor
from statebackend.errors import {StoreClosedError.__name__}
from statebackend.objectstore import open_object_store
store = open_object_store("obstore+memory://x", ThreadPoolExecutor(1))
asyncio.run(store.put("a", b"1"))
if not os.fork():
    try:
        asyncio.run(store.get("a"))
    except StoreClosedError as error:
        os._exit(0 if "fork" in str(error) else 1)
    os._exit(2)
os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert subprocess.run([sys.executable, "-c", story], timeout=60, check=False).returncode == 0


# --- disk cache and logs ---


def test_with_a_disk_cache_a_second_opening_gets_no_file_from_the_server(
    client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Counted at the server: files are read while there is no cache, and not afterwards. No key is logged."""
    place = client.place()
    settings = StoreSettings(disk_cache_dir=tmp_path / "cache", gc_interval_s=None)

    def file_reads() -> int:
        return sum(r.method == "GET" and "/sst/" in r.path for r in client.gate.requests)

    with caplog.at_level(logging.DEBUG, "statebackend"):
        with StateStore.open(place.url, storage_options=place.options, settings=StoreSettings()) as store:
            put(store, **{f"k{n}": n for n in range(100)})
            store.checkpoint(job(1)).result(30)
        counts = []
        for _ in range(2):
            with StateStore.open(place.url, settings, storage_options=place.options) as store:
                assert len(contents(store)) == 100
            counts.append(file_reads())
    assert counts[0] > 0
    assert counts[1] == counts[0]
    said = [f"{r.getMessage()} {r.__dict__}" for r in caplog.records if r.name.startswith("statebackend")]
    assert said
    assert not [line for line in said if KEY in line or SECRET in line]


def test_every_command_reaches_a_store_by_storage_options(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The options also reach a branch and its parent, which lie under the same protocol."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("STATE_SECRET", SECRET)
    given = {"key": KEY, "secret": "env:STATE_SECRET", "endpoint_url": s3.endpoint}
    given["client_kwargs.region_name"] = "us-east-1"
    options = [part for key, value in given.items() for part in ("--storage-option", f"{key}={value}")]
    url, new = (f"s3://{BUCKET}/{uuid.uuid4().hex}" for _ in range(2))
    commands = [
        ["bench", url, "--prefill", "200", "--batch-rows", "50", "--threads", "2"],
        ["ls", url], ["show", url], ["metrics", url], ["compact", url, "--all"], ["gc", url], ["verify", url],
        ["savepoint", url, "--name", "one"], ["savepoint", url],
        ["clone", url, new, "--savepoint", "one"], ["branches", url], ["verify", new], ["compact", new, "--all"],
        ["gc", new], ["verify", new], ["rollback", url, "--savepoint", "one"],
        ["savepoint", url, "--name", "one", "--drop"],
    ]  # fmt: skip
    for command in commands:
        code = main([*command, *options])
        out = capsys.readouterr()
        assert code == 0, (command, out)
        assert SECRET not in out.out + out.err
    assert main(["ls", url, "--storage-option", "endpoint_url=no-url-of-a-server", *options[:4]]) in (1, 2)
    said = capsys.readouterr().err
    assert "endpoint" in said
    assert "no-url-of-a-server" not in said
