"""The memory of the process: what it may have, what it has, and what was promised to models and is not used yet.

A process whose buffers grow beyond what there is would be killed in the middle of its work; so that is found out when
a model is loaded. Host memory alone: a GPU's is ONNX Runtime's to give.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

from service.errors import SettingsError

MIB = 2**20


class Memory:
    """Shared by the engines of a process, each on its own thread: single reads and writes of a dict."""

    def __init__(self, root: Path = Path("/")) -> None:
        """`root` is where /proc and /sys are."""
        self._root = root
        self.limit = memory_limit(root)
        """Bytes, None if nothing is known."""
        self._promised: dict[object, Callable[[], int]] = {}

    @property
    def resident(self) -> int:
        """Bytes that the process has now, 0 if nothing is known."""
        return resident_bytes(self._root)

    @property
    def expected(self) -> int:
        """Bytes that it comes to if every buffer grows to its end."""
        return self.resident + sum(left() for left in list(self._promised.values()))

    def promise(self, owner: object, left: Callable[[], int]) -> None:
        """The owner's buffers may grow by so many bytes. Raises SettingsError if that is more than there is."""
        self._promised[owner] = left
        self.require()

    def require(self) -> None:
        """Raises SettingsError, with the remedy, if the process may grow beyond its limit."""
        if self.limit is not None and self.expected > self.limit:
            raise SettingsError(
                f"the process has {self.resident / MIB:,.0f} MiB and its models' states can grow until it has "
                f"{self.expected / MIB:,.0f}, more than the {self.limit / MIB:,.0f} MiB there are: lower --max-rows, "
                "or give it more memory"
            )

    def release(self, owner: object) -> None:
        """It is no more."""
        self._promised.pop(owner, None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes: the least of the container's limit (cgroup v2 `memory.max`, v1 `memory.limit_in_bytes`) and the machine's
    memory.
    """
    found = [_number(root / "sys/fs/cgroup" / name) for name in ("memory.max", "memory/memory.limit_in_bytes")]
    found.append(_field(root / "proc/meminfo", "MemTotal:"))
    return min((limit for limit in found if limit is not None), default=None)


def resident_bytes(root: Path = Path("/")) -> int:
    """Of this process, 0 where /proc does not tell."""
    return _field(root / "proc/self/status", "VmRSS:") or 0


def give_back() -> None:
    """Give memory back to the system after much was let go. Takes a tenth of a second."""
    gc.collect()  # an engine and its threads know one another
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed between blocks that are in use


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # ValueError: "max"
        return None


def _field(path: Path, name: str) -> int | None:
    """A line `NAME: 123 kB`, in bytes."""
    try:
        for line in path.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
