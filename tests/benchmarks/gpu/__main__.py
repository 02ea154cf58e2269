"""The whole measurement in one call, with a table at the end of each part and all figures in one JSON file.

    python -m tests.benchmarks.gpu [ARTIFACT ...] [--provider cuda|cpu] [--rows 1 8 32 128 512] [--output result.json]

Without an artifact: the shipped one, and two of the base size with random weights, fp16 and fp32, that are exported on
the spot if PyTorch and onnx are there. Ends with status 1 if a part failed; the others have run all the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from service.settings import DEFAULT_MODEL
from tests.benchmarks.gpu.part import OF_AN_ARTIFACT, Child, Outcome, ProcessEnded, run
from tests.benchmarks.gpu.request import Request
from tests.benchmarks.gpu.table import render

_PRECISIONS: tuple[Literal["fp16", "fp32"], ...] = ("fp16", "fp32")
_LIMIT, _LIMIT_OF_EXPORT = 120.0, 180.0
"""Seconds; a part that takes longer hangs. The first one may have to wait for libraries to come from a slow disk."""
_LEAST = 5.0
"""Seconds that have to be left for a part to be begun."""


class Plan:
    """Runs part after part until the time is over."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        """`folder` takes what is made on the spot."""
        self._end = time.monotonic() + 60 * arguments.minutes
        self._folder = folder
        self._child = None if arguments.in_process else Child(folder / "log.txt")
        self._parts = arguments.parts
        self._export = arguments.export
        self._artifacts: list[Path] = arguments.artifacts or [Path(DEFAULT_MODEL)]
        self._request = Request(
            provider=arguments.provider,
            rows=tuple(arguments.rows),
            device_id=arguments.device_id,
            threads=arguments.threads,
            bandwidth=None if arguments.bandwidth is None else 1e9 * arguments.bandwidth,
            steps=arguments.steps,
            sources=arguments.sources,
            new_tokens=arguments.new_tokens,
            concurrency=tuple(arguments.concurrency),
            checkpoint=arguments.checkpoint,
        )

    def run(self) -> Iterator[Outcome]:
        """Every part as it ends."""
        environment = self._run("environment", self._request)
        yield environment
        request = self._request
        if environment.result is not None:
            request = dataclasses.replace(request, bandwidth=environment.result["bandwidth"])
        for artifact in self._artifacts:
            yield from self._look_at(artifact, request)
        for precision in _PRECISIONS if self._export and environment.status == "done" else ():
            exported = self._run_export(dataclasses.replace(request, precision=precision, directory=self._folder))
            yield exported
            if exported.result is not None:
                yield from self._look_at(Path(exported.result["artifact"]), request)

    def end(self) -> None:
        """Leave no process behind."""
        if self._child is not None:
            self._child.end()

    def _look_at(self, artifact: Path, request: Request) -> Iterator[Outcome]:
        for part in self._parts:
            yield self._run(part, dataclasses.replace(request, artifact=artifact))

    def _run_export(self, request: Request) -> Outcome:
        missing = [name for name in ("torch", "onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            return Outcome("export", None, "skipped", problems=[f"not installed: {', '.join(missing)}"])
        return self._run("export", request)

    def _run(self, part: str, request: Request) -> Outcome:
        began = time.monotonic()
        left = self._end - began
        if left < _LEAST:
            return Outcome(part, request.name, "failed", error="not run: the time is over (--minutes)")
        if self._child is None:
            return run(part, request)
        try:
            outcome: Outcome = self._child.call(
                min(left, _LIMIT_OF_EXPORT if part == "export" else _LIMIT), run, part, request
            )
        except ProcessEnded as error:
            return Outcome(part, request.name, "failed", time.monotonic() - began, error=str(error))
        if outcome.status == "failed":
            self._child.end()  # a device's error may stay with the process that saw it
        return outcome


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    arguments = _arguments(argv)
    began, outcomes = time.time(), []
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(arguments, Path(folder))
        try:
            for outcome in plan.run():
                outcomes.append(outcome)
                print(render(outcome), end="\n\n", flush=True)
                if arguments.output is not None:  # after each part: what is known stays known if this is killed
                    _write(arguments.output, outcomes, began)
        finally:
            plan.end()
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    names = ", ".join(f"{outcome.part} ({outcome.artifact or 'all'})" for outcome in failed)
    print(f"{len(outcomes)} parts in {time.time() - began:.0f} s; " + (f"failed: {names}" if failed else "none failed"))
    return 1 if failed else 0


def _write(path: Path, outcomes: list[Outcome], began: float) -> None:
    record = {
        "command": sys.argv,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds": time.time() - began,
        "parts": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description="Measure the service on a GPU.")
    parser.add_argument("artifacts", nargs="*", type=Path, metavar="ARTIFACT", help="default: the shipped one")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 128, 512])
    parser.add_argument("--output", type=Path, help="JSON file for all figures and tracebacks")
    parser.add_argument("--bandwidth", type=float, help="of the device's memory, GB/s, instead of measuring it")
    parser.add_argument("--checkpoint", type=Path, help="what is exported on the spot, instead of random weights")
    parser.add_argument(
        "--export", action=argparse.BooleanOptionalAction, default=True, help="export fp16 and fp32 on the spot"
    )
    parser.add_argument("--parts", nargs="+", choices=OF_AN_ARTIFACT, default=list(OF_AN_ARTIFACT))
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything; what is left out failed")
    parser.add_argument("--steps", type=int, default=48, help="decoder steps that are timed")
    parser.add_argument("--sources", type=int, default=24, help="texts that are compared alone and together")
    parser.add_argument("--new-tokens", type=int, default=40, help="tokens generated for each of them at most")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[64, 512], help="sequences served at once")
    parser.add_argument("--device-id", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="of an ONNX Runtime call on the CPU")
    parser.add_argument("--in-process", action="store_true", help="no process for each part: for a debugger")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
