"""Stages rolls and publishes them: the commit protocol of the file sinks.

A roll is what one checkpoint writes out. Its life, below the sink's directory::

    _staging/<store>/<operator>/<roll>/0.parquet ...     complete files, synced
    _staging/<store>/<operator>/<roll>/index.json        written last: names, final names, rows, checksums
      -- the manifest that names the roll is committed --
    origin=EWR/part-<roll>-0.parquet ...                 each file moved to its final name
    _committed/<store>/<operator>/<roll>.json            the same index, in the commit log (`commit_log.py`)
      -- _staging/.../<roll> is deleted --

Invariants:

* A file is at its final name only after the manifest that names its roll was committed, and it is
  complete there; so a reader that passes over ``_*`` sees committed rows only. One that wants whole rolls
  only reads the files of the commit log (`published_rolls`, `read_published`).
* The commit log entry is durable before the staged index is deleted, and written after every
  file of the roll is durable at its final name. So each step of publishing can be repeated after a
  crash, also by another process at the same time.
* Nothing is deleted but what this store and operator staged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO
from urllib.parse import quote

import pyarrow as pa
import xxhash

from operators.errors import OutputVanishedError, SinkOccupiedError
from operators.sinks.commit_log import CLAIM, COMMITTED, VERSION, decode, encode, is_entry
from operators.sinks.files import OutputFiles
from operators.sinks.formats import FileFormat
from operators.sinks.partitions import partition

__all__ = ["Rolls"]

_STAGING = "_staging"
_NAME_CHARS_MAX = 60


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
        claim = f"{COMMITTED}/{self._area}/{CLAIM}"
        own = _safe(self._store_id)
        if self._files.exists(claim):
            return
        if not shared:
            stores = self._files.names(COMMITTED)
            for store in stores:
                if store != own and (entries := self._count_entries(store)):
                    self._refuse(f"it holds {entries} commits of the store {store!r}, this one is {self._store_id!r}")
            visible = [n for n in self._files.names("") if not n.startswith(("_", "."))]
            if visible and own not in stores:
                self._refuse(f"it holds {visible[0]!r}, which no job wrote that is known here")
        identity = {"version": VERSION, "store": self._store_id, "operator": self._operator_id}
        self._files.replace(claim, json.dumps(identity).encode())

    def stage(
        self, roll: str, batches: Sequence[pa.RecordBatch], partition_by: Sequence[str], format_: FileFormat
    ) -> None:
        """Write a roll where no reader looks; durable on return. After a failure it is written anew."""
        directory = self._staging(roll)
        table = pa.Table.from_batches(batches)
        entries = []
        for number, (place, rows) in enumerate(partition(table, partition_by)):
            staged = f"{directory}/{number}{format_.suffix}"
            written = _write(self._files, staged, rows, format_)
            final = f"part-{roll}-{number}-{_safe(self._operator_id)}-{_safe(self._store_id)[:8]}{format_.suffix}"
            final = f"{place}/{final}" if place else final
            size = {"rows": rows.num_rows, "bytes": written.bytes, "check": written.check}
            entries.append({"staged": staged, "final": final, **size})
        index = encode(
            store_id=self._store_id,
            operator_id=self._operator_id,
            roll=roll,
            rows=table.num_rows,
            format=format_.details,
            schema=table.schema,
            partition_by=partition_by,
            files=entries,
        )
        self._files.replace(f"{directory}/index.json", index)

    def publish(self, roll: str) -> None:
        """Move the files of a committed roll to their final names and log it. Idempotent.

        Raises `OutputVanishedError` when something else deleted what was committed.
        """
        if self._is_logged(roll):
            # Whoever wrote the entry may have stopped before its name was durable.
            self._files.sync([self._log(roll).rpartition("/")[0]])
        else:
            staged = f"{self._staging(roll)}/index.json"
            data = self._files.read(staged)
            index = decode(data, f"{self._path}/{staged}")
            if data is not None and index is not None:
                self._move(index)
                self._files.sync({entry["final"].rpartition("/")[0] for entry in index["files"]})
                self._files.replace(self._log(roll), data)
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
        return decode(self._files.read(self._log(roll)), f"{self._path}/{self._log(roll)}") is not None

    def _staging(self, roll: str) -> str:
        return f"{_STAGING}/{self._area}/{roll}"

    def _log(self, roll: str) -> str:
        return f"{COMMITTED}/{self._area}/{roll}.json"

    def _count_entries(self, store: str) -> int:
        operators = self._files.names(f"{COMMITTED}/{store}")
        return sum(is_entry(n) for o in operators for n in self._files.names(f"{COMMITTED}/{store}/{o}"))

    def _refuse(self, reason: str) -> None:
        raise SinkOccupiedError(
            f"{self._operator_id}: {self._path} is not this job's: {reason}; "
            "use an empty directory, or existing='append' to add to it"
        )


class _Counted:
    """A file that is written once: counts its bytes and computes their checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = xxhash.xxh3_64()
        self.closed = False
        self.bytes = 0

    @property
    def check(self) -> str:
        """Of all bytes so far, as the commit log writes it."""
        return self._hash.hexdigest()

    def write(self, data: Any) -> int:
        self._file.write(data)
        self._hash.update(data)
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True


def _write(files: OutputFiles, name: str, rows: pa.Table, format_: FileFormat) -> _Counted:
    counted: list[_Counted] = []

    def content(file: BinaryIO) -> None:
        counted.append(_Counted(file))
        format_.write(rows, counted[-1])  # type: ignore[arg-type]

    files.write(name, content)
    return counted[-1]


def _safe(text: str) -> str:
    """A file name component for an id; different ids have different ones."""
    name = quote(text, safe=" +,@~")
    if len(name) > _NAME_CHARS_MAX:
        name = f"{name[: _NAME_CHARS_MAX - 17]}-{xxhash.xxh3_64_hexdigest(text.encode())}"
    return f"%{name}" if name.startswith((".", "_")) else name
