"""The trials of a running gateway: which there are, what their rules say, and how that shows in the metrics."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.api.version_registry import Registry
from lora2serve.errors import Lora2ServeError, first_line
from lora2serve.gateway.decisions.trial import TrialMode
from lora2serve.gateway.decisions.trial_store import TrialStore
from lora2serve.gateway.decisions.verdicts import DecisionMaker, TrialPlan, TrialStatus
from lora2serve.gateway.drift import windows
from lora2serve.gateway.drift.check_drift import keep_references
from lora2serve.gateway.drift.drift_report import RECORD, DriftReport
from lora2serve.gateway.gateway_config import GatewayConfig
from lora2serve.gateway.routing import CHAMPION, Routes
from lora2serve.gateway.traffic_store import TrafficStore
from lora2serve.progress import Progress

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

TRIALS = "trials"  # in the folder of the records
PAUSE = 0.5  # seconds between two looks at what came
TRIAL = ("adapter", "mode", "champion", "challenger")
FEATURE = ("adapter", "version", "feature")
UNDECIDED = "none"
LARGEST = 700.0  # logarithm of an e-value that is a number of a float
DRIFT_PAUSE = 30.0  # seconds between two looks at reports of drift
REFERENCE_PAUSE = 600.0  # seconds between two looks for champions without a reference


class TrialMetrics:
    """Evidence and verdicts of trials, and the last reports on drift."""

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Gauge

        self._evidence = Gauge(
            "lora2serve_trial_evidence", "That the challenger is worse, as a part of what decides.",
            [*TRIAL, "measure"], registry=registry,
        )  # fmt: skip
        self._value = Gauge(
            "lora2serve_trial_e_value", "The same as a number of times: 20 is 20 to 1.", [*TRIAL, "measure"],
            registry=registry,
        )  # fmt: skip
        self._verdict = Gauge("lora2serve_trial_verdict", "1 once decided.", [*TRIAL, "outcome"], registry=registry)
        self._effect = Gauge("lora2serve_drift_effect", "How far a feature is off.", FEATURE, registry=registry)
        self._drifted = Gauge("lora2serve_drifted", "Whether a feature drifted.", FEATURE, registry=registry)

    def show_trials(self, trials: list[TrialStatus]) -> None:
        """All trials that there are."""
        self._evidence.clear()
        self._value.clear()
        self._verdict.clear()
        for trial in trials:
            labels = (trial.name, trial.mode, str(trial.champion), str(trial.challenger))
            of_rules = [(rule.measure, rule.log_e_worse) for rule in trial.evidence]
            for measure, log_e in [("all", trial.log_e_worse), *of_rules]:
                self._evidence.labels(*labels, measure).set(log_e / trial.log_bound)
                self._value.labels(*labels, measure).set(math.exp(min(log_e, LARGEST)))
            self._verdict.labels(*labels, trial.outcome or UNDECIDED).set(bool(trial.outcome))

    def show_drift(self, reports: list[DriftReport]) -> None:
        """The last report of each name."""
        self._effect.clear()
        self._drifted.clear()
        for report in reports:
            for feature in report.features:
                labels = (report.name, str(report.version), feature.feature)
                self._effect.labels(*labels).set(feature.effect)
                self._drifted.labels(*labels).set(feature.drifted)


class TrialLoop:
    """Judges the trials of the routes, again and again, by the store that records are written to."""

    def __init__(
        self, config: GatewayConfig, registry: Registry, routes: Routes, metrics: TrialMetrics, progress: Progress
    ) -> None:
        self._config, self._routes, self._metrics = config, routes, metrics
        self._folder, self._progress = Path(config.capture.folder), progress
        self._failed, self._drift_seen, self._references_seen = "", -math.inf, -math.inf
        self._open = partial(Registry, registry.location.folder or registry.location.url, author="gateway")
        states = TrialStore(self._folder / TRIALS)
        self._maker = DecisionMaker(self._open, TrafficStore(self._folder), states, progress)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(PAUSE)

    async def look(self) -> None:
        """What came since the last look."""
        plans = list(plans_of(self._config, self._routes.table()))
        try:
            trials, reports = await asyncio.to_thread(self._judge, plans)
            self._metrics.show_trials(trials)  # here, where scrapes are answered: none sees half of them
            if reports is not None:
                self._metrics.show_drift(reports)
            if time.monotonic() >= self._references_seen + REFERENCE_PAUSE:
                self._references_seen = time.monotonic()
                await asyncio.to_thread(self._keep_references, self._routes.table())
            self._failed = ""
        except Exception as error:  # whatever it is, requests go on, and the next look may be better
            if self._failed != first_line(error):
                self._failed = first_line(error)
                self._progress.warn(f"trials: {type(error).__name__}: {self._failed}")

    async def close(self) -> None:
        """Judge what is left, and write every state down."""
        await self.look()
        await asyncio.to_thread(self._maker.close)

    def _judge(self, plans: list[TrialPlan]) -> tuple[list[TrialStatus], list[DriftReport] | None]:
        """The trials as they are now; and the last reports on drift, where it is time to look at them again."""
        self._maker.plan(plans)
        self._maker.act()
        trials = self._maker.status()
        if time.monotonic() < self._drift_seen + DRIFT_PAUSE:
            return trials, None
        self._drift_seen = time.monotonic()
        return trials, last_reports(self._folder)

    def _keep_references(self, table: Mapping[str, Mapping[str, int]]) -> None:
        store = TrafficStore(self._folder)
        champions = {name: numbers[CHAMPION] for name, numbers in table.items() if CHAMPION in numbers}
        with self._open() as registry:
            keep_references(registry, store, champions)
        store.close()


def plans_of(config: GatewayConfig, table: Mapping[str, Mapping[str, int]]) -> Iterator[TrialPlan]:
    """The trials of the versions that answer now, where there are rules."""
    for name, numbers in table.items():
        route, champion = config.route(name), numbers.get(CHAMPION)
        arms: tuple[tuple[TrialMode, str, float], ...] = (
            ("split", route.challenger.alias, route.challenger.share),
            ("shadow", route.shadow.alias, route.shadow.share),
        )
        for mode, alias, share in arms:
            number = numbers.get(alias)
            if route.decisions.rules and champion is not None and number not in (None, champion):
                assert number is not None
                yield TrialPlan(name, champion, number, mode, share, route.decisions, (CHAMPION, alias))


def last_reports(folder: Path) -> list[DriftReport]:
    """What the last `lora2serve drift` of each name wrote."""
    reports = []
    for path in sorted((folder / windows.FOLDER).glob(f"*/{RECORD}")):
        with suppress(Lora2ServeError, OSError):  # half of one is the next look's
            reports.append(DriftReport.from_text(path.read_text(encoding="utf-8"), str(path)))
    return reports
