"""The machine that a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import datafusion
import numpy as np
import pyarrow as pa

__all__ = ["describe_machine"]


def describe_machine() -> dict[str, str | int | float]:
    """Processor, cores, memory and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "pyarrow": pa.__version__,
        "datafusion": datafusion.__version__,
        "numpy": np.__version__,
    }
