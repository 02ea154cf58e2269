"""compose.yaml: what it promises, and that compose takes it where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from service.server import slow_reader_seconds
from service.settings import Settings
from tests.deploy.manifests import DEPLOY

COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]


def test_both_containers_are_hardened_and_bound_to_this_machine() -> None:
    """Read-only, without capabilities or new privileges; ports on the loopback alone."""
    assert set(SERVICES) == {"transduce", "prometheus"}
    for service in SERVICES.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_the_service_has_time_to_drain() -> None:
    """Before it is killed: the drain, the engine's end, and what slow readers get."""
    slow_readers = slow_reader_seconds(Settings())
    grace = int(SERVICES["transduce"]["stop_grace_period"].removesuffix("s"))
    drain = float(SERVICES["transduce"]["environment"]["TRANSDUCE_DRAIN_SECONDS"])
    assert drain == Settings().drain_seconds
    assert grace > drain + 5 + slow_readers


def test_prometheus_scrapes_the_service_under_its_name() -> None:
    """The configuration that is mounted, with the job that alerts and dashboard look for."""
    mounts = [volume for volume in SERVICES["prometheus"]["volumes"] if volume.startswith("./")]
    (mount,) = mounts
    source, target, mode = mount.split(":")
    assert mode == "ro"
    assert f"--config.file={target}" in SERVICES["prometheus"]["command"]
    config = yaml.safe_load((DEPLOY / source).read_text())
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "transduce"
    assert job["static_configs"] == [{"targets": ["transduce:8000"]}]
    assert SERVICES["transduce"]["ports"] == ["127.0.0.1:8000:8000"]


def test_every_image_has_a_tag_or_is_built_here() -> None:
    """Prometheus by its version; the service from the repository."""
    assert re.fullmatch(r"prom/prometheus:v\d+\.\d+\.\d+", SERVICES["prometheus"]["image"])
    assert (DEPLOY / SERVICES["transduce"]["build"]["context"] / "Dockerfile").resolve().exists()


def test_compose_takes_it() -> None:
    """By the plugin, or the program that was there before it."""
    command = next((command for command in (["docker", "compose"], ["docker-compose"]) if _answers(command)), None)
    if command is None:
        pytest.skip("no compose here: docker's plugin, or apt-get install docker-compose")
    outcome = subprocess.run(
        [*command, "--file", str(DEPLOY / "compose.yaml"), "config"], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    understood = yaml.safe_load(outcome.stdout)["services"]
    assert set(understood) == set(SERVICES)
    assert understood["transduce"]["read_only"] is True
    assert "service_healthy" in json.dumps(understood["prometheus"]["depends_on"])


def _answers(command: list[str]) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0
