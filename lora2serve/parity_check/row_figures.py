"""What the report shows of one export beside its gates: figures by part, the worst texts, answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.manifest import EngineVerdict, ParityVerdict
from lora2serve.artifacts.parity_report import ComparisonResult, GreedyAnswer, Metric, PromptFigures
from lora2serve.parity_check.gates import Behavior
from lora2serve.parity_check.references import References
from lora2serve.parity_check.token_pieces import quoted

WORST_TEXTS = 6  # shown token by token


def shown(measured: Behavior) -> tuple[Metric, ...]:
    """All figures, without a verdict."""
    return tuple(Metric(name, figure.value, figure.low, figure.high) for name, figure in measured.measure().items())


def by_part(measured: Behavior) -> dict[str, tuple[Metric, ...]]:
    """The figures on held-out rows and on general text."""
    parts = {}
    for part, rows in (("task", measured.task), ("general", ~measured.task)):
        if rows.any():
            of_part = replace(
                measured, positions=measured.positions.take(rows),
                base=measured.base.take(rows) if measured.base else None,
                sequences=measured.sequences[rows], task=np.ones(int(rows.sum()), dtype=bool), greedy=None,
                long=None,
            )  # fmt: skip
            parts[part] = shown(of_part)
    return parts


def by_text(measured: Behavior, references: References) -> tuple[PromptFigures, ...]:
    """The KL of every text by position; the worst texts also token by token."""
    texts = references.data.sequences
    parts = np.split(measured.positions.kl, np.cumsum([len(text.ids) - 1 for text in texts])[:-1])
    worst = set(sorted(range(len(parts)), key=lambda number: -parts[number].max())[:WORST_TEXTS])
    words = {number: references.pieces(texts[number].ids) for number in worst}
    return tuple(
        PromptFigures(text.part, text.text[:200], tuple(kl.tolist()), tuple(words.get(number, ())))
        for number, (text, kl) in enumerate(zip(texts, parts, strict=True))
    )


def answers(
    measured: Behavior, references: References, got: Sequence[Sequence[int]], reference: str
) -> tuple[GreedyAnswer, ...]:
    """Each greedy answer beside that of the reference which the verdict is on."""
    assert measured.greedy is not None
    expected = references.words([tokens for tokens, _ in references.greedy[reference]])
    prompts = [prompt.question for prompt in references.data.prompts]
    return tuple(
        GreedyAnswer(*parts)
        for parts in zip(prompts, expected, references.words(got), measured.greedy.parts, strict=True)
    )


def position_name(references: References, position: int) -> str:
    """The text that a scored position is in, and the token that was to come."""
    number = int(references.sequences[position])
    inside = position - int(np.flatnonzero(references.sequences == number)[0])
    text = references.data.sequences[number]
    pieces = references.pieces(text.ids)
    token = next((piece for piece in reversed(pieces[: inside + 2]) if piece), "")
    return f"{text.part} text {number} ({text.text[:40]!r}), position {inside + 1}, next token {quoted(token)}"


def record(export: Export, row: ComparisonResult) -> None:
    """Into the export's manifest: whether it is met, and the figures in each engine that was asked."""

    def value(name: str) -> float | None:
        metric = row.check(name)
        return metric.value if metric else None

    verdict = EngineVerdict(
        status=row.status,
        reference=row.reference,
        version=row.version,
        mean_kl=value("mean_kl"),
        p999_kl=value("p999_kl"),
        top1=value("top1"),
        equal_answers=value("equal_answers"),
        retention=value("retention"),
    )
    before = export.manifest.parity.engines if export.manifest.parity else {}
    engines = {**before, row.engine: verdict}
    statuses = {verdict.status for verdict in engines.values()} - {"missing"}
    export.with_parity(ParityVerdict(met=statuses == {"met"}, engines=engines))
