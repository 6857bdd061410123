"""Stages rolls and publishes them: the commit protocol of the file sinks.

A roll is what one checkpoint writes out. Its life, below the sink's directory::

    _staging/<store>/<operator>/<roll>/0.parquet ...     complete files, synced
    _staging/<store>/<operator>/<roll>/index.json        written last: names, final names, rows
      -- the manifest that names the roll is committed --
    origin=EWR/part-<roll>-0.parquet ...                 each file moved to its final name
    _committed/<store>/<operator>/<roll>.json            the same index, in the commit log
      -- _staging/.../<roll> is deleted --

Invariants:

* A file is at its final name only after the manifest that names its roll was committed, and it is
  complete there; so a reader that passes over ``_*`` sees committed rows only. One that wants whole rolls
  only reads the files of the commit log (`published_rolls`).
* The commit log entry is durable before the staged index is deleted, and written after every
  file of the roll is durable at its final name. So each step of publishing can be repeated after a
  crash, also by another process at the same time.
* Nothing is deleted but what this store and operator staged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from operators.errors import OutputVanishedError, SinkOccupiedError
from operators.sinks.files import OutputFiles, output_files
from operators.sinks.partitions import partition
from statebackend import UnsupportedFormatError

__all__ = ["PublishedFile", "PublishedRoll", "Rolls", "published_rolls"]

_VERSION = 1
_STAGING = "_staging"
_COMMITTED = "_committed"
_CLAIM = "_claim.json"
_NAME_CHARS_MAX = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFile:
    """One file of the commit log; ``name`` is relative to the sink's directory."""

    name: str
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRoll:
    """One entry of the commit log: the output of one checkpoint of one sink."""

    store_id: str
    operator_id: str
    roll: str
    rows: int
    files: tuple[PublishedFile, ...]


