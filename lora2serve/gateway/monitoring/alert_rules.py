"""Prometheus' rules for the metrics of a gateway, as YAML: figures for dashboards, and what a person is woken for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora2serve.gateway.request_record import CLIENT_LEFT

BY = "adapter, version, arm"


@dataclass(frozen=True)
class Alert:
    """One alert: its name, when, for how long, how bad, and what it says."""

    name: str
    when: str
    lasting: str
    severity: str
    says: str


RECORDED: Mapping[str, str] = {
    "lora2serve:requests:rate5m": f"sum by ({BY}) (rate(lora2serve_requests_total[5m]))",
    "lora2serve:errors:ratio5m": (
        f"sum by ({BY}) (rate(lora2serve_errors_total{{kind!=\"{CLIENT_LEFT}\"}}[5m])) / on ({BY}) "
        "lora2serve:requests:rate5m"
    ),
    "lora2serve:first_token_seconds:p95": (
        f"histogram_quantile(0.95, sum by (le, {BY}) (rate(lora2serve_first_token_seconds_bucket[5m])))"
    ),
    "lora2serve:request_seconds:p95": (
        f"histogram_quantile(0.95, sum by (le, {BY}) (rate(lora2serve_request_seconds_bucket[5m])))"
    ),
    "lora2serve:tokens:rate5m": f"sum by ({BY}, kind) (rate(lora2serve_tokens_total[5m]))",
    "lora2serve:right:ratio1d": (
        "sum by (adapter, version) (increase(lora2serve_truth_total{outcome=\"right\"}[1d])) / "
        "sum by (adapter, version) (increase(lora2serve_truth_total[1d]))"
    ),
}  # fmt: skip
OF_ARM = "{{ $labels.adapter }}@{{ $labels.version }} ({{ $labels.arm }})"
OF_VERSION = "{{ $labels.adapter }}@{{ $labels.version }}"
OF_ADAPTER = "{{ $labels.adapter }}"
ALERTS = (
    Alert(
        "Lora2serveErrors", "lora2serve:errors:ratio5m > 0.05 and lora2serve:requests:rate5m > 0.02", "5m", "page",
        f"{OF_ARM}: {{{{ $value | humanizePercentage }}}} of its requests fail.",
    ),
    Alert(
        "Lora2serveSlowFirstToken", "lora2serve:first_token_seconds:p95{arm!=\"shadow\"} > 5", "10m", "ticket",
        f"{OF_ARM}: the first token of one in 20 answers takes more than {{{{ $value | humanizeDuration }}}}.",
    ),
    Alert(
        "Lora2serveFewerRightAnswers",
        "lora2serve:right:ratio1d < 0.95 * avg_over_time(lora2serve:right:ratio1d[7d] offset 1d)", "1h", "page",
        f"{OF_VERSION}: {{{{ $value | humanizePercentage }}}} right answers, over 5 % fewer than last week.",
    ),
    Alert(
        "Lora2serveTrialDecided", "lora2serve_trial_verdict == 1", "0m", "ticket",
        "{{ $labels.adapter }}: {{ $labels.outcome }}, {{ $labels.challenger }} against {{ $labels.champion }}.",
    ),
    Alert(
        "Lora2serveDrift", "lora2serve_drifted == 1", "0m", "ticket",
        f"{OF_VERSION}: {{{{ $labels.feature }}}} drifted; `lora2serve drift` has a report.",
    ),
    Alert(
        "Lora2serveShadowDropped", "sum by (adapter) (rate(lora2serve_shadow_dropped_total[10m])) > 0", "30m", "ticket",
        f"{OF_ADAPTER}: copies for its shadow are dropped: its trial takes longer.",
    ),
    Alert(
        "Lora2serveRecordsLost", "increase(lora2serve_records_dropped_total[10m]) > 0", "10m", "ticket",
        "Records of requests are lost ({{ $labels.reason }}): decisions and drift do not see them.",
    ),
    Alert(
        "Lora2serveLoadsFail", "increase(lora2serve_adapter_loads_total{result!=\"ok\"}[10m]) > 0", "10m", "page",
        f"{OF_VERSION} cannot be loaded on {{{{ $labels.upstream }}}}; the version before answers.",
    ),
    Alert(
        "Lora2serveRegistryDown", "lora2serve_registry_up == 0", "5m", "page",
        "The gateway cannot read its registry: versions stay as they are, and no verdict is acted on.",
    ),
)  # fmt: skip


def alert_rules() -> str:
    """The file for ``rule_files`` of prometheus.yml."""
    import yaml

    recorded = [{"record": name, "expr": expression} for name, expression in RECORDED.items()]
    alerts = [
        {
            "alert": alert.name, "expr": alert.when, "for": alert.lasting, "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.says},
        }
        for alert in ALERTS
    ]  # fmt: skip
    groups = [{"name": "lora2serve", "rules": recorded}, {"name": "lora2serve-alerts", "rules": alerts}]
    return yaml.safe_dump({"groups": groups}, sort_keys=False, width=1000).rstrip("\n")
