"""The outcomes for people to read: one table for each part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tests.benchmarks.gpu.exactness import AGAIN
from tests.benchmarks.gpu.part import Outcome

Result = dict[str, Any]


def render(outcome: Outcome) -> str:
    """A part with its heading, its figures, and what failed."""
    name = outcome.part if outcome.artifact is None else f"{outcome.part}, {outcome.artifact}"
    lines = [f"== {name}: {outcome.status} in {outcome.seconds:.0f} s"]
    if outcome.result is not None:
        lines += _TABLES[outcome.part](outcome.result)
        lines += [f"   note: {note}" for note in outcome.result.get("notes", [])]
    lines += [f"   PROBLEM: {problem}" for problem in outcome.problems]
    if outcome.error is not None:
        lines += [f"   | {line}" for line in outcome.error.rstrip().splitlines()[-12:]]
    return "\n".join(lines)


def _environment(result: Result) -> list[str]:
    gpu = ", ".join(f"{name} {value}" for name, value in result["gpu"].items())
    bandwidth = "unknown" if result["bandwidth"] is None else f"{result['bandwidth'] / 1e9:.0f} GB/s"
    return [
        f"   GPU: {gpu}",
        f"   Python {result['python']} on {result['system']}, {result['processors']} processors; "
        f"PyTorch {result['torch']}, CUDA {result['cuda']}",
        f"   ONNX Runtime {result['onnxruntime']}, {', '.join(result['providers'])}; {result['build']}",
        f"   memory bandwidth {bandwidth} ({result['bandwidth_by']})",
    ]


def _export(result: Result) -> list[str]:
    return [f"   {result['artifact']}"]


def _placement(result: Result) -> list[str]:
    lines = [f"   precision {result['precision']}; self-test: {result['self_test']}"]
    for graph in result["graphs"]:
        for provider, operators in graph["nodes"].items():
            counts = ", ".join(f"{count} {operator}" for operator, count in operators.items())
            lines.append(f"   {graph['graph']} on {provider}: {counts}")
        if graph["products_on_cpu"]:
            lines.append(f"   {graph['graph']}: products left to the CPU: {', '.join(graph['products_on_cpu'])}")
    if (profile := result["profile"]) is not None:
        nodes = ", ".join(f"{count} on {provider}" for provider, count in profile["nodes"].items())
        lines.append(f"   a step of {profile['rows']} rows runs {nodes}; {profile['copies']} copies inside of it")
        dearest = ", ".join(f"{name} x {count} {ms:.3f}" for name, count, ms in profile["dearest"])
        lines.append(f"   its dearest operators, ms on the host: {dearest}")
    return lines


def _exactness(result: Result) -> list[str]:
    lines = [f"   {result['sources']} sources of up to {result['longest_source']} tokens, against each of them alone"]
    rows = []
    for one in result["agreements"]:
        shares = [f"{one[name]} of {one['answers']}" for name in ("same", "same_bits")]
        largest = f"{one['largest_difference']:.2g}"
        rows.append((one["company"], one["kind"], *shares, largest, one["first_difference"]))
    names = ("company", "answers", "same tokens", "same bits", "largest difference", "first difference")
    return [*lines, *_columns(names, rows), f"   {_verdict(result['agreements'])}"]


def _verdict(agreements: list[Result]) -> str:
    """What holds, in a sentence."""
    together = [one for one in agreements if one["company"] != AGAIN]
    words = []
    for field, what in (("same", "tokens"), ("same_bits", "bits")):
        shares = {one["kind"]: [0, 0] for one in together}
        for one in together:
            shares[one["kind"]][0] += one[field]
            shares[one["kind"]][1] += one["answers"]
        lost = [f"{kind} {100 * same / of:.1f} %" for kind, (same, of) in shares.items() if same < of]
        words.append(f"the same {what}: " + (f"NOT always, but {', '.join(lost)}" if lost else "always"))
    return "alone == batched: " + "; ".join(words)


def _invariance(result: Result) -> list[str]:
    steps = result["steps"]
    lines = ["   logits of a decoder step, the encoder's bits being equal:"]
    for name, words in (
        ("as_alone", "the same bits as with one row"),
        ("at_every_place", "the same bits at every place among the rows"),
        ("beside_others", "the same bits beside other texts"),
    ):
        lines.append(f"   {words}: {_spans((check['rows'], check[name]) for check in steps)}")
    lines.append(f"   largest difference from one row: {max(check['difference'] for check in steps):.2g}")
    rows = [
        (check["rows"], check["padded_to"], "same bits" if check["as_alone"] else f"{check['difference']:.2g}")
        for check in result["encoder"]
    ]
    return lines + _columns(("encoder, rows", "padded to", "against one row alone"), rows)


def _spans(checks: Iterable[tuple[int, bool]]) -> str:
    """The numbers of rows for which it holds, as spans of those that were tried."""
    words, span, tried = [], [], list(checks)
    for rows, holds in [*tried, (0, False)]:
        if holds:
            span.append(rows)
        elif span:
            words.append(str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}")
            span = []
    if all(holds for _, holds in tried):
        return "always"
    return f"with {', '.join(words)} rows" if words else "never"


def _steps(result: Result) -> list[str]:
    rows = [
        (
            cost["mode"], cost["rows"], f"{cost['step_ms']:.3f}", f"{cost['p90_ms']:.3f}",
            f"{cost['tokens_per_second']:,.0f}",
            _number(cost["floor_ms"], 4), _ratio(cost["step_ms"], cost["floor_ms"]),
            f"{cost['run_ms']:.3f}", f"{cost['bind_ms']:.3f}", f"{cost['reorder_ms']:.3f}", f"{cost['host_ms']:.3f}",
            f"{cost['bus_bytes']:,}", _number(cost["growth_ms"], 1),
        )
        for cost in result["costs"]
    ]  # fmt: skip
    names = (
        "mode", "rows", "ms/step", "p90", "tokens/s", "floor ms", "x floor", "ORT run", "bind", "reorder", "host",
        "bytes on the bus", "growth",
    )  # fmt: skip
    weights = {cost["weight_bytes"] for cost in result["costs"] if cost["weight_bytes"] is not None}
    note = f"   precision {result['precision']}, sources of {result['source_tokens']} tokens"
    note += "".join(f", the decoder's matrices are {size / 1e6:.1f} MB" for size in weights)
    return [note, *_columns(names, rows)]


def _captured(result: Result) -> list[str]:
    rows = [
        (
            cost["rows"], cost["k"], f"{cost['run_ms']:.3f}", f"{cost['captured_run_ms']:.3f}",
            _ratio(cost["run_ms"], cost["captured_run_ms"]), f"{cost['step_ms']:.3f}",
            f"{cost['captured_step_ms']:.3f}", f"{cost['first_run_ms']:.0f}", "yes" if cost["same_bits"] else "NO",
        )
        for cost in result["costs"]
    ]  # fmt: skip
    names = ("rows", "k", "run ms", "captured", "x", "with copies", "captured", "capture ms", "same bits")
    return _columns(names, rows) if rows else []


def _service(result: Result) -> list[str]:
    rows = [
        (
            run["concurrency"], run["workers"], run["sequences"], f"{run['tokens']:,}", f"{run['seconds']:.2f}",
            f"{run['tokens_per_second']:,.0f}", f"{run['rows_per_step']:.1f}",
            ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in run["phases"].items()),
        )
        for run in result["runs"]
    ]  # fmt: skip
    names = ("at once", "workers", "sequences", "tokens", "s", "tokens/s", "rows/step", "s by phase")
    return [f"   precision {result['precision']}", *_columns(names, rows)]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _ratio(value: float, by: float | None) -> str:
    return "-" if not by else f"{value / by:.1f}"


def _columns(names: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Numbers to the right, under their names."""
    cells = [list(map(str, row)) for row in (names, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["   " + "  ".join(map(str.rjust, row, widths)).rstrip() for row in cells]


_TABLES: dict[str, Callable[[Result], list[str]]] = {
    "environment": _environment,
    "export": _export,
    "placement": _placement,
    "exactness": _exactness,
    "invariance": _invariance,
    "steps": _steps,
    "captured": _captured,
    "service": _service,
}
