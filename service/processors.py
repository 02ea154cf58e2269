"""How many processors this process may use and what they can do, and how the engine's work is divided over them."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from service.settings import Settings

_FEWEST_ROWS = 16
"""Of a worker that nobody asked for."""


@dataclass(frozen=True, slots=True)
class Division:
    """So many workers, each with so many threads for a call into ONNX Runtime and so many rows."""

    workers: int
    threads: int
    rows: int

    @classmethod
    def of(cls, settings: Settings, *, on_gpu: bool) -> Self:
        """By the settings; what they leave open is a worker for each processor, or one where a GPU does the work."""
        processors = usable_processors()
        # Many beams need many rows in one worker, so rows are not divided until few are left.
        by_itself = 1 if on_gpu else min(processors // (settings.threads or 1), settings.max_rows // _FEWEST_ROWS)
        workers = min(settings.workers or max(1, by_itself), settings.max_rows)
        return cls(workers, settings.threads or max(1, processors // workers), settings.max_rows // workers)


def usable_processors(root: Path = Path("/")) -> int:
    """At least 1. Reads cgroup v2 (`cpu.max`) and v1 (`cpu.cfs_quota_us`) as a container sees them, under `root`."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(root / "sys/fs/cgroup")
    return max(1, count if quota is None else min(count, math.ceil(quota)))


def has_vnni(root: Path = Path("/")) -> bool:
    """Whether an x86 processor is known to add products of bytes in 32 bits, as AVX512-VNNI and AVX-VNNI do. One
    without them adds two of them in 16, where they saturate. False where nothing is known, and of other processors.
    """
    try:
        flags = re.search(r"^flags\s*:(.*)$", (root / "proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags[1].split())


def _quota(cgroup: Path) -> float | None:
    """Processors' worth of time that the container gets, None without a limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        pass
    try:
        quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text()
        period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
