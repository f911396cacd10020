"""Runs the trials of a sweep, several at a time, until nothing is missing."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora2serve.artifacts.run_record import EvalLoss
from lora2serve.config import recipe as recipes
from lora2serve.errors import EngineError, SweepError
from lora2serve.progress import Progress
from lora2serve.sweeping.optuna_points import propose
from lora2serve.sweeping.search_plan import SearchPlan, Step
from lora2serve.sweeping.search_space import SearchPoint
from lora2serve.sweeping.sweep_facts import SweepFacts
from lora2serve.sweeping.sweep_suite import suite_order
from lora2serve.sweeping.trial_files import TrialFiles, trial_overrides
from lora2serve.sweeping.trial_ledger import LedgerView, TrialLedger, spec_from_json
from lora2serve.sweeping.trial_plans import TrialMemory, TrialPlanner
from lora2serve.sweeping.trial_process import TrialOrder, TrialPlace
from lora2serve.sweeping.trial_record import FULL, TrialOutcome, TrialSpec

LOOK = 1.0  # seconds between two looks at what others have done
HOPELESS = 3  # failures without one trial that gives a loss, after which a sweep ends


def plan_of(facts: SweepFacts, view: LedgerView) -> SearchPlan:
    """The search, as far as it is on record."""
    first = [spec_from_json(text).point for text in facts.first]
    return SearchPlan(facts.space, facts.settings, view.results, view.tried, first)


@dataclass
class SweepLoop:
    """One worker of a sweep: this process with its ``jobs``."""

    ledger: TrialLedger
    files: TrialFiles
    planner: TrialPlanner
    place: TrialPlace
    base: Path
    base_loss: EvalLoss | None
    jobs: int
    progress: Progress
    _futures: dict[Future[TrialOutcome], tuple[TrialSpec, TrialMemory, float]] = field(default_factory=dict)
    _phase: str = ""
    _told: set[str] = field(default_factory=set)

    def run(self) -> SearchPlan:
        """Until all is done; the search as it is then. On Ctrl-C trials that run are left to whoever comes next."""
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while True:
                    view = self.ledger.read()
                    plan = plan_of(self.ledger.facts, view)
                    step = plan.step()
                    self._tell(plan, step)
                    if step.phase == "done" and not self._futures:
                        return plan
                    self._start(pool, plan, step, view)
                    self._wait()
            except BaseException as error:
                self.place.stop()
                for spec, _, _ in self._futures.values():
                    self.ledger.give_up(spec)
                if isinstance(error, KeyboardInterrupt):
                    self.progress.note(f"the same command goes on with the sweep {self.ledger.facts.name}")
                raise
            finally:
                self.place.close()

    def _start(self, pool: ThreadPoolExecutor, plan: SearchPlan, step: Step, view: LedgerView) -> None:
        """Claim and begin as many trials as there is room for."""
        tried = set(view.tried)
        for spec in step.trials:
            if len(self._futures) < self.jobs and spec.key not in tried and not self._over_budget(len(tried)):
                tried |= {spec.key} if self._begin(pool, spec) else set()
        if step.to_choose and len(self._futures) < self.jobs and not self._over_budget(len(tried)):
            point = self._proposed(plan)  # one at a time: the next proposal knows of this one
            if point is not None:
                self._begin(pool, plan.spec(point, 0))

    def _over_budget(self, tried: int) -> bool:
        most = self.ledger.facts.settings.trials
        return most is not None and tried >= most

    def _begin(self, pool: ThreadPoolExecutor, spec: TrialSpec) -> bool:
        facts = self.ledger.facts
        train = recipes.load(self.files.recipe).train
        overrides = trial_overrides(spec, train, facts.settings, self.files, facts.fraction)
        plan = self.planner.plan(self.files.recipe, overrides)
        if not self.ledger.claim(spec):
            return False
        if plan.misfit:
            outcome = TrialOutcome("does not fit", plan.misfit, memory=plan.memory, parameters=plan.parameters)
            self._keep(spec, plan, outcome)
            return True
        of_all = "train.quantize" not in dict(spec.point.others)
        order = TrialOrder(
            recipe=str(self.files.recipe), overrides=overrides, run=str(self.files.run(spec)), base=str(self.base),
            base_loss=self.base_loss.to_json() if of_all and self.base_loss else None, quick=spec.level != FULL,
            final_rows=str(self.files.final_rows) if spec.level == FULL and not facts.quality.of_suite else None,
            suite=suite_order(facts.quality, self.files, "final" if spec.level == FULL else "search"),
        )  # fmt: skip
        self._futures[pool.submit(self.place.run, order)] = (spec, plan, time.monotonic())
        return True

    def _wait(self) -> None:
        """For a trial to end, or a while; what has ended is kept."""
        if not self._futures:
            time.sleep(LOOK)
        for future in wait(self._futures, LOOK, FIRST_COMPLETED).done:
            spec, plan, begin = self._futures.pop(future)
            try:
                outcome = future.result()
            except EngineError as error:
                outcome = TrialOutcome("failed", error.message)
            except BaseException:
                self.ledger.give_up(spec)
                raise
            self._keep(spec, plan, replace(outcome, wall=time.monotonic() - begin))
        self.ledger.show_life()

    def _keep(self, spec: TrialSpec, plan: TrialMemory, outcome: TrialOutcome) -> None:
        memory = outcome.memory if outcome.memory_measured else plan.memory
        outcome = replace(
            outcome, memory=memory, parameters=outcome.parameters or plan.parameters, host=socket.gethostname()
        )
        self.ledger.finish(spec, outcome)
        if outcome.finished:
            quality = self.ledger.facts.quality
            reached = f"{quality.title} {quality.shown(outcome.losses.mean)}"
            self.progress.note(f"{spec.key}: {reached}, {outcome.seconds:.0f} s")
        else:
            self.progress.warn(f"{spec.key}: {outcome.status}: {outcome.problem}")
        self._refuse_hopeless(self.ledger.read().results)

    def _refuse_hopeless(self, results: Mapping[str, TrialOutcome]) -> None:
        bad = [outcome for outcome in results.values() if not outcome.finished]
        if len(bad) >= HOPELESS and len(bad) == len(results):
            raise SweepError(
                f"the first {len(bad)} trials gave no loss; the last: {bad[-1].status}: {bad[-1].problem}",
                "mend that, and run the same command again",
            )

    def _proposed(self, plan: SearchPlan) -> SearchPoint | None:
        """By Optuna's sampler, which is told what does not fit."""
        pairs = [(plan.tried[key], outcome) for key, outcome in plan.results.items() if plan.tried[key].level == 0]
        losses = {spec.point: plan.objectives(spec.point, 0) for spec, outcome in pairs if outcome.finished}
        settings = self.ledger.facts.settings
        infeasible = {spec.point: o.infeasible(settings.base_loss) for spec, o in pairs if not o.finished}
        running = {spec.point for key, spec in plan.tried.items() if spec.level == 0 and key not in plan.results}
        return propose(self.ledger.facts.space, losses, infeasible, settings.seed, running)

    def _tell(self, plan: SearchPlan, step: Step) -> None:
        """A new phase, a wider range, a rank that is flat: once each."""
        lines = [step_.words for step_ in plan.rank_steps]
        lines += [f"the best learning rate was at the edge: {rate:g} is tried, too" for rate in plan.widened]
        if step.phase not in ("done", self._phase):
            self._phase = step.phase
            self.progress.note(f"phase: {step.phase} ({len(step.trials) + step.to_choose} trials next)")
        for line in lines:
            if line not in self._told:
                self._told.add(line)
                self.progress.note(line)
