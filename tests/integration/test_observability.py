# SPDX-License-Identifier: Apache-2.0
"""Views of a served graph under load: metrics, dashboards, alerts, ``dynamo top`` and the web page."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from components.metrics import names
from tests.integration.browser import chromium
from tests.integration.graphs import PAGED, PROMPT, ROOT, Graph
from tests.integration.observers import Collector, Prometheus, prometheus

pytestmark = [pytest.mark.integration, pytest.mark.slow]
DEPLOY = ROOT / "deploy"
PANELS = json.loads((DEPLOY / "grafana/dashboards/migration.json").read_text())["panels"]
RULES = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"][0]["rules"]
EXPRESSIONS = {p["title"]: [t["expr"] for t in p["targets"]] for p in PANELS if "targets" in p}
PANEL_QUERIES = dict(EXPRESSIONS)
EXPRESSIONS |= {rule["alert"]: [rule["expr"]] for rule in RULES}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Graph]:
    """A graph in which a request was moved live, one by stop-and-copy, and a worker was drained."""
    tracing = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.address, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    tracing |= {"OTEL_EXPORT_ENABLED": "1", "DYN_LOGGING_JSONL": "1", "OTEL_BSP_SCHEDULE_DELAY": "500"}
    graph = Graph(tmp_path_factory.mktemp("observed"), overrides=PAGED, **tracing)
    try:
        graph.wait(200)
        act(graph)
        yield graph
    finally:
        assert graph.stop() == []


def act(graph: Graph) -> None:
    """Three requests: one is moved live, one by stop-and-copy, and a worker is drained."""

    def move(where: dict[str, str]) -> None:
        (first, there), (second, _) = list(where.items())[:2]
        for request, mode in ((first, "live"), (second, "stop-and-copy")):
            assert graph.ask("migrate", request, graph.another(where[request]), mode)["ok"]
        graph.ask("drain", there)
        graph.ask("undrain", there)

    graph.under_way([f"{time.monotonic()} {i} {PROMPT}" for i in range(3)], 1500, move, temperature=0)


@pytest.fixture(scope="module")
def scraped(busy: Graph) -> str:
    """All metrics of the graph, found as Prometheus finds them."""
    groups = busy.on_page("/targets")
    components = [group["labels"]["component"] for group in groups]
    assert sorted(components) == ["decode", "decode", "frontend", "prefill"]
    return "\n".join(busy.metrics(component) for component in sorted(set(components)))


@pytest.mark.parametrize("metric", names.WORKER, ids=lambda metric: metric.name)
def test_every_metric_is_exported_with_dynamos_labels(metric: names.Metric, scraped: str) -> None:
    series = metric.full_name + ("_count" if metric.kind is names.Kind.HISTOGRAM else "")
    lines = [line for line in scraped.splitlines() if re.match(rf"{series}[{{ ]", line)]
    assert lines
    for label in (*metric.labels, "dynamo_namespace", "dynamo_component", "dynamo_endpoint"):
        assert f'{label}="' in lines[0]


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_no_panel_and_no_alert_is_without_data(where: str, scraped: str) -> None:
    for expression in EXPRESSIONS[where]:
        for name in re.findall(r"\bdynamo_\w+", re.sub(r"by \([^)]*\)", "", expression)):
            assert re.search(rf"^{name}[{{ ]", scraped, re.M), f"{name} of {where} is not exported"


@pytest.fixture(scope="module")
def watched(busy: Graph, scraped: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A real Prometheus that has watched the same once more."""
    folder = tmp_path_factory.mktemp("prometheus")
    rules = DEPLOY / "prometheus/alerts.yml"
    with prometheus(folder, DEPLOY / "prometheus/prometheus.yml", rules, busy.page) as server:
        while server.up() < 4:
            time.sleep(0.5)
        act(busy)
        yield server


@pytest.mark.parametrize("panel", PANEL_QUERIES)
def test_a_real_prometheus_has_values_for_every_panel(panel: str, watched: Prometheus) -> None:
    for expression in PANEL_QUERIES[panel]:
        asked = expression.replace("$__rate_interval", "2m")
        end = time.monotonic() + 30
        while not any(math.isfinite(value) for value in watched.values(asked)):
            assert time.monotonic() < end, f"no value for {asked}"
            time.sleep(1)


