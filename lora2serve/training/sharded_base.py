"""A base that no single GPU holds: each process keeps a part of every weight, and layers are put together for use.

By torch's ``fully_shard``, for the frozen base alone: the adapter is whole in each process, so that its gradients, its
optimizer and its checkpoints are those of several processes with a whole base each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Module, Parameter
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from lora2serve.errors import TrainError
from lora2serve.training import ranks
from lora2serve.training.base_parts import gathered, is_part
from lora2serve.training.expert_layers import four_bit_modules, four_bit_of

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit
    from transformers import PreTrainedModel

READ_BY_PEFT = ("compress_statistics", "quant_type")  # of a 4-bit weight


def shard(model: PreTrainedModel, device: str) -> None:
    """Cut layers, embeddings and head of ``model`` into parts, one for each process; other norms stay whole.

    TrainError where a 4-bit weight would be whole in each of them.
    """
    mesh = init_device_mesh(device, (ranks.processes(),))
    linears = [module for _, module in _linears(model)]
    read = [{name: getattr(module.weight, name) for name in READ_BY_PEFT} for module in linears]
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not table.weight:
        fully_shard(table, mesh=mesh)
        _shard_head(head, mesh)
    whole = {parameter for parameter in model.base_model.parameters() if not isinstance(parameter, DTensor)}
    body = model.base_model
    fully_shard(body, mesh=mesh, ignored_params=whole)  # layers are fetched one ahead
    _CAN_RECORD_REGISTRY[str(type(body))] = body._can_record_outputs  # by class, and this is one of torch's own now
    for module, values in zip(linears, read, strict=True):
        for name, value in values.items():
            setattr(module.weight, name, value)
    for module in model.modules():  # what was loaded beside the device
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and not isinstance(tensor, DTensor) and tensor.device.type != device:
                getattr(module, name).data = tensor.data.to(device)
    refuse_whole(model)


def _linears(model: Module) -> list[tuple[str, Linear4bit]]:
    """Those in 4 bits, by name."""
    from bitsandbytes.nn import Linear4bit

    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def refuse_whole(model: Module) -> None:
    """TrainError for 4-bit weights that are not cut into parts."""
    weights = {f"{name}.weight": module.weight for name, module in _linears(model)}
    for path, module in four_bit_modules(model):
        weights |= {f"{path}.{name}": getattr(module, name) for name in four_bit_of(module).states}
    whole = [name for name, weight in weights.items() if not is_part(weight)]
    if whole:
        more = f" and {len(whole) - 1} more" if whole[1:] else ""
        raise TrainError(
            f"train.parallel: fsdp: {whole[0]}{more}: in 4 bits, and whole in every process", "train.parallel: ddp"
        )


def _shard_head(head: Module, mesh: DeviceMesh) -> None:
    """TRL takes the loss from the weight of the head, and gathers one that is in parts by itself."""

    def forward(states: Tensor) -> Tensor:
        weight = vars(head).get("gathered")
        whole = weight if isinstance(weight, Tensor) else gathered(head.get_parameter("weight"))
        return torch.nn.functional.linear(states, whole, head._parameters.get("bias"))

    whole = head.get_parameter("weight")
    part = distribute_tensor(whole.data.to(mesh.device_type), mesh, [Shard(0)])
    head._parameters["weight"] = Parameter(part, requires_grad=False)
    vars(head)["forward"] = forward
