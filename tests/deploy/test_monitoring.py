"""What Prometheus and Grafana are told to look at is what the server counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from hivtp.runtime.serving.settings import ServerSettings
from tests.support.answers import load
from tests.support.serving import asking, random_image, serving

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_prometheus_asks_where_the_server_tells():
    found = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    [job] = found["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["authorization"]["type"] == "Bearer"
    assert all(target.endswith(f":{ServerSettings().port}") for target in job["static_configs"][0]["targets"])


def test_the_dashboard_shows_what_the_server_counts(pruned_bundle: Path):
    dashboard = json.loads((DEPLOY / "grafana" / "hivtp.json").read_text())
    with serving(load(pruned_bundle).model) as server:
        assert server.chat(asking("what", random_image(1))).status_code == 200
        # So that every label has a value.
        assert server.chat("what", temperature=-1).status_code == 400
        text = server.client.get("/metrics").text
    samples = dict.fromkeys(re.findall(r"^(hivtp:\w+)\{", text, re.MULTILINE))
    names = set(samples) | set(re.findall(r"^# TYPE (hivtp:\w+) counter", text, re.MULTILINE))
    names |= {f"{name}_total" for name in re.findall(r"^# TYPE (hivtp:\w+?)(?:_total)? counter", text, re.MULTILINE)}
    labels = set(re.findall(r'(\w+)="', text)) | {"instance"}
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [one["definition"] for one in dashboard["templating"]["list"] if "definition" in one]
    used = {name for expression in expressions for name in re.findall(r"hivtp:\w+", expression)}
    assert used <= names
    # What is counted is shown.
    families = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in names}
    assert {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in used} == families
    for expression in expressions:
        assert expression.count("(") == expression.count(")")
        assert set(re.findall(r"by \((\w+)\)", expression)) <= labels
        assert set(re.findall(r"(\w+)=~", expression)) <= labels
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    assert (
        len({(place["x"], place["y"]) for place in places})
        == len(places)
        == len({one["id"] for one in dashboard["panels"]})
    )
