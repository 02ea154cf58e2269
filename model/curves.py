"""A picture of a run: loss, learning rate and validation over the steps, from its log."""

from __future__ import annotations

import json
from pathlib import Path


def draw_curves(log: Path, picture: Path) -> None:
    """Read log.jsonl and write a PNG."""
    from matplotlib.figure import Figure  # slow to import, and only the end of a validation needs it

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    validations = [line for line in lines if line["kind"] == "validation"]
    figure = Figure(figsize=(8, 9), layout="constrained")
    loss, score, rate = figure.subplots(3, 1, sharex=True)
    loss.plot(
        [line["step"] for line in steps], [line["loss"] for line in steps], linewidth=0.3, alpha=0.5, label="per step"
    )
    loss.plot(
        [line["step"] for line in validations], [line["loss"] for line in validations], label="mean between validations"
    )
    loss.set_ylabel("training loss (nats per token)")
    loss.legend()
    for name in validations[-1]["scores"]:
        score.plot(
            [line["step"] for line in validations],
            [line["scores"][name] for line in validations],
            marker="o",
            markersize=3,
            label=name,
        )
    score.set_ylabel("validation")
    score.legend()
    rate.plot([line["step"] for line in validations], [line["learning_rate"] for line in validations])
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    figure.savefig(picture, dpi=100)
