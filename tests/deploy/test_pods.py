"""What the pods promise: nothing that they do not need, probes that tell the truth, an end without a lost answer."""

from __future__ import annotations

import re
import stat
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from service.keys import Keys, make_key
from service.probes import HEALTH_PATHS
from service.server import ENGINE_SECONDS, slow_reader_seconds
from service.settings import PREFIX, Settings, read_settings, variable
from tests.deploy.manifests import DEPLOY, JOBS, ROOT, SERVERS, WHOLE, Object, build, build_with, pod_of, the, workloads

ALLOWED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
"""Of the restricted Pod Security Standard."""


def broken_controls(pod: Object) -> list[str]:
    """The controls of the Pod Security Standard `restricted` that a pod breaks, each container by itself."""
    broken = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    around = pod.get("securityContext", {})
    if around.get("sysctls") or around.get("windowsOptions", {}).get("hostProcess"):
        broken.append("sysctls or hostProcess")
    volumes = pod.get("volumes", [])
    broken += [f"volume {one['name']}" for one in volumes if not set(one) - {"name"} <= ALLOWED_VOLUMES]
    for container in (*pod["containers"], *pod.get("initContainers", [])):
        own = container.get("securityContext", {})
        capabilities = own.get("capabilities", {})

        def effective(field: str, own: dict[str, Any] = own) -> Any:
            return own.get(field, around.get(field))

        controls = {
            "privileged": not own.get("privileged"),
            "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
            "runAsNonRoot": effective("runAsNonRoot") is True,
            "runAsUser": effective("runAsUser") != 0,
            "seccompProfile": (effective("seccompProfile") or {}).get("type") in ("RuntimeDefault", "Localhost"),
            "capabilities dropped": capabilities.get("drop") == ["ALL"],
            "capabilities added": not set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"},
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
            "procMount": own.get("procMount", "Default") == "Default",
            "seLinuxOptions": "seLinuxOptions" not in own,
            "appArmorProfile": "appArmorProfile" not in own,
            "host of a probe or hook": "'host':" not in str({**container, "env": None}),
        }
        broken += [f"{container['name']}: {name}" for name, kept in controls.items() if not kept]
    return broken


def test_every_pod_keeps_the_restricted_pod_security_standard() -> None:
    """Which the namespace enforces."""
    for name, workload in workloads():
        assert broken_controls(pod_of(workload)) == [], name
    runtime = the(build("overlays/kserve"), "ServingRuntime")
    assert broken_controls(runtime["spec"]) == []
    assert the(build("base"), "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(
    "change", [{"hostNetwork": True}, {"securityContext": {}}, {"volumes": [{"name": "a", "hostPath": {"path": "/"}}]}]
)
def test_a_pod_that_breaks_the_standard_would_be_found(change: dict[str, Any]) -> None:
    """The check has teeth."""
    assert broken_controls({**pod_of(the(build("base"), "Deployment")), **change})


def test_every_pod_is_user_10001_writes_nowhere_and_has_no_token() -> None:
    """Beyond the standard: the image's user, a read-only root, no credentials, no Service addresses around it."""
    for name, workload in workloads():
        pod = pod_of(workload)
        assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (10001, 10001), name
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, name
        assert pod.get("serviceAccountName") is None, name
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
    assert "USER 10001:10001" in (ROOT / "Dockerfile").read_text()
    assert "USER 10001:10001" in (DEPLOY / "jobs/train/Dockerfile").read_text()
    predictor = the(build("overlays/kserve"), "InferenceService")["spec"]["predictor"]
    assert (predictor["automountServiceAccountToken"], predictor["enableServiceLinks"]) == (False, False)


def test_every_container_has_requests_and_a_bound_on_memory() -> None:
    """The server's processors are bounded, too, and whole: their limit is its number of workers."""
    for name, workload in workloads():
        for container in pod_of(workload)["containers"]:
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]), name
            assert resources["limits"]["memory"] == resources["requests"]["memory"], name
            if workload["kind"] == "Deployment":
                assert resources["limits"]["cpu"] == resources["requests"]["cpu"], name
                assert int(resources["limits"]["cpu"]) >= 1, name


def environment(container: Object) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container.get("env", [])}


@pytest.mark.parametrize("component", [None, "gpu", "keys", "model"])
def test_every_setting_in_a_manifest_is_one_of_the_services(component: str | None, tmp_path: Path) -> None:
    """By its variable, and its value is taken."""
    objects = build("overlays/cpu") if component is None else build_with(component, tmp_path)
    (container,) = pod_of(the(objects, "Deployment"))["containers"]
    settings, warnings = read_settings(environ=environment(container))
    assert warnings == []
    assert settings.drain_seconds == Settings().drain_seconds
    known = {variable(spec.name) for spec in fields(Settings)}
    assert {name for name in environment(container) if name.startswith(PREFIX)} <= known


