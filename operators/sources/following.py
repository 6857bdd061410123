"""A directory that grows: every file that appears in it is read once, in the order of names or of modification times.

What is known of the files before a place is bounded, whatever their number:

* by name: only the name of the latest file. A file that appears under a name that sorts before it is never read,
  so writers must name files in the order in which they appear (times or counters in the names);
* by time: the names (16 bytes each) of the files read so far that are in the directory and not older than
  ``lookback_seconds`` before the newest of them. A file that appears with an older modification time is never read.

The directory is listed when all files that were found are read, and not more often than every ``poll_seconds``. A
position holds::

    {"file": name, "offset": rows or bytes within it, "rows": rows so far, "size": its bytes, "check": its fingerprint,
     "ended": whether all its rows are read, "time": its modification time in ns,
     "seen": by time: 8 bytes hash of the name and 8 of the size, for each file that was read before}
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import xxhash

from operators.errors import BadInputError, SourceChangedError
from operators.sources.base import Position
from operators.sources.files import FileList, Found, InputFile

__all__ = ["Follow", "FollowedFiles"]

_SEEN = struct.Struct("<QQ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Follow:
    """How a directory is followed.

    ``order``: of the files, by ``"name"`` or by modification ``"time"``; see the module for what each asks of writers.
    ``poll_seconds``: between two listings, at least; each costs a request for every thousand files on an object store.
    ``settle_seconds``: a file is read once its size and time have not changed for so long; 0: as soon as it is
    seen, for writers that move whole files into the directory, or write to an object store.
    ``lookback_seconds``: by time, how much older than the newest a file may be and still be noticed.
    ``clock``: monotonic seconds.
    """

    order: Literal["name", "time"] = "name"
    poll_seconds: float = 1.0
    settle_seconds: float = 0.0
    lookback_seconds: float = 3600.0
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        if self.order not in ("name", "time"):
            raise ValueError(f"order must be 'name' or 'time', not {self.order!r}")
        if self.poll_seconds <= 0 or self.settle_seconds < 0 or self.lookback_seconds < 0:
            raise ValueError("poll_seconds must be positive, settle_seconds and lookback_seconds not negative")


@dataclass(slots=True)
class _Place:
    """How far the files are read: all up to the file ``name``, and by time those in ``seen``, name hash to size."""

    name: str | None = None
    time_ns: int = 0
    seen: dict[int, int] = field(default_factory=dict)
    packed: bytes | None = None
    """``seen`` as a position holds it, once it was asked for."""

    def pack(self) -> bytes:
        """Made once for all positions in a file."""
        if self.packed is None:
            self.packed = b"".join(_SEEN.pack(name, size) for name, size in sorted(self.seen.items()))
        return self.packed


class FollowedFiles:
    """The files of a directory as they appear; see the module. Everything but `stop` is called from one thread."""

    def __init__(self, files: FileList, follow: Follow) -> None:
        self._list = files
        self._follow = follow
        self._stopped = threading.Event()
        self._listed_at: float | None = None
        self._settling: dict[str, tuple[tuple[int, int], float]] = {}
        self._place = _Place()
        self._found: dict[str, Found] = {}
        self._rows = 0

    @property
    def rows(self) -> int:
        """Rows before the position that `walk` was begun at."""
        return self._rows

    def peek(self) -> InputFile | None:
        """The first file there is, to take columns from."""
        names = sorted(self._list.find().items(), key=self._key)
        return self._list.identify(*names[0]) if names else None

    def walk(self, position: Position | None) -> Iterator[tuple[InputFile, int]]:
        """The files from a position on, with where to begin in each; waits for more until `stop`.

        Raises `SourceChangedError` if the file that was being read at the position is not what it was.
        """
        self._stopped.clear()
        self._listed_at = None
        self._settling.clear()
        self._place, self._rows = _Place(), 0
        if position is not None:
            self._rows = position["rows"]
            yield from self._resume(position)
        while not self._stopped.is_set():
            for name, there in self._new():
                if self._stopped.is_set():
                    return
                self._found[name] = there
                yield self._list.identify(name, there), 0
                self._passed(name, there)

    def position(self, file: InputFile, offset: int, rows: int, *, ended: bool) -> Position:
        """The position ``offset`` into a file that `walk` gave."""
        there = self._found[file.name]
        return {
            "file": file.name,
            "offset": offset,
            "rows": rows,
            "size": file.size,
            "check": file.check,
            "ended": ended,
            "time": there.time_ns,
            "seen": self._place.pack(),
        }

    def stop(self) -> None:
        """End the waiting of `walk`; from any thread."""
        self._stopped.set()

    def _resume(self, position: Position) -> Iterator[tuple[InputFile, int]]:
        seen = dict(_SEEN.iter_unpack(position["seen"]))
        name, there = position["file"], Found(self._list.path_of(position["file"]), position["size"], position["time"])
        if not position["ended"]:
            try:
                file = self._list.identify(name, there)
            except BadInputError as e:
                raise SourceChangedError(name, expected=f"{position['size']} bytes", found=str(e)) from e
            if (file.size, file.check) != (position["size"], position["check"]):
                expected = f"{position['size']} bytes with fingerprint {position['check']:016x}"
                raise SourceChangedError(name, expected=expected, found=file.identity)
            self._place = _Place(None, 0, seen)
            self._found[name] = there
            yield file, position["offset"]
        self._place = _Place(None, 0, seen)
        self._passed(name, there)

    def _passed(self, name: str, there: Found) -> None:
        """All rows of a file are read."""
        place = self._place
        place.name = name
        place.time_ns = max(place.time_ns, there.time_ns)
        if self._follow.order == "time":
            place.seen[_hash(name)] = there.size
            place.packed = None
        self._found = {name: there}

    def _new(self) -> list[tuple[str, Found]]:
        """Files that are there and not read, in order; waits until the next listing is due."""
        follow = self._follow
        if self._listed_at is not None:
            wait_s = self._listed_at + follow.poll_seconds - follow.clock()
            if wait_s > 0 and self._stopped.wait(wait_s):
                return []
        self._listed_at = follow.clock()
        found = self._list.find()
        fresh = self._after_name(found) if follow.order == "name" else self._not_seen(found)
        if follow.settle_seconds:
            fresh = self._settled(fresh)
        return sorted(fresh.items(), key=self._key)

    def _after_name(self, found: Mapping[str, Found]) -> dict[str, Found]:
        last = self._place.name
        if last in found and last in self._found and found[last].size != self._found[last].size:
            self._refuse(last, self._found[last].size, found[last].size)
        return {name: there for name, there in found.items() if last is None or name > last}

    def _not_seen(self, found: Mapping[str, Found]) -> dict[str, Found]:
        place = self._place
        oldest = place.time_ns - int(self._follow.lookback_seconds * 1e9)
        fresh: dict[str, Found] = {}
        seen: dict[int, int] = {}
        for name, there in found.items():
            size = place.seen.get(_hash(name))
            if size is not None and size != there.size:
                self._refuse(name, size, there.size)
            if size is not None and there.time_ns >= oldest:
                seen[_hash(name)] = size
            elif size is None and there.time_ns >= oldest:
                fresh[name] = there
        place.seen, place.packed = seen, None
        return fresh

    def _settled(self, fresh: Mapping[str, Found]) -> dict[str, Found]:
        """Those that have not changed for long enough; by name, none behind one that has."""
        now = self._follow.clock()
        states = {name: (there.size, there.time_ns) for name, there in fresh.items()}
        self._settling = {
            name: known if (known := self._settling.get(name)) is not None and known[0] == state else (state, now)
            for name, state in states.items()
        }
        settled: dict[str, Found] = {}
        for name, there in sorted(fresh.items(), key=self._key):
            if now - self._settling[name][1] >= self._follow.settle_seconds:
                settled[name] = there
            elif self._follow.order == "name":
                break
        return settled

    def _key(self, item: tuple[str, Found]) -> tuple[int, str]:
        name, there = item
        return (there.time_ns if self._follow.order == "time" else 0, name)

    def _refuse(self, name: str, expected: int, found: int) -> None:
        raise SourceChangedError(
            self._list.path_of(name), expected=f"{expected} bytes, all read", found=f"{found} bytes"
        )


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())
