"""The runner: which provider it takes, which graphs it refuses, and that it works in place. On a real artifact."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import service
import service.runner
from export.artifact_decoder import products_saturate
from service.artifact import Artifact
from service.batch import Batch, StepOutput, pad
from service.core import Core
from service.engine import Engine
from service.errors import ArtifactError, SettingsError
from service.graphs import products_on
from service.ladder import Ladder
from service.processors import has_vnni
from service.rehearsal import self_test, warm_up
from service.runner import Runner, choose_variant
from service.settings import Settings
from service.state import State
from tests.service.fakes import Client, Clock, make_metrics

CPU = Settings(threads=1, provider="cpu")
SOURCE = Path(service.__file__).parent


@pytest.fixture(scope="module")
def runner(tiny_artifact: Path) -> Runner:
    return Runner(Artifact.load(tiny_artifact), CPU)


def parts(runner: Runner, max_rows: int = 4) -> tuple[State, Batch, Ladder]:
    """What a rehearsal needs."""
    manifest = runner.manifest
    state = runner.new_state(
        max_rows=max_rows,
        source=Ladder.of_capacities(manifest.max_source_tokens),
        target=Ladder.of_capacities(manifest.max_target_tokens),
    )
    batch = Batch(max_rows=max_rows, max_target_tokens=manifest.max_target_tokens, bos_id=1)
    return state, batch, Ladder.of_lengths(manifest.max_source_tokens)


# ---- ONNX Runtime ----


def test_telemetry_is_off_before_the_library_is_loaded() -> None:
    """The variable that the library reads is set when its import begins, whatever the environment said."""
    program = (
        "import os, sys\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, args: event == 'import' and args[0] == 'onnxruntime'"
        " and seen.append(os.environ.get('ORT_DISABLE_TELEMETRY')))\n"
        "import service.engine\n"
        "print(seen[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=SOURCE.parent, check=True
    )
    assert done.stdout.strip() == "1"


def test_the_runner_alone_imports_onnxruntime() -> None:
    """No other module of the service knows it."""
    importing = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "onnxruntime" for name in names):
                importing.add(path.name)
    assert importing == {"runner.py"}


# ---- the provider ----


def test_cuda_without_cuda_is_refused(tiny_artifact: Path) -> None:
    """Never the CPU instead in silence."""
    with pytest.raises(SettingsError, match=r"cuda was asked for.*Install transduce\[gpu\].*or choose --provider cpu"):
        Runner(Artifact.load(tiny_artifact), Settings(provider="cuda"))


def test_cuda_for_an_artifact_without_cuda_graphs_is_refused(
    tiny_fp32_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where CUDA is, the export has to be too."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(service.runner.ort, "get_available_providers", lambda: providers)
    artifact = Artifact.load(tiny_fp32_artifact)
    with pytest.raises(ArtifactError, match=r"no cuda variant.*Export the model again"):
        choose_variant("cuda", artifact)
    assert choose_variant("auto", artifact) == "cpu"


def test_auto_says_what_it_took_and_why(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the choice."""
    caplog.set_level(logging.INFO)
    artifact = Artifact.load(tiny_artifact)
    assert choose_variant("auto", artifact) == "cpu"
    monkeypatch.setattr(service.runner.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert choose_variant("auto", artifact) == "cuda"
    assert [record.getMessage() for record in caplog.records] == [
        "provider auto takes cpu: no CUDA here",
        "provider auto takes cuda",
    ]


def test_a_provider_that_does_not_start_is_refused(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime would go on without the GPU; the runner looks what it really got."""
    monkeypatch.setattr(service.runner.ort.InferenceSession, "get_providers", lambda _: ["AzureExecutionProvider"])
    with pytest.raises(SettingsError, match="could not be started on device 0"):
        Runner(Artifact.load(tiny_artifact), CPU)


def test_products_of_bytes_are_exact_on_this_processor(runner: Runner, tmp_path: Path) -> None:
    """Without VNNI ONNX Runtime's own choice of instructions saturates: 32,767 here. And the export sees the same."""
    weight = numpy_helper.from_array(np.full((2, 1), 127, np.int8), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, (1, 2))],
        [helper.make_tensor_value_info("y", TensorProto.INT32, (1, 1))],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "product.onnx").write_bytes(model.SerializeToString())
    artifact: Any = SimpleNamespace(graph=lambda name: tmp_path / f"{name}.onnx")
    (found,) = runner._session(artifact, "product", CPU).run(None, {"x": np.full((1, 2), 255, np.uint8)})
    assert found.tolist() == [[2 * 255 * 127]]
    assert products_saturate() is (platform.machine() in ("x86_64", "AMD64") and not has_vnni())


