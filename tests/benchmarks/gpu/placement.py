"""What runs where: every node's provider in each graph, the self-test, and a step as ONNX Runtime profiles it."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from service.artifact import Artifact
from service.batch import Batch
from service.errors import StartupError
from service.graphs import products_on
from service.ladder import Ladder
from service.rehearsal import self_test
from service.runner import Runner
from tests.benchmarks.gpu.request import PROVIDERS, Request
from tests.benchmarks.gpu.sessions import open_session, state_arrays

_PROFILED_ROWS, _PROFILED_STEPS = 8, 5


@dataclass(frozen=True)
class GraphPlacement:
    """One graph."""

    graph: str
    nodes: dict[str, dict[str, int]]
    """Operators and how many of each, by provider."""
    products_on_cpu: list[str]
    """What the service would refuse to leave to the CPU beside a GPU."""


@dataclass(frozen=True)
class StepProfile:
    """One decoder step, as profiled: on a GPU the times are those of the host, which launches kernels."""

    rows: int
    nodes: dict[str, int]
    """Run in a step, by provider."""
    copies: int
    """Between host and device, inside the graph: one is enough to rule out CUDA graphs."""
    dearest: list[tuple[str, int, float]]
    """Operator, nodes, milliseconds of a step: the most expensive first."""


@dataclass(frozen=True)
class Placement:
    """The part `placement`."""

    precision: str
    graphs: list[GraphPlacement]
    opened_in: float | None
    """Seconds that the service's runner took; None if it did not open."""
    self_test: str
    profile: StepProfile | None
    problems: list[str] = field(default_factory=list)


def look(request: Request) -> Placement:
    """The part `placement`. What fails is a problem in the result; the rest is looked at all the same."""
    artifact = request.load()
    variant = artifact.manifest.variants[request.provider]
    problems: list[str] = []
    graphs, profile = [], None
    for graph in variant.graphs:
        try:
            graphs.append(_placement(artifact.graph(graph), request))
        except Exception as error:
            problems.append(f"{graph}: {error}")
    if request.provider == "cuda":
        strays = [f"{graph.graph}: {node}" for graph in graphs for node in graph.products_on_cpu]
        problems += [f"left to the CPU: {', '.join(strays)}"] if strays else []
    try:
        profile = _profile(artifact, request)
    except Exception as error:
        problems.append(f"profile of a step: {error}")
    opened_in, outcome = _rehearse(request, problems)
    return Placement(variant.precision, graphs, opened_in, outcome, profile, problems)


def _placement(path: Path, request: Request) -> GraphPlacement:
    session = open_session(path, request)
    nodes: dict[str, Counter[str]] = defaultdict(Counter)
    for part in session.get_provider_graph_assignment_info():
        nodes[part.ep_name].update(node.op_type for node in part.get_nodes())
    strays = products_on(PROVIDERS["cpu"], session)
    return GraphPlacement(
        f"{path.parent.name}/{path.name}",
        {provider: dict(counts.most_common()) for provider, counts in nodes.items()},
        strays if request.provider == "cuda" else [],
    )


def _profile(artifact: Artifact, request: Request) -> StepProfile:
    manifest = artifact.manifest
    with tempfile.TemporaryDirectory() as folder:
        path = artifact.graph(manifest.variants[request.provider].decoder)
        session = open_session(path, request, profile=Path(folder) / "profile")
        rows = _PROFILED_ROWS
        feeds: dict[str, Any] = {
            "last_ids": np.full(rows, manifest.special_tokens.bos_id),
            "positions": np.zeros(rows, np.int64),
            "source_lengths": np.full(rows, 8),
            "k": np.array(1),
            **state_arrays(session, manifest, rows, source=32, target=32),
        }
        for _ in range(_PROFILED_STEPS):
            session.run(["candidate_ids", "candidate_scores"], feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return _summary(events)


def _summary(events: list[dict[str, Any]]) -> StepProfile:
    """Of the last step alone: the first ones warm up."""
    ran = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    last = ran[-(len(ran) // _PROFILED_STEPS) :]
    nodes = Counter(str(event["args"].get("provider", "")) for event in last)
    operators = Counter(str(event["args"].get("op_name", "")) for event in last)
    times: dict[str, float] = defaultdict(float)
    for event in last:
        times[str(event["args"].get("op_name", ""))] += event["dur"] / 1e3
    dearest = sorted(times.items(), key=lambda entry: -entry[1])[:8]
    return StepProfile(
        rows=_PROFILED_ROWS,
        nodes=dict(nodes),
        copies=sum(count for operator, count in operators.items() if operator.startswith("Memcpy")),
        dearest=[(operator, operators[operator], milliseconds) for operator, milliseconds in dearest],
    )


def _rehearse(request: Request, problems: list[str]) -> tuple[float | None, str]:
    began = time.perf_counter()
    try:
        runner = request.open_runner()
    except Exception as error:
        problems.append(f"the service's runner does not open: {error}")
        return None, "not run"
    opened_in = time.perf_counter() - began
    try:
        count = _self_test(runner)
    except StartupError as error:
        problems.append(str(error))
        return opened_in, f"fails: {error}"
    return opened_in, f"{count} sentences came out as the manifest says"


def _self_test(runner: Runner) -> int:
    manifest = runner.manifest
    source, target = manifest.max_source_tokens, manifest.max_target_tokens
    state = runner.new_state(max_rows=1, source=Ladder.of_capacities(source), target=Ladder.of_capacities(target))
    batch = Batch(max_rows=1, max_target_tokens=target, bos_id=manifest.special_tokens.bos_id)
    return self_test(runner, state, batch, Ladder.of_lengths(source))
