"""GPUs and the memory that their drivers report, by the names that people use; or any number of GiB."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lora2serve.errors import UsageError, did_you_mean
from lora2serve.planning.plan_settings import ComputeType

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class GpuModel:
    """A kind of GPU, or what is computed on instead."""

    name: str
    memory: int  # bytes, as nvidia-smi shows them
    dtype: ComputeType = "bfloat16"


# Name, MiB in nvidia-smi, other names of it and of cards with the same memory.
_TABLE: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("RTX 4070", 12282, ("4070", "3060", "rtx3060", "5070")),
    ("T4", 15360, ("teslat4",)),
    ("V100 16GB", 16384, ("v100", "v10016")),
    ("RTX 4080", 16376, ("4080", "5080", "rtx5080", "4060ti16gb")),
    ("A10", 23028, ("a10g",)),
    ("L4", 23034, ()),
    ("RTX 4090", 24564, ("4090", "3090", "rtx3090")),
    ("RTX 5090", 32607, ("5090",)),
    ("V100 32GB", 32768, ("v10032",)),
    ("A100 40GB", 40960, ("a10040",)),
    ("L40S", 46068, ("l40", "a40", "a6000", "rtxa6000", "rtx6000ada")),
    ("H100", 81559, ("h10080gb", "h10080")),
    ("A100 80GB", 81920, ("a100", "a10080")),
    ("RTX PRO 6000", 97887, ("pro6000",)),
    ("H200", 143771, ()),
    ("B200", 183359, ()),
)
_OLD = ("T4", "V100")  # without bfloat16


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("nvidia"))


def _dtype(name: str) -> ComputeType:
    """What a GPU of that name computes in."""
    return "float16" if any(_plain(old) in _plain(name) for old in _OLD) else "bfloat16"


GPUS = tuple(GpuModel(name, mib * MIB, _dtype(name)) for name, mib, _ in _TABLE)
_NAMED = {
    _plain(alias): gpu
    for gpu, (name, _, aliases) in zip(GPUS, _TABLE, strict=True)
    for alias in (name, name.removeprefix("RTX "), *aliases)
}


def find_gpu(text: str) -> GpuModel:
    """The GPU of that name (``4090``, ``h100``, ``A100 40GB``), or one with that many GiB (``24``, ``24GB``).

    UsageError for a name that is not known, with the nearest one.
    """
    plain = _plain(text)
    if plain in _NAMED:
        return _NAMED[plain]
    number = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:g|gb|gib)?", text.strip().lower())
    if number and 0 < float(number[1]) <= 1024:
        return GpuModel(f"{number[1]} GiB", int(float(number[1]) * GIB))
    known = ", ".join(gpu.name for gpu in GPUS)
    raise UsageError(
        f"--gpu {text}: unknown{did_you_mean(plain, _NAMED)}", f"a number of GiB, such as 24, or one of: {known}"
    )


def gpu_of_driver(name: str, memory: str) -> GpuModel:
    """What nvidia-smi says of a GPU of this machine: its name, and ``"81559 MiB"``."""
    mib = re.match(r"\d+", memory)
    return GpuModel(name, int(mib[0]) * MIB if mib else 0, _dtype(name))
