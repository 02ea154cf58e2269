"""The machine: GPU, driver, versions, and the bandwidth of the memory that the floor of a step is worked out from."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime

from tests.benchmarks.gpu.request import PROVIDERS, Request, load_libraries

_QUERY = "name,memory.total,driver_version,compute_cap,clocks.max.sm,clocks.max.mem,power.limit"
_DEVICE_COPY_BYTES, _HOST_COPY_BYTES, _COPIES = 2**30, 2**27, 20


@dataclass(frozen=True)
class Environment:
    """What the figures depend on."""

    python: str
    system: str
    processors: int
    onnxruntime: str
    build: str
    providers: list[str]
    torch: str | None
    cuda: str | None
    """The version of CUDA that PyTorch was built with."""
    gpu: dict[str, str]
    """As nvidia-smi says."""
    bandwidth: float | None
    """Bytes per second, read and written ones counted."""
    bandwidth_by: str
    problems: list[str] = field(default_factory=list)


def look(request: Request) -> Environment:
    """The part `environment`."""
    torch = _torch()
    load_libraries(request.provider)
    providers = onnxruntime.get_available_providers()
    problems = []
    if PROVIDERS[request.provider] not in providers:
        problems.append(f"ONNX Runtime {onnxruntime.__version__} has no {PROVIDERS[request.provider]}")
    bandwidth, by = _bandwidth(request, torch)
    return Environment(
        python=platform.python_version(),
        system=platform.platform(),
        processors=len(os.sched_getaffinity(0)),
        onnxruntime=onnxruntime.__version__,
        build=str(onnxruntime.get_build_info()),
        providers=providers,
        torch=None if torch is None else str(torch.__version__),
        cuda=None if torch is None else torch.version.cuda,
        gpu=_nvidia_smi(request.device_id),
        bandwidth=bandwidth,
        bandwidth_by=by,
        problems=problems,
    )


def _torch() -> Any:
    return importlib.import_module("torch") if importlib.util.find_spec("torch") is not None else None


def _nvidia_smi(device_id: int) -> dict[str, str]:
    command = ["nvidia-smi", f"--id={device_id}", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return dict(zip(_QUERY.split(","), map(str.strip, answer.split(",")), strict=False))


def _bandwidth(request: Request, torch: Any) -> tuple[float | None, str]:
    """Bytes per second and where the number is from: what was given, else a copy within the provider's memory."""
    if request.bandwidth is not None:
        return request.bandwidth, "given"
    if request.provider == "cpu":
        return _host_copy(), "a copy by numpy"
    if torch is None or not torch.cuda.is_available():
        return None, "not measured: it takes PyTorch with CUDA, or --bandwidth"
    return _device_copy(torch, request.device_id), "a copy on the device by PyTorch"


def _host_copy() -> float:
    source = np.ones(_HOST_COPY_BYTES, np.uint8)
    target = np.zeros_like(source)
    began = time.perf_counter()
    for _ in range(_COPIES):
        np.copyto(target, source)
    return 2 * _HOST_COPY_BYTES * _COPIES / (time.perf_counter() - began)


def _device_copy(torch: Any, device_id: int) -> float:
    device = torch.device("cuda", device_id)
    source = torch.ones(_DEVICE_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for copies in (3, _COPIES):  # the first ones warm up
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        torch.cuda.synchronize(device)
    return 2 * _DEVICE_COPY_BYTES * _COPIES / (time.perf_counter() - began)
