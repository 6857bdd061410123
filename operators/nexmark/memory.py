"""The peak of a process's memory."""

from __future__ import annotations

import resource
from pathlib import Path

__all__ = ["peak_bytes"]


def peak_bytes() -> int:
    """Of this program. On Linux ``getrusage`` would tell the peak of who started it, where that is larger."""
    status = Path("/proc/self/status")
    if status.exists():
        (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
