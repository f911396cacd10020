"""Room for the adapters of a registry in a server whose adapters come and go, as behind a gateway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve import console
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.lineage import BaseRecord
from lora2serve.errors import CheckpointError
from lora2serve.progress import Progress
from lora2serve.registry.location import find_location
from lora2serve.registry.version_facts import base_sum
from lora2serve.serving.lora_room import MOST_SLOTS, LoraRoom, lora_room
from lora2serve.serving.server import open_exports

if TYPE_CHECKING:
    from lora2serve.planning.model_shape import ModelShape
    from lora2serve.registry.version_record import Version


def registry_room(paths: Sequence[Path], progress: Progress) -> LoraRoom | None:
    """What the registry's versions of the same base need; None without a registry, such versions, or adapters here.

    Versions that an alias points to answer at once; beside them, those that a rollback would bring back stay loaded.
    """
    from lora2serve.api.version_registry import Registry

    location = find_location()
    exports = [member for export in open_exports(paths) for member in _adapters(export)]
    if not exports or (location.folder and not location.file.is_file()):
        return None
    base = exports[0].manifest.base
    with Registry() as registry:
        versions = {(each.name, each.number): each for each in registry.versions() if _fits(each, base)}
        live = registry.live()
    assert live is not None
    answering, earlier = (_pointed(aliases) & versions.keys() for aliases in (live.numbers, live.before))
    if not answering:
        return None
    ranks = [version.rank or 1 for version in versions.values()] + [export.manifest.rank or 1 for export in exports]
    shape, size = _shape(base)
    # an adapter that is given here has a name of its own, beside those that a gateway loads
    room = lora_room(len(answering) + len(exports), len(answering | earlier) + len(exports), ranks, shape, size)
    progress.note(_words(room, len(answering) + len(exports)))
    return room


def _adapters(export: Export) -> list[Export]:
    if export.members:
        return [Export.open(path) for path in export.members.values()]
    return [export] if export.target == "adapter" else []


def _pointed(aliases: Mapping[str, Mapping[str, int]]) -> set[tuple[str, int]]:
    return {(name, number) for name, numbers in aliases.items() for number in numbers.values()}


def _fits(version: Version, base: BaseRecord) -> bool:
    """Whether it may be loaded beside the others: of the same base, and not retired."""
    same = version.base_sha256 == base_sum(base) if version.base_sha256 and base_sum(base) else version.base == base.id
    return same and version.state == "active"


def _shape(base: BaseRecord) -> tuple[ModelShape | None, int]:
    """That of the base where it lies here, and the bytes of a value of it; no network is asked."""
    from lora2serve.planning.model_shape import model_shape
    from lora2serve.weights.checkpoint import Checkpoint

    if base.local is None:
        return None, 2
    try:
        checkpoint = Checkpoint(base.local)
        config = checkpoint.config
        wide = str(config.get("dtype") or config.get("torch_dtype")) == "float32"
        return model_shape(config, checkpoint.specs()), 4 if wide else 2
    except CheckpointError:
        return None, 2


def _words(room: LoraRoom, live: int) -> str:
    taken = "" if room.slot_bytes is None else f", {console.size(room.max_loras * room.slot_bytes)} for these slots"
    less = f" ({live} could be asked for at once: others wait)" if live > MOST_SLOTS else ""
    return (
        f"room by the registry: {room.max_loras} adapters in slots{less} of rank {room.max_lora_rank}{taken}; "
        f"{room.max_cpu_loras} in memory"
    )
