"""The card's sections: a CardData in, Markdown out, an empty string where there is nothing to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from lora2serve import __version__
from lora2serve.artifacts.manifest import Manifest
from lora2serve.artifacts.metric_table import figure, head, info
from lora2serve.console import size
from lora2serve.hub import snippets
from lora2serve.hub.card_data import ADAPTER, GGUF, GGUF_ADAPTER, MERGED, CardData, kind_of
from lora2serve.hub.card_markdown import listed, number, table, yaml
from lora2serve.hub.hub_client import page
from lora2serve.hub.published_report import page_of

WHAT = {
    MERGED: "merged weights in safetensors",
    ADAPTER: "a LoRA adapter (PEFT)",
    GGUF: "GGUF files for llama.cpp, Ollama and LM Studio",
    GGUF_ADAPTER: "a LoRA adapter as GGUF",
}
MERGED_ONTO = {
    "trained": "the quantized weights that it was trained on, dequantized",
    "original": "the full-precision weights",
}
FIGURES = ("mean_kl", "p999_kl", "top1", "equal_answers", "retention")
ENGINES = {"vllm": "vLLM"}
WEIGHTS = (".gguf", ".safetensors")


def summary(card: CardData) -> str:
    """What this is, whether it is proven, and the facts that a reader looks for first."""
    kinds = [kind for kind in WHAT if kind in card.kinds]
    base = f"[{card.base}]({page(card.base)})" if card.base else "a local base model"
    lines = [f"**{card.name}**: {listed(_what(card, kind) for kind in kinds)}, fine-tuned from {base}."]
    if card.unproven:
        why = "; ".join(f"{name}: {reason}" for name, reason in card.unproven.items())
        lines += [f"> [!WARNING]\n> Pushed without proof that it answers like the trained model ({why})."]
    lines.append(table(["", ""], [row for row in _glance(card) if row[1]]))
    others = [
        f"- [{repo.rpartition('/')[2]}]({page(repo)}): {_described(manifest)}"
        for repo, manifest in card.siblings.items()
        if repo != card.repo_id
    ]
    if others:
        lines.append("The same model in other forms:\n\n" + "\n".join(others))
    return "\n\n".join(lines)


def _what(card: CardData, kind: str) -> str:
    quants = [export.quant for export in card.exports.values() if kind_of(export) == kind and export.quant]
    return f"{WHAT[kind]}, quantized to {listed(quants)}" if kind == MERGED and quants else WHAT[kind]


def _described(manifest: Manifest) -> str:
    quant = manifest.quant if kind_of(manifest) == MERGED else None
    return f"merged weights, {quant}" if quant else WHAT[kind_of(manifest)]


def _glance(card: CardData) -> list[list[str]]:
    """The table at the top."""
    commit, lora = card.first.base.revision, (card.recipe.get("train") or {}).get("lora") or {}
    revision = f" at `{commit[:12]}`" if commit else ""
    method = "QLoRA" if card.record.quantization else "LoRA"
    rank = card.rank or lora.get("rank")
    quants = list(dict.fromkeys(export.quant for export in card.exports.values() if export.quant))
    return [
        ["base", f"[{card.base}]({page(card.base)}){revision}" if card.base else ""],
        ["method", f"{method}, rank {rank}" if rank else ""],
        ["types", ", ".join(quants)],
        ["context", f"{card.context:,} tokens" if card.context else ""],
        ["proof", _proof(card)],
        ["license", str(card.base_card.get("license_name") or card.base_card.get("license") or "")],
    ]


def _proof(card: CardData) -> str:
    if card.unproven:
        return "**not proven**, see above"
    verdicts = [export.parity for export in card.exports.values() if export.parity]
    engines = dict.fromkeys(ENGINES.get(name, name) for verdict in verdicts for name in verdict.engines)
    return f"answers like the trained model in {listed(engines)}: [parity](#parity)" if engines else ""


def use(card: CardData) -> str:
    """How to run it in each engine."""
    blocks: list[tuple[str, str, str]] = []
    for kind in (kind for kind in WHAT if kind in card.kinds):
        blocks += _snippets(card, kind)
    text = "\n\n".join(f"**{title}**\n\n```{language}\n{code.rstrip()}\n```" for title, language, code in blocks)
    return f"## How to run it\n\n{text}" if blocks else ""


def _snippets(card: CardData, kind: str) -> list[tuple[str, str, str]]:
    files = gguf_files(card, kind)
    if kind == MERGED:
        quants = [export.quant for export in card.exports.values() if kind_of(export) == MERGED]
        return snippets.merged(card.repo_id, card.chat, quants[0])
    if kind == ADAPTER and card.base:
        return snippets.adapter(card.repo_id, card.base, card.rank or 64, card.chat)
    if kind == GGUF and files:
        return snippets.gguf(card.repo_id, files, card.chat)
    if kind == GGUF_ADAPTER and files:
        return snippets.gguf_adapter(card.repo_id, next(iter(files.values()))[0])
    return []


def gguf_files(card: CardData, kind: str) -> dict[str, list[str]]:
    """Quantization type -> its GGUF files, several where it is split; projectors left out."""
    types: dict[str, list[str]] = {}
    for export in card.exports.values():
        names = [name for name in export.files if kind_of(export) == kind and name.endswith(".gguf")]
        names = [name for name in sorted(names) if not PurePosixPath(name).name.startswith("mmproj")]
        if names:
            types.setdefault(export.quant or "F16", names)
    return types


def _names(train: object) -> str:
    """The data sets of a recipe in a line."""
    items = train if isinstance(train, list) else [train] if train else []
    return " + ".join(str(item.get("path")) if isinstance(item, dict) else str(item) for item in items)


def training(card: CardData) -> str:
    """The recipe, in figures and in full, and how the base was folded."""
    recipe, quantization, source = card.recipe, card.record.quantization, card.record.data.train
    train, data = recipe.get("train") or {}, recipe.get("data") or {}
    lora = train.get("lora") or {}
    merge_base = card.first.merge_base or ""
    double = ", double quantization" if quantization and quantization.double_quant else ""
    shown = [
        ["data", f"{_names(data.get('train'))}, {source.rows:,} rows" if source else _names(data.get("train"))],
        ["base while training", f"quantized to {quantization.type}{double}" if quantization else ""],
        ["LoRA", f"rank {lora.get('rank')}, alpha {number(lora.get('alpha'))}, on {_targets(lora)}" if lora else ""],
        ["objective", _objective(train)],
        ["steps", _steps(card, train)],
        ["learning rate", f"{number(train.get('learning_rate'))}, {train.get('schedule')}" if train else ""],
        ["longest row", f"{data.get('max_length')} tokens" if data.get("max_length") else ""],
        ["merged onto", MERGED_ONTO.get(merge_base, "") if card.kinds & {MERGED, GGUF} else ""],
        ["made with", _versions(card)],
    ]
    text = table(["", ""], [row for row in shown if row[1]])
    whole = f"\n\n<details><summary>Recipe</summary>\n\n```yaml\n{yaml(recipe)}```\n\n</details>" if recipe else ""
    return f"## Training\n\n{text}{whole}"


def _targets(lora: Mapping[str, Any]) -> str:
    targets = lora.get("targets")
    return ", ".join(map(str, targets)) if isinstance(targets, list) else str(targets)


def _objective(train: Mapping[str, object]) -> str:
    """Where it is another one than to give the answers of the rows."""
    objective, preference = str(train.get("objective") or "sft"), train.get("preference")
    if objective == "sft":
        return ""
    chosen = preference if isinstance(preference, dict) else {}
    options = ", ".join(f"{name} {value}" for name, value in chosen.items())
    return f"{objective.upper()}{f' ({options})' if options else ''}, with the base as its reference"


def _steps(card: CardData, train: Mapping[str, Any]) -> str:
    batch = train.get("batch_size")
    if not card.record.steps or not batch:
        return ""
    return f"{card.record.steps:,} of {int(batch) * int(train.get('accumulation') or 1)} rows"


def _versions(card: CardData) -> str:
    versions = card.record.versions or card.first.versions
    used = [f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl") if name in versions]
    return ", ".join([f"lora2serve {__version__}", *used])


def evaluation(card: CardData) -> str:
    """Held-out loss and perplexity before and after."""
    metrics = card.record.metrics.measured()
    titles = {"base": "before: the base", "tuned": "after, as trained", "tuned_on_original": "after, on the full base"}
    rows = [
        [title, number(metrics[key].eval_loss), number(metrics[key].perplexity)]
        for key, title in titles.items()
        if key in metrics
    ]
    if not rows:
        return ""
    source, tuned = card.record.data.eval, metrics.get("tuned")
    scored = f"{source.rows:,} held-out rows" if source and source.rows else "Held-out rows"
    scored += f", {tuned.tokens:,} tokens with a loss." if tuned and tuned.tokens else "."
    if found := card.record.metrics.preference:
        scored += f" Of preferences: {found.in_words()}. Loss and perplexity are of the answers that are right."
    return f"## Evaluation\n\n{scored}\n\n" + table(["", "loss", "perplexity"], rows)


def parity(card: CardData) -> str:
    """The parity table: what each export was measured at, and where the whole report is."""
    rows: list[list[str]] = []
    seen: set[tuple[str, ...]] = set()  # the same weights in the same engine: an Ollama and an LM Studio export, say
    for name, export in card.exports.items():
        weights = sorted(file for file in export.files if file.endswith(WEIGHTS))
        report = f"[report]({page_of(name)})" if name in card.reported else ""
        for engine, verdict in (export.parity.engines if export.parity else {}).items():
            shown = [figure(key, verdict.figures.get(key), 4) for key in FIGURES]
            met = {"met": "met", "missing": "not run"}.get(verdict.status, "**not met**")
            if (key := (*weights, engine, *shown, met)) not in seen:
                rows.append([name, ENGINES.get(engine, engine), *shown, met, report])
            seen.add(key)
    if not rows:
        return ""
    heads = ["Export", "Engine", *map(head, FIGURES), "", ""]
    filled = [n for n in range(len(heads)) if n in (0, 1) or any(row[n] for row in rows)]
    text = table([heads[n] for n in filled], [[row[n] for n in filled] for row in rows])
    explained = [key for key in ("mean_kl", "retention") if head(key) in (heads[n] for n in filled)]
    meanings = " ".join(f"*{head(key)}*: {info(key).meaning[:1].lower()}{info(key).meaning[1:]}" for key in explained)
    shipped = "".join(f"\n\n{line}" for line in _to_ship(card))
    return (
        "## Parity\n\nIs this what was trained? The same token ids went through the trained model and through each "
        f"export in its own engine, and their next-token distributions were compared.\n\n{text}{shipped}\n\n"
        f"{meanings} To verify every file and this table: `lora2serve verify {card.repo_id}`."
    )


def _to_ship(card: CardData) -> list[str]:
    """The smallest type of each kind that meets its bounds, where there are several to choose from."""
    proven: dict[str, dict[str, int]] = {}
    for export in card.exports.values():
        if not export.is_adapter and not export.unproven():
            sizes = proven.setdefault(kind_of(export), {})
            sizes[export.quant or export.dtype or "unquantized"] = export.bytes
    return [
        f"To ship of the {WHAT[kind]}: **{(best := min(sizes, key=lambda name: sizes[name]))}** ({size(sizes[best])}), "
        f"the smallest of the {len(sizes)} types that meet their bounds."
        for kind, sizes in proven.items()
        if len(sizes) > 1
    ]


def files(card: CardData) -> str:
    """The files with their sizes and types, the weights first."""
    rows: dict[str, list[str]] = {}
    for export in card.exports.values():
        kind = export.quant or export.dtype or ("LoRA" if kind_of(export) == ADAPTER else "")
        for name, entry in export.files.items():
            weights = name.endswith(WEIGHTS)
            rows.setdefault(name, [f"`{name}`", size(entry.size), kind if weights else ""])
    ordered = sorted(rows, key=lambda name: (not name.endswith(WEIGHTS), name))
    return "## Files\n\n" + table(["file", "size", "type"], [rows[name] for name in ordered])


def limits(card: CardData) -> str:
    """What was not looked at, and what does not work."""
    lines = ["- It inherits the limits, the license and the acceptable use of its base."]
    if card.record.metrics.measured():
        lines.append("- It was evaluated on held-out rows of its own training data, not on benchmarks or for safety.")
    lines.append("- Parity says that it answers like the trained model, not that the trained model is right.")
    quants = [export.quant or "" for export in card.exports.values()]
    small = sorted(quant for quant in quants if quant.startswith(("Q2", "Q3", "IQ1", "IQ2", "IQ3")))
    if small:
        lines.append(f"- {listed(small)}: so few bits change the answers visibly; prefer Q4_K_M or larger.")
    if any(len(names) > 1 for names in gguf_files(card, GGUF).values()):
        lines.append("- Ollama does not pull split files: types in several files are for llama.cpp and LM Studio.")
    templates = [export.template for export in card.exports.values()]
    needs = next((template.requires for template in templates if template and template.requires), None)
    if needs:
        lines.append(f"- Its chat template has no equal in Ollama's own language: it needs Ollama {needs} or newer.")
    return "## Limits\n\n" + "\n".join(lines)


ALL: dict[str, Callable[[CardData], str]] = {
    "summary": summary,
    "use": use,
    "training": training,
    "evaluation": evaluation,
    "parity": parity,
    "files": files,
    "limits": limits,
}
