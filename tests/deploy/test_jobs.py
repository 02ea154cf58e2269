"""The scripts of the jobs, run by bash as their containers do, with the real programs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.deploy.manifests import DEPLOY

TRANSLATE = DEPLOY / "jobs/translate"
SHARDS = 3


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory for PATH with the programs that the images have."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name, module in {"transduce": "service.cli", "torchrun": "torch.distributed.run"}.items():
        (directory / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (directory / name).chmod(0o755)
    return directory


@pytest.fixture
def files(tmp_path: Path, tiny_sentences: Path, tiny_artifact: Path) -> Path:
    """A directory with sentences, empty lines among them; the last line does not end."""
    directory = tmp_path / "files"
    directory.mkdir()
    lines = [line.split("\t")[0] for line in tiny_sentences.read_text().splitlines()[:90]]
    lines[7] = lines[50] = ""
    (directory / "english.txt").write_text("\n".join(lines))
    return directory


def shard(
    index: int, files: Path, programs: Path, artifact: Path, *, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    given = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOSTNAME": f"pod-{index}",
        "JOB_COMPLETION_INDEX": str(index),
        "SHARDS": str(SHARDS),
        "INPUT": str(files / "english.txt"),
        "OUTPUT": str(files / "german"),
        "PARAMETERS": "--num-beams 2",
        "TRANSDUCE_MODEL": str(artifact),
        **environment,
    }
    outcome = subprocess.run(
        ["bash", str(TRANSLATE / "translate.sh")], env=given, capture_output=True, text=True, timeout=100, check=False
    )
    assert not check or outcome.returncode == 0, outcome.stderr
    return outcome


def test_the_shards_together_are_the_files_translation(files: Path, programs: Path, tiny_artifact: Path) -> None:
    """Line for line, in order, with the parameters; nothing else is left in the directory."""
    for index in (2, 0, 1):
        shard(index, files, programs, tiny_artifact)
    whole = subprocess.run(
        [str(programs / "transduce"), "translate", "--input", str(files / "english.txt"), "--num-beams", "2"],
        env={**os.environ, "TRANSDUCE_MODEL": str(tiny_artifact)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    names = sorted(path.name for path in (files / "german").iterdir())
    assert names == ["00000-of-00003", "00001-of-00003", "00002-of-00003"]
    parts = [(files / "german" / name).read_text() for name in names]
    assert all(parts)
    assert "".join(parts) == whole
    assert whole.count("\n") == 90


def test_a_shard_that_is_done_is_not_done_again(files: Path, programs: Path, tiny_artifact: Path) -> None:
    """Not even looked at: the model is gone by then."""
    shard(1, files, programs, tiny_artifact)
    done = files / "german/00001-of-00003"
    before = done.stat()
    again = shard(1, files, programs, Path("/nowhere"))
    assert "is done already" in again.stdout
    after = done.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    ("trouble", "status"),
    [({"PARAMETERS": "--no-such-flag"}, 2), ({"INPUT": "/nowhere"}, 1), ({"TRANSDUCE_MODEL": "/nowhere"}, 2)],
)
def test_a_shard_that_fails_is_not_there(
    trouble: dict[str, str], status: int, files: Path, programs: Path, tiny_artifact: Path
) -> None:
    """And says so by its status: 2 is what the Job does not try again. A later try does all of it."""
    failed = shard(0, files, programs, tiny_artifact, check=False, **trouble)
    assert failed.returncode == status, failed.stderr
    assert not (files / "german/00000-of-00003").exists()
    shard(0, files, programs, tiny_artifact)
    assert (files / "german/00000-of-00003").read_text().count("\n") > 10
    rules = yaml.safe_load((TRANSLATE / "job.yaml").read_text())["spec"]["podFailurePolicy"]["rules"]
    (final,) = (rule for rule in rules if rule["action"] == "FailIndex")
    assert final["onExitCodes"] == {"operator": "In", "values": [2]}


def test_what_a_killed_pod_left_is_no_shard_and_goes(files: Path, programs: Path, tiny_artifact: Path) -> None:
    """Half a shard has another name, and is removed by the one that ends it."""
    (files / "german").mkdir()
    left = files / "german/.00000-of-00003.lost-pod"
    left.write_text("half a")
    shard(0, files, programs, tiny_artifact)
    assert not left.exists()
    assert "half a" not in (files / "german/00000-of-00003").read_text()


@pytest.mark.slow
def test_two_nodes_train_one_model_and_go_on_after_a_stop(tmp_path: Path, programs: Path) -> None:
    """torchrun on two nodes that find each other by an address; the second start continues the run of the first."""
    from tests.model.test_training import RECIPE

    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    words = ["".join("abcdefgh"[(i * k) % 8] for k in (1, 3, 5, 7)[: 1 + i % 4]) for i in range(300)]
    pairs = "".join(f"{' '.join(word)} {i}\t{' '.join(word).upper()} {i}\n" for i, word in enumerate(words))
    (tmp_path / "pairs.tsv").write_text(pairs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = (DEPLOY / "jobs/train/train.sh").read_text()
    assert script.count("29500") == 1
    (tmp_path / "train.sh").write_text(script.replace("29500", str(port)))  # another run may have it on this machine

    def nodes(steps: int) -> None:
        (tmp_path / "recipe.toml").write_text(RECIPE.replace("max_steps = 40", f"max_steps = {steps}"))
        started = [
            subprocess.Popen(
                ["bash", str(tmp_path / "train.sh")],
                env={
                    **os.environ,
                    "PATH": f"{programs}:{os.environ['PATH']}",
                    "OMP_NUM_THREADS": "1",
                    "JOB_COMPLETION_INDEX": str(index),
                    "NODES": "2",
                    "PROCESSES": "1",
                    "FIRST": "127.0.0.1",
                    "RECIPE": str(tmp_path / "recipe.toml"),
                    "DATA": str(tmp_path / "pairs.tsv"),
                    "RUN": str(tmp_path / "run"),
                },
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]
        for node in started:
            _, said = node.communicate(timeout=100)
            assert node.returncode == 0, said

    def steps() -> list[int]:
        lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        return [line["step"] for line in lines if line["kind"] == "step"]

    nodes(10)
    assert steps() == list(range(10))
    nodes(14)
    assert steps() == list(range(14)), "it went on, and did not begin again"
    assert (tmp_path / "run/model.pt").exists()
