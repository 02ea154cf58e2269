"""The number of threads follows the container's limit, not the machine's size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.processors import has_vnni, usable_processors


def _write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def test_affinity_alone(tmp_path: Path) -> None:
    """Without a container, the processors that the process may run on."""
    assert usable_processors(tmp_path) == 8


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("max 100000", 8),
        ("9900000 100000", 8),
        ("x", 8),
    ],
)
def test_cgroup_version_2(tmp_path: Path, quota: str, expected: int) -> None:
    """cpu.max: a quota is rounded up, and never above the affinity."""
    assert usable_processors(_write(tmp_path, **{"cpu.max": quota})) == expected


@pytest.mark.parametrize(("quota", "expected"), [("300000", 3), ("-1", 8)])
def test_cgroup_version_1(tmp_path: Path, quota: str, expected: int) -> None:
    """cfs_quota_us and cfs_period_us; -1 is no limit."""
    files = {"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": "100000"}
    assert usable_processors(_write(tmp_path, **files)) == expected


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\nbugs\t\t:\n", True),
        ("flags\t\t: fpu avx2 avx_vnni\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("vmx flags\t: avx512_vnni\nflags\t\t: fpu avx2\n", False),
        ("Features\t: fp asimd asimddp\n", False),
        ("", False),
    ],
)
def test_vnni_by_the_processors_flags(tmp_path: Path, cpuinfo: str, expected: bool) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    assert has_vnni(tmp_path) is expected


def test_without_proc_no_vnni_is_known(tmp_path: Path) -> None:
    assert not has_vnni(tmp_path)
