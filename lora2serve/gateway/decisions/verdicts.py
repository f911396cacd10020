"""What a verdict does: one registry transaction, which one of several gateways makes; a webhook, a line in the log."""

from __future__ import annotations

import math
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from urllib.parse import urlsplit, urlunsplit

from lora2serve.api.version_registry import Registry
from lora2serve.errors import GateNotMet, Lora2ServeError, UsageError, first_line
from lora2serve.gateway.decisions.decision_rules import DecisionRecipe
from lora2serve.gateway.decisions.observations import TrialObserver
from lora2serve.gateway.decisions.rule_test import RuleEvidence
from lora2serve.gateway.decisions.trial import Trial, TrialMode, TrialRecord, TrialVerdict, continues
from lora2serve.gateway.decisions.trial_store import TrialStore
from lora2serve.gateway.traffic_store import TrafficStore
from lora2serve.progress import Progress
from lora2serve.registry.version_facts import utc
from lora2serve.system.http import HttpClient, HttpError, HttpStatus

ELSEWHERE = "ended elsewhere"  # the outcome of a trial that somebody else ended
PATIENCE = 10.0  # seconds for a webhook's answer
PAUSES = (1.0, 5.0)  # seconds before a webhook is called again
SAVE_EVERY = 5.0  # seconds; what came since is read again from the store


@dataclass(frozen=True)
class TrialPlan:
    """What is tested: two versions of one name, which two aliases point to."""

    name: str
    champion: int
    challenger: int
    mode: TrialMode
    share: float  # of split traffic, the challenger's
    recipe: DecisionRecipe
    aliases: tuple[str, str]  # of the champion, of the challenger

    @property
    def key(self) -> str:
        """A name may have two trials: of its challenger and of its shadow."""
        return f"{self.name}@{self.mode}"


@dataclass(frozen=True)
class TrialStatus:
    """A trial as metrics show it."""

    name: str
    mode: TrialMode
    champion: int
    challenger: int
    outcome: str  # empty while it is undecided
    log_bound: float  # what the logarithm of an e-value must reach
    log_e_worse: float
    evidence: tuple[RuleEvidence, ...]


