"""The image, built by a real Docker engine and run as production would: hardened, watched, stopped.

`make test-docker`, with DOCKER_HOST saying where the engine is.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

ROOT = Path(__file__).parents[2]
IMAGE = "transduce:test"
HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "200")

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]


def docker(*arguments: str, seconds: float = 120, check: bool = True) -> str:
    outcome = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=seconds)
    if check:
        assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout + ("" if check else outcome.stderr)


@pytest.fixture(scope="session")
def image() -> str:
    if not os.environ.get("DOCKER_HOST") or shutil.which("docker") is None:
        pytest.skip("no Docker engine: DOCKER_HOST is not set, or there is no docker command")
    docker("build", "--network", "host", "--tag", IMAGE, str(ROOT), seconds=850)
    return IMAGE


@contextlib.contextmanager
def running(image: str, *options: str, command: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """A container that is ready: its name, and where it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name = f"transduce-test-{port}"
    docker(
        "run", "--detach", "--name", name, "--network", "host", *HARDENED, "--env", f"TRANSDUCE_PORT={port}",
        "--env", "TRANSDUCE_HOST=127.0.0.1", *options, image, *command,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            assert time.monotonic() < end, docker("logs", name, check=False)
            time.sleep(0.1)
        yield name, url
    finally:
        docker("rm", "--force", name)


def inspected(name: str) -> Any:
    return json.loads(docker("inspect", name))[0]


def inside(image: str, script: str) -> str:
    return docker("run", "--rm", "--network", "none", "--entrypoint", "sh", image, "-c", script)


def test_the_image_is_small_and_says_what_it_is(image: str) -> None:
    about = inspected(image)
    assert about["Size"] < 500e6
    assert about["Config"]["User"] == "10001:10001"
    assert about["Config"]["Labels"]["org.opencontainers.image.title"] == "transduce"
    assert "ORT_DISABLE_TELEMETRY=1" in about["Config"]["Env"]
    assert about["Config"]["Entrypoint"] == ["transduce"]


def test_nothing_is_in_it_that_serving_does_not_need(image: str) -> None:
    """No training, no package manager in the environment, no cache, no compiler."""
    listing = inside(image, "ls /opt/transduce/lib/python3.11/site-packages /opt/transduce/bin")
    names = set(listing.split())
    assert {"service", "onnxruntime", "transduce"} <= names
    assert not {"torch", "onnx", "model", "export", "pip", "setuptools", "hatchling", "huggingface_hub"} & names
    assert inside(image, "command -v cc gcc g++ make; ls -d /root/.cache /wheels /lock.txt 2>/dev/null; true") == ""


def test_what_is_installed_is_what_the_lock_says(image: str) -> None:
    found = inside(
        image,
        "python -c 'import importlib.metadata as m;"
        ' print(*sorted(f"{d.name}=={d.version}".lower() for d in m.distributions() if d.name != "transduce"))\'',
    ).split()
    locked = {line.split()[0] for line in (ROOT / "deploy/lock/cpu.txt").read_text().splitlines() if "==" in line}
    assert {name.replace("_", "-") for name in found} == locked


def test_it_serves_hardened_and_leaves_when_it_is_told_to(image: str) -> None:
    """Read-only, without capabilities; healthy; what was accepted is answered after SIGTERM, and the status is 0."""
    with running(image) as (name, url):
        answer = httpx.post(f"{url}/v1/generate", json={"inputs": "Where is the train station?"})
        assert answer.json()["outputs"][0]["sequences"][0]["text"] == "Wo ist der Bahnhof?"
        end = time.monotonic() + 30
        while inspected(name)["State"]["Health"]["Status"] != "healthy":
            assert time.monotonic() < end
            time.sleep(0.5)
        many = subprocess.Popen(
            [
                "curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", f"{url}/v1/generate",
                "--data", json.dumps({"inputs": ["This is a rather long sentence."] * 1000}),
            ],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        while "transduce_num_requests_waiting" not in (page := httpx.get(f"{url}/metrics").text) or not any(
            line.startswith("transduce_num_requests_waiting{") and not line.endswith(" 0.0")
            for line in page.split("\n")
        ):
            assert many.poll() is None, "it was answered before it was seen to wait"
        docker("stop", "--time", "60", name)
        assert many.communicate()[0] == b"200"
        assert inspected(name)["State"]["ExitCode"] == 0
        assert "Where is the train" not in docker("logs", name, check=False)


def test_another_model_is_mounted(image: str, tiny_artifact: Path) -> None:
    """Read-only too, and called as the flag says."""
    mount = f"{tiny_artifact}:/models/tiny:ro"
    for path in (tiny_artifact, *tiny_artifact.rglob("*")):  # the container's user is a stranger here
        path.chmod(0o755 if path.is_dir() else 0o644)
    with running(image, "--volume", mount, command=("serve", "--model", "mine=/models/tiny")) as (_, url):
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "mine"
        assert httpx.post(f"{url}/v1/generate", json={"inputs": "a", "model": "mine"}).status_code == 200


def test_keys_are_mounted(image: str, tmp_path: Path) -> None:
    key, entry = docker("run", "--rm", "--network", "none", image, "key", "alice").split()
    keys = tmp_path / "keys"
    keys.write_text(entry)
    tmp_path.chmod(0o755)
    keys.chmod(0o644)
    with running(image, "--volume", f"{keys}:/keys:ro", "--env", "TRANSDUCE_API_KEY_FILE=/keys") as (_, url):
        assert httpx.post(f"{url}/v1/generate", json={"inputs": "a"}).status_code == 401
        answer = httpx.post(f"{url}/v1/generate", json={"inputs": "a"}, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200


def test_a_shard_of_a_file_is_translated_as_the_job_does(image: str, tmp_path: Path) -> None:
    """It has what the script calls (bash, split, sync), and may write to the volume alone."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "english.txt").write_text("Good morning!\nWhere is the train station?\n" * 3)
    tmp_path.chmod(0o755)
    files.chmod(0o777)  # in a cluster fsGroup lets the user write
    script = ROOT / "deploy/jobs/translate/translate.sh"
    settings = {"SHARDS": "2", "INPUT": "/files/english.txt", "OUTPUT": "/files/german", "PARAMETERS": "--num-beams 4"}
    for index in (0, 1):
        environment = {**settings, "JOB_COMPLETION_INDEX": str(index)}
        docker(
            "run", "--rm", "--network", "none", *HARDENED, "--entrypoint", "bash",
            "--volume", f"{files}:/files", "--volume", f"{script}:/script/translate.sh:ro",
            *(part for name, value in environment.items() for part in ("--env", f"{name}={value}")),
            image, "/script/translate.sh",
        )  # fmt: skip
    shards = sorted((files / "german").iterdir())
    assert [shard.name for shard in shards] == ["00000-of-00002", "00001-of-00002"]
    lines = "".join(shard.read_text() for shard in shards).splitlines()
    assert len(lines) == 6
    assert lines[1::2] == ["Wo ist der Bahnhof?"] * 3


@pytest.fixture(scope="session")
def cuda_image(image: str) -> str:
    tag = f"{image}-cuda"
    docker("build", "--network", "host", "--target", "cuda", "--tag", tag, str(ROOT), seconds=850)
    return tag


def test_the_cuda_image_lacks_nothing_but_a_driver(cuda_image: str) -> None:
    """Where there is no GPU it says so and ends, since every other library was found; on the CPU it translates."""
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this host has an NVIDIA driver: the image would start")
    outcome = subprocess.run(
        ["docker", "run", "--rm", "--network", "none", cuda_image], capture_output=True, text=True, timeout=120
    )
    assert outcome.returncode == 2
    assert "libcuda.so.1: cannot open shared object file" in outcome.stderr
    assert "provider: cuda could not be started" in outcome.stderr
    assert "choose --provider cpu" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    with running(cuda_image, "--env", "TRANSDUCE_PROVIDER=cpu") as (_, url):
        answer = httpx.post(f"{url}/v1/generate", json={"inputs": "Where is the train station?"})
        assert answer.json()["outputs"][0]["sequences"][0]["text"] == "Wo ist der Bahnhof?"


def test_a_wrong_setting_ends_it_with_one_line(image: str) -> None:
    outcome = subprocess.run(
        ["docker", "run", "--rm", "--network", "none", image, "serve", "--max-rows", "0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert outcome.returncode == 2
    assert "--max-rows" in outcome.stderr
    assert "Traceback" not in outcome.stderr
