"""A plain LoRA out of what vLLM does not take (DoRA, a trained head, other methods): truncated SVD, module by module.

The change ``W' - W`` is taken in float32 from the merged model and its base. PiSSA and OLoRA change the base by
rank 2r exactly (their share of the base goes out, the trained product comes in), so there nothing is lost.
The randomized range finder is that of Halko, Martinsson, Tropp (https://arxiv.org/abs/0909.4061), with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora2serve.adapters.adapter import PREFIX, Adapter
from lora2serve.adapters.lint import RANKS, next_rank
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel, ModelSource
from lora2serve.merge.layout import EMBEDDINGS
from lora2serve.weights.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOST = 0.3  # of the whole change that may be lost, in Frobenius norms
EXACT = 1e-4  # where the change has the rank asked for, in float32


@dataclass
class Extracted:
    """A LoRA of one rank with scale 1."""

    source: ModelSource
    names: Sequence[str]
    specs: Sequence[TensorSpec]
    rank: int
    keep: int  # singular values kept; the rest of ``rank`` is zeros
    limit: float
    scale: float = 1.0
    errors: dict[str, float] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[TensorSpec, Tensor]]:
        """Spec and value, A and B of one module after another; ExportError where too much would be lost."""
        by_name = {spec.name: spec for spec in self.specs}
        lost = total = 0.0
        for name in self.names:
            a, b, change, rest = self._factor(name)
            lost, total = lost + rest**2, total + change**2
            self.errors[name] = rest / change if change else 0.0
            for key, value in zip(tensor_names(name), (a, b), strict=True):
                yield by_name[key], value
        error = (lost / total) ** 0.5 if total else 0.0
        if error > self.limit:
            worst = max(self.errors, key=lambda name: self.errors[name])
            raise ExportError(
                f"rank {self.keep} loses {error:.1%} of the change, {self.limit:.2%} at most may be lost; "
                f"worst: {worst}, {self.errors[worst]:.1%}",
                "raise --as-lora-rank, or merge with --target vllm",
            )

    def report(self) -> dict[str, Any]:
        """What the manifest should say."""
        errors = {name: float(f"{error:.3g}") for name, error in self.errors.items()}
        return {"lossless": self.limit == EXACT, "relative_error": errors}

    def _factor(self, name: str) -> tuple[Tensor, Tensor, float, float]:
        """A (rank, in), B (out, rank), the norm of the change, and of what A and B leave of it."""
        import torch

        after, before = (read(name).values.float() for read in (self.source.read, self.source.before))
        if after.shape != before.shape:
            raise ExportError(
                f"{name}: {list(after.shape)} after training, {list(before.shape)} before: no LoRA can add rows",
                "export --target vllm merges it",
            )
        change = after - before
        if name.endswith(EMBEDDINGS):
            change = change.T.contiguous()
        b, a = low_rank(change, min(self.keep, *change.shape))
        rest = float(torch.linalg.norm(change - b @ a))
        grown_a, grown_b = a.new_zeros(self.rank, a.shape[1]), b.new_zeros(b.shape[0], self.rank)
        grown_a[: a.shape[0]], grown_b[:, : b.shape[1]] = a, b
        return grown_a, grown_b, float(torch.linalg.norm(change)), rest


def plan(model: ExportModel, adapter: Adapter, rank: int | None) -> Extracted:
    """Plan an extraction at ``rank``; None means the exact one, twice the adapter's own. Reads no weights."""
    source = model.source
    keep = rank or 2 * max(layer.parts["lora_A"].shape[0] for layer in adapter.layers.values())
    held = next_rank(keep)
    if held is None or keep < 1:
        raise ExportError(f"--as-lora-rank {keep}: expected 1 to {RANKS[-1]}")
    stored = {spec.name: spec for spec in source.specs()}
    names = source.changed()
    odd = [n for n in names if not n.endswith(".weight") or len(stored[n].shape) != 2]
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ExportError(
            f"a LoRA changes only matrices, not {', '.join(odd[:3])}{more}",
            "export --target vllm merges it",
        )
    specs = [spec for name in names for spec in _specs(stored[name], held)]
    return Extracted(source, names, specs, held, keep, MAX_LOST if rank else EXACT)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, rank) and A (rank, in), float32: the best product of that rank, its two sides equally large."""
    import torch

    if min(matrix.shape) <= max(256, 4 * rank):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(matrix.shape[1], rank + 16, generator=generator)
        for _ in range(4):
            basis = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ basis).Q).Q
        q = torch.linalg.qr(matrix @ basis).Q
        u, s, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
        u = q @ u
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]


def tensor_names(name: str) -> tuple[str, str]:
    """A's and B's keys for one weight, as PEFT writes them."""
    module = PREFIX + name.removesuffix(".weight")
    if name.endswith(EMBEDDINGS):
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _specs(weight: TensorSpec, rank: int) -> tuple[TensorSpec, TensorSpec]:
    out, into = weight.shape[::-1] if weight.name.endswith(EMBEDDINGS) else weight.shape
    a, b = tensor_names(weight.name)
    return TensorSpec(a, (rank, into), "F32"), TensorSpec(b, (out, rank), "F32")
