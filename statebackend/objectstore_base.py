"""The storage seam: six methods over named, immutable-in-practice blobs.

Everything durable goes through `ObjectStore`. A name is a relative POSIX path ("manifest/0042.manifest").
Implementations: ``objectstore.py`` (fsspec) and ``objectstore_obstore.py``; around them retrying, counting and
checking wrappers: ``objectstore_wrappers.py``.

Invariants:
* ``put`` and ``put_if_absent`` return only when the object is durable, and nobody ever reads part of one.
* Of all callers that ever create one name with ``put_if_absent``, at most one gets ``CREATED``.
* Every failure of the storage is a `StateStoreError` that names the object and keeps its cause.
* No message holds a credential.
"""

from __future__ import annotations

import errno
from enum import Enum
from typing import Protocol, TypeAlias
from urllib.parse import urlsplit

import pyarrow as pa

from statebackend.errors import ObjectMissingError, StateStoreError, StorageFullError, StorageUnavailableError

__all__ = [
    "TEMP_PREFIX",
    "Data",
    "ObjectStore",
    "PutResult",
    "RefusedError",
    "check_name",
    "check_url",
    "is_refusal",
    "translated",
]

TEMP_PREFIX = ".tmp-"
"""File names with this prefix are unfinished writes; a crash leaves them behind and no listing shows them."""

Data: TypeAlias = "bytes | memoryview | pa.Buffer"


class PutResult(Enum):
    """The two expected outcomes of `ObjectStore.put_if_absent`."""

    CREATED = "created"
    EXISTS = "exists"


class ObjectStore(Protocol):
    """Where the bytes are. Any method may raise `StorageUnavailableError` (or `StorageFullError`).

    Such an error says nothing about the effect: a write that raised may have happened, or may still
    happen later (a lost response, a timeout).
    """

    async def get(self, name: str) -> bytes:
        """The whole object. Raises `ObjectMissingError`."""

    async def get_range(self, name: str, start: int, end: int | None = None) -> bytes:
        """Bytes ``[start, end)`` with the meaning of a Python slice.

        A negative ``start`` counts from the end, ``end=None`` is the end. A range beyond the object
        returns what there is: the caller knows the length it expects. Raises `ObjectMissingError`.
        """

    async def put(self, name: str, data: Data) -> None:
        """Create or replace the object; durable when it returns, readers see the old or the new one."""

    async def put_if_absent(self, name: str, data: Data) -> PutResult:
        """Create the object unless there is one; durable when it returns.

        Of any number of racing callers, in any processes, exactly one gets ``CREATED``; ``EXISTS``
        means that a complete, durable object of this name is there. After an error the caller may meet its own
        object as ``EXISTS``: only the caller can recognise its own bytes.
        """

    async def list(self, prefix: str) -> list[str]:
        """All names that start with ``prefix``, sorted.

        Complete with respect to every write that returned before the call. Not of one moment: what is created or
        deleted meanwhile may be shown or not, and what was deleted before may still be shown.
        """

    async def delete(self, name: str) -> None:
        """Remove the object; it is fine if there is none. Deletes become durable in the order they return."""

    def describe(self) -> str:
        """The URL of the store for messages, without credentials."""


class RefusedError(PermissionError):
    """The cause of a `StorageUnavailableError` that an operator must mend: the storage answered, and refused."""


def check_name(name: str, *, is_object: bool = True) -> None:
    """Raise ``ValueError`` unless ``name`` is a relative path that stays below the root."""
    parts = name.split("/")
    if any(part in (".", "..") or part.startswith(TEMP_PREFIX) for part in parts) or (is_object and not all(parts)):
        raise ValueError(f"object name {name!r}: must be a relative path, without '.', '..' and {TEMP_PREFIX!r}")


def check_url(url: str) -> None:
    """Raise ``ValueError`` if the URL holds a password: it would be in every message and log."""
    if "://" in url and "@" in urlsplit(url).netloc:
        scheme, _, rest = url.partition("://")
        raise ValueError(f"{scheme}://***@{rest.rpartition('@')[2]}: credentials belong in storage_options")


_PASSING_STATUS = {408, 409, 425, 429}
_PASSING_CODES = {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"}


def is_refusal(status: int, code: str) -> bool:
    """Whether an HTTP store that answered with this status and S3 error code would answer the same again."""
    answered = 300 <= status < 500 or status == 501
    return answered and status not in _PASSING_STATUS and code not in _PASSING_CODES


def needs_operator(error: StorageUnavailableError) -> bool:
    """Whether trying again within seconds is pointless: a full disk, a refusal, a path or a size that cannot be."""
    cause = error.__cause__
    if isinstance(error, StorageFullError) or isinstance(cause, PermissionError):
        return True
    return isinstance(cause, OSError) and cause.errno in (
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EROFS,
        errno.ENAMETOOLONG,
        errno.EFBIG,
    )


def translated(error: OSError, action: str, where: str) -> StateStoreError:
    """The error a caller can act on.

    Lost permission is "unavailable" as well: it passes once an operator has given it back, and until
    then nothing is lost. It is not worth a quick retry, though; see `RetryingObjectStore`.
    """
    if isinstance(error, FileNotFoundError) and action == "read":
        return ObjectMissingError(f"no object {where}")
    cause = f"{type(error).__name__}: {error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFullError(f"cannot {action} {where}: no space left or quota exceeded ({cause})")
    if isinstance(error, TimeoutError):
        return StorageUnavailableError(
            f"cannot {action} {where}: no answer in time; it may still take effect ({cause})"
        )
    return StorageUnavailableError(f"cannot {action} {where}: {cause}")
