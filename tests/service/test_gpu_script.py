"""The GPU measurement, as far as it goes without a GPU: every part on the CPU provider, and the device's path on it."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import service.runner
from service.artifact import Artifact
from service.runner import Runner
from service.settings import Settings
from tests.benchmarks.gpu import captured, environment, exactness, export, part, request, steps, throughput
from tests.benchmarks.gpu.__main__ import main
from tests.benchmarks.gpu.exactness import Answer, difference
from tests.benchmarks.gpu.floor import decoder_elements, floor_of, state_bytes
from tests.benchmarks.gpu.part import MODULES, OF_AN_ARTIFACT, Child, Outcome, ProcessEnded, run
from tests.benchmarks.gpu.request import Request, sources_of
from tests.benchmarks.gpu.table import render

SHORT = ["--steps", "6", "--sources", "3", "--new-tokens", "6", "--concurrency", "4", "--rows", "1", "8"]
QUICK = [*SHORT, "--threads", "1", "--bandwidth", "10", "--no-export", "--in-process"]


def small(artifact: Path, **changes: Any) -> Request:
    values: dict[str, Any] = {"provider": "cpu", "rows": (1, 8), "threads": 1, "bandwidth": 1e10, "steps": 6}
    return Request(**{**values, "artifact": artifact, "sources": 3, "new_tokens": 6, "concurrency": (4,), **changes})


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything believes to be on CUDA, while ONNX Runtime computes on the CPU: the same calls, other words."""
    monkeypatch.setattr(service.runner, "_PROVIDERS", dict.fromkeys(("cpu", "cuda"), "CPUExecutionProvider"))
    monkeypatch.setattr(service.runner, "_CUDA_OPTIONS", {})
    monkeypatch.setattr(service.runner, "products_on", lambda provider, session: [])
    monkeypatch.setattr(Runner, "device", "cpu")
    monkeypatch.setattr(request, "DEVICES", dict.fromkeys(("cpu", "cuda"), "cpu"))
    monkeypatch.setitem(request.PROVIDERS, "cuda", "CPUExecutionProvider")


# ---- all of it ----


