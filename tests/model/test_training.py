"""Training runs: they learn, continue exactly, stop early, and two processes are one."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import Checkpoint, CheckpointError, average_weights, copied
from model.config import ConfigurationError, TransformerConfig
from model.optimizer import rate_factor
from model.recipe import Recipe, TrainingConfig

PROGRAM = "import sys; from service.cli import main; sys.exit(main())"
RECIPE = """
[model]
vocab_size = 290
d_model = 32
num_heads = 2
encoder_layers = 1
decoder_layers = 1
pre_norm = true
max_source_tokens = 32
max_target_tokens = 32
[training]
batch_tokens = 160
learning_rate = 0.004
warmup_steps = 20
max_steps = 40
validate_every = 20
precision = "fp32"
[metadata]
name = "letters"
license = "CC0"
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Spell a word in capitals: learnable in a few hundred steps."""
    words = ["".join("abcdefgh"[(i * k) % 8] for k in (1, 3, 5, 7)[: 1 + i % 4]) for i in range(300)]
    (tmp_path / "pairs.tsv").write_text(
        "".join(f"{' '.join(w)} {i}\t{' '.join(w).upper()} {i}\n" for i, w in enumerate(words))
    )
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(data: Path, run: str, *options: str, processes: int = 1) -> list[str]:
    program = [sys.executable, "-c", PROGRAM]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
        program = [*torchrun, f"--nproc-per-node={processes}", *program]
    files = ["--recipe", str(data / "recipe.toml"), "--data", str(data / "pairs.tsv"), "--output", str(data / run)]
    return [*program, "train", *files, "--holdout", "0.05", "--threads", "1", *options]


def train(
    data: Path, run: str, *options: str, processes: int = 1, check: bool = True
) -> subprocess.CompletedProcess[str]:
    outcome = subprocess.run(
        command(data, run, *options, processes=processes), capture_output=True, text=True, timeout=110, env=ENVIRONMENT
    )
    if check:
        assert outcome.returncode == 0, outcome.stderr
    return outcome


def log(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log(run, "step")]


def test_a_killed_run_continues_with_the_same_losses(data: Path) -> None:
    """A run killed some steps after a checkpoint: losses, weights and validation become those of a run left alone.

    Dropout, BPE-dropout, joined pairs, Muon and the moving average of the weights are on, and the kill falls within an
    epoch.
    """
    options = (
        "--set",
        "training.join_share=0.2",
        "--set",
        "training.bpe_dropout=0.2",
        "--set",
        "training.ema_decay=0.9",
        "--set",
        "training.optimizer='muon'",
    )
    train(data, "whole", *options)
    log_file = data / "parts" / "log.jsonl"
    killed = subprocess.Popen(command(data, "parts", *options), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not (log_file.exists() and log_file.read_text().count('"kind": "step"') > 24):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert len(losses(data / "parts")) < 40
    train(data, "parts", *options, "--resume")
    assert losses(data / "parts") == losses(data / "whole")
    assert len(losses(data / "whole")) == 40
    assert log(data / "parts", "validation")[-1]["scores"] == log(data / "whole", "validation")[-1]["scores"]
    whole, parts = (Checkpoint.load(data / run / "model.pt") for run in ("whole", "parts"))
    assert all(bool((whole.weights[name] == parts.weights[name]).all()) for name in whole.weights)
    assert (data / "whole" / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(("spaces", "words"), [("before", ["ein", "\u0120haus"]), ("after", ["ein\u0120", "haus"])])
def test_a_run_learns_its_tokenizer_as_the_recipe_treats_spaces(data: Path, spaces: str, words: list[str]) -> None:
    options = ("--set", f"training.spaces='{spaces}'", "--set", "training.max_steps=1")
    train(data, spaces, *options)
    cut = Checkpoint.load(data / spaces / "model.pt").tokenizer.pre_tokenizer.pre_tokenize_str("ein haus")
    assert [word for word, _ in cut] == words


def test_two_processes_learn_what_one_does(data: Path) -> None:
    """Under torchrun each process takes one of every two batches, and the loss is that of both together."""
    options = ("--set", "model.dropout=0.0", "--set", "training.validate_every=10", "--set", "training.max_steps=10")
    train(data, "two", *options, processes=2)
    train(data, "one", *options)
    two, one = log(data / "two", "step"), log(data / "one", "step")
    assert [line["tokens"] for line in two[:5]] == [
        a["tokens"] + b["tokens"] for a, b in zip(one[::2], one[1::2], strict=True)
    ]
    # The first update of two processes starts from the weights that one process has before its first.
    mean = (one[0]["loss"] * one[0]["tokens"] + one[1]["loss"] * one[1]["tokens"]) / two[0]["tokens"]
    assert two[0]["loss"] == pytest.approx(mean, rel=0.05)
    assert two[-1]["loss"] < two[0]["loss"]
    train(
        data,
        "two",
        *options,
        "--resume",
        "--set",
        "training.max_steps=12",
        "--set",
        "training.validate_every=2",
        processes=2,
    )
    assert len(losses(data / "two")) == 12


def test_what_cannot_be_continued_is_refused_in_a_sentence(data: Path) -> None:
    """A finished model has no training state; a run of another version counts its progress otherwise."""
    steps = ("--set", "training.max_steps=2", "--set", "training.validate_every=2")
    train(data, "run", *steps)
    last = data / "run" / "last.pt"
    checkpoint = Checkpoint.load(last)
    assert checkpoint.training_state is not None
    checkpoint.training_state["progress"]["once_counted"] = checkpoint.training_state["progress"].pop("batch")
    checkpoint.save(last)
    for words in ("begun by another version", "no training state"):
        outcome = train(data, "run", *steps, "--resume", check=False)
        assert outcome.returncode == 2
        assert words in outcome.stderr
        assert "Traceback" not in outcome.stderr
        last.write_bytes((data / "run" / "model.pt").read_bytes())


def test_a_run_that_gains_nothing_stops_early(data: Path) -> None:
    """At a rate of nearly nothing BLEU does not rise: patience ends the run long before its last step."""
    train(
        data,
        "idle",
        "--set",
        "training.learning_rate=1e-9",
        "--set",
        "training.patience=2",
        "--set",
        "training.validate_every=5",
    )
    assert len(losses(data / "idle")) == 15
    assert (data / "idle" / "model.pt").exists()


def test_a_terminal_shows_how_far_a_run_and_its_teachers_are(data: Path) -> None:
    """By a bar each; what is logged stands in lines of its own."""
    short = ("--set", "training.max_steps=4", "--set", "training.validate_every=2")
    train(data, "teacher", *short)
    teacher = ("--teacher", str(data / "teacher" / "model.pt"))
    kept = ("--set", "training.distillation_weight=0.5", "--set", "training.distillation_top=3")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 100))
    shown = b""
    with subprocess.Popen(command(data, "run", *short, *teacher, *kept), stderr=theirs, env=ENVIRONMENT) as run:
        os.close(theirs)
        with suppress(OSError):  # which is what Linux gives once a terminal's last writer is gone
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    assert run.returncode == 0, shown
    lines = re.split(r"[\r\n]+", shown.decode())
    assert any("pair/s" in line for line in lines)
    assert any("4/4" in line for line in lines)
    logged = [line for line in lines if "target tokens/s" in line]
    assert len(logged) == 2
    assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in logged), logged


def test_a_clip_norm_of_zero_leaves_gradients_as_they_are(data: Path) -> None:
    """As one that no gradient reaches; the usual 1 is reached in the first steps. One below zero is refused."""
    for run, norm in (("never", 0.0), ("unreached", 1e9), ("reached", 1.0)):
        train(data, run, "--set", f"training.clip_norm={norm}", "--set", "training.max_steps=4")
    assert losses(data / "never") == losses(data / "unreached") != losses(data / "reached")
    with pytest.raises(ConfigurationError, match="clip_norm"):
        TrainingConfig(clip_norm=-1.0)


def test_bf16_where_the_processor_has_no_instructions_for_it_is_fp32(data: Path) -> None:
    """The same losses as in fp32, and a line that says so; with the instructions the losses are others."""
    program = """
