"""``lora2serve.compare``: two models on the same prompts, beside the first one asked twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora2serve.api.evaluate_model import EvaluationResult, choose_suite, page_of
from lora2serve.api.evaluated_model import EvaluatedModel, find_models, planned, refuse_same, slug
from lora2serve.api.evaluation_request import CompareRequest
from lora2serve.api.export_request import Named, several
from lora2serve.config.arguments import checked
from lora2serve.console import default_progress
from lora2serve.evaluation.evaluation_plan import EvaluationPlan, foreseen, of_suite, plan_of_suite
from lora2serve.evaluation.score_gates import ScoreGate, parse_gate, refuse_unknown
from lora2serve.evaluation.suite import Suite
from lora2serve.progress import Progress
from lora2serve.system import scratch
from lora2serve.system.small_files import plain_path

FILES = ("first", "again", "second")


@checked
def compare(
    first: Named, second: Named, *,
    suite: Named | None = None, limit: int | None = None, gate: str | Sequence[str] = (), engine: str = "",
    base: Named | None = None, url_model: str | None = None, out: Named | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:  # fmt: skip
    """Ask two models the same, and say in what they differ beyond that in which the first differs from itself.

    first, second: runs, exports, adapters, versions of a registry, models' directories, Hub ids, or addresses of
        servers. The second may be "base", or at the address that is the first, the name of another model there.
    suite: a suite, or prompts of any kind: nothing need be expected of them, so that captured requests serve, too. By
        default the held-out rows of the first that has a run.
    limit: only so many items, the first.
    gate: what must hold of the second, such as ``"changed <= 0.05"`` or ``"seconds <= other + 0.2"``.
    engine, base, url_model: as for ``evaluate``.
    out: the folder of the report; ``evals/compared`` in the first's run, or here, by default.
    progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

    Raises what ``evaluate`` raises, but for questions that were trained on, which are a fair comparison.
    """
    request = CompareRequest(
        first=first, second=second, suite=suite, limit=limit, gate=several(gate), engine=engine, base=base,
        url_model=url_model, out=out,
    )  # fmt: skip
    return run_comparison(request, progress)


@checked
def run_comparison(request: CompareRequest, progress: Progress | None = None) -> EvaluationResult:
    """``compare``, with its arguments in one value."""
    from lora2serve.evaluation.comparison import compare_models
    from lora2serve.evaluation.report import eval_page

    progress = progress or default_progress()
    prepared = _prepare(request, progress)
    first, second, suite, home = prepared.first, prepared.second, prepared.suite, prepared.home
    for note in suite.notes:
        progress.note(note)
    progress.note(f"{suite.name}: {len(suite.items)} items, {first.name} twice, {second.name}; loading the libraries")
    with scratch.filled(home):
        done = compare_models(first.chat, second.chat, suite, prepared.gates, progress)
        for path, measured, record in zip(prepared.records, done.measured, done.evaluations, strict=True):
            eval_page.write_record(path, record, measured)
        page = eval_page.write(done.report, page_of(home, suite.name).parent)
    return EvaluationResult(done.report, page, prepared.records)


@checked
def plan_comparison(request: CompareRequest, progress: Progress | None = None) -> EvaluationPlan:
    """What ``compare`` would ask and write, and which gates it can decide; starts no engine and writes nothing.

    request: the arguments of ``compare`` in one value.
    progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

    Raises what ``compare`` would refuse before it starts an engine.
    """
    from lora2serve.evaluation.comparison import compared_figures

    prepared = _prepare(request, progress or default_progress(), weights=False)
    second, suite, (*twice, last) = prepared.second, prepared.suite, prepared.records
    scratch.try_folder(prepared.home)
    figures = {name: of_suite(items) for name, items in compared_figures(suite).items()}
    gates = foreseen(prepared.gates, [second.name], 0, figures)
    models = [planned(prepared.first, twice), planned(second, [last])]
    return plan_of_suite("compare", suite, models, gates, page_of(prepared.home, suite.name))


@dataclass(frozen=True)
class _PreparedComparison:
    """What is asked of whom, and where it goes."""

    first: EvaluatedModel
    second: EvaluatedModel
    suite: Suite
    gates: Sequence[ScoreGate]
    home: Path

    @property
    def records(self) -> tuple[Path, ...]:
        """The files of the answers: of the first, of the first again, of the second."""
        return tuple(self.home / f"{self.suite.name}.{name}.json" for name in FILES)


def _prepare(request: CompareRequest, progress: Progress, *, weights: bool = True) -> _PreparedComparison:
    """Everything up to the first engine; ``weights``: also those of the Hub, which engines need."""
    from lora2serve.evaluation.comparison import compared_figures

    gates, named, against = [parse_gate(text) for text in request.gate], [str(request.first)], str(request.second)
    models = find_models(named, against, request.base, request.url_model, request.engine, progress, weights=weights)
    refuse_same(models)
    suite = choose_suite(request.suite, models, request.limit, truth=False)
    refuse_unknown(gates, suite.name, list(compared_figures(suite)), compared=True)
    first, second = models
    home = plain_path(Path(request.out)) if request.out else first.home / "compared" / slug(second.name)
    return _PreparedComparison(first, second, suite, gates, home)
