"""Windows of several kinds over the same rows: one pass makes partial states, which all kinds merge.

The operator is `WindowAggregate` over a `WindowSet`. What differs is where results go: each kind has an output of its
own, with an event time of its own, so that short windows are not held back by long ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from operators.runtime import Output
from operators.stateful.window_aggregate import WindowAggregate, WindowNode
from operators.windows import MAX_WATERMARK, Int64Array, WindowSet

__all__ = ["SharedWindowAggregate", "SharedWindowNode"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedWindowNode(WindowNode):
    """Windowed aggregations of one pass. Output i: the windows of kind i; the last: rows too late for all of them."""

    windows: WindowSet

    @property
    def output_names(self) -> tuple[str, ...]:
        """The kinds of windows, and the rows that came too late."""
        sizes = ((str(kind.length), str(kind.slide)) for kind in self.windows.kinds)
        return (*("-".join(dict.fromkeys(size)) for size in sizes), "late")

    @property
    def _verb(self) -> str:
        return "windows"

    def _operator_type(self) -> type[WindowAggregate]:
        return SharedWindowAggregate


class SharedWindowAggregate(WindowAggregate):
    """The operator."""

    _windows: WindowSet

    def __init__(self, operator_id: str, *, windows: WindowSet, **options: Any) -> None:
        super().__init__(operator_id, windows=windows, **options)
        self._kinds = tuple(Output() for _ in windows.kinds)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """One per kind of windows, and the rows that came too late for all of theirs."""
        return (*self._kinds, self.late)

    def _hand_on(self, watermark: int) -> None:
        for output, kind in zip(self._kinds, self._windows.kinds, strict=True):
            behind = 0 if watermark == MAX_WATERMARK else kind.length + kind.allowed_lateness
            output.advance(watermark - behind)

    def _emit_windows(self, windows: Int64Array, rows: pa.RecordBatch) -> None:
        kinds = self._windows.kind_of(windows)
        for number in np.unique(kinds).tolist():
            self._kinds[number].emit(rows.filter(pa.array(kinds == number)))
