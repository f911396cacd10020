"""One frozen base under several adapters that are trained at the same time, in one process.

Each training has modules of its own, with its own adapter, switches and hooks; their weights are the same tensors.
What a training does to its model is what it would do alone, and reaches no other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import TrainerCallback

from lora2serve.errors import TrainError
from lora2serve.training.turns import RandomNumbers, Turn

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn import Module
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments


class SharedBase:
    """The base that the first training loads."""

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None
        self._path: Path | None = None

    def modules(self, path: Path, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """A model of its own around the weights at ``path``, which are loaded once.

        TrainError where loading draws random numbers: of each training alone the base would be another one.
        """
        if self._path not in (None, path):
            raise TrainError(f"{path} is another base than {self._path}, which is shared", "leave --share-base out")
        if self._model is None:
            before = RandomNumbers.now()
            model = load()
            if not _same_numbers(before, RandomNumbers.now()):
                raise TrainError(
                    "weights are missing in the base, and were drawn at random: no two trainings would have the same",
                    "leave --share-base out",
                )
            self._model, self._path = model, path
        return own_modules(self._model)

    def refuse_trained(self, model: PeftModel) -> None:
        """TrainError where ``model`` would train a weight of the base itself."""
        assert self._model is not None
        shared = {id(parameter): name for name, parameter in self._model.named_parameters()}
        trained = [each for each in model.parameters() if each.requires_grad and id(each) in shared]
        for parameter in trained:
            parameter.requires_grad = False
        if trained:
            names = ", ".join(shared[id(each)] for each in trained[:3])
            raise TrainError(
                f"it trains {len(trained)} weights of the base itself ({names}{', ...' if trained[3:] else ''}), which "
                "is shared",
                "leave --share-base out",
            )


@dataclass(frozen=True)
class SharedTraining:
    """What one of several trainings on a shared base has of it."""

    base: SharedBase
    turn: Turn
    begun: Callable[[Path], object] = lambda _: None  # called with its run directory

    def load(self, path: Path, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """Its model, once the others have planned their memory, too."""
        self.turn.pass_on()
        return self.base.modules(path, load)


class PassOn(TrainerCallback):  # type: ignore[misc]
    """Lets the others do a step after each one; ``stop`` where that was the last one, as Ctrl-C was pressed."""

    def __init__(self, turn: Turn, stop: Callable[[], None]) -> None:
        self._turn, self._stop = turn, stop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """To be the last to be called: what follows, figures, evaluations and checkpoints, is of the next turn."""
        self._turn.pass_on()
        if self._turn.stopped:
            self._stop()
            control.should_save = control.should_training_stop = True


def own_modules(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules of ``model`` and of its settings around the very same parameters and buffers."""
    return copy.deepcopy(model, {id(item): item for item in _shared(model)})


def _shared(model: Module) -> Iterator[object]:
    """Parameters, buffers, and what else holds tensors in a module: bitsandbytes' quantization states."""
    for parameter in model.parameters():
        yield parameter
        if hasattr(parameter, "quant_state"):
            yield parameter.quant_state
    yield from model.buffers()
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            inside = getattr(value, "__dict__", {}).values()
            if isinstance(value, Tensor) or any(isinstance(item, Tensor) for item in inside):
                yield value


def _same_numbers(before: RandomNumbers, after: RandomNumbers) -> bool:
    assert isinstance(before.torch, Tensor) and isinstance(after.torch, Tensor)
    return before.python == after.python and bool((before.torch == after.torch).all())
