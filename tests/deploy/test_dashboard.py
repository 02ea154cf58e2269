"""Every query that the deployment makes, put to a real Prometheus over a server with traffic: it has to find data."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import DEPLOY
from tests.deploy.monitored import Prometheus, Server, again_and_again, prometheus, promtool, tool

DASHBOARD = json.loads((DEPLOY / "components/monitoring/dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel, target) for panel in PANELS for target in panel["targets"]]
SECONDS = 10
"""That the traffic lasts for; rates are over as many."""

MAY_BE_STILL = {"transduce_state_growths_total"}
"""What need not happen while one looks, so that a series of zeroes is right."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    tool("prometheus")
    running = Server("--max-rows", "8", "--max-queue", "300")
    yield running
    running.stop()


def traffic(server: Server) -> None:
    """Calls of all kinds for SECONDS: each route, a stream, beams, a crowd, and refusals of several types."""
    text = "The children are playing in the garden, and nobody knows where they have come from."

    def generate(**more: Any) -> None:
        server.post("/v1/generate", {"inputs": text, **more})

    def refused() -> None:
        assert server.post("/v1/generate", {"inputs": text, "parameters": {"nothing": 1}}).status_code == 422
        assert server.post("/v1/generate", {"inputs": "word " * 4000}).status_code == 413
        assert server.post("/v1/generate", {"inputs": text, "model": "nobody's"}).status_code == 404
        server.post("/v1/generate", {"inputs": text, "parameters": {"timeout": 0.001}})

    def crowds() -> None:
        # Two crowds of 200 at once are more than a line of 300 takes: one of them is 429.
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(server.post, "/v1/generate", {"inputs": [text] * 200}) for _ in range(2)]
        assert {call.result().status_code for call in calls} <= {200, 429}

    with again_and_again(
        generate,
        lambda: generate(stream=True),
        lambda: generate(parameters={"num_beams": 4}),
        lambda: generate(parameters={"max_new_tokens": 2}),
        lambda: server.post("/v1/encode", {"inputs": [text, "Good morning!"]}),
        lambda: server.post("/v1/score", {"inputs": text, "targets": "Die Kinder spielen."}),
        refused,
        crowds,
    ):
        time.sleep(SECONDS)


@pytest.fixture(scope="module")
def watched(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with prometheus(tmp_path_factory.mktemp("prometheus"), {"transduce-0": server.port}) as running:
        traffic(server)
        time.sleep(1.5)  # one more scrape
        yield running


@pytest.mark.parametrize(("panel", "target"), TARGETS, ids=[f"{p['title']} {t['refId']}" for p, t in TARGETS])
def test_a_panels_query_finds_data(watched: Prometheus, panel: dict[str, Any], target: dict[str, Any]) -> None:
    """Numbers, not all zero, and each series with the labels that its legend names."""
    query = target["expr"].replace("$__rate_interval", f"{SECONDS}s")
    query = query.replace("$model", ".*").replace("$namespace", ".*")
    assert "$" not in query
    found = watched.query(f"max_over_time(({query})[{SECONDS}s:1s])")
    assert found, query
    if not any(name in query for name in MAY_BE_STILL):
        assert any(float(series["value"][1]) > 0 for series in found), query
    for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
        assert all(series["metric"].get(label) for series in found), (query, label)


def test_the_variables_offer_what_there_is(watched: Prometheus) -> None:
    """Model and namespace, out of the series that they look at."""
    offered = {}
    for variable in DASHBOARD["templating"]["list"]:
        if match := re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]):
            offered[variable["name"]] = {series[match[2]] for series in watched.series(match[1])}
    assert offered == {"model": {"tatoeba-en-de"}, "namespace": {"transduce"}}


def test_calls_keep_their_route(watched: Prometheus) -> None:
    """The monitor's honorLabels: `endpoint` is the route, although the target has a label of that name."""
    routes = {series["endpoint"] for series in watched.series("transduce_http_requests_total")}
    assert {"/v1/generate", "/v1/encode", "/v1/score", "/readyz"} <= routes
    assert "http" not in routes


def test_the_refusals_were_of_many_types(watched: Prometheus) -> None:
    """So that the panel of errors was tried with them."""
    types = {series["type"] for series in watched.series("transduce_request_failures_total")}
    assert {"validation_failed", "too_large", "not_found", "queue_full"} <= types


def test_the_adapter_finds_the_line_of_each_pod(watched: Prometheus) -> None:
    """Its template filled in as prometheus-adapter does for the pods of a namespace."""
    values = yaml.safe_load((DEPLOY / "components/scale-on-queue/adapter-values.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    (series,) = watched.series(rule["seriesQuery"])
    for resource, override in rule["resources"]["overrides"].items():
        assert resource in series
        assert override["resource"] == resource
    query = rule["metricsQuery"].replace("<<.Series>>", series["__name__"]).replace("<<.GroupBy>>", "pod")
    query = query.replace("<<.LabelMatchers>>", 'namespace="transduce",pod=~"transduce-0"')
    assert "<<" not in query
    (found,) = watched.query(query)
    assert found["metric"] == {"pod": "transduce-0"}
    (most,) = watched.query(f"max_over_time(({query})[{SECONDS}s:1s])")
    assert float(most["value"][1]) > 32, "the crowds waited: the autoscaler would have seen it"


def test_keda_finds_the_line(watched: Prometheus) -> None:
    """One number for all pods of the namespace."""
    scaled = yaml.safe_load((DEPLOY / "components/scale-on-queue-keda/scaledobject.yaml").read_text())
    (found,) = watched.query(scaled["spec"]["triggers"][0]["metadata"]["query"])
    assert found["metric"] == {}


def test_promtool_takes_a_scrape(watched: Prometheus, server: Server) -> None:
    """Of a server that has answered all kinds of calls: names, types, help and units are as they ought to be."""
    page = server.get("/metrics").text
    assert "transduce_requests_total" in page
    said = promtool("check", "metrics", text=page)
    assert said == "", said
