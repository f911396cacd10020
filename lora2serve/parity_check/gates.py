"""The gates that ask an engine or look at tensors, cheapest first: facts in, a verdict in words out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.artifacts.metric_table import higher_is_better
from lora2serve.artifacts.parity_report import Gate, Metric
from lora2serve.data.prompts import Conversation, PromptSet
from lora2serve.parity_check.metrics import Estimate, Ints, Positions, figures, ratio
from lora2serve.parity_check.thresholds import Thresholds

FAINT = "what the adapter changes is as small as the engine's own rounding"


@dataclass(frozen=True)
class EngineTokens(JsonRecord):
    """What an engine makes of every conversation; None where it cannot be asked."""

    version: str
    rendered: tuple[str | None, ...]
    ids: tuple[tuple[int, ...] | None, ...]
    stop: tuple[int, ...] | None = None  # tokens that end an answer
    eos: int | None = None  # the end token that a GGUF names
    dtype: str | None = None  # that the engine computes in; None: as it serves


@dataclass(frozen=True)
class EngineAnswers(JsonRecord):
    """An engine's greedy answers, and the time that it took for all of them, one after another."""

    ids: tuple[tuple[int, ...], ...]
    seconds: float

    @property
    def speed(self) -> float:
        """Tokens per second, the reading of the prompts included; 0 where there is nothing to measure."""
        count = sum(map(len, self.ids))
        return round(count / self.seconds, 2) if self.seconds > 0 else 0.0


def tokens(data: PromptSet, engine: EngineTokens) -> Gate:
    """Prompts byte for byte, ids one by one, BOS at most once, and the token that ends an answer."""
    count = {"prompts": 0, "ids": 0}
    for conversation, rendered, ids in zip(
        map(data.exported, data.conversations), engine.rendered, engine.ids, strict=True
    ):
        difference = _bos_difference(data, conversation, ids)
        if difference:
            return _tokens_missed(*difference, count)
        if rendered is not None:
            count["prompts"] += 1
            if rendered != conversation.text:
                return _tokens_missed(*_text_difference(conversation, rendered), count)
        if ids is not None:
            count["ids"] += 1
            if ids != conversation.ids:
                return _tokens_missed(*_id_difference(conversation, ids), count)
    missing = sorted(set(data.stop) - set(data.stop if engine.stop is None else engine.stop))
    if missing:
        first = f"the trained model stops at token {missing[0]}, the export does not"
        return _tokens_missed(first, "end token: missing in the export's generation config or tokenizer", count)
    if engine.eos is not None and data.stop and engine.eos not in data.stop:
        first = f"the file's end token is {engine.eos}, the trained model stops at {', '.join(map(str, data.stop))}"
        return _tokens_missed(first, "end token: the file names another", count)
    return Gate("tokens", "met", _counts(count))


def _counts(count: Mapping[str, int]) -> tuple[Metric, ...]:
    return tuple(Metric(f"equal {name}", value) for name, value in count.items())


def _tokens_missed(first: str, cause: str, count: Mapping[str, int]) -> Gate:
    return Gate("tokens", "missed", _counts(count), first, cause)


def _text_difference(conversation: Conversation, rendered: str) -> tuple[str, str]:
    expected = conversation.text
    at = next(
        (n for n, (a, b) in enumerate(zip(expected, rendered, strict=False)) if a != b),
        min(len(expected), len(rendered)),
    )
    was, became = expected[at : at + 24], rendered[at : at + 24]
    first = f"prompt {_name(conversation)!r}, character {at}: {was!r} became {became!r}"
    if "".join(expected.split()) == "".join(rendered.split()):
        return first, "template: white space was lost or added"
    return first, "template: not the one that was trained with"


def _bos_difference(data: PromptSet, conversation: Conversation, ids: Sequence[int] | None) -> tuple[str, str] | None:
    """BOS at the start, as often as in training."""
    if ids is None or data.bos is None:
        return None
    expected, actual = (
        sum(1 for _ in takewhile(lambda token: token == data.bos, part)) for part in (conversation.ids, ids)
    )
    if actual == expected <= 1:
        return None
    first = f"prompt {_name(conversation)!r}: BOS {actual} times at the start, expected {min(expected, 1)}"
    if actual > 1:
        return first, "BOS: the template writes it twice, or the engine adds it again"
    return (
        first,
        "BOS: lost; neither template nor engine writes it" if expected else "BOS: added, and training had none",
    )


