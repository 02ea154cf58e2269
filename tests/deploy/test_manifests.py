"""The manifests build, are what Kubernetes takes, and hang together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service import __version__
from tests.deploy.manifests import COMPONENTS, DEPLOY, SERVERS, WHOLE, Object, build, build_with, pod_of, the

VERSIONS = ("1.30", "1.32", "1.34", "1.37")
OPERATORS = {"ServiceMonitor", "PrometheusRule", "ScaledObject", "ServingRuntime", "InferenceService"}
"""Kinds that come with operators. No schema of theirs is at hand: what matters in them is asserted below."""


def assert_valid(objects: tuple[Object, ...], version: str) -> None:
    for one in objects:
        if one["kind"] not in OPERATORS:
            kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", WHOLE)
def test_every_object_is_one_of_that_version_of_kubernetes(name: str, version: str) -> None:
    """Strictly: a field that is unknown there is a failure."""
    assert_valid(build(name), version)


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_goes_on_the_base(component: str, tmp_path: Path) -> None:
    """Alone, and what comes out is valid for the oldest and the newest version."""
    objects = build_with(component, tmp_path)
    assert_valid(objects, VERSIONS[0])
    assert_valid(objects, VERSIONS[-1])
    assert objects != build("base")


def test_a_wrong_field_would_be_found() -> None:
    """The check has teeth."""
    deployment = json.loads(json.dumps(the(build("base"), "Deployment")))
    deployment["spec"]["template"]["spec"]["containers"][0]["readOnlyRootFileSystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)


def test_every_file_begins_with_what_it_is_for() -> None:
    """In a comment; JSON has none."""
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.suffix not in (".json", ".md") and path.parent.name != "lock":
            assert re.match(r"# \S.{20,}", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("name", WHOLE)
def test_every_object_has_the_recommended_labels(name: str) -> None:
    """So that `kubectl get -l app.kubernetes.io/part-of=transduce` finds all of it."""
    for one in build(name):
        labels = one["metadata"].get("labels", {})
        if one["kind"] == "ConfigMap" and "dashboard" not in one["metadata"]["name"]:
            continue  # a script, named by its job
        assert labels.get("app.kubernetes.io/name") == "transduce", one["metadata"]["name"]


@pytest.mark.parametrize("name", SERVERS)
def test_selectors_find_the_pods_and_no_others(name: str) -> None:
    """Service, budget, network policy and monitor mean the Deployment's pods, and not those of the jobs."""
    objects = build(name)
    labels = the(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [
        the(objects, "Deployment")["spec"]["selector"]["matchLabels"],
        the(objects, "Service")["spec"]["selector"],
        the(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        the(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(
            one["labelSelector"]["matchLabels"]
            for one in pod_of(the(objects, "Deployment"))["topologySpreadConstraints"]
        ),
    ]
    others = [
        the(build(job), "Job")["spec"]["template"]["metadata"]["labels"] for job in ("jobs/translate", "jobs/train")
    ]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not any(selector.items() <= other.items() for other in others)
    for monitor in (one for one in objects if one["kind"] == "ServiceMonitor"):
        assert (
            monitor["spec"]["selector"]["matchLabels"].items() <= the(objects, "Service")["metadata"]["labels"].items()
        )


@pytest.mark.parametrize("name", SERVERS)
def test_ports_lead_to_where_the_service_listens(name: str) -> None:
    """By name, from Service, probes, network policy and monitor to the container's 8000."""
    objects = build(name)
    (container,) = pod_of(the(objects, "Deployment"))["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": 8000}]
    assert {"name": "TRANSDUCE_HOST", "value": "0.0.0.0"} in container["env"]
    (port,) = the(objects, "Service")["spec"]["ports"]
    assert (port["name"], port["port"], port["targetPort"]) == ("http", 8000, "http")
    (rule,) = the(objects, "NetworkPolicy")["spec"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": "http"}]
    for monitor in (one for one in objects if one["kind"] == "ServiceMonitor"):
        assert [endpoint["port"] for endpoint in monitor["spec"]["endpoints"]] == ["http"]


def test_the_image_has_its_tag_from_one_file(tmp_path: Path) -> None:
    """Every image that is deployed is named there, and its tag is this version."""
    listed = yaml.safe_load((DEPLOY / "image/kustomization.yaml").read_text())["images"]
    wanted = {f"{image['newName']}:{image['newTag']}" for image in listed}
    assert {tag.split(":")[1].split("-")[0] for tag in wanted} == {__version__}
    found = set(re.findall(r'"image": "([^"]+)"', json.dumps([build(name) for name in WHOLE])))
    assert found == wanted
    tags = [path for path in DEPLOY.rglob("*.yaml") if "newTag" in path.read_text()]
    assert tags == [DEPLOY / "image/kustomization.yaml"]


def test_the_dashboard_is_the_file() -> None:
    """Whole, and where Grafana's sidecar finds it."""
    (found,) = (one for one in build("overlays/cpu") if one["metadata"]["name"] == "transduce-dashboard")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    dashboard = json.loads(found["data"]["transduce.json"])
    assert dashboard == json.loads((DEPLOY / "components/monitoring/dashboard.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def scaled(component: str, tmp_path: Path) -> tuple[Object, Object]:
    """What scales, and the Deployment that it scales."""
    objects = build_with(component, tmp_path)
    scaler = next(one for one in objects if one["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"))
    return scaler, the(objects, "Deployment")


@pytest.mark.parametrize("component", [name for name in COMPONENTS if name.startswith("scale-on-")])
def test_an_autoscaler_owns_the_number_of_replicas(component: str, tmp_path: Path) -> None:
    """It points at the Deployment, which then says nothing of replicas: an apply would set them back."""
    scaler, deployment = scaled(component, tmp_path)
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"]
    spec = scaler["spec"]
    assert spec.get("minReplicas", spec.get("minReplicaCount")) == the(build("base"), "Deployment")["spec"]["replicas"]


def test_both_ways_to_scale_on_the_line_mean_the_same(tmp_path: Path) -> None:
    """The HorizontalPodAutoscaler and KEDA: same bounds, same numbers, same behaviour."""
    by_adapter, _ = scaled("scale-on-queue", tmp_path / "adapter")
    by_keda, _ = scaled("scale-on-queue-keda", tmp_path / "keda")
    spec, keda = by_adapter["spec"], by_keda["spec"]
    pods, cpu = spec["metrics"]
    line, busy = keda["triggers"]
    assert (line["type"], line["metricType"], busy["type"], busy["metricType"]) == (
        "prometheus", "AverageValue", "cpu", "Utilization",
    )  # fmt: skip
    assert line["metadata"]["threshold"] == pods["pods"]["target"]["averageValue"]
    assert busy["metadata"]["value"] == str(cpu["resource"]["target"]["averageUtilization"])
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (spec["minReplicas"], spec["maxReplicas"])
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == spec["behavior"]
    assert f'namespace="{by_keda["metadata"]["namespace"]}"' in line["metadata"]["query"]
    assert spec["minReplicas"] <= keda["fallback"]["replicas"] <= spec["maxReplicas"]


def test_the_cpu_autoscaler_needs_metrics_server_alone(tmp_path: Path) -> None:
    """Resource metrics and no others."""
    scaler, _ = scaled("scale-on-cpu", tmp_path)
    assert [metric["type"] for metric in scaler["spec"]["metrics"]] == ["Resource"]


def test_the_service_monitor_keeps_the_metrics_own_labels() -> None:
    """The operator's target label `endpoint` would else push the metrics' own aside."""
    monitor = the(build("overlays/cpu"), "ServiceMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    (endpoint,) = monitor["spec"]["endpoints"]
    assert (endpoint["path"], endpoint["honorLabels"]) == ("/metrics", True)
    label = monitor["spec"]["jobLabel"]
    assert the(build("overlays/cpu"), "Service")["metadata"]["labels"][label] == "transduce"


def test_kserve_serves_the_artifact_that_it_fetches() -> None:
    """The runtime takes the format that the model asks for, and serves what KServe mounts, by the model's name."""
    runtime, model = the(build("overlays/kserve"), "ServingRuntime"), the(build("overlays/kserve"), "InferenceService")
    assert (runtime["apiVersion"], model["apiVersion"]) == ("serving.kserve.io/v1alpha1", "serving.kserve.io/v1beta1")
    asked = model["spec"]["predictor"]["model"]
    assert asked["modelFormat"]["name"] in {one["name"] for one in runtime["spec"]["supportedModelFormats"]}
    assert asked["runtime"] == runtime["metadata"]["name"]
    assert re.fullmatch(r"pvc://[a-z-]+/\w+", asked["storageUri"])
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"
    assert container["args"] == ["serve", "--model={{.Name}}=/mnt/models"]
    assert container["ports"][0]["containerPort"] == int(runtime["spec"]["annotations"]["prometheus.kserve.io/port"])


def test_what_kserve_makes_a_pod_of_is_one() -> None:
    """The runtime's container with what the predictor says of its pod, against Kubernetes's own schema."""
    runtime, model = the(build("overlays/kserve"), "ServingRuntime"), the(build("overlays/kserve"), "InferenceService")
    own = {"model", "minReplicas", "maxReplicas", "scaleMetric", "scaleTarget"}  # fields of KServe's
    of_pod = {name: value for name, value in model["spec"]["predictor"].items() if name not in own}
    pod = {"apiVersion": "v1", "kind": "Pod", "spec": {**of_pod, "containers": runtime["spec"]["containers"]}}
    assert_valid((pod,), VERSIONS[0])
    assert_valid((pod,), VERSIONS[-1])


def test_kserves_container_is_that_of_the_base() -> None:
    """The same probes, limits and security, said once more because KServe takes no Deployment."""
    (container,) = the(build("overlays/kserve"), "ServingRuntime")["spec"]["containers"]
    (base,) = pod_of(the(build("base"), "Deployment"))["containers"]

    def probes(one: dict[str, Any]) -> str:
        kinds = ("startupProbe", "readinessProbe", "livenessProbe")
        return json.dumps([one[kind] for kind in kinds], sort_keys=True).replace('"port": "http"', '"port": 8000')

    assert probes(container) == probes(base)
    for part in ("resources", "lifecycle", "env", "image"):
        assert container[part] == base[part]
    assert base["securityContext"].items() <= container["securityContext"].items()
