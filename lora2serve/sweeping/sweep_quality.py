"""By what a sweep judges its trials: the eval loss, or the scores of a suite; and how either is put into words.

What is compared is a loss in both cases, of which less is better: that of a suite is what is missing of its scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lora2serve.artifacts.json_record import JsonRecord
from lora2serve.evaluation.harness_options import HarnessOptions

NAMES = {"acc": "accuracy", "f1": "F1", "judge": "judge's score"}  # of a suite's figures; all others are scores


@dataclass(frozen=True)
class Quality(JsonRecord):
    """``suite`` is its name, empty for the eval loss; ``metric`` what the mean of its scores is called. Where it is
    tasks of lm-evaluation-harness, ``harness`` says which.

    Both sha256 are those of the part that every trial answers, and of the part that no trial has seen until the end.
    """

    WHOLE: ClassVar[bool] = True

    suite: str = ""
    metric: str = ""
    path: str = ""  # of its file, absolute; empty for the sweep's own held-out rows
    search_sha256: str = ""
    final_sha256: str = ""
    harness: HarnessOptions | None = None

    @property
    def of_suite(self) -> bool:
        """Whether it is a suite's scores."""
        return bool(self.suite)

    @property
    def places(self) -> tuple[str, ...]:
        """Files and folders that whoever joins must have."""
        return tuple(place for place in (self.path, self.harness.include if self.harness else "") if place)

    @property
    def noun(self) -> str:
        """What it is called."""
        return NAMES.get(self.metric, "score") if self.suite else "loss"

    @property
    def title(self) -> str:
        """The same with the suite that it is of."""
        return f"{self.noun} on {self.suite}" if self.suite else "eval loss"

    @property
    def best(self) -> str:
        """The one that is best."""
        return f"the largest {self.noun}" if self.suite else "the smallest loss"

    def figure(self, loss: float) -> float:
        """What is shown: of a suite the score."""
        return 1 - loss if self.suite else loss

    def shown(self, loss: float) -> str:
        """``0.4312``, or ``87.5 %``."""
        return f"{100 * (1 - loss):.1f} %" if self.suite else f"{loss:.4f}"

    def span(self, losses: Sequence[float]) -> str:
        """From the smallest figure to the largest."""
        ends = sorted(losses, key=self.figure)
        return f"{self.shown(ends[0])} to {self.shown(ends[-1])}"

    def mark(self, figure: float) -> str:
        """At a line of a chart."""
        return f"{100 * figure:.3g} %" if self.suite else f"{figure:.3g}"

    def reached(self, loss: float) -> str:
        """As a sentence has it."""
        return f"reaches {self.shown(loss)} {self.noun}" if self.suite else f"has a loss of {self.shown(loss)}"

    def rows(self, count: int) -> str:
        """What it was measured on."""
        return f"{count} items of {self.suite}" if self.suite else f"{count} rows"

    def margin(self, share: float) -> str:
        """A change that counts as none."""
        if not self.suite:
            return f"{100 * share:g} %"
        return "1 point" if 100 * share == 1 else f"{100 * share:g} points"


EVAL_LOSS = Quality()