def test_every_part_runs_on_the_cpu_and_says_what_holds(
    tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 0, a table for each part, all figures in the file."""
    output = tmp_path / "result.json"
    assert main([str(tiny_artifact), "--provider", "cpu", "--output", str(output), *QUICK]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    parts = {outcome["part"]: outcome for outcome in record["parts"]}
    assert list(parts) == ["environment", *OF_AN_ARTIFACT]
    assert {outcome["status"] for outcome in parts.values()} == {"done"}
    told = capsys.readouterr().out
    assert all(f"== {name}" in told for name in parts)
    assert "alone == batched: the same tokens: always; the same bits: always" in told
    assert "the same bits as with one row: always" in told
    assert "sentences came out as the manifest says" in parts["placement"]["result"]["self_test"]
    assert parts["environment"]["result"]["bandwidth"] == 1e10
    assert not parts["captured"]["result"]["costs"]


def test_every_part_runs_on_the_devices_path(
    device: None, tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to the calls into CUDA: beams are reordered by the graph, and captured steps are bound to stay in place. Here
    the CPU has all products, which is told as what it would be on a GPU."""
    output = tmp_path / "result.json"
    assert main([str(tiny_artifact), "--provider", "cuda", "--output", str(output), *QUICK]) == 1
    parts = {outcome["part"]: outcome for outcome in json.loads(output.read_text(encoding="utf-8"))["parts"]}
    failed = [name for name, outcome in parts.items() if outcome["status"] != "done"]
    assert failed == ["placement"]
    assert any("left to the CPU" in problem for problem in parts["placement"]["problems"])
    beams = [cost for cost in parts["steps"]["result"]["costs"] if cost["mode"] == "4 beams"]
    assert all(cost["reorder_ms"] > 0 for cost in beams)
    costs = parts["captured"]["result"]["costs"]
    assert [(cost["rows"], cost["k"]) for cost in costs] == [(1, 1), (8, 1), (1, 8), (8, 8)]
    assert all(cost["same_bits"] for cost in costs)
    assert "captured" in capsys.readouterr().out


def test_a_part_that_fails_is_told_and_takes_no_other_along(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1, the traceback in the file, the other parts done."""

    def break_down(*_: object) -> None:
        raise MemoryError("no memory on the device")

    monkeypatch.setattr(exactness, "look", break_down)
    output = tmp_path / "result.json"
    arguments = ["--provider", "cpu", "--output", str(output), "--parts", "exactness", "steps"]
    assert main([str(tiny_artifact), *arguments, *QUICK]) == 1
    parts = {outcome["part"]: outcome for outcome in json.loads(output.read_text(encoding="utf-8"))["parts"]}
    assert {name: outcome["status"] for name, outcome in parts.items()} == {
        "environment": "done",
        "exactness": "failed",
        "steps": "done",
    }
    assert "MemoryError: no memory on the device" in parts["exactness"]["error"]
    assert "failed: exactness (" in capsys.readouterr().out


def test_an_artifact_that_is_none_fails_part_by_part(tmp_path: Path) -> None:
    """Those that come after it would be measured all the same."""
    outcomes = [run(name, small(tmp_path / "none")) for name in OF_AN_ARTIFACT if name != "captured"]
    assert {outcome.status for outcome in outcomes} == {"failed"}
    assert all("does not exist" in str(outcome.error) for outcome in outcomes)


def test_what_there_is_no_time_for_failed(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not left out in silence."""
    assert main([str(tiny_artifact), "--provider", "cpu", "--minutes", "0", *QUICK]) == 1
    assert capsys.readouterr().out.count("the time is over") == 1 + len(OF_AN_ARTIFACT)


def test_an_export_without_pytorch_is_skipped(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped artifact is measured all the same, and nothing has failed."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else find(name))
    quick = [word for word in QUICK if word != "--no-export"]
    assert main([str(tiny_artifact), "--provider", "cpu", "--parts", "steps", *quick]) == 0
    assert capsys.readouterr().out.count("export: skipped") == 2


# ---- the process of the parts ----


def test_a_process_that_crashes_is_told_of_and_replaced(tmp_path: Path) -> None:
    """With its status and what it wrote last; so is one that hangs. One call follows another in the same process."""
    child = Child(tmp_path / "log.txt")
    try:
        assert child.call(60, os.getpid) == child.call(60, os.getpid) != os.getpid()
        with pytest.raises(ProcessEnded, match="ended with status 7"):
            child.call(60, os._exit, 7)
        with pytest.raises(ProcessEnded, match="stopped after 1 s"):
            child.call(1, time.sleep, 60)
        request = Request("cpu", Path("nowhere"), bandwidth=1.0)
        outcome = child.call(60, run, "steps", request)
        assert (outcome.status, outcome.artifact) == ("failed", "nowhere")
    finally:
        child.end()


def test_every_part_has_a_module_with_a_look() -> None:
    """And every one of an artifact's is a part."""
    assert set(OF_AN_ARTIFACT) < set(MODULES)
    for module in (captured, environment, exactness, export, steps, throughput):
        assert callable(module.look)
    assert set(part.OF_AN_ARTIFACT) == set(MODULES) - {"environment", "export"}


# ---- the figures ----


def test_no_row_leaves_while_steps_are_timed(tiny_artifact: Path) -> None:
    """Whatever the model says: texts end by their length alone, and the parts of a step are its whole."""
    runner = small(tiny_artifact).open_runner()
    for mode in steps.MODES:
        cost = steps.measure(runner, small(tiny_artifact, steps=100), 8, mode)
        assert cost.steps >= runner.manifest.max_target_tokens - steps.WARM_UP - 2
        assert cost.tokens_per_second == pytest.approx(8 / cost.step_ms * 1e3)
        assert cost.growth_ms is not None, "32 positions are not enough for these texts"
        assert cost.floor_ms is not None
        assert 0 < cost.run_ms < cost.step_ms


def test_bytes_on_the_bus_are_rows_by_candidates(tiny_artifact: Path) -> None:
    """Three numbers of each row go to the device, an id and a score for each candidate come back."""
    runner = small(tiny_artifact).open_runner()
    found = {
        mode.name: steps.measure(runner, small(tiny_artifact), 8, mode).bus_bytes
        for mode in (steps.MODES[0], steps.MODES[1])
    }
    assert found == {"greedy, k 1": 8 * (24 + 12), "greedy, k 8": 8 * (24 + 8 * 12)}


def test_the_weights_of_the_floor_are_the_matrices_of_the_graph(tiny_artifact: Path) -> None:
    """All that a step multiplies by; the table of positions is not among them."""
    onnx = pytest.importorskip("onnx")
    artifact = Artifact.load(tiny_artifact)
    graph = onnx.load(artifact.graph(artifact.manifest.variants["cpu"].decoder)).graph
    matrices = [tensor.dims for tensor in graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) > 1]
    positions = (artifact.manifest.max_target_tokens + 1) * artifact.manifest.embedding_size
    assert decoder_elements(artifact.manifest) == sum(int(np.prod(dims)) for dims in matrices) - positions
    unknown = artifact.manifest.model_copy(update={"architecture": {}})
    assert decoder_elements(unknown) is None


def test_the_floor_grows_with_rows_and_positions(tiny_artifact: Path) -> None:
    """Weights once, state of every row; without a bandwidth there is none."""
    runner = small(tiny_artifact).open_runner()
    one, many = (floor_of(runner, rows=rows, source=4, target=3, bandwidth=1e9) for rows in (1, 10))
    assert one.weight_bytes == many.weight_bytes == decoder_elements(runner.manifest)  # int8
    assert many.state_bytes == 10 * one.state_bytes
    # 2 layers, keys and values of 32 int8: 4 of the source, and of the target 3 read, one new read and written.
    assert one.state_bytes == state_bytes(runner, source=4, target=3) == 2 * 2 * 32 * (4 + 5)
    assert one.weight_bytes is not None
    assert one.milliseconds == pytest.approx(1e3 * (one.weight_bytes + one.state_bytes) / 1e9)
    assert floor_of(runner, rows=1, source=4, target=3, bandwidth=None).milliseconds is None


def test_differences_are_found(tiny_artifact: Path) -> None:
    """Another token, another bit, and how far the numbers are apart before the tokens part."""
    alone = Answer([[5, 6, 2]], [np.array([-1.0, -2.0, -3.0], np.float32)])
    other = Answer([[5, 7, 2]], [np.array([-1.5, -9.0, -9.0], np.float32)])
    assert difference(alone, alone) == 0
    assert difference(alone, other) == 0.5
    call = {("greedy", 0): alone, ("greedy", 1): alone}
    (agreement,) = exactness._agreements("8 rows", call, {("greedy", 0): alone, ("greedy", 1): other})
    assert (agreement.same, agreement.same_bits, agreement.largest_difference) == (1, 1, 0.5)
    assert agreement.first_difference == "source 1, result 0, token 1"
    record = {"sources": 2, "longest_source": 3, "agreements": [vars(agreement)], "notes": []}
    assert "the same tokens: NOT always, but greedy 50.0 %" in render(Outcome("exactness", "a", "done", 1, record))


def test_scores_are_compared_where_the_artifact_gives_them(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service whose numbers are others from the seventh call on, when three texts have been asked for twice."""
    calls: list[int] = []

    def score(_: object, source_ids: np.ndarray, *others: np.ndarray, alignment: bool) -> tuple[np.ndarray, None]:
        calls.append(len(source_ids))
        return -(others[1] + (len(calls) > 6) / 16).astype(np.float32), None

    monkeypatch.setattr(exactness, "can_score", lambda runner: True)
    monkeypatch.setattr(Runner, "score", score, raising=False)
    found = exactness.look(small(tiny_artifact))
    scores = {one.company: one for one in found.agreements if one.kind == "score"}
    assert [one.same for one in scores.values()] == [one.same_bits for one in scores.values()] == [3, 0]
    assert [one.largest_difference for one in scores.values()] == [0, 1 / 16]
    assert not found.notes


def test_rows_with_which_bits_are_the_same_are_told_as_spans() -> None:
    """So that a number of rows that could always be kept shows."""
    checks = [
        {"rows": rows, "as_alone": holds, "at_every_place": True, "beside_others": False, "difference": 0.1}
        for rows, holds in ((1, True), (2, True), (3, True), (8, False), (32, True), (64, False))
    ]
    told = render(Outcome("invariance", "a", "done", 1, {"steps": checks, "encoder": []}))
    assert "as with one row: with 1 to 3, 32 rows" in told
    assert "among the rows: always" in told
    assert "beside other texts: never" in told


def test_sources_are_different_and_fit(tiny_artifact: Path) -> None:
    """However many are wanted."""
    manifest = Artifact.load(tiny_artifact).manifest
    sources = sources_of(manifest, 200)
    assert len({tuple(source) for source in sources}) == 200
    assert all(len(source) <= 48 and source[-1] == manifest.special_tokens.eos_id for source in sources)
    assert sources == sources_of(manifest, 200)


def test_the_key_of_a_captured_graph_is_one_that_onnx_runtime_knows() -> None:
    """It stands in the library, as does that of the nodes' providers; an unknown one would be ignored in silence."""
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("onnxruntime_pybind11_state*"))
    contents = library.read_bytes()
    assert b"gpu_graph_id" in contents
    assert b"gpu_graph_annotation_id" not in contents


@pytest.mark.slow
def test_an_artifact_made_on_the_spot_is_measured(tiny_checkpoint_file: Path, tmp_path: Path) -> None:
    """Of both precisions; it loads, its self-test comes out, and texts are the same alone and together."""
    for precision in ("fp16", "fp32"):
        asked = Request("cpu", checkpoint=tiny_checkpoint_file, directory=tmp_path, precision=precision)
        outcome = run("export", asked)
        assert outcome.result is not None, outcome.error
        path = Path(outcome.result["artifact"])
        runner = Runner(Artifact.load(path), Settings(threads=1, provider="cpu"))
        assert runner.precision == precision
        for name in ("placement", "exactness"):
            measured = run(name, small(path))
            assert measured.status == "done", measured
