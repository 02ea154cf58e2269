"""Alerts, dashboard and autoscalers ask for metrics that exist; alerts fire when they have to, and have runbooks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from service import errors
from service.errors import RequestError, TransduceError
from service.metrics import FINISH_REASONS, PHASES, Families
from tests.deploy.manifests import DEPLOY
from tests.deploy.monitored import RULES, promtool

ALERTS = [rule for group in RULES for rule in group["rules"]]
DASHBOARD = json.loads((DEPLOY / "components/monitoring/dashboard.json").read_text())
STORIES = yaml.safe_load((Path(__file__).parent / "alerts.yml").read_text())
OF_TARGETS = {"job", "namespace", "service", "pod", "instance", "le"}
"""Labels that Prometheus adds, and that of a histogram's buckets."""


def queries() -> dict[str, str]:
    """Every query in deploy/, by where it stands."""
    found = {f"alert {alert['alert']}": alert["expr"] for alert in ALERTS}
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            found[f"panel {panel['title']} {target['refId']}"] = target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        found[f"variable {variable['name']}"] = variable["query"]
    keda = yaml.safe_load((DEPLOY / "components/scale-on-queue-keda/scaledobject.yaml").read_text())
    found["keda"] = keda["spec"]["triggers"][0]["metadata"]["query"]
    adapter = yaml.safe_load((DEPLOY / "components/scale-on-queue/adapter-values.yaml").read_text())
    found["adapter"] = adapter["rules"]["custom"][0]["seriesQuery"]
    return found


def samples() -> dict[str, set[str]]:
    """The series that the service can give, by name, with their labels."""
    registry = CollectorRegistry()
    metrics = Families(registry).of("any")
    metrics.count_finished("generate", "stop")
    metrics.count_failure("queue_full")
    metrics.count_http("/v1/generate", 200)
    found: dict[str, set[str]] = {"up": set()}
    for family in registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def selectors(query: str) -> list[tuple[str, str]]:
    """The metrics of a query, each with what stands in its braces."""
    found = re.findall(r"\b((?:transduce|process|python)_\w+|up)\b(?:\{([^}]*)\})?", re.sub(r'"[^"]*"', '""', query))
    return [(name, matchers) for name, matchers in found]


@pytest.mark.parametrize("place", queries())
def test_every_metric_that_is_asked_for_is_one_of_the_services(place: str) -> None:
    """With labels that it has."""
    known, query = samples(), queries()[place]
    assert selectors(query) or place == "variable datasource", query
    for name, matchers in selectors(query):
        assert name in known, f"{place} asks for {name}"
        labels = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers))
        assert labels <= known[name] | OF_TARGETS, f"{place}: {name} has no {labels - known[name] - OF_TARGETS}"


def test_every_value_of_a_label_that_is_asked_for_can_come() -> None:
    """Types of errors, reasons to finish, routes, phases."""

    def types(error: type[TransduceError]) -> set[str]:
        return {error.type}.union(*(types(child) for child in error.__subclasses__()))

    assert errors.QueueFull in RequestError.__subclasses__()
    text = "\n".join(queries().values())
    wanted: dict[str, Any] = {
        "type": types(RequestError),
        "finish_reason": set(FINISH_REASONS),
        "phase": set(PHASES),
    }
    for label, known in wanted.items():
        for value in re.findall(rf'\b{label}=~?"([^"]+)"', text):
            assert set(value.split("|")) <= known, (label, value)
    routes = set(re.findall(r'\bendpoint=~?"([^"]+)"', text))
    assert routes == {"/readyz", "/v1/.+"}


def test_the_autoscalers_read_the_line() -> None:
    """The metric's name in HorizontalPodAutoscaler, adapter and KEDA."""
    scaler = yaml.safe_load((DEPLOY / "components/scale-on-queue/horizontalpodautoscaler.yaml").read_text())
    assert scaler["spec"]["metrics"][0]["pods"]["metric"]["name"] == "transduce_num_requests_waiting"
    assert selectors(queries()["adapter"])[0][0] == "transduce_num_requests_waiting"
    assert selectors(queries()["keda"])[0][0] == "transduce_num_requests_waiting"


def test_every_alert_has_its_section_in_the_runbook_and_every_section_its_alert() -> None:
    """With the metric that it looks at in the section, and a severity on the alert."""
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (Transduce\w+)\n(.*?)(?=^##)", readme + "\n##", re.M | re.S))
    assert list(sections) == [alert["alert"] for alert in ALERTS]
    for alert in ALERTS:
        assert alert["annotations"]["runbook"] == f"deploy/README.md#{alert['alert'].lower()}"
        assert alert["annotations"]["summary"]
        assert alert["labels"]["severity"] in ("warning", "critical")
        for name, _ in selectors(alert["expr"]):
            assert f"`{name.removesuffix('_bucket')}" in sections[alert["alert"]], (alert["alert"], name)


def test_promtool_takes_the_rules(tmp_path: Path) -> None:
    """Syntax, types of expressions and templates, with its linter's objections as failures."""
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": RULES}))
    said = promtool("check", "rules", "--lint-fatal", str(tmp_path / "rules.yml"))
    assert f"{len(ALERTS)} rules found" in said


def test_promtool_takes_the_configuration_of_compose() -> None:
    """deploy/prometheus.yml."""
    assert "is valid" in promtool("check", "config", "--lint-fatal", str(DEPLOY / "prometheus.yml"))


def test_every_alert_has_a_story_in_which_it_fires_and_one_in_which_it_keeps_still() -> None:
    """In alerts.yml."""
    names = {alert["alert"] for alert in ALERTS}
    assert {story["alert"] for story in STORIES} == names
    assert {story["alert"] for story in STORIES if "fires" in story} == names
    assert {story["alert"] for story in STORIES if "fires" not in story} == names


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story["alert"] + ("" if "fires" in story else "-still"))
def test_an_alert_fires_when_it_has_to_and_not_before(story: dict[str, Any], tmp_path: Path) -> None:
    """Of the rules as they are, over series that are made up, a sample a minute."""
    rule = next(alert for alert in ALERTS if alert["alert"] == story["alert"])
    promtool("--version")
    said = evaluate(story, rule, story["still"], tmp_path)
    assert said == "", f"fires at {story['still']} min: {said}"
    if "fires" in story:
        assert story["alert"] in evaluate(story, rule, story["fires"], tmp_path), "does not fire"


def evaluate(story: dict[str, Any], rule: dict[str, Any], minutes: int, directory: Path) -> str:
    """The alerts of a rule that fire then, as promtool tells them; empty if none does.

    promtool compares with what is expected, and labels depend on the story: so nothing is expected, and what it
    objects to is what fires.
    """
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in story["series"].items()],
        "alert_rule_test": [{"eval_time": f"{minutes}m", "alertname": rule["alert"], "exp_alerts": []}],
    }
    (directory / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "one", "rules": [rule]}]}))
    (directory / "tests.yml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "15s", "tests": [test]})
    )
    try:
        promtool("test", "rules", str(directory / "tests.yml"))
    except AssertionError as objection:
        text = str(objection)
        assert "got:" in text, text
        return text.split("got:")[1]
    return ""


def test_links_of_the_handbook_lead_somewhere() -> None:
    """deploy/README.md: files that exist, sections that exist."""
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    slugs = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}
    for file, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        assert (DEPLOY / file).exists() if file else anchor in slugs, (file, anchor)
    for directory in re.findall(r"^\| `([a-z/]+)/?`", text, re.M):
        assert (DEPLOY / directory).is_dir() or directory in {
            path.parent.name for path in DEPLOY.glob("components/*/*")
        }