class DecisionMaker:
    """The trials of one gateway, on the entries of its traffic store. Several gateways may share store and folder."""

    def __init__(
        self, registry: Callable[[], AbstractContextManager[Registry]], traffic: TrafficStore, states: TrialStore,
        progress: Progress,
    ) -> None:  # fmt: skip
        """``registry`` opens it for one verdict; ``traffic`` is read by nobody else."""
        self._registry, self._traffic, self._states, self._progress = registry, traffic, states, progress
        self._plans: dict[str, TrialPlan] = {}
        self._observers: dict[str, TrialObserver] = {}
        self._saved: dict[str, tuple[int, float]] = {}  # trial -> the sequence that its file has, and since when
        self._refused: set[str] = set()  # what the registry's gates do not let become champion
        self._said: dict[str, str] = {}  # trial -> its last trouble, which is said once
        self._status: dict[str, TrialStatus] = {}
        self._turn = threading.RLock()

    def plan(self, plans: Sequence[TrialPlan]) -> None:
        """What is tested now; a trial of the same versions by the same rules goes on, after a restart too."""
        with self._turn:
            for plan in plans:
                if self._plans.get(plan.key) != plan:
                    self._guarded(plan.key, partial(self._take, plan))
            for key in self._plans.keys() - {plan.key for plan in plans}:
                del self._plans[key], self._observers[key]
            self._show()

    def act(self) -> list[TrialVerdict]:
        """Take what is new in the store, do what the rules say, write the states down; the verdicts acted on.

        Where the store, the registry or the disk refuses, that is said once, and tried again the next time.
        """
        with self._turn:
            self._guarded("traffic", self._read)
            done: list[TrialVerdict] = []
            for key, observer in self._observers.items():
                self._guarded(key, partial(self._decide, key, observer.trial, done))
            self._show()
            return done

    def close(self) -> None:
        """Write every state down."""
        with self._turn:
            for key, observer in self._observers.items():
                self._guarded(key, partial(self._save, key, observer.trial, at_once=True))

    def status(self) -> list[TrialStatus]:
        """The trials as they were after the last ``act``, and of each name and mode the last one that has ended."""
        return list(self._status.values())

    def _show(self) -> None:
        running = {key: _status(observer.trial) for key, observer in self._observers.items()}
        ended = {key: status for key, status in self._status.items() if key not in running and status.outcome}
        self._status = ended | running

    def _read(self) -> None:
        """Each trial has what came since it was last written down, or since it began."""
        observers = self._observers.values()
        if observers:
            newest = self._traffic.last_sequence()
            for observer in observers:
                if observer.trial.sequence > newest:  # another store: somebody has removed the one before
                    observer.trial.sequence = 0
            for entry in self._traffic.entries(min(observer.trial.sequence for observer in observers)):
                for observer in observers:
                    observer.take(entry)

    def _take(self, plan: TrialPlan) -> None:
        observer = TrialObserver(self._begin(plan), self._traffic.of_request)
        self._plans[plan.key], self._observers[plan.key] = plan, observer
        self._refused.discard(plan.key)

    def _begin(self, plan: TrialPlan) -> Trial:
        record: TrialRecord | None = None
        try:
            record = self._states.read(plan.key)
        except Lora2ServeError as error:
            self._complain(plan.key, f"the trial begins anew: {error.message}")
        if record and (record.outcome or not continues(record, plan.champion, plan.challenger, plan.recipe)):
            record = None  # of other versions or rules; or of these, which somebody tests again
        return Trial(
            plan.name, plan.champion, plan.challenger, plan.recipe, mode=plan.mode, share=plan.share,
            started=_now(), sequence=0 if record else self._traffic.last_sequence(), record=record,
        )  # fmt: skip

    def _decide(self, key: str, trial: Trial, done: list[TrialVerdict]) -> None:
        verdict, decided = None if trial.outcome else trial.verdict(), False
        if verdict and not (verdict.outcome == "promote" and key in self._refused):
            try:
                done += [verdict] if self._conclude(self._plans[key], trial, verdict) else []
                decided = True
            except GateNotMet as error:
                self._refused.add(key)
                self._progress.warn(f"{trial.name}: not promoted: {error.message}")
        self._save(key, trial, at_once=decided)

    def _save(self, key: str, trial: Trial, *, at_once: bool) -> None:
        sequence, at = self._saved.get(key, (-1, 0.0))
        if at_once or (trial.sequence != sequence and time.monotonic() >= at + SAVE_EVERY):
            self._states.write(key, trial.record())
            self._saved[key] = trial.sequence, time.monotonic()

    def _conclude(self, plan: TrialPlan, trial: Trial, verdict: TrialVerdict) -> bool:
        with self._registry() as registry:
            moved = registry.end_trial(
                trial.name, verdict.outcome, champion=trial.champion, challenger=trial.challenger, why=verdict.why,
                aliases=plan.aliases,
            )  # fmt: skip
        trial.outcome = verdict.outcome if moved else ELSEWHERE
        versions = f"{trial.name}@{trial.challenger} against {trial.name}@{trial.champion}"
        if not moved:
            self._progress.note(f"verdict {verdict.outcome} of {versions}: somebody was faster, nothing was moved")
            return False
        self._progress.note(f"verdict {verdict.outcome} of {versions}: {verdict.why}")
        if plan.recipe.webhook:
            threading.Thread(target=self._call, args=(plan.recipe.webhook, verdict), daemon=True).start()
        return True

    def _call(self, webhook: str, verdict: TrialVerdict) -> None:
        """The address is shown nowhere: its path is a secret of many services."""
        parts = urlsplit(webhook)
        origin, path = f"{parts.scheme}://{parts.netloc}", urlunsplit(("", "", parts.path or "/", parts.query, ""))
        body = webhook_body(verdict)  # once: it says when the verdict was, whichever call gets through
        for pause in (*PAUSES, None):
            try:
                HttpClient(origin, patience=PATIENCE).send("POST", path, body)
                return
            except (HttpError, UsageError) as error:
                if pause is None:
                    answer = f"answers {error.status}" if isinstance(error, HttpStatus) else "does not answer"
                    self._progress.warn(f"webhook of {verdict.name}: {parts.hostname} {answer}")
                else:
                    time.sleep(pause)

    def _guarded(self, key: str, work: Callable[[], None]) -> None:
        try:
            work()
            self._said.pop(key, None)
        except (Lora2ServeError, OSError, sqlite3.Error) as error:
            self._complain(key, first_line(error))

    def _complain(self, key: str, problem: str) -> None:
        if self._said.get(key) != problem:
            self._said[key] = problem
            self._progress.warn(f"{key}: {problem}")


def webhook_body(verdict: TrialVerdict) -> dict[str, object]:
    """What a webhook gets."""
    return {
        "event": "verdict", "outcome": verdict.outcome, "name": verdict.name, "champion": verdict.champion,
        "challenger": verdict.challenger, "measure": verdict.measure, "why": verdict.why, "at": _now(),
        "log_e": verdict.log_e, "evidence": [asdict(each) for each in verdict.evidence],
    }  # fmt: skip


def _status(trial: Trial) -> TrialStatus:
    return TrialStatus(
        trial.name, trial.mode, trial.champion, trial.challenger, trial.outcome, -math.log(trial.recipe.false_alarms),
        trial.log_e_worse, trial.evidence(),
    )  # fmt: skip


def _now() -> str:
    return utc(datetime.now(UTC))
