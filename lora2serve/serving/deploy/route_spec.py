"""What a rendered route says: one name that clients ask for, and the versions that answer it, each by its share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora2serve.errors import UsageError

MOST = 1_000_000  # the largest weight that Kubernetes' gateways take


@dataclass(frozen=True)
class RoutedVersion:
    """``served`` is what vLLM calls the version, ``medical-qa-7``; ``weight`` is a share of the sum of all weights."""

    reference: str  # medical-qa@7
    served: str
    sha256: str
    weight: int


@dataclass(frozen=True)
class RouteSpec:
    """``name`` is what clients ask for; ``pool`` and ``upstream`` are where the versions are served."""

    name: str
    versions: tuple[RoutedVersion, ...]
    pool: str = ""  # an InferencePool
    upstream: str = ""  # the OpenAI-compatible address of a server

    @property
    def shares(self) -> str:
        """``medical-qa@7 90, medical-qa@9 10``"""
        return ", ".join(f"{version.reference} {version.weight}" for version in self.versions)


def check_weights(weights: Sequence[int], count: int) -> Sequence[int]:
    """A weight for each of so many versions; UsageError where they do not fit. One version needs none."""
    if count == 1 and not weights:
        return (1,)
    if len(weights) != count:
        raise UsageError(
            f"--weights: {len(weights)} for {count} versions",
            f"one for each, such as --weights {','.join(['90', *['10'] * (count - 1)])}",
        )
    if wrong := [weight for weight in weights if not 1 <= weight <= MOST]:
        raise UsageError(f"--weights {wrong[0]}: expected 1 to {MOST}", "leave a version out that gets nothing")
    return weights
