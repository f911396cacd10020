"""The facts a model card tells, gathered from manifests, the run's record and its recipe; no words here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora2serve.hub.collect import public
from lora2serve.run import Run

MERGED, ADAPTER, GGUF, GGUF_ADAPTER = "merged", "adapter", "gguf", "gguf-adapter"
KINDS = {
    "vllm": MERGED,
    "adapter": ADAPTER,
    "gguf": GGUF,
    "ollama": GGUF,
    "lmstudio": GGUF,
    "gguf-adapter": GGUF_ADAPTER,
}


@dataclass(frozen=True)
class Facts:
    """Everything that the card of one repository is made of. ``exports`` are public manifests, by name."""

    repo_id: str
    exports: Mapping[str, Mapping[str, Any]]
    siblings: Mapping[str, str]  # kind -> repository of the same push
    base_card: Mapping[str, Any] = field(default_factory=dict)  # the metadata of the base's own card
    record: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False

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
    return "" if parity.get("met") is True else "parity was not met"


def hub_id(name: Any) -> str | None:
    """``name`` if it is an ``org/name`` of the Hub and no local path."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return None
    return None if Path(name).exists() else name


def gather(
    repo_id: str,
    exports: Mapping[str, Mapping[str, Any]],
    local: Sequence[Path],
    siblings: Mapping[str, str],
    run: Run | None,
) -> Facts:
    """The facts for the card of ``repo_id``; ``local`` are the export directories that are at hand."""
    import yaml

    recipe = run.recipe if run else None
    return Facts(
        repo_id=repo_id,
        exports=exports,
        siblings=siblings,
        base_card=_base_card(local),
        record=run.record if run else {},
        recipe=public(yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}) if recipe and recipe.is_file() else {},
        chat=any(_has_template(place) for path in local for place in (path, _base_path(path))),
    )


def _base_path(export: Path) -> Path:
    """The base as it lay here when ``export`` was written; an adapter is served with its template."""
    from lora2serve import manifest

    return Path((manifest.read(export).get("base") or {}).get("path") or export)


def _base_card(local: Sequence[Path]) -> dict[str, Any]:
    for path in local:
        readme = _base_path(path) / "README.md"
        if readme.is_file():
            try:
                return read_metadata(readme.read_text(encoding="utf-8-sig"))
            except ValueError:  # someone else's card: what cannot be read tells nothing
                continue
    return {}


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
