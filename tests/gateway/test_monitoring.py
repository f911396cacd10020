"""Alerts and the dashboard: Prometheus' own promtool reads them, and every metric in them is one that a gateway has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from lora2serve.cli import run as command_line
from lora2serve.gateway.monitoring.alert_rules import RECORDED, alert_rules
from lora2serve.gateway.monitoring.grafana_dashboard import grafana_dashboard
from tests.support.gateways import call, chat, test_bed, wait_for

PROMTOOL = shutil.which("promtool")
NO_PROMTOOL = "THE RULES WERE NOT READ BY PROMETHEUS: no promtool here (apt-get install prometheus)"
METRIC = re.compile(r"\blora2serve[_:][a-z0-9_:]+")
RULES = [{"measure": "errors", "worse_by": 0.0}, {"measure": "latency", "worse_by": 5.0}]


def promtool(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL
    return subprocess.run([PROMTOOL, *words, str(path)], capture_output=True, text=True, check=False)


@pytest.mark.skipif(PROMTOOL is None, reason=NO_PROMTOOL)
def test_promtool_reads_the_rules(tmp_path: Path) -> None:
    file = tmp_path / "rules.yml"
    file.write_text(alert_rules())
    done = promtool(file, "check", "rules")
    assert done.returncode == 0 and "15 rules found" in done.stdout, done.stderr
    file.write_text(alert_rules().replace("> 0.05", "> > 0.05"))
    assert promtool(file, "check", "rules").returncode != 0


@pytest.mark.skipif(PROMTOOL is None, reason=NO_PROMTOOL)
def test_the_alerts_fire(tmp_path: Path) -> None:
    """On series of an hour, by promtool's own test of rules; the control is a version whose requests do not fail."""
    (tmp_path / "rules.yml").write_text(alert_rules())
    labels = 'adapter="a",arm="champion",version="{}"'
    series = [
        {"series": f"lora2serve_requests_total{{{labels.format(version)}}}", "values": "0+60x60"} for version in (1, 2)
    ] + [
        {"series": f'lora2serve_errors_total{{{labels.format(1)},kind="http"}}', "values": "0+30x60"},
        {"series": f'lora2serve_errors_total{{{labels.format(2)},kind="client_left"}}', "values": "0+30x60"},
        {"series": "lora2serve_registry_up", "values": "0x60"},
    ]

    def alert(name: str, summary: str, severity: str, **own: str) -> dict[str, object]:
        expected = [{"exp_labels": {"severity": severity, **own}, "exp_annotations": {"summary": summary}}]
        return {"eval_time": "50m", "alertname": name, "exp_alerts": expected}

    tests = [
        alert("Lora2serveErrors", "a@1 (champion): 50% of its requests fail.", "page", adapter="a", arm="champion", version="1"),
        alert(
            "Lora2serveRegistryDown",
            "The gateway cannot read its registry: versions stay as they are, and no verdict is acted on.", "page",
        ),
        {"eval_time": "50m", "alertname": "Lora2serveDrift", "exp_alerts": []},
    ]  # fmt: skip
    content = {
        "rule_files": ["rules.yml"],
        "tests": [{"interval": "1m", "input_series": series, "alert_rule_test": tests}],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(content))
    done = promtool(tmp_path / "test.yml", "test", "rules")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["gateway", "--print", "grafana"]) == 0
    dashboard = json.loads(capsys.readouterr().out)
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == 12
    assert {panel["id"] for panel in dashboard["panels"]} == set(range(1, 13))
    assert command_line(["gateway", "--print", "prometheus-rules"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["groups"][0]["name"] == "lora2serve"
    assert command_line(["gateway", "--print", "grafan"]) == 2
    assert "did you mean 'grafana'" in capsys.readouterr().err


def test_every_metric_is_one_of_a_gateway(tmp_path: Path, seed: Path) -> None:
    """Of one that has a trial, a shadow that drops, feedback, drift and failures: all families are there."""
    aliases = {"champion": 1, "challenger": 2, "shadow": 3}
    routes = {"towns": {"challenger": {"share": 0.5}, "decisions": {"rules": RULES}}}
    drift = tmp_path / "records" / "drift" / "towns"
    drift.mkdir(parents=True)
    feature = {
        "feature": "answer.length", "kind": "number", "reference": 1.0, "current": 2.0, "effect": 0.5, "p": 0.001,
        "adjusted": 0.005, "psi": 0.3, "drifted": True,
    }  # fmt: skip
    report = {
        "format": 1, "name": "towns", "version": 1, "created": "2026-11-28T00:00:00Z", "reference": "", "current": "",
        "features": [feature],
    }  # fmt: skip
    (drift / "report.json").write_text(json.dumps(report))
    with test_bed(tmp_path, seed, aliases=aliases, routes=routes) as bed:
        for number in range(8):
            chat(bed.url, user=f"user-{number}", stream=bool(number % 2))
        wait_for(
            lambda: 'lora2serve_trial_verdict{adapter="towns"' in call(bed.url, "/metrics").body.decode(), "a trial"
        )
        text = call(bed.url, "/metrics").body.decode()
    families = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    known = families | {f"{name}{end}" for name in families for end in ("_total", "_bucket", "_sum", "_count")}
    used = set(METRIC.findall(alert_rules())) | set(METRIC.findall(grafana_dashboard()))
    assert used - set(RECORDED) - known - {"lora2serve"} == set()
    assert 'lora2serve_drifted{adapter="towns",feature="answer.length",version="1"} 1.0' in text
    assert 'mode="shadow"' in text and 'outcome="none"' in text
    assert {"lora2serve_requests_total", "lora2serve_trial_evidence"} <= families and "lora2serve_x" not in known
