"""What kubectl makes of `deploy/`: every kustomization, as the objects that a cluster would get."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SERVERS = ("base", "overlays/cpu", "overlays/gpu")
JOBS = ("jobs/translate", "jobs/train")
WHOLE = (*SERVERS, "overlays/kserve", *JOBS)
COMPONENTS = tuple(sorted(path.parent.name for path in DEPLOY.glob("components/*/kustomization.yaml")))

Object = dict[str, Any]


@functools.cache
def build(name: str) -> tuple[Object, ...]:
    """The objects of a kustomization under deploy/; skips the test that asks where there is no kubectl."""
    return _objects(DEPLOY / name)


def build_with(component: str, directory: Path) -> tuple[Object, ...]:
    """The objects of the base with one component, through a kustomization in `directory`."""
    deploy = directory / "deploy"
    shutil.copytree(DEPLOY, deploy, ignore=shutil.ignore_patterns("lock"))
    overlay = deploy / "overlays" / "tried"
    overlay.mkdir()
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "transduce",
        "resources": ["../../base"],
        "components": [f"../../components/{component}", "../../image"],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return _objects(overlay)


def the(objects: tuple[Object, ...], kind: str) -> Object:
    """The one object of a kind."""
    (found,) = (one for one in objects if one["kind"] == kind)
    return found


def pod_of(workload: Object) -> Object:
    """The pod's spec within a Deployment or a Job."""
    return workload["spec"]["template"]["spec"]  # type: ignore[no-any-return]  # YAML has no types


def workloads() -> Iterator[tuple[str, Object]]:
    """Each Deployment and Job, with the kustomization that it comes from."""
    for name in (*SERVERS, *JOBS):
        for one in build(name):
            if one["kind"] in ("Deployment", "Job"):
                yield name, one


def _objects(path: Path) -> tuple[Object, ...]:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here: install it (https://kubernetes.io/docs/tasks/tools) to build the manifests")
    outcome = subprocess.run(["kubectl", "kustomize", str(path)], capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr == "", outcome.stderr  # a deprecated field, for one
    return tuple(yaml.safe_load_all(outcome.stdout))