import sys, torch
from types import MappingProxyType
from service.cli import main
name = sys.argv.pop(1)
torch.cpu.get_capabilities = lambda: MappingProxyType({"architecture": "x86_64", name: True})
sys.exit(main())
"""
    said = {}
    for run, capability, precision in (
        ("fp32", "avx2", "fp32"),
        ("without", "avx2", "bf16"),
        ("with", "amx_bf16", "bf16"),
    ):
        options = ("--set", "training.max_steps=3", "--set", f"training.precision='{precision}'")
        arguments = [sys.executable, "-c", program, capability, *command(data, run, *options)[3:]]
        outcome = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, check=True)
        said[run] = "no instructions for bf16" in outcome.stderr
    assert losses(data / "fp32") == losses(data / "without") != losses(data / "with")
    assert said == {"fp32": False, "without": True, "with": False}


@pytest.mark.slow
def test_a_small_model_learns_to_spell(data: Path) -> None:
    """A few hundred steps bring the validation BLEU of a copying task above 60 and the loss far down."""
    train(
        data,
        "learns",
        "--set",
        "training.max_steps=900",
        "--set",
        "training.validate_every=300",
        "--set",
        "training.average_checkpoints=2",
    )
    assert log(data / "learns", "validation")[-1]["scores"]["bleu"] > 60
    final = Checkpoint.load(data / "learns" / "model.pt")
    assert final.metadata["name"] == "letters"
    assert (
        final.metadata["validation"]["bleu"]
        >= max(line["scores"]["bleu"] for line in log(data / "learns", "validation")) - 1e-9
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "training.steps=3"), "training.steps"),
        (("--set", "max_steps=3"), "TABLE.FIELD=VALUE"),
        (("--holdout", "0.7"), "--holdout"),
        (("--resume",), "no such checkpoint"),
        (("--data", "missing.tsv"), "missing.tsv"),
        (("--threads", "-1"), "--threads"),
    ],
)
def test_a_wrong_command_ends_with_one_line_that_names_it(data: Path, options: tuple[str, ...], message: str) -> None:
    outcome = train(data, "run", *options, check=False)
    assert outcome.returncode == 2
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_checkpoint_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"model.pt: not a checkpoint"):
        Checkpoint.load(path)


def test_average_of_weights_is_their_mean() -> None:
    import torch

    average = average_weights([{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}])
    assert torch.equal(average["w"], torch.tensor([2.0, 4.0]))


def test_a_file_holds_shared_weights_once(tmp_path: Path) -> None:
    from model.tokenizer import train_tokenizer
    from model.transformer import Transformer

    tokenizer = train_tokenizer(["abc"], 260)
    sizes = {}
    for share in (True, False):
        config = TransformerConfig(vocab_size=260, d_model=64, num_heads=2, share_embeddings=share)
        weights = copied(Transformer(config).state_dict())
        for name, kept in {"copied": weights, "mean": average_weights([weights, weights])}.items():
            checkpoint = Checkpoint(Recipe(config), tokenizer, kept, {})
            checkpoint.save(tmp_path / "model.pt")
            sizes[name, share] = (tmp_path / "model.pt").stat().st_size
    table = 260 * 64 * 4
    assert sizes["copied", False] - sizes["copied", True] == pytest.approx(2 * table, rel=0.05)
    assert sizes["mean", False] - sizes["mean", True] == pytest.approx(2 * table, rel=0.05)


def test_the_learning_rate_warms_up_falls_and_cools_down() -> None:
    """Linear to the highest rate at the end of the warm-up, half of it at four times that step, zero after the last."""
    config = TrainingConfig(warmup_steps=100, max_steps=1000, cooldown_steps=100)
    assert rate_factor(49, config) == pytest.approx(0.5)
    assert rate_factor(99, config) == pytest.approx(1.0)
    assert rate_factor(399, config) == pytest.approx(0.5)
    assert rate_factor(950, config) == pytest.approx(0.5 * (100 / 951) ** 0.5, rel=1e-6)
    assert rate_factor(1000, config) == 0.0