def published_rolls(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> list[PublishedRoll]:
    """The commit log of a sink directory: every roll that counts, by store, operator and checkpoint."""
    files = output_files(path, storage_options)
    found: list[PublishedRoll] = []
    for store in files.names(_COMMITTED):
        for operator in files.names(f"{_COMMITTED}/{store}"):
            directory = f"{_COMMITTED}/{store}/{operator}"
            entries = (_decode(files.read(f"{directory}/{n}")) for n in files.names(directory) if _is_entry(n))
            found += [_published(e) for e in entries if e is not None]
    return found


class Rolls:
    """The rolls of one sink: of one operator of one store, in one directory."""

    def __init__(self, files: OutputFiles, *, path: str, store_id: str, operator_id: str) -> None:
        self._files = files
        self._path = path
        self._store_id = store_id
        self._operator_id = operator_id
        self._area = f"{_safe(store_id)}/{_safe(operator_id)}"

    def claim(self, *, shared: bool) -> None:
        """Make the directory this store's; unless ``shared``, raise `SinkOccupiedError` if it holds other output."""
        claim = f"{_COMMITTED}/{self._area}/{_CLAIM}"
        own = _safe(self._store_id)
        if self._files.exists(claim):
            return
        if not shared:
            stores = self._files.names(_COMMITTED)
            for store in stores:
                if store != own and (entries := self._count_entries(store)):
                    self._refuse(f"it holds {entries} commits of the store {store!r}, this one is {self._store_id!r}")
            visible = [n for n in self._files.names("") if not n.startswith(("_", "."))]
            if visible and own not in stores:
                self._refuse(f"it holds {visible[0]!r}, which no job wrote that is known here")
        identity = {"version": _VERSION, "store": self._store_id, "operator": self._operator_id}
        self._files.replace(claim, json.dumps(identity).encode())

    def stage(
        self, roll: str, batches: Sequence[pa.RecordBatch], partition_by: Sequence[str], compression: str
    ) -> None:
        """Write a roll where no reader looks; durable on return. After a failure it is written anew."""
        directory = self._staging(roll)
        table = pa.Table.from_batches(batches)
        entries = []
        for number, (place, rows) in enumerate(partition(table, partition_by)):
            staged = f"{directory}/{number}.parquet"
            size = _write_parquet(self._files, staged, rows, compression)
            final = f"part-{roll}-{number}-{_safe(self._operator_id)}-{_safe(self._store_id)[:8]}.parquet"
            final = f"{place}/{final}" if place else final
            entries.append({"staged": staged, "final": final, "rows": rows.num_rows, "bytes": size})
        index = {
            "version": _VERSION,
            "store": self._store_id,
            "operator": self._operator_id,
            "roll": roll,
            "rows": table.num_rows,
            "files": entries,
        }
        self._files.replace(f"{directory}/index.json", json.dumps(index).encode())

    def publish(self, roll: str) -> None:
        """Move the files of a committed roll to their final names and log it. Idempotent.

        Raises `OutputVanishedError` when something else deleted what was committed.
        """
        if self._is_logged(roll):
            # Whoever wrote the entry may have stopped before its name was durable.
            self._files.sync([self._log(roll).rpartition("/")[0]])
        else:
            index = _decode(self._files.read(f"{self._staging(roll)}/index.json"))
            if index is not None:
                self._move(index)
                self._files.sync({entry["final"].rpartition("/")[0] for entry in index["files"]})
                self._files.replace(self._log(roll), json.dumps(index).encode())
            elif not self._is_logged(roll):  # else another process was just done with it
                raise OutputVanishedError(
                    f"{self._path}: committed output vanished: neither {self._staging(roll)}/index.json "
                    f"nor {self._log(roll)} is there"
                )
        self._files.remove_tree(self._staging(roll))

    def drop_orphans(self) -> None:
        """Delete all that this job still has staged: after its committables are published, nothing committed."""
        self._files.remove_tree(f"{_STAGING}/{self._area}")

    def _move(self, index: Mapping[str, Any]) -> None:
        for entry in index["files"]:
            try:
                self._files.move(entry["staged"], entry["final"])
            except FileNotFoundError as e:
                if not self._files.exists(entry["final"]):
                    raise OutputVanishedError(
                        f"{self._path}: committed output vanished: {entry['final']} ({entry['rows']} rows) "
                        f"is neither there nor staged as {entry['staged']}"
                    ) from e

    def _is_logged(self, roll: str) -> bool:
        return _decode(self._files.read(self._log(roll))) is not None

    def _staging(self, roll: str) -> str:
        return f"{_STAGING}/{self._area}/{roll}"

    def _log(self, roll: str) -> str:
        return f"{_COMMITTED}/{self._area}/{roll}.json"

    def _count_entries(self, store: str) -> int:
        operators = self._files.names(f"{_COMMITTED}/{store}")
        return sum(_is_entry(n) for o in operators for n in self._files.names(f"{_COMMITTED}/{store}/{o}"))

    def _refuse(self, reason: str) -> None:
        raise SinkOccupiedError(
            f"{self._operator_id}: {self._path} is not this job's: {reason}; "
            "use an empty directory, or existing='append' to add to it"
        )


def _write_parquet(files: OutputFiles, name: str, rows: pa.Table, compression: str) -> int:
    size = 0

    def content(file: BinaryIO) -> None:
        nonlocal size
        pq.write_table(rows, file, compression=compression)
        size = file.tell()

    files.write(name, content)
    return size


def _decode(data: bytes | None) -> dict[str, Any] | None:
    """An index or log entry; None if it is missing, or torn by a filesystem without atomic writes."""
    try:
        entry = None if data is None else json.loads(data)
    except ValueError:
        return None
    if not isinstance(entry, dict):
        return None
    if entry["version"] > _VERSION:
        raise UnsupportedFormatError(f"sink index of version {entry['version']}: this release reads up to {_VERSION}")
    return entry


def _is_entry(name: str) -> bool:
    """Neither a claim nor what a crash left of one that was being written."""
    return name.endswith(".json") and name != _CLAIM


def _published(entry: Mapping[str, Any]) -> PublishedRoll:
    return PublishedRoll(
        store_id=entry["store"],
        operator_id=entry["operator"],
        roll=entry["roll"],
        rows=entry["rows"],
        files=tuple(PublishedFile(name=f["final"], rows=f["rows"], bytes=f["bytes"]) for f in entry["files"]),
    )


def _safe(text: str) -> str:
    """A file name component for an id; different ids have different ones."""
    name = quote(text, safe=" +,@~")
    if len(name) > _NAME_CHARS_MAX:
        name = f"{name[: _NAME_CHARS_MAX - 17]}-{xxhash.xxh3_64_hexdigest(text.encode())}"
    return f"%{name}" if name.startswith((".", "_")) else name
