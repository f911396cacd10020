"""The card's sections: facts in, Markdown out, an empty string where there is nothing to tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from lora2serve import __version__
from lora2serve.console import size
from lora2serve.hub import snippets
from lora2serve.hub.client import page
from lora2serve.hub.facts import ADAPTER, GGUF, GGUF_ADAPTER, MERGED, Facts, kind_of

WHAT = {
    MERGED: "merged weights in safetensors",
    ADAPTER: "a LoRA adapter (PEFT)",
    GGUF: "GGUF files for llama.cpp, Ollama and LM Studio",
    GGUF_ADAPTER: "a LoRA adapter as GGUF",
}


def summary(facts: Facts) -> str:
    """What this is, what it was made from, and whether it is proven."""
    kinds = [kind for kind in WHAT if kind in facts.kinds]
    base = f"[{facts.base}]({page(facts.base)})" if facts.base else "a local base model"
    lines = [f"{facts.name}: {_and(WHAT[kind] for kind in kinds)}, fine-tuned from {base}."]
    others = {kind: repo for kind, repo in facts.siblings.items() if repo != facts.repo_id}
    if others:
        lines += [
            "",
            "The same model: " + ", ".join(f"[{WHAT[k]}]({page(r)})" for k, r in others.items()) + ".",
        ]
    if facts.unproven:
        why = "; ".join(f"{name}: {reason}" for name, reason in facts.unproven.items())
        lines += ["", f"> [!WARNING]\n> Pushed without proof that it answers like the trained model ({why})."]
    return "\n".join(lines)


def use(facts: Facts) -> str:
    """How to run it in each engine."""
    blocks: list[tuple[str, str, str]] = []
    for kind in (kind for kind in WHAT if kind in facts.kinds):
        blocks += _snippets(facts, kind)
    text = "\n\n".join(f"**{title}**\n\n```{language}\n{code.rstrip()}\n```" for title, language, code in blocks)
    return f"## How to run it\n\n{text}" if blocks else ""


def _snippets(facts: Facts, kind: str) -> list[tuple[str, str, str]]:
    files = gguf_files(facts, kind)
    if kind == MERGED:
        return snippets.merged(facts.repo_id, facts.chat)
    if kind == ADAPTER and facts.base:
        rank = next((e["rank"] for e in facts.exports.values() if isinstance(e.get("rank"), int)), 64)
        return snippets.adapter(facts.repo_id, facts.base, rank, facts.chat)
    if kind == GGUF and files:
        return snippets.gguf(facts.repo_id, files, facts.chat)
    if kind == GGUF_ADAPTER and files:
        return snippets.gguf_adapter(facts.repo_id, next(iter(files.values())))
    return []


def gguf_files(facts: Facts, kind: str) -> dict[str, str]:
    """Quantisation type -> its (first) GGUF file, projectors left out."""
    found: dict[str, str] = {}
    for export in facts.exports.values():
        for name in export["files"] if kind_of(export) == kind else ():
            if name.endswith(".gguf") and not PurePosixPath(name).name.startswith("mmproj"):
                found.setdefault(str(export.get("quant") or "F16"), name)
    return found


def training(facts: Facts) -> str:
    """The recipe and how the base was folded."""
    lines = []
    if facts.record.get("quantization"):
        lines.append(f"- trained on a base quantised to {facts.record['quantization'].get('type')} (QLoRA)")
    merge_base = facts.first.get("merge_base")
    if merge_base and facts.kinds & {MERGED, GGUF}:
        weights = {"trained": "the quantised weights that it was trained on", "original": "the full-precision weights"}
        lines.append(f"- merged onto {weights.get(str(merge_base), merge_base)}, in float32, rounded once")
    base = facts.first.get("base") or {}
    if base.get("revision"):
        lines.append(f"- base revision `{base['revision']}`")
    versions = facts.first.get("versions") or {}
    used = [f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl") if name in versions]
    lines.append(f"- made with lora2serve {__version__}" + (f", {', '.join(used)}" if used else ""))
    recipe = (
        f"\n\n<details><summary>Recipe</summary>\n\n```yaml\n{_yaml(facts.recipe)}```\n\n</details>"
        if facts.recipe
        else ""
    )
    return "## Training\n\n" + "\n".join(lines) + recipe


def evaluation(facts: Facts) -> str:
    """Held-out loss and perplexity before and after."""
    metrics = facts.record.get("metrics") or {}
    titles = {"base": "base", "tuned": "tuned, as trained", "tuned_on_original": "tuned, on the full-precision base"}
    rows = [
        [title, _number(metrics[key].get("eval_loss")), _number(metrics[key].get("perplexity"))]
        for key, title in titles.items()
        if isinstance(metrics.get(key), Mapping)
    ]
    if not rows:
        return ""
    return "## Evaluation\n\nOn held-out rows of the training set.\n\n" + _table(["model", "loss", "perplexity"], rows)


def parity(facts: Facts) -> str:
    """The parity table: what each export was measured at."""
    rows = []
    for name, export in facts.exports.items():
        told = export.get("parity")
        engines = told.get("engines") if isinstance(told, Mapping) else None
        for engine, figures in (engines or {}).items():
            shown = [_number(figures.get(key)) for key in ("mean_kl", "p999_kl", "top1", "equal_answers")]
            rows.append([name, engine, *shown, "yes" if figures.get("status") == "met" else "**no**"])
    if not rows:
        return ""
    text = "## Parity\n\nThe same token ids, scored by the trained model and by each export in its own engine.\n\n"
    return text + _table(["export", "engine", "mean KL", "p99.9 KL", "same top token", "same greedy text", "met"], rows)


def files(facts: Facts) -> str:
    """What lies here, with sizes and types."""
    rows = []
    for export in facts.exports.values():
        kind = str(export.get("quant") or export.get("dtype") or "")
        for name, entry in export["files"].items():
            weights = name.endswith((".gguf", ".safetensors"))
            rows.append([f"`{name}`", size(int(entry["size"])), kind if weights else ""])
    rows = [row for number, row in enumerate(rows) if row not in rows[:number]]
    return "## Files\n\n" + _table(["file", "size", "type"], rows)


def limits(facts: Facts) -> str:
    """What was not looked at."""
    lines = ["- It inherits the limits, the licence and the acceptable use of its base."]
    if facts.record.get("metrics"):
        lines.append(
            "- It was evaluated on held-out rows of its own training data only, not on benchmarks or for safety."
        )
    small = sorted(
        str(e["quant"])
        for e in facts.exports.values()
        if str(e.get("quant") or "").startswith(("Q2", "Q3", "IQ1", "IQ2", "IQ3"))
    )
    if small:
        lines.append(f"- {_and(small)}: so few bits change the answers visibly; prefer Q4_K_M or larger.")
    return "## Limits\n\n" + "\n".join(lines)


ALL: dict[str, Callable[[Facts], str]] = {
    "summary": summary,
    "use": use,
    "training": training,
    "evaluation": evaluation,
    "parity": parity,
    "files": files,
    "limits": limits,
}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _yaml(data: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True))


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:.4g}"


def _and(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
