"""The tokens whose rows an adapter trains, by the tokenizers that lie beside it and beside its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora2serve.adapters.adapter import read_config
from lora2serve.errors import AdapterError
from lora2serve.system.small_files import read_json

FILE = "tokenizer.json"


def trained_tokens(adapter: Path) -> dict[int, str]:
    """What ``trainable_token_indices`` names, id -> text, as far as the adapter's own tokenizer has it."""
    indices = read_config(adapter).get("trainable_token_indices") or []
    lists = list(indices.values()) if isinstance(indices, Mapping) else [indices]
    own = _texts(adapter)
    return {number: own[number] for numbers in lists for number in numbers if number in own}


def refuse_new_tokens(adapter: Path, base: Path, targets: Sequence[str]) -> None:
    """AdapterError for targets beside the base, of an adapter that trains tokens which the base does not have."""
    known = _texts(base)
    new = [text for number, text in trained_tokens(adapter).items() if known.get(number) != text]
    if new and targets:
        more = f" and {len(new) - 3} more" if len(new) > 3 else ""
        raise AdapterError(
            f"{adapter}: trained with new tokens ({', '.join(new[:3])}{more}), and {', '.join(targets)} has no "
            "tokenizer: that of the base, which a server reads beside it, splits them",
            "--target vllm, gguf, ollama or lmstudio holds them in the model",
        )


def _texts(folder: Path) -> dict[int, str]:
    """All tokens of a directory's tokenizer.json, by their ids; none where there is no such file."""
    if not (folder / FILE).is_file():
        return {}
    content = read_json(folder / FILE, f"no {FILE}")
    pieces = (content.get("model") or {}).get("vocab") or {}
    texts = {number: text for text, number in pieces.items()} if isinstance(pieces, Mapping) else {}
    return texts | {int(token["id"]): str(token["content"]) for token in content.get("added_tokens") or []}
