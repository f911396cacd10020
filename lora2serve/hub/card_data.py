"""What a model card is made of, from manifests, the run's record and its recipe; the text is made elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.run import Run
from lora2serve.artifacts.run_record import RunRecord
from lora2serve.config.yaml_text import front_matter, load_yaml
from lora2serve.errors import InputError
from lora2serve.hub.package import public

MERGED, ADAPTER, GGUF, GGUF_ADAPTER = "merged", "adapter", "gguf", "gguf-adapter"
KINDS = {
    "vllm": MERGED,
    "adapter": ADAPTER,
    "gguf": GGUF,
    "ollama": GGUF,
    "lmstudio": GGUF,
    "gguf-adapter": GGUF_ADAPTER,
    "ollama-adapter": GGUF_ADAPTER,
}


@dataclass(frozen=True)
class CardData:
    """Everything that the card of one repository is made of. ``exports`` are public manifests, by name."""

    repo_id: str
    exports: Mapping[str, Manifest]
    siblings: Mapping[str, Manifest]  # repository of the same push -> the (first) manifest that it gets
    base_card: Mapping[str, Any] = field(default_factory=dict)  # the metadata of the base's own card
    record: RunRecord = field(default_factory=RunRecord)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False
    context: int | None = None  # tokens that the model was made for
    reported: frozenset[str] = frozenset()  # exports with a parity report beside them

    @property
    def first(self) -> Manifest:
        return next(iter(self.exports.values()))

    @property
    def kinds(self) -> set[str]:
        return {kind_of(export) for export in self.exports.values()}

    @property
    def base(self) -> str | None:
        """The base's Hub id, or None for a base that is on no Hub."""
        return hub_id(self.first.base.id)

    @property
    def name(self) -> str:
        return self.first.name or self.repo_id.split("/")[-1]

    @property
    def rank(self) -> int | None:
        """Of the adapter, where one is here."""
        return next((export.rank for export in self.exports.values() if export.rank), None)

    @property
    def unproven(self) -> dict[str, str]:
        """Export name -> why its parity is not proven."""
        return {name: why for name, export in self.exports.items() if (why := export.unproven())}


def kind_of(manifest: Manifest) -> str:
    """What an export is to its users; a target of another package counts as merged weights."""
    return KINDS.get(manifest.target, MERGED)


def hub_id(name: str) -> str | None:
    """``name`` if it is an ``org/name`` of the Hub and no local path."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return None
    return None if Path(name).exists() else name


def gather(
    repo_id: str,
    exports: Mapping[str, Manifest],
    local: Sequence[Export],
    siblings: Mapping[str, Manifest],
    run: Run | None,
    reported: Iterable[str] = (),
) -> CardData:
    """The facts for the card of ``repo_id``; ``local`` are the exports that are at hand."""
    bases = [Path(export.manifest.base.path or export.path) for export in local]
    directories = [directory for export, base in zip(local, bases, strict=True) for directory in (export.path, base)]
    return CardData(
        repo_id=repo_id,
        exports=exports,
        siblings=siblings,
        base_card=_base_card(bases, hub_id(next(iter(exports.values())).base.id)),
        record=run.record if run else RunRecord(),
        recipe=_recipe(run.recipe) if run else {},
        chat=any(_has_template(directory) for directory in directories),
        context=next((context for directory in directories if (context := _context(directory))), None),
        reported=frozenset(reported),
    )


def _recipe(path: Path) -> Mapping[str, Any]:
    """A run's recipe as others may read it; empty where there is none."""
    try:
        content = public(load_yaml(path.read_text(encoding="utf-8"))) if path.is_file() else None
    except ValueError as error:
        raise InputError(f"{path}: {error}", "the run is damaged") from None
    return content if isinstance(content, dict) else {}


def _base_card(bases: Sequence[Path], base: str | None) -> dict[str, Any]:
    """The metadata of the base's card: from where the base was here, else from the Hub or its cache."""
    cards = [path / "README.md" for path in bases]
    card = next((card for card in cards if card.is_file()), None) or (_card_from_hub(base) if base else None)
    try:
        return read_metadata(card.read_text(encoding="utf-8-sig")) if card else {}
    except ValueError:  # someone else's card: one that cannot be read counts as none
        return {}


def _card_from_hub(base: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(base, "README.md"))
    except Exception:  # gated, gone, no network: the push is about another repository
        return None


def _context(path: Path) -> int | None:
    """``max_position_embeddings`` of the config.json there."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        context = (config.get("text_config") or config).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return context if isinstance(context, int) else None


def read_metadata(card: str) -> dict[str, Any]:
    """The YAML at the head of a model card; ValueError where it is none."""
    from huggingface_hub import ModelCard

    front_matter(card)  # within bounds
    data: Any = ModelCard(card, ignore_metadata_errors=True).data
    return dict(data.to_dict())


def _has_template(path: Path) -> bool:
    if any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json", "template", "Modelfile")):
        return True
    config = path / "tokenizer_config.json"
    return config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