def test_a_real_prometheus_can_evaluate_every_alert_and_none_fires(watched: Prometheus) -> None:
    [group] = watched.get("rules")["groups"]
    while any(rule["health"] == "unknown" for rule in group["rules"]):
        time.sleep(0.5)
        [group] = watched.get("rules")["groups"]
    assert {rule["name"]: (rule["health"], rule["state"]) for rule in group["rules"]} == {
        rule["alert"]: ("ok", "inactive") for rule in RULES
    }
    for rule in RULES:
        for selector in re.findall(r"dynamo_\w+(?:{[^}]*})?", re.sub(r"by \([^)]*\)", "", rule["expr"])):
            assert watched.values(selector), selector


def test_a_move_is_written_with_the_time_in_which_no_token_came(busy: Graph, collector: Collector) -> None:
    moves = [span for span in collector.wait_for_name("live_migration", 2) if span.service == "dynamo-migrate"]
    assert {span.attributes["live_migration.mode"] for span in moves} >= {"live", "stop-and-copy"}
    for span in moves:
        assert span.attributes["live_migration.source"] != span.attributes["live_migration.target"]
        assert "frozen" in {inside.name for inside in collector.spans if inside.parent == span.span}


def test_counts_are_those_of_what_happened(scraped: str) -> None:
    def total(name: str, **labels: str) -> float:
        found = re.findall(rf"^{names.PREFIX}_{name}{{([^}}]*)}} (\S+)$", scraped, re.M)
        return sum(float(v) for text, v in found if all(f'{k}="{x}"' in text for k, x in labels.items()))

    assert total("moves_total", mode="live", outcome="done") >= 1
    assert total("moves_total", mode="stop-and-copy", outcome="done") == 1
    assert total("drains_total", outcome="done") == 1
    assert total("landings_total", outcome="done") == total("moves_total", outcome="done")
    assert total("bytes_total", mode="live") > 0
    assert total("downtime_seconds_count", mode="live") == total("moves_total", mode="live", outcome="done")


def test_the_page_tells_the_life_of_each_request(busy: Graph) -> None:
    lives = busy.on_page("/api/state")["latest"]["lives"]
    kinds = [{part["kind"] for part in life["parts"]} for life in lives]
    assert any({"decode", "copying", "frozen"} <= life for life in kinds)
    for life in lives:
        times = [part["began"] for part in life["parts"] if part["kind"] in ("prefill", "decode")]
        assert times == sorted(times)


def test_top_shows_workers_and_migrations(busy: Graph) -> None:
    done = busy.command("top", "--once")
    assert done.returncode == 0, done.stderr
    for word in ("tokens/s", "decode", "prefill", "migrations", "live", "stop-and-copy"):
        assert word in done.stdout


def test_the_page_shows_the_same_in_a_browser(busy: Graph) -> None:
    with chromium() as browser, ThreadPoolExecutor(3) as pool:
        running = [pool.submit(busy.complete, f"page {i} {PROMPT}", 2500, temperature=0) for i in range(3)]
        browser.get(busy.page)
        wait = WebDriverWait(browser, 30)
        wait.until(lambda b: int(b.find_element(By.TAG_NAME, "body").get_attribute("data-samples") or 0) >= 4)
        wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#timeline rect.decode")) >= 3)
        rows = browser.find_elements(By.CSS_SELECTOR, "#workers tr")
        assert len(rows) == 4
        assert browser.find_elements(By.CSS_SELECTOR, "#moves td.done")
        assert len(browser.find_elements(By.CSS_SELECTOR, ".chart canvas")) == 2
        assert browser.find_elements(By.CSS_SELECTOR, "#timeline rect.copying")
        assert not browser.find_element(By.ID, "planner").is_displayed()
        browser.refresh()  # The history comes back at once.
        wait.until(lambda b: int(b.find_element(By.TAG_NAME, "body").get_attribute("data-samples") or 0) >= 4)
        severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert severe == []
        for text in running:
            text.result(300)
