"""``lora2serve.compare``: two models on the same prompts, beside the first one asked twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora2serve.api.evaluate_model import REPORT, EvaluationResult, choose_suite
from lora2serve.api.evaluated_model import EvaluatedModel, find_models, refuse_same, slug
from lora2serve.api.export_request import Named, several
from lora2serve.config.arguments import checked
from lora2serve.console import default_progress
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
    progress = progress or default_progress()
    gates = [parse_gate(text) for text in several(gate)]
    models = find_models([str(first)], str(second), base, url_model, engine, progress)
    refuse_same(models)
    asked = choose_suite(suite, models, limit, progress, truth=False)
    return _run(models, asked, gates, out, progress)


def _run(
    models: Sequence[EvaluatedModel], suite: Suite, gates: Sequence[ScoreGate], out: Named | None, progress: Progress
) -> EvaluationResult:
    from lora2serve.evaluation.comparison import compare_models, compared_figures
    from lora2serve.evaluation.report import eval_page

    refuse_unknown(gates, suite.name, compared_figures(suite), compared=True)
    first, second = models
    home = plain_path(Path(out)) if out else first.home / "compared" / slug(second.name)
    progress.note(f"{suite.name}: {len(suite.items)} items, {first.name} twice, {second.name}; loading the libraries")
    with scratch.filled(home):
        done = compare_models(first.chat, second.chat, suite, gates, progress)
        paths = [home / f"{suite.name}.{name}.json" for name in FILES]
        for path, measured, record in zip(paths, done.measured, done.evaluations, strict=True):
            eval_page.write_record(path, record, measured)
        page = eval_page.write(done.report, home / REPORT / suite.name)
    return EvaluationResult(done.report, page, tuple(paths))
