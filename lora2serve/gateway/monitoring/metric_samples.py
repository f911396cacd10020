"""A scrape of a gateway's metrics, parsed by prometheus-client, and what happened between two of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora2serve.gateway.request_record import CLIENT_LEFT

ArmKey = tuple[str, str, str]  # adapter, version, arm
Buckets = Mapping[float, float]  # upper bound in seconds -> how many at most so long


@dataclass
class ArmFigures:
    """One arm of one version: counts since the gateway began, or between two scrapes. Seconds are in buckets."""

    requests: float = 0.0
    failed: float = 0.0
    in_flight: float = 0.0
    tokens: float = 0.0  # of answers
    right: float = 0.0
    judged: float = 0.0
    slot_bytes: float = 0.0
    first: dict[float, float] = field(default_factory=dict)
    whole: dict[float, float] = field(default_factory=dict)

    def since(self, before: ArmFigures) -> ArmFigures:
        """What was added; a gateway that began anew counts from zero."""
        if self.requests < before.requests:
            return self
        return ArmFigures(
            self.requests - before.requests, self.failed - before.failed, self.in_flight, self.tokens - before.tokens,
            self.right, self.judged, self.slot_bytes, _less(self.first, before.first), _less(self.whole, before.whole),
        )  # fmt: skip


@dataclass(frozen=True)
class TrialFigures:
    """One trial: its evidence as a part of what decides, and its verdict, "none" while there is none."""

    name: str
    mode: str
    champion: str
    challenger: str
    evidence: float
    outcome: str


@dataclass(frozen=True)
class MetricScrape:
    """All that a table shows of one scrape."""

    arms: Mapping[ArmKey, ArmFigures]
    trials: tuple[TrialFigures, ...]
    drifted: tuple[str, ...]  # "medical-qa@2: answer.length"


def parse_scrape(text: str) -> MetricScrape:
    """The metrics in Prometheus' text format; ValueError for what is none."""
    from prometheus_client.parser import text_string_to_metric_families

    arms: dict[ArmKey, ArmFigures] = {}
    sizes: dict[tuple[str, str], float] = {}
    evidence: dict[tuple[str, str, str, str], float] = {}
    outcomes: dict[tuple[str, str, str, str], str] = {}
    drifted: list[str] = []
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sample.labels
            if "arm" in labels:
                key = (labels["adapter"], labels["version"], labels["arm"])
                _add(arms.setdefault(key, ArmFigures()), sample.name, labels, sample.value)
            elif sample.name == "lora2serve_adapter_bytes" and labels["where"] == "slot":
                sizes[labels["adapter"], labels["version"]] = sample.value
            elif sample.name == "lora2serve_drifted" and sample.value:
                drifted.append(f"{labels['adapter']}@{labels['version']}: {labels['feature']}")
            elif sample.name.startswith("lora2serve_trial_"):
                trial = (labels["adapter"], labels["mode"], labels["champion"], labels["challenger"])
                if sample.name == "lora2serve_trial_verdict":
                    outcomes[trial] = labels["outcome"]
                elif sample.name == "lora2serve_trial_evidence" and labels["measure"] == "all":
                    evidence[trial] = sample.value
    for (name, version, _), figures in arms.items():
        figures.slot_bytes = sizes.get((name, version), 0.0)
    trials = tuple(TrialFigures(*key, evidence.get(key, 0.0), outcome) for key, outcome in sorted(outcomes.items()))
    return MetricScrape(arms, trials, tuple(drifted))


def quantile_of(buckets: Buckets, which: float) -> float | None:
    """As Prometheus' histogram_quantile, linear within a bucket; None of none, infinite beyond the last bound."""
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0.0
    if not total:
        return None
    rank, below, low = which * total, 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank:
            if math.isinf(bound):
                return math.inf
            inside = buckets[bound] - below
            return low + (bound - low) * ((rank - below) / inside if inside else 1.0)
        below, low = buckets[bound], bound
    return math.inf


def _add(figures: ArmFigures, name: str, labels: Mapping[str, str], value: float) -> None:
    if name == "lora2serve_requests_total":
        figures.requests += value
    elif name == "lora2serve_errors_total" and labels["kind"] != CLIENT_LEFT:
        figures.failed += value
    elif name == "lora2serve_in_flight":
        figures.in_flight += value
    elif name == "lora2serve_tokens_total" and labels["kind"] == "completion":
        figures.tokens += value
    elif name == "lora2serve_truth_total":
        figures.judged += value
        figures.right += value * (labels["outcome"] == "right")
    elif name in ("lora2serve_first_token_seconds_bucket", "lora2serve_request_seconds_bucket"):
        buckets = figures.first if "first_token" in name else figures.whole
        bound = float(labels["le"])
        buckets[bound] = buckets.get(bound, 0.0) + value


def _less(now: Buckets, before: Buckets) -> dict[float, float]:
    return {bound: count - before.get(bound, 0.0) for bound, count in now.items()}
