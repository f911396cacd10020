"""Tokenizer files of a model whose soft prompt is tokens of its vocabulary: they stand in front of every prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lora2serve.errors import ExportError
from lora2serve.system import scratch
from lora2serve.system.small_files import JsonObject, read_json
from lora2serve.weights.chat_template import EXTRA, GENERATION, JINJA, TOKENIZER, chat_templates, read_settings
from lora2serve.weights.side_files import SideFiles

FAST = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
ENDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)  # that a model without a generation config takes from its config
REPLACE_PROCESSOR = ("add_bos_token", "add_eos_token")  # with one of them transformers makes another post-processor
BY_NUMBER = ("Unigram",)  # a vocabulary that is a list: a token's id is its place


def put_in_front(files: SideFiles, tokens: Sequence[str], first: int, config: JsonObject) -> None:
    """Let ``tokens``, with the ids from ``first`` on, begin every prompt, and end up in no answer.

    The chat template writes them before anything else, and so does the tokenizer before a plain text that gets special
    tokens. ``config`` is the model's. ExportError for a tokenizer that cannot hold them.
    """
    ids = list(range(first, first + len(tokens)))
    _add_to_tokenizer(files, tokens, ids, config)
    for name, template in chat_templates(files).items():
        files.write(JINJA if name == "default" else f"{EXTRA}{name}.jinja", "".join(tokens) + template)
    settings = read_settings(files, TOKENIZER)
    known = dict(settings.get("added_tokens_decoder") or {})
    marked = {str(number): _marked(token) for number, token in zip(ids, tokens, strict=True)}
    changed = {key: value for key, value in settings.items() if key not in ("chat_template", *REPLACE_PROCESSOR)}
    listed = known or SENTENCEPIECE in files  # whose readers find added tokens there alone
    files.set(TOKENIZER, {**changed, **({"added_tokens_decoder": known | marked} if listed else {})})
    text = config.get("text_config") or config
    generation = read_settings(files, GENERATION) or {key: text[key] for key in ENDS if text.get(key) is not None}
    files.set(GENERATION, {**generation, "suppress_tokens": [*(generation.get("suppress_tokens") or []), *ids]})


def _add_to_tokenizer(files: SideFiles, tokens: Sequence[str], ids: Sequence[int], config: JsonObject) -> None:
    if FAST not in files:
        raise ExportError(
            f"no {FAST}: a soft prompt becomes tokens of a tokenizer in that form only",
            "load and save the base's tokenizer with transformers: it writes one",
        )
    content = read_json(files[FAST], f"no {FAST}")
    model, added = content["model"], content.setdefault("added_tokens", [])
    taken = {token["content"] for token in added} | set(model["vocab"] if isinstance(model["vocab"], dict) else ())
    if clash := sorted(taken.intersection(tokens)):
        raise ExportError(f"{FAST}: has a token {clash[0]} already", "is there a soft prompt in this base?")
    following = 1 + max([*(token["id"] for token in added), *_own_ids(model)], default=-1)
    if following != ids[0]:  # the embedding has more rows than there are tokens: a token keeps its id in the vocabulary
        if model["type"] in BY_NUMBER:
            raise ExportError(
                f"{FAST}: {following} tokens and {ids[0]} rows of the embedding: a {model['type']} model has no gaps",
                "serve the adapter by `lora2serve serve --engine peft`",
            )
        model["vocab"] |= dict(zip(tokens, ids, strict=True))
    added += [{"id": number, **_marked(token)} for number, token in zip(ids, tokens, strict=True)]
    content["post_processor"] = _behind(_post_processor(files, config), tokens, ids)
    files.write(FAST, json.dumps(content, ensure_ascii=False, indent=2))


def _post_processor(files: SideFiles, config: JsonObject) -> JsonObject | None:
    """What puts special tokens around a text, as transformers loads it: settings may replace the file's."""
    from transformers import AutoTokenizer

    with scratch.temporary_folder("tokenizer") as folder:
        for name, path in files.items():
            if "/" not in name:
                (Path(folder) / name).symlink_to(path.resolve())
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": config.get("model_type")}))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    processor: JsonObject | None = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"]
    return processor


def _own_ids(model: JsonObject) -> Sequence[int]:
    return list(model["vocab"].values()) if isinstance(model["vocab"], dict) else range(len(model["vocab"]))


def _marked(token: str) -> dict[str, object]:
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": token, **switches, "special": True}


def _behind(processor: JsonObject | None, tokens: Sequence[str], ids: Sequence[int]) -> JsonObject:
    """The post-processor that puts the tokens before what ``processor`` makes of a text."""
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]
    special = {
        token: {"id": token, "ids": [number], "tokens": [token]} for token, number in zip(tokens, ids, strict=True)
    }
    steps = processor.get("processors", [processor]) if processor else []
    templates = [step for step in steps if step["type"] == "TemplateProcessing"]
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    own: JsonObject = templates[-1] if templates else {"single": texts[:1], "pair": texts}
    template = {
        "type": "TemplateProcessing",
        "single": [*pieces, *own["single"]],
        "pair": [*pieces, *own["pair"]],
        "special_tokens": {**own.get("special_tokens", {}), **special},
    }
    rest = [step for step in steps if step is not own]
    return {"type": "Sequence", "processors": [*rest, template]} if rest else template
