"""What shared layers cost and what a contrastive loss brings, on a real corpus.

    python -m tests.benchmarks.learned --data pairs.tsv.gz --work DIR [--steps 2500] [--threads 0]

Trains small translators that differ in how their layers share weights, by `transduce train` with the recipe of the
default artifact made smaller, exports each, and goes on from the first one with and without a contrastive loss. Runs
that are finished are not run again, so that this can be stopped at any time. Writes DIR/learned.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE = Path("model/recipes/tatoeba-en-de.toml")
SMALL = {
    "model.vocab_size": 4000, "model.d_model": 128, "model.d_ff": 512, "model.encoder_layers": 6,
    "model.decoder_layers": 6, "training.batch_tokens": 2048, "training.join_share": 0.0,
    "training.learning_rate": 0.004, "training.validate_every": 500,
}  # fmt: skip

SHARING: dict[str, dict[str, Any]] = {
    "6 different layers": {},
    "6 layers, 3 different": {
        "model.share_layers": "cycle_reversed",
        "model.different_encoder_layers": 3,
        "model.different_decoder_layers": 3,
    },
    "6 layers, all the same": {"model.share_layers": "all"},
    "3 layers": {"model.encoder_layers": 3, "model.decoder_layers": 3},
    "1 layer": {"model.encoder_layers": 1, "model.decoder_layers": 1},
}
"""Of encoder and decoder each. The last two have as many weights as the two before them, and less to compute."""

FIRST = next(iter(SHARING))

FURTHER: dict[str, dict[str, Any]] = {
    "further, translation alone": {},
    "further, contrastive weight 0.2": {"training.contrastive_weight": 0.2},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--further-steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    for name, changes in SHARING.items():
        cooled = {"training.max_steps": arguments.steps, "training.cooldown_steps": arguments.steps // 3}
        train(arguments, name, SMALL | cooled | changes)
        export(arguments, name)
    steps = arguments.further_steps
    short = {
        "training.max_steps": steps, "training.cooldown_steps": steps * 2 // 3, "training.warmup_steps": 50,
        "training.learning_rate": 0.001, "training.ema_decay": 0.98, "training.validate_every": steps,
    }  # fmt: skip
    for name, changes in FURTHER.items():
        train(arguments, name, SMALL | short | changes, init=directory(arguments, FIRST) / "model.pt")
    found = {
        "sharing": {name: sharing(arguments, name) for name in SHARING},
        "retrieval": {name: retrieval(arguments, name) for name in (FIRST, *FURTHER)},
    }
    (arguments.work / "learned.json").write_text(json.dumps(found, indent=1))
    text = tables(found)
    (arguments.work / "learned.md").write_text(text)
    draw(found["sharing"], arguments.work / "learned.png")
    print(text)
    return 0


def directory(arguments: argparse.Namespace, name: str) -> Path:
    """Where a run lies."""
    return Path(arguments.work, re.sub(r"[^a-z0-9.]+", "-", name))


def transduce(arguments: argparse.Namespace, *words: str | Path) -> str:
    """Run the program; what it printed."""
    command = [str(Path(sys.executable).with_name("transduce")), *map(str, words)]
    if words[0] != "export":  # which uses few
        command += ["--threads", str(arguments.threads)]
    print("$", *command, file=sys.stderr)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def train(arguments: argparse.Namespace, name: str, changes: dict[str, Any], init: Path | None = None) -> None:
    """A run of the small recipe with these changes, unless it is finished; one that was stopped goes on."""
    run = directory(arguments, name)
    if (run / "model.pt").exists():
        return
    sets = [word for field, value in changes.items() for word in ("--set", f"{field}={json.dumps(value)}")]
    more: list[str | Path] = ["--resume"] if (run / "last.pt").exists() else []
    more += ["--init", init] if init else []
    common = "--recipe", RECIPE, "--data", arguments.data, "--holdout", "0.01", "--output", run
    transduce(arguments, "train", *common, *sets, *more)


def export(arguments: argparse.Namespace, name: str) -> None:
    """Its fp32 artifact for the CPU."""
    run = directory(arguments, name)
    if not (run / "artifact").exists():
        transduce(
            arguments, "export", run / "model.pt", run / "artifact", "--sentences", run / "test.tsv",
            "--precision", "fp32", "--no-cuda",
        )  # fmt: skip


def sharing(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    """Parameters, megabytes of graphs, and BLEU of greedy translations of the test sentences."""
    from model.checkpoint import Checkpoint

    run = directory(arguments, name)
    manifest = json.loads((run / "artifact" / "manifest.json").read_text(encoding="utf-8"))
    return {
        "parameters": Checkpoint.load(run / "model.pt").transformer().num_parameters(),
        "megabytes": sum(path.stat().st_size for path in (run / "artifact").rglob("*.onnx")) / 1e6,
        "bleu": manifest["parity"]["cpu"]["bleu"],
    }


def retrieval(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    """Per cent of 1,000 test sentences that find their translation, and BLEU."""
    model, data = directory(arguments, name) / "model.pt", directory(arguments, FIRST) / "test.tsv"
    outputs = {
        measure: transduce(arguments, "evaluate", model, "--data", data, "--measure", measure, "--samples", "0")
        for measure in ("retrieval", "bleu")
    }
    return {name: float(re.findall(r"\d+\.\d+", output)[0]) for name, output in outputs.items()}


def tables(found: dict[str, Any]) -> str:
    """In Markdown."""
    lines = ["| encoder and decoder | parameters | graphs, fp32 | BLEU |", "|---|---|---|---|"]
    for name, one in found["sharing"].items():
        lines.append(f"| {name} | {one['parameters'] / 1e6:.2f} M | {one['megabytes']:.1f} MB | {one['bleu']:.2f} |")
    lines += ["", "| | found among 1,000 | BLEU |", "|---|---|---|"]
    for name, one in found["retrieval"].items():
        lines.append(f"| {name} | {one['retrieval']:.1f} % | {one['bleu']:.2f} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    """BLEU against the parameters, and the size of the files."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    bleu, size = figure.subplots(1, 2)
    for name, one in found.items():
        bleu.plot(one["parameters"] / 1e6, one["bleu"], marker="o", linestyle="", label=name)
    bleu.set(xlabel="parameters, millions", ylabel="BLEU of greedy translations", xlim=(0, None))
    bleu.grid(alpha=0.3)
    bleu.legend()
    names = list(found)[::-1]
    size.barh(names, [found[name]["megabytes"] for name in names])
    size.set(xlabel="graphs of the artifact, fp32, MB")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
