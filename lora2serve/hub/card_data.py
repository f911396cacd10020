"""The facts a model card tells, gathered from manifests, the run's record and its recipe; no words here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora2serve.artifacts.run import Run
from lora2serve.artifacts.run_record import RunRecord
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
    exports: Mapping[str, Mapping[str, Any]]
    siblings: Mapping[str, Mapping[str, Any]]  # repository of the same push -> the (first) manifest that it gets
    base_card: Mapping[str, Any] = field(default_factory=dict)  # the metadata of the base's own card
    record: RunRecord = field(default_factory=RunRecord)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False
    context: int | None = None  # tokens that the model was made for
    reported: frozenset[str] = frozenset()  # exports with a parity report beside them

    @property
    def first(self) -> Mapping[str, Any]:
        return next(iter(self.exports.values()))

    @property
    def kinds(self) -> set[str]:
        return {kind_of(export) for export in self.exports.values()}

    @property
    def base(self) -> str | None:
        """The base's Hub id, or None for a base that is on no Hub."""
        return hub_id((self.first.get("base") or {}).get("id"))

    @property
    def name(self) -> str:
        return str(self.first.get("name") or self.repo_id.split("/")[-1])

    @property
    def rank(self) -> int | None:
        """Of the adapter, where one is here."""
        return next((e["rank"] for e in self.exports.values() if isinstance(e.get("rank"), int)), None)

    @property
    def unproven(self) -> dict[str, str]:
        """Export name -> why its parity is not proven."""
        return {name: why for name, export in self.exports.items() if (why := unproven(export))}


def kind_of(export: Mapping[str, Any]) -> str:
    """What an export is to its users; a target of another package counts as merged weights."""
    return KINDS.get(str(export["target"]), MERGED)


def unproven(export: Mapping[str, Any]) -> str:
    """Why the parity of an export is not proven, or an empty string where it is."""
    parity = export.get("parity")
    if not isinstance(parity, Mapping):
        return "parity was not run"
    engines = parity.get("engines")
    if not isinstance(engines, Mapping) or not all(isinstance(figures, Mapping) for figures in engines.values()):
        return "parity names no engine"
    statuses = {str(figures.get("status")) for figures in engines.values()} - {"missing"}
    if parity.get("met") is not True or statuses - {"met"}:
        return "parity was not met"
    return "" if statuses else "parity was run in no engine"


def hub_id(name: Any) -> str | None:
    """``name`` if it is an ``org/name`` of the Hub and no local path."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return None
    return None if Path(name).exists() else name


def gather(
    repo_id: str,
    exports: Mapping[str, Mapping[str, Any]],
    local: Sequence[Path],
    siblings: Mapping[str, Mapping[str, Any]],
    run: Run | None,
    reported: Iterable[str] = (),
) -> CardData:
    """The facts for the card of ``repo_id``; ``local`` are the export directories that are at hand."""
    import yaml

    recipe = run.recipe if run else None
    places = [place for path in local for place in (path, _base_path(path))]
    return CardData(
        repo_id=repo_id,
        exports=exports,
        siblings=siblings,
        base_card=_base_card(local, hub_id((next(iter(exports.values())).get("base") or {}).get("id"))),
        record=run.record if run else RunRecord(),
        recipe=public(yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}) if recipe and recipe.is_file() else {},
        chat=any(_has_template(place) for place in places),
        context=next((found for place in places if (found := _context(place))), None),
        reported=frozenset(reported),
    )


def _base_path(export: Path) -> Path:
    """The base as it lay here when ``export`` was written; an adapter is served with its template."""
    from lora2serve.artifacts import manifest

    return Path((manifest.read(export).get("base") or {}).get("path") or export)


def _base_card(local: Sequence[Path], base: str | None) -> dict[str, Any]:
    """The metadata of the base's card: from where the base lay here, else from the Hub or its cache."""
    cards = [_base_path(path) / "README.md" for path in local]
    found = next((card for card in cards if card.is_file()), None) or (_card_from_hub(base) if base else None)
    try:
        return read_metadata(found.read_text(encoding="utf-8-sig")) if found else {}
    except ValueError:  # someone else's card: what cannot be read tells nothing
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
        found = (config.get("text_config") or config).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) else None


def read_metadata(card: str) -> dict[str, Any]:
    """The YAML at the head of a model card; ValueError where it is none."""
    from huggingface_hub import ModelCard

    data: Any = ModelCard(card, ignore_metadata_errors=True).data
    return dict(data.to_dict())


def _has_template(path: Path) -> bool:
    if any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json", "template", "Modelfile")):
        return True
    config = path / "tokenizer_config.json"
    return config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
