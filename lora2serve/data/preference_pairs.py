"""Two answers to a prompt in token ids, as a trainer of preferences is given them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora2serve.data.data_sets import DataSet
from lora2serve.data.rendering import IGNORE
from lora2serve.data.samples import Sample
from lora2serve.errors import DataError


@dataclass(frozen=True)
class PreferencePair:
    """The ids of a prompt as a server sends it, and of each answer up to and with its end."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer one with its prompt."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def paired(samples: Sequence[Sample]) -> list[PreferencePair]:
    """Of ``samples``, of which each row has two with something to learn: the chosen answer, and the rejected one."""
    pairs = []
    for chosen, rejected in zip(samples[::2], samples[1::2], strict=True):
        assert chosen.row == rejected.row, "both answers of a row are cut behind the same prompt, or neither is there"
        start = _start(chosen)
        pairs.append(PreferencePair(chosen.input_ids[:start], chosen.input_ids[start:], rejected.input_ids[start:]))
    return pairs


def refuse_other_prompts(samples: Sequence[Sample], data: DataSet) -> None:
    """DataError for a row whose two prompts are not the same: the chat template writes them by what follows."""
    for chosen, rejected in zip(samples[::2], samples[1::2], strict=True):
        start = _start(chosen)
        if start != _start(rejected) or chosen.input_ids[:start] != rejected.input_ids[:start]:
            raise DataError(
                f"{data.where(chosen.row)}: the chat template writes another prompt before the rejected answer",
                "data.chat_template names another one",
            )


def _start(sample: Sample) -> int:
    """Where the answer begins."""
    return next(place for place, label in enumerate(sample.labels) if label != IGNORE)


@dataclass(frozen=True)
class LabeledAnswer:
    """The ids of a prompt as a server sends it, and of an answer up to and with its end; whether it is one to give."""

    prompt: list[int]
    answer: list[int]
    label: bool


def labeled(samples: Sequence[Sample]) -> list[LabeledAnswer]:
    """Of ``samples``, each with something to learn."""
    cuts = [(sample, _start(sample)) for sample in samples]
    return [LabeledAnswer(one.input_ids[:start], one.input_ids[start:], one.right) for one, start in cuts]
