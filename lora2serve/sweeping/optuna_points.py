"""Points as Optuna knows them: its samplers propose some, its evaluator says which parameter matters."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from lora2serve.sweeping.search_space import RANK, RATE, TARGETS, SearchPoint, SearchSpace, Value
from lora2serve.sweeping.trial_record import Objectives

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FEWEST_TRIALS = 4  # of which an importance says something


def quiet_optuna() -> ModuleType:
    """The library, without its words on every study and trial."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    module: ModuleType = optuna
    return module


def params_of(point: SearchPoint) -> dict[str, object]:
    """By key of the recipe."""
    return {RATE: point.rate, TARGETS: point.targets, RANK: point.rank} | {
        key: _category(value) for key, value in point.others
    }


def distributions_of(space: SearchSpace) -> dict[str, BaseDistribution]:
    """What each of them may be, the same for all trials of a sweep."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    others = {key: CategoricalDistribution([_category(v) for v in values]) for key, values in space.others.items()}
    return {
        RATE: FloatDistribution(1e-8, 1.0, log=True), TARGETS: CategoricalDistribution(list(space.targets)),
        RANK: IntDistribution(1, 1 << 14, log=True), **others,
    }  # fmt: skip


def propose(
    space: SearchSpace,
    losses: Mapping[SearchPoint, Objectives],
    infeasible: Mapping[SearchPoint, Objectives],
    seed: int,
    running: Collection[SearchPoint] = (),
) -> SearchPoint | None:
    """A point of the first phase's grid that was not tried, by a tree-structured Parzen estimator over all figures.

    infeasible: points that memory does not hold, with what they would take. running: those whose figures are not known
    yet. None where the whole grid was tried.
    """
    optuna = quiet_optuna()
    left = [point for point in space.grid() if not any(point in known for known in (losses, infeasible, running))]
    if not left or not losses:
        return left[0] if left else None
    sampler = optuna.samplers.TPESampler(seed=seed + len(losses), n_startup_trials=0, multivariate=True)
    study = optuna.create_study(directions=["minimize"] * 5, sampler=sampler)
    spans = distributions_of(space)
    spans[RATE] = optuna.distributions.FloatDistribution(space.rates[0], space.rates[-1], log=True)
    spans.pop(RANK)  # the same for all
    for known, violation in ((losses, -1.0), (infeasible, 1.0)):
        for point, objectives in known.items():
            params = {key: value for key, value in params_of(point).items() if key in spans}
            if space.rates[0] <= point.rate <= space.rates[-1]:
                study.add_trial(
                    optuna.create_trial(
                        params=params, distributions=spans, values=list(objectives.values),
                        constraints={"memory": violation},
                    )
                )  # fmt: skip
    params = study.ask(spans).params
    return min(left, key=lambda point: _apart(point, params))


def importances(trials: Sequence[tuple[SearchPoint, float]]) -> dict[str, float]:
    """How much each parameter decides whether a loss is among the better ones, as shares (PED-ANOVA, Watanabe 2023).

    Empty where there are too few trials to say.
    """
    optuna = quiet_optuna()
    names = (
        [name for name in params_of(trials[0][0]) if len({params_of(p)[name] for p, _ in trials}) > 1] if trials else []
    )
    if len(trials) < FEWEST_TRIALS or not names or len({loss for _, loss in trials}) == 1:
        return {}
    spans: dict[str, BaseDistribution] = {}
    for name in names:
        values = sorted({params_of(point)[name] for point, _ in trials}, key=str)
        if name == RATE:
            rates = [point.rate for point, _ in trials]
            spans[name] = optuna.distributions.FloatDistribution(min(rates), max(rates), log=True)
        else:
            spans[name] = optuna.distributions.CategoricalDistribution([str(value) for value in values])
    study = optuna.create_study()
    for point, loss in trials:
        params = params_of(point)
        shown = {name: params[name] if name == RATE else str(params[name]) for name in names}
        study.add_trial(optuna.create_trial(params=shown, distributions=spans, value=loss))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
    shares: dict[str, float] = optuna.importance.get_param_importances(study, evaluator=evaluator)
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()} if total > 0 else {}


def _category(value: Value) -> str | int | float | bool | None:
    return json.dumps(value) if isinstance(value, tuple) else value


def _apart(point: SearchPoint, params: Mapping[str, object]) -> tuple[int, float]:
    """How many choices differ, then how far the rates are apart."""
    own, rate = params_of(point), params[RATE]
    assert isinstance(rate, float)
    return sum(own[key] != value for key, value in params.items() if key != RATE), abs(point.rate / rate - 1)
