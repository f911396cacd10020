"""What the rest of the training asks about a base that is cut into parts (``sharded_base``).

torch's distributed tensors take two seconds to import, and there are none where one process trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, distributed
from torch.nn import Module

from lora2serve.training.tiled_head import plain_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def is_part(weight: object) -> bool:
    """Whether a process has only its part of a weight."""
    if not distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor, Shard

    return isinstance(weight, DTensor) and any(isinstance(place, Shard) for place in weight.placements)


def is_sharded(model: PreTrainedModel | PeftModel) -> bool:
    """Whether all processes have to go through ``model`` together, as often as each other."""
    return any(map(is_part, model.parameters()))


@contextmanager
def head_gathered(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Meanwhile the head of a sharded model is whole, for many small products."""
    head = plain_model(model).get_output_embeddings()
    if not isinstance(head, Module) or not is_part(head._parameters.get("weight")):
        yield
        return
    vars(head)["gathered"] = gathered(head.get_parameter("weight"))
    try:
        yield
    finally:
        del vars(head)["gathered"]


def gathered(weight: Tensor) -> Tensor:
    """All parts of it, from all processes."""
    from torch.distributed.tensor import DTensor

    assert isinstance(weight, DTensor)
    whole: Tensor = weight.full_tensor()
    return whole