def _name(conversation: Conversation) -> str:
    return conversation.question[:60]


def _id_difference(conversation: Conversation, ids: Sequence[int]) -> tuple[str, str]:
    expected = conversation.ids
    at = next((n for n, (a, b) in enumerate(zip(expected, ids, strict=False)) if a != b), min(len(expected), len(ids)))
    first = (
        f"prompt {_name(conversation)!r}, token {at}: ids {list(expected[at : at + 6])} became {list(ids[at : at + 6])}"
    )
    if list(ids[1:]) == list(expected) or list(ids) == list(expected[1:]):
        return first, "tokenizer: one more or one less token at the start"
    return first, "tokenizer: not the one that was trained with"


@dataclass(frozen=True)
class Greedy:
    """Greedy answers beside the reference's: where each parts (-1: nowhere), and how sure the reference is there.

    ``gaps``: by how much the log-probability of its own token is above that of the export's, in nats; 0 where nothing
    parts, infinite where the export's is not among the likeliest.
    """

    parts: tuple[int, ...]
    gaps: tuple[float, ...]

    @property
    def equal(self) -> float:
        """Share of equal answers."""
        return sum(part < 0 for part in self.parts) / len(self.parts)

    def excusable(self, tie: float) -> float:
        """Share of answers that are equal or part at two tokens that the reference holds for nearly alike."""
        return sum(gap <= tie for gap in self.gaps) / len(self.gaps)


ReferenceAnswer = tuple[Sequence[int], Sequence[Sequence[tuple[int, float]]]]  # tokens; (likeliest, gap) of each step


def greedy(reference: Sequence[ReferenceAnswer], answers: Sequence[Sequence[int]], stop: Sequence[int]) -> Greedy:
    """A stop counts as a token."""
    parts, gaps = [], []
    for (expected, steps), got in zip(reference, answers, strict=True):
        want, have = list(expected), list(got)
        at = next((n for n, (a, b) in enumerate(zip(want, have, strict=False)) if a != b), min(len(want), len(have)))
        known = dict(steps[at]) if at < len(steps) else {}
        chosen = stop if at == len(have) else have[at : at + 1]
        parts.append(-1 if want == have else at)
        gaps.append(0.0 if want == have else min((known.get(token, np.inf) for token in chosen), default=np.inf))
    return Greedy(tuple(parts), tuple(gaps))


def tie(bounds: Thresholds) -> float:
    """The gap in nats that an export within its bound may turn round: at an even choice, its KL is gap² / 8."""
    return float((8 * bounds.mean_kl) ** 0.5) if bounds.mean_kl else 0.0


@dataclass(frozen=True)
class Behavior:
    """Everything measured of one engine against one reference."""

    positions: Positions
    base: Positions | None  # how far the model without adapter is from the same reference; None: there is no adapter
    sequences: Ints  # (P,) sequence of each position
    task: np.ndarray  # (P,) bool: from held-out rows
    greedy: Greedy | None = None
    long: Positions | None = None  # at the end of the long text

    def measure(self) -> dict[str, Estimate]:
        """All figures with their intervals, over the positions of which the engine says something."""
        known = ~np.isnan(self.positions.kl)
        if not known.all():
            base = self.base.take(known) if self.base else None
            answered = replace(
                self, positions=self.positions.take(known), base=base,
                sequences=self.sequences[known], task=self.task[known],
            )  # fmt: skip
            share = float(known.mean())
            return {**answered.measure(), "known": Estimate(share, share, share)}
        estimates = figures(self.positions, self.sequences)
        if self.base is not None:
            rows = self.task if self.task.any() else np.ones(len(self.task), dtype=bool)
            estimates["retention"] = ratio(self.positions.kl[rows], self.base.kl[rows], self.sequences[rows])
        if self.long is not None and (far := self.long.take(~np.isnan(self.long.kl))):
            estimates["long_kl"] = ratio(far.kl, np.ones(len(far)), np.zeros(len(far), dtype=np.int64))
        if self.greedy:
            estimates["equal_answers"] = Estimate(self.greedy.equal, self.greedy.equal, self.greedy.equal)
        return estimates

    def signal(self) -> float:
        """Nats that the adapter makes, on the texts that ``retention`` is of."""
        if self.base is None:
            return 0.0
        known = ~np.isnan(self.base.kl) & (self.task if self.task.any() else True)
        return float(self.base.kl[known].mean())