# ---- graphs and manifest ----


def _change_state(place: int, **changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["state"][place].update(changes)


def _drop_state(manifest: dict[str, Any]) -> None:
    del manifest["state"][0]


DISAGREEMENTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a state tensor that the graph does not have": (_change_state(0, name="other"), "inputs that the manifest wants"),
    "a graph's state that the manifest does not have": (_drop_state, "inputs that the manifest does not know"),
    "another number of heads": (_change_state(0, shape=["rows", 5, "target_capacity", 16]), "has the shape"),
    "another rank": (_change_state(0, shape=["rows", "target_capacity", 16]), "has the shape"),
    "another embedding size": (lambda manifest: manifest.update(embedding_size=7), "memory has the shape"),
    "another vocabulary": (lambda manifest: manifest.update(vocab_size=3000), "logits has the shape"),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_a_graph_that_is_not_what_the_manifest_says_is_refused(tiny_artifact: Path, tmp_path: Path, case: str) -> None:
    """Before a single number is computed."""
    change, message = DISAGREEMENTS[case]
    path = _copy(tiny_artifact, tmp_path)
    _edit(path, change)
    with pytest.raises(ArtifactError, match=f"the manifest disagree: .*{message}.*Export the model again"):
        Runner(Artifact.load(path), CPU)


def test_a_graph_that_is_no_graph_is_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    """Though its checksum is right."""
    path = _copy(tiny_artifact, tmp_path)
    (path / "cpu/decoder.onnx").write_bytes(b"no graph")
    checksum = hashlib.sha256(b"no graph").hexdigest()
    _edit(path, lambda manifest: manifest["files"].update({"cpu/decoder.onnx": checksum}))
    with pytest.raises(ArtifactError, match=r"cpu/decoder.onnx cannot be loaded .*Export the model again"):
        Runner(Artifact.load(path), CPU)


def test_an_encoder_in_the_decoders_place_is_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    """A graph, but not this one."""
    path = _copy(tiny_artifact, tmp_path)

    def swap(manifest: dict[str, Any]) -> None:
        cpu = manifest["variants"]["cpu"]
        cpu["encoder"], cpu["decoder"] = cpu["decoder"], cpu["encoder"]

    _edit(path, swap)
    with pytest.raises(ArtifactError, match="disagree"):
        Runner(Artifact.load(path), CPU)


def test_the_self_test_tells_a_machine_that_computes_otherwise(tiny_artifact: Path, tmp_path: Path) -> None:
    """Other token ids than at the export: the engine does not start, and says what to do."""
    path = _copy(tiny_artifact, tmp_path)
    _edit(path, lambda manifest: manifest["self_test"][1]["target_ids"].update(cpu=[7, 8, 2]))
    engine = Engine(Artifact.load(path), CPU, make_metrics())
    engine.start()
    with pytest.raises(ArtifactError, match=r"self-test 1 .* the manifest says \[7, 8, 2\].*--precision fp32"):
        engine.wait_ready(60)
    assert engine.status == "failed"


def test_an_engine_on_a_real_artifact_becomes_ready_and_says_what_it_is(tiny_artifact: Path) -> None:
    """Sessions, self-test, warm-up; then the facts for people."""
    artifact = Artifact.load(tiny_artifact)
    engine, client = Engine(artifact, Settings(threads=1, max_rows=3, provider="cpu"), make_metrics()), Client()
    assert engine.describe() == {}
    engine.start()
    assert engine.wait_ready(60)
    facts = engine.describe()
    assert (facts["provider"], facts["precision"], facts["max_rows"]) == ("cpu", "int8", 3)
    assert facts["self_tests"] == len(artifact.manifest.self_test) > 0
    sequence = client.generate(artifact.manifest.self_test[0].source_ids, artifact.manifest.max_target_tokens)
    engine.submit([sequence])
    engine.drain(60)
    assert engine.join(60)
    assert client.result(sequence).ids == artifact.manifest.self_test[0].target_ids["cpu"]


# ---- working in place ----


def test_state_is_read_and_written_in_place(runner: Runner) -> None:
    """The encoder writes behind the rows in use, a step writes one position of each row, and nothing else moves."""
    state, batch, ladder = parts(runner)
    client = Client()
    sources = [[5, 6, 7, 2], [9, 8, 2]]
    for source in sources:
        runner.encode_into(state, *pad([source], ladder.rung(len(source)), 0))
        state.append(1)
        batch.append([client.generate(source)])
    before = {name: state.read(name).copy() for name in state.names}
    layout = state.layout
    output = runner.step(batch, state, 3, logits=False)
    ids, scores = output.ids, output.log_probabilities
    assert ids.shape == scores.shape == (2, 3)
    assert (np.diff(scores) <= 0).all()
    assert state.layout == layout
    for name in state.names:
        changed = (state.read(name) != before[name]).any(axis=(1, 3))  # (rows, positions)
        written = np.flatnonzero(changed.any(axis=0)).tolist()
        assert written == ([0] if name.startswith("self") else []), name


def test_more_candidates_are_a_longer_list_of_the_same(runner: Runner) -> None:
    """The first of k candidates is the one of a greedy step."""
    state, batch, ladder = parts(runner)
    runner.encode_into(state, *pad([[5, 6, 2]], ladder.first, 0))
    state.append(1)
    batch.append([Client().generate([5, 6, 2])])
    one = _copies(runner.step(batch, state, 1, logits=False))
    many = _copies(runner.step(batch, state, 5, logits=False))
    assert [array[0, 0] for array in many] == [array[0, 0] for array in one]
    assert [array[0, 0] for array in _copies(runner.step(batch, state, 1, logits=False))] == [
        array[0, 0] for array in one
    ]


def test_the_rehearsal_leaves_nothing_behind(runner: Runner) -> None:
    """No row in use, the smallest capacities, and every sentence compared."""
    state, batch, ladder = parts(runner)
    assert self_test(runner, state, batch, ladder) == len(runner.manifest.self_test)
    warm_up(runner, state, batch, ladder, encode_tokens=64)
    assert (state.rows, batch.rows, state.source_capacity, state.target_capacity) == (0, 0, 32, 32)


# ---- the device path, on the CPU ----


@pytest.fixture
def device_runner(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """A runner that believes to be on CUDA, while ONNX Runtime computes on the CPU: the same calls, other words."""
    monkeypatch.setattr(service.runner, "_PROVIDERS", dict.fromkeys(("cpu", "cuda"), "CPUExecutionProvider"))
    monkeypatch.setattr(service.runner, "_CUDA_OPTIONS", {})
    monkeypatch.setattr(Runner, "device", "cpu")
    monkeypatch.setattr(service.runner, "products_on", lambda provider, session: [])
    return Runner(Artifact.load(tiny_artifact), Settings(provider="cuda", threads=1))


def test_the_device_path_gives_the_answers_of_the_export(device_runner: Runner) -> None:
    """Alone and in changing company: blocks of the device's, rows moved by the reorder graph, halves for the state."""
    runner = device_runner
    assert runner.variant == "cuda"
    core, client = Core(runner, make_metrics(), max_rows=3, encode_tokens=64, clock=Clock()), Client()
    assert {core.state.dtype(name) for name in core.state.names} == {np.dtype(np.float16)}
    answers = {}
    for test in runner.manifest.self_test * 2:
        sequence = client.generate(test.source_ids, runner.manifest.max_target_tokens)
        answers[sequence] = test.target_ids["cuda"]
        core.add([sequence])
        core.iterate()
    while not core.idle:
        core.iterate()
        core.check_integrity()
    assert core.state.layout != (0, (False, False)), "rows were moved by the reorder graph"
    for sequence, ids in answers.items():
        assert client.result(sequence).ids == ids


def test_searches_on_the_device_path_are_the_same_alone_and_together(
    device_runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams, samples and alternatives part, meet and end: their rows are moved by the reorder graph, within a sequence
    and between sequences, and all that each is told is what it is told alone."""
    asked: list[dict[str, object]] = [
        {"num_beams": 4, "num_return_sequences": 4},
        {"num_beams": 3, "prefix_ids": (7, 8), "repetition_penalty": 1.3},
        {"do_sample": True, "seed": 1, "num_return_sequences": 3},
        {"return_alternatives": True, "num_return_sequences": 3},
        {},
    ]
    sources = [test.source_ids for test in device_runner.manifest.self_test]
    moves: list[bool] = []  # whether the source's state was moved too
    gather = Runner.gather

    def spy(runner: Runner, state: State, rows_from: np.ndarray, names: list[str]) -> None:
        moves.append(len(names) == len(state.names))
        gather(runner, state, rows_from, names)

    monkeypatch.setattr(Runner, "gather", spy)

    def told(calls: list[int], pause: int) -> list[list[object]]:
        core, client = Core(device_runner, make_metrics(), max_rows=8, encode_tokens=64, clock=Clock()), Client()
        sequences = []
        for call in calls:
            sequences.append(client.generate(sources[call % len(sources)], 16, stream=True, **asked[call % len(asked)]))
            core.add(sequences[-1:])
            for _ in range(pause):
                core.iterate()
        while not core.idle:
            core.iterate()
            core.check_integrity()
        return [client.told(sequence) for sequence in sequences]

    calls = list(range(12))
    alone = [told([call], 0)[0] for call in calls]
    assert told(calls, 0) == alone
    assert told(calls, 2) == alone
    assert moves.count(False) > 10
    assert moves.count(True) > 10


def test_a_device_is_given_ids_and_lengths_anew_at_each_step(
    device_runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It copies them when they are bound; on the CPU the memory itself is bound, once."""
    bound = []
    bind = Runner._bind_host_inputs
    monkeypatch.setattr(Runner, "_bind_host_inputs", lambda self, *args: (bound.append(1), bind(self, *args)))
    state, batch, ladder = parts(device_runner)
    device_runner.encode_into(state, *pad([[5, 2]], ladder.first, 0))
    state.append(1)
    batch.append([Client().generate([5, 2])])
    for _ in range(3):
        device_runner.step(batch, state, 1, logits=False)
    assert len(bound) == 3


def _copies(output: StepOutput) -> list[np.ndarray]:
    return [output.ids.copy(), output.log_probabilities.copy()]


def _copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "artifact"))


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_device_session_whose_products_would_run_on_the_cpu_is_refused(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No silent fall-back: ONNX Runtime gives to the CPU what its CUDA provider cannot do; here that is all."""
    monkeypatch.setattr(service.runner, "_PROVIDERS", dict.fromkeys(("cpu", "cuda"), "CPUExecutionProvider"))
    monkeypatch.setattr(service.runner, "_CUDA_OPTIONS", {})
    with pytest.raises(ArtifactError, match=r"no CUDA kernel for .* and would run them on the CPU\. .*--provider cpu"):
        Runner(Artifact.load(tiny_artifact), Settings(provider="cuda", threads=1))


def test_products_that_a_device_session_left_to_the_cpu_are_found(tiny_artifact: Path) -> None:
    """By operator and node, and none for a provider that has none."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    path = tiny_artifact / "cuda" / "decoder.onnx"
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = products_on("CPUExecutionProvider", session)
    assert {name.split()[0] for name in found} >= {"MatMul", "GroupQueryAttention"}
    assert products_on("CUDAExecutionProvider", session) == []
