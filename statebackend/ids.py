"""Identifiers: small typed values, each with one meaning."""

from __future__ import annotations

from typing import NewType

__all__ = ["AttemptId", "CheckpointId", "ManifestNumber", "SequenceNumber", "StoreId", "WriterEpoch", "WriterId"]

ManifestNumber = NewType("ManifestNumber", int)
"""Place of a manifest in the store's history; grows by one, never used twice."""

WriterEpoch = NewType("WriterEpoch", int)
"""Fencing token of a writer; the writer with the highest one owns the store."""

CheckpointId = NewType("CheckpointId", int)
"""Number of one cut through the stream; grows, never used twice in a store."""

SequenceNumber = NewType("SequenceNumber", int)
"""Order in which one writer froze its MemTables."""

StoreId = NewType("StoreId", str)
"""Random identity of a store, given when it is created."""

WriterId = NewType("WriterId", str)
"""Random identity of one opening of a store for writing."""

AttemptId = NewType("AttemptId", str)
"""Random identity of one attempt to commit one manifest."""
