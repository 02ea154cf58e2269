"""How many processors this process may use: the smallest of affinity and the container's quota."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_processors(root: Path = Path("/")) -> int:
    """At least 1. Reads cgroup v2 (`cpu.max`) and v1 (`cpu.cfs_quota_us`) as a container sees them, under `root`."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(root / "sys/fs/cgroup")
    return max(1, count if quota is None else min(count, math.ceil(quota)))


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