def test_no_file_names_a_setting_that_there_is_not() -> None:
    """Comments, scripts and compose.yaml included."""
    known = {variable(spec.name) for spec in fields(Settings)}
    for path in (*DEPLOY.rglob("*.y*ml"), *DEPLOY.rglob("*.sh"), *DEPLOY.rglob("*.md")):
        names = set(re.findall(r"TRANSDUCE_[A-Z_]+", path.read_text(encoding="utf-8")))
        assert names <= known, path


@pytest.mark.parametrize("name", SERVERS)
def test_probes_ask_the_open_routes(name: str) -> None:
    """Ready is /readyz, alive is /healthz: a service that drains is not ready, and is not to be killed for it."""
    (container,) = pod_of(the(build(name), "Deployment"))["containers"]
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/healthz"}
    assert set(paths.values()) == HEALTH_PATHS
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60


@pytest.mark.parametrize("name", [*SERVERS, "overlays/kserve"])
def test_the_grace_period_holds_all_that_an_end_may_take(name: str) -> None:
    """preStop, the drain, the engine's end, and what uvicorn gives to connections that are still open."""
    objects = build(name)
    if name == "overlays/kserve":
        (container,) = the(objects, "ServingRuntime")["spec"]["containers"]
        grace = the(objects, "InferenceService")["spec"]["predictor"]["terminationGracePeriodSeconds"]
    else:
        pod = pod_of(the(objects, "Deployment"))
        (container,), grace = pod["containers"], pod["terminationGracePeriodSeconds"]
    settings, _ = read_settings(environ=environment(container))
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert grace > sleep + settings.drain_seconds + ENGINE_SECONDS + slow_reader_seconds(settings)


def test_pre_stop_outlasts_the_news_of_an_end() -> None:
    """Until a readiness probe would have said so, at the latest, newcomers are answered as ever."""
    (container,) = pod_of(the(build("base"), "Deployment"))["containers"]
    readiness = container["readinessProbe"]
    told = readiness["periodSeconds"] * readiness["failureThreshold"]
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] >= told


def test_keys_come_from_a_secret_as_a_file(tmp_path: Path) -> None:
    """Readable to the service's group alone, where the variable says; what `transduce key` makes is taken."""
    pod = pod_of(the(build_with("keys", tmp_path / "built"), "Deployment"))
    (container,) = pod["containers"]
    (volume,) = pod["volumes"]
    (mount,) = container["volumeMounts"]
    assert volume["secret"]["secretName"] == "transduce-keys"
    assert stat.filemode(volume["secret"]["defaultMode"]) == "?r--r-----"
    assert not volume["secret"].get("optional"), "without its Secret a pod has to wait, not to be open"
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    assert mount["readOnly"] is True
    file = environment(container)["TRANSDUCE_API_KEY_FILE"]
    assert Path(file).parent == Path(mount["mountPath"])
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert f"--from-file={Path(file).name}=" in readme
    key, entry = make_key("alice")
    (tmp_path / "keys").write_text(f"{entry}\n")
    assert Keys(path=str(tmp_path / "keys")).client(key.encode()) == "alice"


def test_the_network_policy_lets_out_nothing_and_in_only_who_is_named() -> None:
    """Both directions are governed; no rule is empty, which would mean everyone."""
    spec = the(build("base"), "NetworkPolicy")["spec"]
    assert sorted(spec["policyTypes"]) == ["Egress", "Ingress"]
    assert spec.get("egress", []) == []
    (rule,) = spec["ingress"]
    assert {"podSelector": {}} in rule["from"]
    assert {"namespaceSelector": {}} not in rule["from"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_has_as_many_pods_as_its_script_is_told(name: str) -> None:
    """The number stands in two places, because a pod cannot read its Job's."""
    job = the(build(name), "Job")
    (container,) = pod_of(job)["containers"]
    told = environment(container)["SHARDS" if name == "jobs/translate" else "NODES"]
    assert (job["spec"]["completionMode"], job["spec"]["completions"]) == ("Indexed", int(told))


def test_the_nodes_of_a_run_find_the_first_by_name() -> None:
    """Its headless Service, its subdomain and its address agree."""
    objects = build("jobs/train")
    job, service = the(objects, "Job"), the(objects, "Service")
    pod = pod_of(job)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert pod["subdomain"] == service["metadata"]["name"]
    first = environment(pod["containers"][0])["FIRST"]
    assert first == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert job["spec"]["parallelism"] == job["spec"]["completions"]


def test_scripts_of_jobs_are_mounted_where_they_are_called() -> None:
    """By the name with the hash of their text."""
    for name in JOBS:
        objects = build(name)
        pod = pod_of(the(objects, "Job"))
        (script,) = (volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume)
        config = the(objects, "ConfigMap")
        assert script == config["metadata"]["name"]
        assert pod["containers"][0]["command"] == ["bash", f"/script/{next(iter(config['data']))}"]


def test_every_kustomization_is_looked_at() -> None:
    """A new one comes into these tests."""
    found = {str(path.parent.relative_to(DEPLOY)) for path in DEPLOY.rglob("kustomization.yaml")}
    assert {name for name in found if not name.startswith("components/")} - {"image"} == set(WHOLE)
