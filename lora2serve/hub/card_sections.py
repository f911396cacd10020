"""The card's sections: facts in, Markdown out, an empty string where there is nothing to tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from lora2serve import __version__
from lora2serve.console import size
from lora2serve.hub import snippets
from lora2serve.hub.card_data import ADAPTER, GGUF, GGUF_ADAPTER, MERGED, CardData, kind_of
from lora2serve.hub.card_markdown import figure, listed, number, table, yaml
from lora2serve.hub.hub_client import page
from lora2serve.hub.published_report import page_of

WHAT = {
    MERGED: "merged weights in safetensors",
    ADAPTER: "a LoRA adapter (PEFT)",
    GGUF: "GGUF files for llama.cpp, Ollama and LM Studio",
    GGUF_ADAPTER: "a LoRA adapter as GGUF",
}
MERGED_ONTO = {
    "trained": "the quantised weights that it was trained on, dequantised",
    "original": "the full-precision weights",
}
FIGURES = {
    "mean_kl": "mean KL",
    "p999_kl": "99.9 % KL",
    "top1": "same top token",
    "equal_answers": "same greedy answers",
    "retention": "adapter's signal kept",
}
ENGINES = {"vllm": "vLLM"}
WEIGHTS = (".gguf", ".safetensors")


def summary(facts: CardData) -> str:
    """What this is, whether it is proven, and the facts that a reader looks for first."""
    kinds = [kind for kind in WHAT if kind in facts.kinds]
    base = f"[{facts.base}]({page(facts.base)})" if facts.base else "a local base model"
    lines = [f"**{facts.name}**: {listed(_what(facts, kind) for kind in kinds)}, fine-tuned from {base}."]
    if facts.unproven:
        why = "; ".join(f"{name}: {reason}" for name, reason in facts.unproven.items())
        lines += [f"> [!WARNING]\n> Pushed without proof that it answers like the trained model ({why})."]
    lines.append(table(["", ""], [row for row in _glance(facts) if row[1]]))
    others = [
        f"- [{repo.rpartition('/')[2]}]({page(repo)}): {_described(about)}"
        for repo, about in facts.siblings.items()
        if repo != facts.repo_id
    ]
    if others:
        lines.append("The same model in other forms:\n\n" + "\n".join(others))
    return "\n\n".join(lines)


def _what(facts: CardData, kind: str) -> str:
    quants = [str(e["quant"]) for e in facts.exports.values() if kind_of(e) == kind and e.get("quant")]
    return f"{WHAT[kind]}, quantised to {listed(quants)}" if kind == MERGED and quants else WHAT[kind]


def _described(about: Mapping[str, Any]) -> str:
    quant = about.get("quant") if kind_of(about) == MERGED else None
    return f"merged weights, {quant}" if quant else WHAT[kind_of(about)]


def _glance(facts: CardData) -> list[list[str]]:
    """The table at the top."""
    base, lora = facts.first.get("base") or {}, (facts.recipe.get("train") or {}).get("lora") or {}
    revision = f" at `{base['revision'][:12]}`" if base.get("revision") else ""
    method = "QLoRA" if facts.record.quantization else "LoRA"
    rank = facts.rank or lora.get("rank")
    quants = list(dict.fromkeys(str(e["quant"]) for e in facts.exports.values() if e.get("quant")))
    return [
        ["base", f"[{facts.base}]({page(facts.base)}){revision}" if facts.base else ""],
        ["method", f"{method}, rank {rank}" if rank else ""],
        ["types", ", ".join(quants)],
        ["context", f"{facts.context:,} tokens" if facts.context else ""],
        ["proof", _proof(facts)],
        ["licence", str(facts.base_card.get("license_name") or facts.base_card.get("license") or "")],
    ]


def _proof(facts: CardData) -> str:
    if facts.unproven:
        return "**not proven**, see above"
    parities = [export.get("parity") or {} for export in facts.exports.values()]
    engines = dict.fromkeys(ENGINES.get(name, name) for told in parities for name in told.get("engines") or {})
    return f"answers like the trained model in {listed(engines)}: [parity](#parity)" if engines else ""


def use(facts: CardData) -> str:
    """How to run it in each engine."""
    blocks: list[tuple[str, str, str]] = []
    for kind in (kind for kind in WHAT if kind in facts.kinds):
        blocks += _snippets(facts, kind)
    text = "\n\n".join(f"**{title}**\n\n```{language}\n{code.rstrip()}\n```" for title, language, code in blocks)
    return f"## How to run it\n\n{text}" if blocks else ""


def _snippets(facts: CardData, kind: str) -> list[tuple[str, str, str]]:
    files = gguf_files(facts, kind)
    if kind == MERGED:
        quants = [e.get("quant") for e in facts.exports.values() if kind_of(e) == MERGED]
        return snippets.merged(facts.repo_id, facts.chat, quants[0])
    if kind == ADAPTER and facts.base:
        return snippets.adapter(facts.repo_id, facts.base, facts.rank or 64, facts.chat)
    if kind == GGUF and files:
        return snippets.gguf(facts.repo_id, files, facts.chat)
    if kind == GGUF_ADAPTER and files:
        return snippets.gguf_adapter(facts.repo_id, next(iter(files.values()))[0])
    return []


def gguf_files(facts: CardData, kind: str) -> dict[str, list[str]]:
    """Quantisation type -> its GGUF files, several where it is split; projectors left out."""
    found: dict[str, list[str]] = {}
    for export in facts.exports.values():
        names = [name for name in export["files"] if kind_of(export) == kind and name.endswith(".gguf")]
        names = [name for name in sorted(names) if not PurePosixPath(name).name.startswith("mmproj")]
        if names:
            found.setdefault(str(export.get("quant") or "F16"), names)
    return found


def training(facts: CardData) -> str:
    """The recipe, in figures and in full, and how the base was folded."""
    recipe, quantization, source = facts.recipe, facts.record.quantization, facts.record.data.train
    train, data = recipe.get("train") or {}, recipe.get("data") or {}
    lora = train.get("lora") or {}
    merge_base = str(facts.first.get("merge_base") or "")
    double = ", double quantisation" if quantization and quantization.double_quant else ""
    shown = [
        ["data", f"{data.get('train')}, {source.rows:,} rows" if source else str(data.get("train") or "")],
        ["base while training", f"quantised to {quantization.type}{double}" if quantization else ""],
        ["LoRA", f"rank {lora.get('rank')}, alpha {number(lora.get('alpha'))}, on {_targets(lora)}" if lora else ""],
        ["steps", _steps(facts, train)],
        ["learning rate", f"{number(train.get('learning_rate'))}, {train.get('schedule')}" if train else ""],
        ["longest row", f"{data.get('max_length')} tokens" if data.get("max_length") else ""],
        ["merged onto", MERGED_ONTO.get(merge_base, "") if facts.kinds & {MERGED, GGUF} else ""],
        ["made with", _versions(facts)],
    ]
    text = table(["", ""], [row for row in shown if row[1]])
    whole = f"\n\n<details><summary>Recipe</summary>\n\n```yaml\n{yaml(recipe)}```\n\n</details>" if recipe else ""
    return f"## Training\n\n{text}{whole}"


def _targets(lora: Mapping[str, Any]) -> str:
    targets = lora.get("targets")
    return ", ".join(map(str, targets)) if isinstance(targets, list) else str(targets)


def _steps(facts: CardData, train: Mapping[str, Any]) -> str:
    batch = train.get("batch_size")
    if not facts.record.steps or not batch:
        return ""
    return f"{facts.record.steps:,} of {int(batch) * int(train.get('accumulation') or 1)} rows"


def _versions(facts: CardData) -> str:
    versions = facts.record.versions or facts.first.get("versions") or {}
    used = [f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl") if name in versions]
    return ", ".join([f"lora2serve {__version__}", *used])


def evaluation(facts: CardData) -> str:
    """Held-out loss and perplexity before and after."""
    metrics = facts.record.metrics.measured()
    titles = {"base": "before: the base", "tuned": "after, as trained", "tuned_on_original": "after, on the full base"}
    rows = [
        [title, number(metrics[key].eval_loss), number(metrics[key].perplexity)]
        for key, title in titles.items()
        if key in metrics
    ]
    if not rows:
        return ""
    source, tuned = facts.record.data.eval, metrics.get("tuned")
    said = f"{source.rows:,} held-out rows" if source and source.rows else "Held-out rows"
    said += f", {tuned.tokens:,} tokens with a loss." if tuned and tuned.tokens else "."
    return f"## Evaluation\n\n{said}\n\n" + table(["", "loss", "perplexity"], rows)


def parity(facts: CardData) -> str:
    """The parity table: what each export was measured at, and where the whole report is."""
    rows: list[list[str]] = []
    seen: set[tuple[str, ...]] = set()  # the same weights in the same engine: an Ollama and an LM Studio export, say
    for name, export in facts.exports.items():
        told = export.get("parity")
        weights = sorted(file for file in export["files"] if file.endswith(WEIGHTS))
        engines = told.get("engines") if isinstance(told, Mapping) else None
        report = f"[report]({page_of(name)})" if name in facts.reported else ""
        for engine, figures in (engines or {}).items():
            shown = [figure(key, figures.get(key)) for key in FIGURES]
            met = {"met": "met", "missing": "not asked"}.get(str(figures.get("status")), "**not met**")
            if (key := (*weights, engine, *shown, met)) not in seen:
                rows.append([name, ENGINES.get(engine, engine), *shown, met, report])
            seen.add(key)
    if not rows:
        return ""
    heads = ["export", "engine", *FIGURES.values(), "", ""]
    filled = [n for n in range(len(heads)) if n in (0, 1) or any(row[n] for row in rows)]
    text = table([heads[n] for n in filled], [[row[n] for n in filled] for row in rows])
    return (
        "## Parity\n\nIs this what was trained? The same token ids went through the trained model and through each "
        f"export in its own engine, and their next-token distributions were compared.\n\n{text}\n\n"
        "`mean KL` is the divergence from the trained model in nats (0 is equal), `adapter's signal kept` how much of "
        "what the fine-tune changed is still there. To verify every file and this table: "
        f"`lora2serve pull-check {facts.repo_id}`."
    )


def files(facts: CardData) -> str:
    """What lies here, with sizes and types: the weights first."""
    rows: dict[str, list[str]] = {}
    for export in facts.exports.values():
        kind = str(export.get("quant") or export.get("dtype") or ("LoRA" if kind_of(export) == ADAPTER else ""))
        for name, entry in export["files"].items():
            weights = name.endswith(WEIGHTS)
            rows.setdefault(name, [f"`{name}`", size(int(entry["size"])), kind if weights else ""])
    ordered = sorted(rows, key=lambda name: (not name.endswith(WEIGHTS), name))
    return "## Files\n\n" + table(["file", "size", "type"], [rows[name] for name in ordered])


def limits(facts: CardData) -> str:
    """What was not looked at, and what does not work."""
    lines = ["- It inherits the limits, the licence and the acceptable use of its base."]
    if facts.record.metrics.measured():
        lines.append("- It was evaluated on held-out rows of its own training data, not on benchmarks or for safety.")
    lines.append("- Parity says that it answers like the trained model, not that the trained model is right.")
    small = sorted(
        str(e["quant"])
        for e in facts.exports.values()
        if str(e.get("quant") or "").startswith(("Q2", "Q3", "IQ1", "IQ2", "IQ3"))
    )
    if small:
        lines.append(f"- {listed(small)}: so few bits change the answers visibly; prefer Q4_K_M or larger.")
    if any(len(names) > 1 for names in gguf_files(facts, GGUF).values()):
        lines.append("- Ollama does not pull split files: types in several files are for llama.cpp and LM Studio.")
    templates = [export.get("template") for export in facts.exports.values()]
    needs = next((t["requires"] for t in templates if isinstance(t, Mapping) and t.get("requires")), None)
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
