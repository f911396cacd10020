"""What a training and its exports take on the disk, and of the host's memory."""

from __future__ import annotations

from lora2serve.adapters.kind_targets import way
from lora2serve.planning.memory_plan import PlannedTraining

LIBRARIES = 3_000_000_000  # bytes of the host's memory that torch and its neighbors take
CHECKPOINTS = 3  # two are kept, and a third is being written: each with the adapter and both moments of AdamW
EXPORTS = {"vllm": 16.0, "gguf F16": 16.0, "gguf Q8_0": 8.5, "gguf Q4_K_M": 4.9}  # bits a value


def disk_bytes(parameters: int, stored: int | None, training: PlannedTraining) -> dict[str, int]:
    """Bytes of the base as it is fetched, of the run, and of its exports, where there can be some.

    stored: of the base, where it is known; otherwise it is taken for one of 16 bits.
    """
    base = stored or 2 * parameters
    trained = 4 * training.trainable
    sizes = {"base": base, "run": trained + CHECKPOINTS * 3 * trained, "adapter": trained}
    if way(training.kind.upper(), "vllm") == "no":
        return sizes
    return sizes | {name: round(parameters * bits / 8) for name, bits in EXPORTS.items()}


def host_bytes(training: PlannedTraining, on_cpu: bool, shards: int = 1) -> int:
    """Bytes of the host's memory: a paged optimizer may be moved there, and without a GPU everything is there.

    Of each process; a base that is cut into parts is whole there before it is.
    """
    whole = training.bytes.weights * shards if shards > 1 else 0
    return LIBRARIES + max(whole, training.bytes.total if on_cpu else training.bytes.optimizer)
