"""Fields of log records, so that records of all modules can be filtered and joined alike.

Every record of this package carries the same attributes, None where they do not apply::

    store_id  checkpoint_id  table  object  duration_s

Levels: DEBUG one object; INFO what happens once per checkpoint, compaction, collection or opening, and what was tried
again; WARNING what failed and will be tried again or does without; ERROR what ends the store.
"""

from __future__ import annotations

from typing import Any

__all__ = ["context"]


def context(
    *,
    store_id: str | None = None,
    checkpoint_id: int | None = None,
    table: str | None = None,
    object: str | None = None,  # noqa: A002  (the word of the storage seam)
    duration_s: float | None = None,
) -> dict[str, Any]:
    """The ``extra`` of a logging call."""
    return {
        "store_id": store_id,
        "checkpoint_id": checkpoint_id,
        "table": table,
        "object": object,
        "duration_s": duration_s,
    }
