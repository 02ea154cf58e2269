"""The locks hold what the project asks for, by hash, and nothing of training."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked(name: str) -> dict[str, Version]:
    lines = (ROOT / "deploy/lock" / f"{name}.txt").read_text().splitlines()
    pins = [match for line in lines if (match := re.match(r"([A-Za-z0-9_.-]+)==(\S+)", line))]
    return {canonicalize_name(match[1]): Version(match[2]) for match in pins}


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("cpu", [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["cpu"]]),
        ("gpu", [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["gpu"]]),
        ("build", PROJECT["build-system"]["requires"]),
    ],
)
def test_a_lock_holds_what_is_asked_for(name: str, asked: list[str]) -> None:
    """After a change of dependencies: `make lock`."""
    pins = locked(name)
    for requirement in map(Requirement, asked):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in the lock: make lock"
        assert requirement.specifier.contains(version), f"{requirement} against {version}: make lock"
    assert not {"torch", "onnx", "huggingface-hub", "pip"} & set(pins)


@pytest.mark.parametrize("name", ["cpu", "gpu", "build"])
def test_every_pin_has_hashes_and_no_place(name: str) -> None:
    """So that an index that was broken into cannot give something else; and no address of any index stands in it."""
    text = (ROOT / "deploy/lock" / f"{name}.txt").read_text()
    blocks = re.split(r"\n(?=[A-Za-z0-9])", text.strip())
    assert len(blocks) == len(locked(name))
    for block in blocks:
        assert "--hash=sha256:" in block, block.splitlines()[0]
    assert "://" not in text


def test_images_are_built_from_the_locks_alone() -> None:
    """No pip install without hashes, but for the wheel of this project."""
    dockerfile = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    installs = [line for line in dockerfile.splitlines() if "pip" in line and " install " in line]
    assert len(installs) == 5
    for line in installs:
        assert "--require-hashes" in line or ("--no-index" in line and "--no-deps" in line), line
    assert "# syntax=" not in dockerfile
