"""What vLLM's own loader makes of a checkpoint: its parameters, without a kernel and without a forward.

``python vllm_weights.py OUT DIR...`` writes one safetensors file for each directory, or the reason why there is none.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def main(out: Path, folders: list[str]) -> None:
    from safetensors.torch import save_file
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    for number, folder in enumerate(folders):
        config = _config(folder)
        with _current(config):
            if not number:
                init_distributed_environment(1, 0, f"file://{out / 'rendezvous'}", 0, "gloo")
                initialize_model_parallel(1, 1)
            try:
                found = _loaded(config)
            except Exception as error:
                (out / f"{number}.txt").write_text(f"{type(error).__name__}: {error}")
                continue
        save_file(found, out / f"{number}.safetensors")


def _config(folder: str) -> object:
    from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig

    model = ModelConfig(model=folder, tokenizer=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=64)
    return VllmConfig(model_config=model, device_config=DeviceConfig(device="cpu"), load_config=LoadConfig())


def _current(config: object) -> object:
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(config)


def _loaded(config: object) -> dict[str, torch.Tensor]:
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(torch.bfloat16):
        model = initialize_model(vllm_config=config)
    for parameter in model.parameters():  # what is not loaded stays visibly so
        parameter.data.fill_(77)
    get_model_loader(config.load_config).load_weights(model, config.model_config)
    return {name: parameter.data.contiguous() for name, parameter in model.named_parameters()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