def behavior(
    measured: Behavior, estimates: Mapping[str, Estimate], bounds: Thresholds, name_of: Callable[[int], str],
    noise: float,
) -> Gate:  # fmt: skip
    """The worse end of each interval against its bound; ``name_of(position)`` says which text a position is in.

    ``noise`` is the KL of a model against itself in its engine: an adapter whose signal is not well above it cannot be
    told from it.
    """
    figures = dict(estimates)
    if measured.greedy:
        share = measured.greedy.excusable(tie(bounds))
        figures["first_difference"] = Estimate(share, share, share)
    if "retention" in figures and measured.signal() * (bounds.retention or 0.0) < noise:
        figures["retention"] = replace(figures["retention"], unjudged=FAINT)
    limits = bounds.by_figure()
    checks = [_check(name, estimate, limits.get(name)) for name, estimate in figures.items()]
    missed = [check for check in checks if check.met is False]
    if not missed:
        return Gate("behaviour", "met", tuple(checks))
    if measured.greedy and [check.name for check in missed] == ["first_difference"]:
        return Gate("behaviour", "missed", tuple(checks), *_other_answer(measured.greedy, tie(bounds)))
    if [check.name for check in missed] == ["long_kl"]:
        return Gate("behaviour", "missed", tuple(checks), *_far_in(measured, missed[0]))
    worst = int(np.nanargmax(measured.positions.kl))
    broken = np.flatnonzero(np.isinf(measured.positions.kl))
    at = int(broken[0]) if len(broken) else worst
    first = f"{name_of(at)}: KL {measured.positions.kl[at]:.3g}"
    return Gate("behaviour", "missed", tuple(checks), first, _cause(measured, estimates, bool(len(broken))))


def _other_answer(answers: Greedy, tie: float) -> tuple[str, str]:
    number = int(np.argmax(answers.gaps))
    first = (
        f"answer {number + 1}, token {answers.parts[number] + 1}: another one, where the trained model's is likelier "
        f"by {answers.gaps[number]:.2g} nats; {tie:.2g} would be a near-tie"
    )
    return first, "stop, length or sampling settings: the export's own answers part, with the right probabilities"


def _far_in(measured: Behavior, check: Metric) -> tuple[str, str]:
    first = f"the last {len(measured.long or ())} tokens of the long text: mean KL {check.value:.3g}"
    return first, "rope scaling, sliding window or context: right in short texts, and not far into a long one"


def _check(name: str, figure: Estimate, bound: float | None) -> Metric:
    if bound is None or figure.unjudged:
        why = "" if bound is None else figure.unjudged
        return Metric(name, figure.value, figure.low, figure.high, unjudged=why)
    if higher_is_better(name):
        met = figure.low >= bound
    else:
        met = max(abs(figure.low), abs(figure.high)) <= bound
    return Metric(name, figure.value, figure.low, figure.high, bound, bool(met))


def _cause(measured: Behavior, estimates: Mapping[str, Estimate], broken: bool) -> str:
    if broken:
        return "dtype: NaN or infinity in the export's logits"
    if measured.base is None:
        return "damaged weights, dtype or rounding: the export does not answer like the model it was made from"
    lost = estimates["retention"].value
    if not np.isfinite(lost) or float(measured.base.kl.mean()) < 1e-9:
        return "adapter: the trained model answers like its base, so nothing was learned or the adapter was not loaded"
    if 0.7 <= lost <= 1.4:
        return "adapter: not applied, or lost in rounding; the export is as far from the trained model as the base is"
    if lost > 1.4:
        return "wrong base or damaged weights: the export is further from the trained model than the base is"
    return "scale or rounding: the adapter is there, but not as trained (alpha, rsLoRA, dtype, too few bits)"
