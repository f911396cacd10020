"""The model card: metadata by huggingface_hub's own classes, and sections between marks.

A card that was edited is kept: of its text only what stands between our marks is rewritten, a section whose marks
were taken out stays out, and metadata that is there stays, apart from what ties the repository to its base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora2serve.data.readers import SUFFIXES
from lora2serve.hub import card_sections
from lora2serve.hub.card_data import ADAPTER, GGUF, GGUF_ADAPTER, MERGED, CardData, hub_id, kind_of, read_metadata
from lora2serve.hub.hub_client import page

MARK = re.compile(r"<!-- lora2serve:(?P<name>[a-z-]+) -->\n.*?<!-- /lora2serve:(?P=name) -->", re.DOTALL)
FOLLOWS = ("base_model", "base_model_relation")  # what ties the repository to its base follows every push
HELD_OUT = "held-out rows of the training set"
LIBRARY = {MERGED: "transformers", ADAPTER: "peft", GGUF: "gguf", GGUF_ADAPTER: "gguf"}


def write(card: CardData, existing: str | None) -> str:
    """The text of README.md; ``existing`` is the card that is there, if any."""
    from huggingface_hub import ModelCard

    # Marks stand around empty sections too: what is measured later finds its place, what was taken out stays out.
    parts = {name: make(card).strip() for name, make in card_sections.ALL.items()}
    ours = metadata(card)
    if existing is None:
        body = f"# {card.repo_id.split('/')[-1]}\n\n" + "\n\n".join(_marked(name, text) for name, text in parts.items())
        return f"---\n{_yaml(ours)}---\n\n{body}\n"
    text = str(ModelCard(existing, ignore_metadata_errors=True).text)
    before = read_metadata(existing)
    merged = _merge(before, ours)
    head = existing[: len(existing) - len(text)]
    if merged != before or not head.strip():
        head = f"---\n{_yaml(merged)}---\n"
    return head + rewrite(text, parts)


def rewrite(text: str, parts: Mapping[str, str]) -> str:
    """``text`` with our sections renewed; all of them at its end where it has none."""
    marked = {match["name"] for match in MARK.finditer(text)}
    if not marked:
        return text.rstrip() + "\n\n" + "\n\n".join(_marked(name, part) for name, part in parts.items()) + "\n"
    return MARK.sub(lambda match: _marked(match["name"], parts.get(match["name"], "")), text)


def metadata(card: CardData) -> dict[str, Any]:
    """The card's YAML as the Hub expects it, for what the repository holds."""
    from huggingface_hub import ModelCardData

    kind = next(kind for kind in (MERGED, GGUF, ADAPTER, GGUF_ADAPTER) if kind in card.kinds)
    base, relation = _base(card, kind)
    results = _eval_results(card)
    fields: dict[str, Any] = {
        **{key: card.base_card.get(key) for key in ("license", "license_name", "language")},
        "license_link": _license_link(card),
        "base_model": base,
        "datasets": _datasets(card) or None,
        "library_name": LIBRARY[kind],
        "pipeline_tag": _task(card, kind),
        "tags": _tags(card, kind, base),
        "base_model_relation": relation if base else None,
        "eval_results": results or None,
        "model_name": card.name if results else None,
    }
    data: Any = ModelCardData(**fields)
    return dict(data.to_dict())


def _task(card: CardData, kind: str) -> str:
    """What the base is for; GGUF files look at pictures only with their projector beside them."""
    seen = any("mmproj" in name for export in card.exports.values() for name in export.files)
    pictures = card.base_card.get("pipeline_tag") == "image-text-to-text" and (kind != GGUF or seen)
    return "image-text-to-text" if pictures else "text-generation"


def _license_link(card: CardData) -> str | None:
    """The base's link to its license: a file beside its card is meant relative to the base, unless it came along."""
    link = card.base_card.get("license_link")
    if not isinstance(link, str) or "://" in link or any(link in export.files for export in card.exports.values()):
        return link if isinstance(link, str) else None
    return f"{page(card.base)}/blob/main/{link}" if card.base else None


def _base(card: CardData, kind: str) -> tuple[str | None, str]:
    """The repository this one derives from, and how: quantized files come from the merged model if pushed."""
    if kind in (ADAPTER, GGUF_ADAPTER):
        return card.base, "adapter"
    quantized = kind == GGUF or all(export.quant for export in card.exports.values())
    siblings = card.siblings.items()
    merged = next((repo for repo, export in siblings if kind_of(export) == MERGED and not export.quant), card.repo_id)
    return (merged, "quantized") if quantized and merged != card.repo_id else (card.base, "finetune")


def _tags(card: CardData, kind: str, base: str | None) -> list[str]:
    tags = ["lora2serve"]
    if kind in (ADAPTER, GGUF_ADAPTER):
        tags += ["lora", *([f"base_model:adapter:{base}"] if base else [])]
    if kind == MERGED:
        tags += ["text-generation-inference"]
    if kind in (MERGED, ADAPTER):
        tags += ["transformers", "vllm"]
    if card.kinds & {GGUF, GGUF_ADAPTER}:
        tags += ["gguf", "llama.cpp", "ollama"]
    if card.record.quantization:
        tags += ["qlora"]
    return tags + (["conversational"] if card.chat else [])


def _datasets(card: CardData) -> list[str]:
    """Training sets that are on the Hub; the recipe may name them anywhere under ``data``."""
    data = card.recipe.get("data")
    named = data.values() if isinstance(data, Mapping) else [data]
    flat = [inner for value in named for inner in (value if isinstance(value, list) else [value])]
    paths = [value.get("path") if isinstance(value, Mapping) else value for value in flat]
    # ``data/train.jsonl`` would pass for an id
    names = [path.partition("@")[0] for path in paths if isinstance(path, str) and not path.endswith(SUFFIXES)]
    return [name for name in names if hub_id(name)]


def _eval_results(card: CardData) -> list[Any]:
    """The held-out loss after training, as model-index: ``.eval_results`` is for the Hub's benchmark sets only."""
    from huggingface_hub import EvalResult

    tuned = card.record.metrics.tuned
    if not tuned:
        return []
    figures = [("loss", "Held-out loss", tuned.eval_loss), ("perplexity", "Held-out perplexity", tuned.perplexity)]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=(_datasets(card) or ["private"])[0],
            dataset_name=HELD_OUT,
            metric_type=kind,
            metric_name=title,
            metric_value=round(value, 4),
        )
        for kind, title, value in figures
    ]


def _merge(before: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that is there, with ours where it has none, and ours where it must follow the push."""
    merged = {**before, **{key: value for key, value in ours.items() if key not in before or key in FOLLOWS}}
    tags = before.get("tags") or []
    merged["tags"] = list(dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *ours["tags"]]))
    index = [_without_ours(entry) for entry in before.get("model-index") or []]
    if index and any(entry["results"] for entry in index):
        results = (ours.get("model-index") or [{"results": []}])[0]["results"]
        merged["model-index"] = [{**index[0], "results": [*index[0]["results"], *results]}, *index[1:]]
    elif "model-index" in ours:
        merged["model-index"] = ours["model-index"]
    return merged


def _without_ours(entry: Mapping[str, Any]) -> dict[str, Any]:
    theirs = [result for result in entry["results"] if result["dataset"]["name"] != HELD_OUT]
    return {**entry, "results": theirs}


def _yaml(data: Mapping[str, Any]) -> str:
    from huggingface_hub import CardData

    return CardData(**data).to_yaml() + "\n"


def _marked(name: str, text: str) -> str:
    return f"<!-- lora2serve:{name} -->\n{text}\n<!-- /lora2serve:{name} -->"
