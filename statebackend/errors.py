"""One exception tree, cut by what the caller does next.

::

    StateStoreError
      FencedError               a newer writer owns the store: stop, never retry
      CommitConflictError       another commit came first: reload, apply again
      CompactorSupersededError  another compactor claimed the merges: abandon one's own, end quietly
      CommitUnknownError        the outcome is unknown: read back before anything else
      StorageUnavailableError   transient: retry with backoff
        StorageFullError        the disk or quota is full: free space, then retry
      CorruptionError           bytes are wrong: stop; the message names the object
        UnsupportedFormatError  written by a newer version: upgrade, then read
      ObjectMissingError        an object that must exist is gone: stop; names the object
      CheckpointNotFoundError   no such checkpoint in this store
        CheckpointGoneError     it was there, and is kept no longer: open another one
      SchemaMismatchError       the table, plan or job differs from the one in the store
      UnsupportedAggregateError an aggregate that cannot be kept as state: rewrite the query
      StoreClosedError          closed, or unusable after a failure or a fork: open again
      AtomicCreateError         the filesystem cannot create a file only if it is absent

Wrong arguments are ``ValueError`` or ``TypeError``. Every message names the object, what was
expected and what was found.
"""

from __future__ import annotations

__all__ = [
    "AtomicCreateError",
    "CheckpointGoneError",
    "CheckpointNotFoundError",
    "CommitConflictError",
    "CommitUnknownError",
    "CompactorSupersededError",
    "CorruptionError",
    "FencedError",
    "ObjectMissingError",
    "SchemaMismatchError",
    "StateStoreError",
    "StorageFullError",
    "StorageUnavailableError",
    "StoreClosedError",
    "UnsupportedAggregateError",
    "UnsupportedFormatError",
]


class StateStoreError(Exception):
    """Base of every error that the state store raises on purpose."""


class FencedError(StateStoreError):
    """A newer writer owns the store. Stop; retrying cannot help and nothing was written."""


class CommitConflictError(StateStoreError):
    """Another commit took the manifest number. Reload, apply the change again, commit."""


class CompactorSupersededError(StateStoreError):
    """A newer compactor claimed the store's merges. Nothing is wrong: its work is abandoned, and it ends."""


class CommitUnknownError(StateStoreError):
    """The outcome of a commit is unknown. Delete and abort nothing until a later manifest decides."""


class StorageUnavailableError(StateStoreError):
    """The storage failed in a way that may pass. Retry with backoff."""


class StorageFullError(StorageUnavailableError):
    """The disk or the quota is full. Nothing is lost; free space and retry."""


class CorruptionError(StateStoreError):
    """The bytes of an object are not what was written. The message names the object."""


class UnsupportedFormatError(CorruptionError):
    """The object was written in a newer format. The message holds both versions."""


class ObjectMissingError(StateStoreError):
    """An object does not exist. The message names it."""


class CheckpointNotFoundError(StateStoreError):
    """The store holds no such checkpoint."""


class CheckpointGoneError(CheckpointNotFoundError):
    """The checkpoint that is being read is kept no longer: retention took it, or the lease on it ended. Open again."""


class SchemaMismatchError(StateStoreError):
    """A table, an aggregation or a job differs from the one that the store holds."""


class UnsupportedAggregateError(StateStoreError):
    """An aggregate function whose partial state cannot be kept; the message names it."""


class StoreClosedError(StateStoreError):
    """The store was closed, failed for good, or was inherited through ``fork``."""


class AtomicCreateError(StateStoreError):
    """The filesystem has no atomic create-if-absent, so two writers could not be told apart."""
