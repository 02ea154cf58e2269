"""Transduce against CTranslate2 and Hugging Face transformers: same weights, same texts, same threads, same decoding.

    python -m tests.benchmarks.compare --checkpoint runs/tatoeba/model.pt --sentences runs/tatoeba/test.tsv \\
        --text pairs.tsv.gz --work compare/ [--part offline|served|all] [--output compare.json]

Two models: the default one, and the base size with random weights (made and exported in --work the first time, from
the words of --text). All engines run in alternating rounds in one go, so that what else the machine does meets all of
them; ratios are taken within a round, and their median is what counts. CTranslate2 gets its best way, found by a sweep.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.exporter import ExportRequest, export_artifact
from service.settings import DEFAULT_MODEL
from tests.benchmarks import offline, served
from tests.benchmarks.base_model import base_checkpoint
from tests.benchmarks.workload import Subject, base_subject, default_subject

NAMES = ("ctranslate2", "transformers", "onnxruntime", "torch", "tokenizers")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what is compared, the ratio of each round, and what was aimed at."""

    what: str
    ratios: list[float]
    target: str
    reached: bool

    def __str__(self) -> str:
        spread = f"({min(self.ratios):.2f} to {max(self.ratios):.2f})"
        verdict = "reached" if self.reached else "not reached"
        return f"| {self.what} | {statistics.median(self.ratios):.2f} {spread} | {self.target} | {verdict} |"


def at_least(what: str, ratios: list[float], least: float) -> Row:
    """More is better."""
    return Row(what, ratios, f"at least {least:g}", statistics.median(ratios) >= least)


def at_most(what: str, ratios: list[float], most: float) -> Row:
    """Less is better."""
    return Row(what, ratios, f"at most {most:.2f}", statistics.median(ratios) <= most)


def rows_of(comparisons: Sequence[offline.Comparison], servings: Sequence[served.Served]) -> list[Row]:
    """The table of ratios, Transduce over CTranslate2."""
    rows = []
    for one in servings:
        name = one.subject
        rows.append(at_least(f"{name}: tokens/s served at {served.CLIENTS} clients", one.ratios("many", "tokens"), 3))
        what = f"{name}: latency p99 at {one.rate:.0f} requests/s, 70 % of CTranslate2's"
        rows.append(at_most(what, one.ratios("offered", "p99"), 1 / 3))
        rows.append(at_most(f"{name}: one request alone, median latency", one.ratios("one", "p50"), 1 / 2))
    for comparison in comparisons:
        decoding = "greedy" if comparison.num_beams == 1 else f"beam {comparison.num_beams}"
        rows.append(at_least(f"{comparison.subject}: tokens/s offline, {decoding}", comparison.ratios(), 2))
    return rows


def subjects(arguments: argparse.Namespace) -> list[Subject]:
    """The models asked for, in every engine's form."""
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    found = []
    if "default" in arguments.models:
        found.append(default_subject(arguments.checkpoint, arguments.artifact, arguments.sentences, work))
    if "base" in arguments.models:
        checkpoint, artifact = work / "base.pt", work / "base-artifact"
        if not checkpoint.exists():
            base_checkpoint(arguments.text).save(checkpoint)
        if not artifact.exists():
            print("exporting the base size, some minutes", flush=True)
            export_artifact(ExportRequest(checkpoint, artifact, "int8", arguments.sentences, cuda=False))
        found.append(base_subject(checkpoint, artifact, arguments.sentences, work))
    return found


def machine() -> dict[str, Any]:
    """Where this ran."""
    return {
        "processors": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in NAMES},
    }


def main() -> None:
    """The command in the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="of the default artifact")
    add("--artifact", type=Path, default=Path(DEFAULT_MODEL), help="exported from it (default: the shipped one)")
    add(
        "--sentences", type=Path, required=True, help="source, tab, translation: at least 500 that training did not see"
    )
    add("--text", type=Path, help="teaches the base size's tokenizer, if that is not in --work yet")
    add("--work", type=Path, required=True, help="directory for converted models, kept from run to run")
    add("--models", nargs="+", choices=("default", "base"), default=["default", "base"])
    add("--part", choices=("offline", "served", "all"), default="all")
    add("--beams", type=int, nargs="+", default=[1, 4], help="of the offline comparison")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=6.0, help="of each load on each server in each round")
    add("--output", type=Path, help="write every figure as JSON")
    arguments = parser.parse_args()
    began, facts = time.time(), machine()
    processors = facts["processors"]
    comparisons: list[offline.Comparison] = []
    servings: list[served.Served] = []
    for subject in subjects(arguments):
        share = 4 if subject.name == "base" else 2
        if arguments.part != "served":
            comparisons += offline.compare(subject, arguments.beams, arguments.rounds, processors, share)
        if arguments.part != "offline":
            environment = offline.CTRANSLATE2_SETS[-1]
            servings.append(served.compare(subject, arguments.rounds, processors, environment, arguments.seconds, 3.0))
    rows = rows_of(comparisons, servings)
    print("\n| Transduce over CTranslate2 int8 | median ratio (rounds) | target | |\n|---|---|---|---|")
    print("\n".join(map(str, rows)))
    if arguments.output:
        content = {
            "machine": facts,
            "seconds": time.time() - began,
            "rows": [dataclasses.asdict(row) for row in rows],
            "offline": [dataclasses.asdict(comparison) for comparison in comparisons],
            "served": [dataclasses.asdict(one) for one in servings],
        }
        text = json.dumps(content, indent=2, default=lambda value: value.model_dump())
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
