"""``lora2serve top``: the figures of a running gateway as a table, again and again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora2serve import console
from lora2serve.errors import EngineError
from lora2serve.gateway.monitoring.metric_samples import (
    ArmFigures,
    MetricScrape,
    TrialFigures,
    parse_scrape,
    quantile_of,
)
from lora2serve.system.http import HttpClient

PATIENCE = 10.0  # seconds for an answer
HEADS = ("Version", "Arm", "Requests/s", "Under way", "Failed", "First p95", "Whole p95", "Tokens/s", "Right", "Slot")


@dataclass(frozen=True)
class TableView:
    """What is shown at one moment: a title, the rows under ``HEADS``, and lines below."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def watch(url: str, every: float) -> Iterator[TableView]:
    """A table now, of all since the gateway began, then one of each ``every`` seconds.

    Raises EngineError where nothing answers, or what answers is no gateway.
    """
    client = HttpClient(url, patience=PATIENCE, hint="--url is the address of a gateway; is it running?")
    before, start = scrape(client), time.monotonic()
    yield table_view(before, None, 0.0)
    while True:
        time.sleep(every)
        now, at = scrape(client), time.monotonic()
        yield table_view(now, before, at - start)
        before, start = now, at


def scrape(client: HttpClient) -> MetricScrape:
    """The metrics as they are now."""
    text = client.send("GET", "/metrics").decode("utf-8", "replace")
    try:
        scraped = parse_scrape(text)
    except (ValueError, KeyError):
        scraped = None
    if scraped is None or "lora2serve_registry_up" not in text:
        raise EngineError(
            f"{client.address}/metrics: not the metrics of a gateway", "--url is the address of a gateway"
        )
    return scraped


def table_view(now: MetricScrape, before: MetricScrape | None, seconds: float) -> TableView:
    """The rows of one moment: rates of the last ``seconds``, or counts since the gateway began."""
    title = f"the last {seconds:.{0 if seconds >= 1 else 1}f} s" if before else "since the gateway began"
    rows = []
    for key in sorted(now.arms):
        figures = now.arms[key]
        added = figures.since(before.arms.get(key, ArmFigures())) if before else figures
        rows.append(_row(key, added, seconds if before else 0.0))
    notes = [
        f"trial of {trial.name}@{trial.challenger} ({trial.mode}) against @{trial.champion}: {_outcome(trial)}"
        for trial in now.trials
    ]
    return TableView(title, tuple(rows), (*notes, *(f"drift of {text}" for text in now.drifted)))


def _row(key: tuple[str, str, str], figures: ArmFigures, seconds: float) -> tuple[str, ...]:
    name, version, arm = key
    per = seconds or 1.0
    return (
        f"{name}@{version}" if version else name, arm or "-",
        f"{figures.requests / per:.1f}" if seconds else f"{figures.requests:.0f} in all",
        f"{figures.in_flight:.0f}",
        f"{figures.failed / figures.requests:.1%}" if figures.requests else "-",
        _seconds(quantile_of(figures.first, 0.95)), _seconds(quantile_of(figures.whole, 0.95)),
        f"{figures.tokens / per:.0f}" if seconds else f"{figures.tokens:.0f} in all",
        f"{figures.right / figures.judged:.1%} of {figures.judged:.0f}" if figures.judged else "-",
        console.size(figures.slot_bytes) if figures.slot_bytes else "-",
    )  # fmt: skip


def _outcome(trial: TrialFigures) -> str:
    if trial.outcome == "none":
        return f"evidence that it is worse: {trial.evidence:.0%} of what decides"
    return trial.outcome


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return "longer" if math.isinf(value) else f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def plain_lines(view: TableView) -> Sequence[str]:
    """The table for a pipe: columns apart by tabs."""
    return ["\t".join(HEADS), *("\t".join(row) for row in view.rows), *view.notes]
