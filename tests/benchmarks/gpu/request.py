"""What one part of the measurement is asked for: which artifact, on which provider, how much of it."""

from __future__ import annotations

import importlib
import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from service.artifact import Artifact, Manifest
from service.runner import Runner
from service.settings import Settings

Provider = Literal["cuda", "cpu"]

PROVIDERS: dict[Provider, str] = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
DEVICES: dict[Provider, str] = {"cuda": "cuda", "cpu": "cpu"}
"""Where ONNX Runtime keeps what a provider computes, in its own word."""


@dataclass(frozen=True)
class Request:
    """Plain values, so that another process can be asked the same."""

    provider: Provider
    artifact: Path | None = None
    rows: tuple[int, ...] = (1, 8, 32, 128, 512)
    device_id: int = 0
    threads: int = 0
    bandwidth: float | None = None
    """Of the device's memory, bytes per second; None if nobody knows."""
    steps: int = 48
    """Decoder steps that are timed, at most."""
    sources: int = 24
    """Different texts that are compared."""
    new_tokens: int = 40
    """Tokens generated for each of them, at most."""
    concurrency: tuple[int, ...] = (64, 512)
    """Sequences at once in the whole service."""
    checkpoint: Path | None = None
    """Where an export on the spot takes its weights from; None for random ones of the base size."""
    precision: Literal["fp16", "fp32"] = "fp16"
    """What it makes of them."""
    directory: Path | None = None
    """Where it puts the artifact."""

    @property
    def name(self) -> str | None:
        """What to call the artifact in a report."""
        return None if self.artifact is None else self.artifact.name

    @property
    def device(self) -> str:
        """Where the provider's memory is."""
        return DEVICES[self.provider]

    def load(self) -> Artifact:
        """The artifact, verified."""
        assert self.artifact is not None
        return Artifact.load(self.artifact)

    def settings(self, **changes: Any) -> Settings:
        """Those of a service on this provider."""
        return Settings(provider=self.provider, device_id=self.device_id, threads=self.threads, **changes)

    def open_runner(self) -> Runner:
        """The artifact's graphs, as the service opens them."""
        load_libraries(self.provider)
        return Runner(self.load(), self.settings())


def load_libraries(provider: Provider) -> None:
    """PyTorch first, if it is there: its CUDA libraries are then those that ONNX Runtime finds."""
    if provider == "cuda":
        if importlib.util.find_spec("torch") is not None:
            importlib.import_module("torch")
        importlib.import_module("onnxruntime").preload_dlls()


def sources_of(manifest: Manifest, count: int, longest: int = 48) -> list[list[int]]:
    """So many different sources: those of the self-test, pairs of them, and random ids where these are too few."""
    longest = min(longest, manifest.max_source_tokens)
    tests = [test.source_ids for test in manifest.self_test if len(test.source_ids) <= longest]
    pairs = [[*first[:-1], *second] for first in tests for second in tests]
    found = {tuple(source): None for source in [*tests, *pairs] if len(source) <= longest}
    rng = random.Random(1)
    while len(found) < count:
        found[tuple(random_source(manifest, rng, rng.randint(1, longest)))] = None
    return [list(source) for source in rng.sample(list(found), count)]


def random_source(manifest: Manifest, rng: random.Random, length: int) -> list[int]:
    """Ordinary token ids and the end token, `length` in all."""
    special = manifest.special_tokens
    first = max(special.pad_id, special.bos_id, special.eos_id) + 1
    return [*(rng.randrange(first, manifest.vocab_size) for _ in range(length - 1)), special.eos_id]
