"""The decoder layers of a model compiled, one graph for all of one kind, in the steps of a training only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEWEST_STEPS = 200  # below, compiling takes longer than it saves
MULTIPLE = 64  # of tokens, to which lengths are padded: fewer shapes, and full tiles


class CompiledLayers:
    """``on`` lets the layers of ``model`` run compiled; evaluations and answers, of other shapes, go without.

    Each layer has to be one graph, of any number of rows and tokens: what cannot be raises an error, which
    ``is_refusal`` knows.
    """

    def __init__(self, model: PreTrainedModel, backend: str = "inductor") -> None:
        model.enable_input_require_grads()  # the input of the first layer, too: else it would be a graph of its own
        self._layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._calls = []
        for layer in self._layers:
            layer.compile(fullgraph=True, dynamic=True, backend=backend)
            self._calls.append(layer._compiled_call_impl)
            layer._compiled_call_impl = None

    @contextmanager
    def on(self) -> Iterator[None]:
        """While it lasts."""
        for layer, call in zip(self._layers, self._calls, strict=True):
            layer._compiled_call_impl = call
        try:
            yield
        finally:
            for layer in self._layers:
                layer._compiled_call_impl = None

    def drop(self) -> None:
        """Never again compiled."""
        self._calls = [None] * len(self._layers)
        torch._dynamo.reset()


def is_refusal(error: BaseException) -> bool:
    """Whether an error says that a layer cannot be compiled."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return isinstance(error, TorchDynamoException | InductorError)
