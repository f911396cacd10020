"""A dashboard for Grafana, as JSON: per adapter, version and arm, from the metrics of a gateway."""

from __future__ import annotations

import json
from dataclasses import dataclass

WIDTH, HEIGHT = 12, 8  # of a panel, in Grafana's grid of 24
SCHEMA = 39  # Grafana 10 and later read it
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
CHOSEN = 'adapter=~"$adapter"'
BY = "adapter, version, arm"
LEGEND = "{{adapter}}@{{version}} {{arm}}"


@dataclass(frozen=True)
class DashboardPanel:
    """One graph: its lines by expression, what names them, and the unit of its axis."""

    title: str
    lines: tuple[tuple[str, str], ...]  # expression, legend
    unit: str


def _quantile(metric: str, which: float) -> str:
    return f"histogram_quantile({which}, sum by (le, {BY}) (rate({metric}_bucket{{{CHOSEN}}}[$__rate_interval])))"


PANELS = (
    DashboardPanel(
        "Requests", ((f"sum by ({BY}) (rate(lora2serve_requests_total{{{CHOSEN}}}[$__rate_interval]))", LEGEND),),
        "reqps",
    ),
    DashboardPanel(
        "Failed",
        ((
            f"sum by ({BY}) (rate(lora2serve_errors_total{{{CHOSEN}}}[$__rate_interval])) / "
            f"sum by ({BY}) (rate(lora2serve_requests_total{{{CHOSEN}}}[$__rate_interval]))", LEGEND,
        ),),
        "percentunit",
    ),
    DashboardPanel("First token, 95 %", ((_quantile("lora2serve_first_token_seconds", 0.95), LEGEND),), "s"),
    DashboardPanel("Whole answer, 95 %", ((_quantile("lora2serve_request_seconds", 0.95), LEGEND),), "s"),
    DashboardPanel(
        "Tokens out",
        ((f'sum by ({BY}) (rate(lora2serve_tokens_total{{{CHOSEN}, kind="completion"}}[$__rate_interval]))', LEGEND),),
        "short",
    ),
    DashboardPanel("Between two tokens, 95 %", ((_quantile("lora2serve_inter_token_seconds", 0.95), LEGEND),), "s"),
    DashboardPanel(
        "Right answers, where there was feedback",
        ((
            f'sum by ({BY}) (increase(lora2serve_truth_total{{{CHOSEN}, outcome="right"}}[1h])) / '
            f"sum by ({BY}) (increase(lora2serve_truth_total{{{CHOSEN}}}[1h]))", LEGEND,
        ),),
        "percentunit",
    ),
    DashboardPanel(
        "Evidence that the challenger is worse (1: it is)",
        ((f"lora2serve_trial_evidence{{{CHOSEN}}}", "{{adapter}} {{mode}} {{measure}}"),), "short",
    ),
    DashboardPanel("Under way", ((f"sum by ({BY}) (lora2serve_in_flight{{{CHOSEN}}})", LEGEND),), "short"),
    DashboardPanel(
        "Adapters in slots",
        ((f'lora2serve_adapter_bytes{{{CHOSEN}, where="slot"}}', "{{adapter}}@{{version}}"),), "bytes",
    ),
    DashboardPanel(
        "Drift, by its effect", ((f"lora2serve_drift_effect{{{CHOSEN}}}", "{{adapter}} {{feature}}"),), "short"
    ),
    DashboardPanel(
        "Shadow copies dropped",
        ((
            f"sum by (adapter, reason) (rate(lora2serve_shadow_dropped_total{{{CHOSEN}}}[$__rate_interval]))",
            "{{adapter}} {{reason}}",
        ),),
        "reqps",
    ),
)  # fmt: skip


def grafana_dashboard() -> str:
    """What Grafana imports."""
    variables: list[dict[str, object]] = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        {
            "name": "adapter", "type": "query", "datasource": SOURCE, "multi": True, "includeAll": True,
            "label": "Adapter",
            "query": {"query": "label_values(lora2serve_requests_total, adapter)", "refId": "adapter"},
            "refresh": 2, "current": {"text": ["All"], "value": ["$__all"]},
        },
    ]  # fmt: skip
    panels = [_panel(number, panel) for number, panel in enumerate(PANELS)]
    dashboard = {
        "uid": "lora2serve", "title": "lora2serve", "tags": ["lora2serve"], "timezone": "browser", "editable": True,
        "schemaVersion": SCHEMA, "refresh": "30s", "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": variables}, "panels": panels,
    }  # fmt: skip
    return json.dumps(dashboard, indent=2)


def _panel(number: int, panel: DashboardPanel) -> dict[str, object]:
    place = {"h": HEIGHT, "w": WIDTH, "x": WIDTH * (number % 2), "y": HEIGHT * (number // 2)}
    targets = [
        {"refId": chr(ord("A") + line), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
        for line, (expression, legend) in enumerate(panel.lines)
    ]
    return {
        "id": number + 1, "type": "timeseries", "title": panel.title, "datasource": SOURCE, "gridPos": place,
        "targets": targets, "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }  # fmt: skip
