"""Sessions of the measurement's own, beside those of the service: to look into, and to try what it does not do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from service.artifact import Manifest, StateTensor
from service.graphs import ELEMENT_TYPES
from tests.benchmarks.gpu.request import PROVIDERS, Request, load_libraries

_CUDA_OPTIONS = {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
"""As the service's."""


def open_session(
    path: Path, request: Request, *, capture: bool = False, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """A graph on the provider, and nothing else but the CPU behind it; `capture` asks for CUDA graphs."""
    load_libraries(request.provider)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request.threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    chosen: dict[str, str] = {}
    if request.provider == "cuda":
        chosen = {"device_id": str(request.device_id), **_CUDA_OPTIONS}
        if capture:
            chosen["enable_cuda_graph"] = "1"
            options.enable_mem_pattern = False  # a captured run must find its memory where it was
    session = onnxruntime.InferenceSession(str(path), options, providers=[(PROVIDERS[request.provider], chosen)])
    session.disable_fallback()
    if session.get_providers()[0] != PROVIDERS[request.provider]:
        raise RuntimeError(f"{PROVIDERS[request.provider]} could not be started, but {session.get_providers()}")
    return session


def state_arrays(
    session: onnxruntime.InferenceSession, manifest: Manifest, rows: int, *, source: int, target: int
) -> dict[str, np.ndarray]:
    """A state that was made up, the same for the same sizes: what a source wrote is random, the rest is zero."""
    types = {port.name: ELEMENT_TYPES[port.type] for port in session.get_inputs()}
    sizes = {"rows": rows, "source_capacity": source, "target_capacity": target}
    rng = np.random.default_rng(0)
    arrays = {}
    for tensor in manifest.state:
        shape = [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
        values = rng.standard_normal(shape, np.float32) if tensor.kind == "source" else np.zeros(shape, np.float32)
        arrays[tensor.name] = values.astype(types[tensor.name])
    return arrays


def row_bytes(tensor: StateTensor, dtype: np.dtype[Any], *, source: int, target: int) -> int:
    """Bytes that a row of a state tensor holds in so many positions."""
    sizes = {"rows": 1, "source_capacity": source, "target_capacity": target}
    elements = 1
    for size in tensor.shape:
        elements *= size if isinstance(size, int) else sizes[size]
    return elements * dtype.itemsize


class Timed:
    """A session with a clock on its runs; everything else is the session's."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.seconds = 0.0

    def run_with_iobinding(self, *arguments: Any) -> None:
        """As the session's."""
        began = time.perf_counter()
        self._session.run_with_iobinding(*arguments)
        self.seconds += time.perf_counter() - began

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)
