"""The tokenizer's part of a GGUF file: tokens, types, merges, special ids, pre-tokenizer name, chat template.

The pre-tokenizer's name follows from its rules (pretokenizer.py), which survive fine-tuning; upstream recognizes it by
a hash of token ids, which does not survive an added token. Then it is proven: tokenizer_check.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

from converters.gguf import header
from converters.gguf.header import GgufValue
from converters.gguf.native.architectures import Architecture
from converters.gguf.native.pretokenizer import pre_tokenizer
from converters.gguf.tokenizer_files import (
    AddedToken,
    TokenizerJson,
    added_tokens,
    read_tokenizer_json,
    space_scheme,
    tokenizer_directory,
)
from lora2serve.data.tokenizer import looks_special
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class TokenType(IntEnum):
    """llama.cpp's ``llama_token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocab:
    """``tokens``: text (BPE, byte-level) or UTF-8 bytes (SentencePiece); all lists have the embedding's length."""

    model: str  # gpt2 or llama
    tokens: Sequence[str] | Sequence[bytes]
    types: Sequence[int]
    scores: Sequence[float] = ()
    pre: str | None = None
    extra: Mapping[str, GgufValue] = field(default_factory=dict)


def tokenizer_keys(model: ExportModel, vocab: Vocab, chat_template: str | None) -> dict[str, header.TypedValue]:
    """``tokenizer.*``: the vocabulary, and what gguf's own reader finds in the tokenizer's files."""
    from gguf import GGUFWriter, SpecialVocab

    writer = GGUFWriter(None, "")  # it collects the keys; nothing is written
    writer.kv_data[0].clear()
    writer.add_tokenizer_model(vocab.model)
    if vocab.pre:
        writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    if vocab.scores:
        writer.add_token_scores(vocab.scores)
    writer.add_token_types(vocab.types)
    with tokenizer_directory(model) as folder:
        special = SpecialVocab(folder, load_merges=vocab.model == "gpt2", n_vocab=len(vocab.tokens))
    if chat_template is not None:
        special.chat_template = chat_template
    first = {**header.collected(writer), **header.typed(vocab.extra)}
    writer.kv_data[0].clear()
    special.add_to_gguf(writer)
    return {**first, **header.collected(writer)}


def read_vocab(model: ExportModel, architecture: Architecture, rows: int, pre: str | None) -> Vocab:
    """The vocabulary, padded to ``rows`` of the embedding."""
    if "tokenizer.model" in model.files:
        return _sentencepiece(model, rows, architecture)
    if architecture.needs_sentencepiece:
        raise ExportError(
            f"architecture {architecture.name}: no tokenizer.model in the model directory",
            "copy it from the base's original repository",
        )
    if "tokenizer.json" not in model.files:
        raise ExportError(
            "no tokenizer.json or tokenizer.model in the model directory", "copy the base's tokenizer files into it"
        )
    content = read_tokenizer_json(model.files["tokenizer.json"])
    kind = content.get("model", {}).get("type")
    if kind != "BPE":
        raise ExportError(f"tokenizer.json holds a {kind} model, expected BPE", "serve it with --target vllm")
    if content["model"].get("byte_fallback"):
        return _bpe_of_sentencepiece(model, content, rows, architecture)
    return _bpe(model.files["tokenizer.json"], content, rows, pre)


def _bpe(path: Path, content: TokenizerJson, rows: int, pre: str | None) -> Vocab:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    by_id = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    _refuse_beyond(by_id, rows)
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    tokens, types = [], []
    for number in range(rows):
        if number not in by_id:
            tokens.append(f"[PAD{number}]")
            types.append(TokenType.UNUSED)
            continue
        token, kind = by_id[number], TokenType.NORMAL
        if number in added:
            if not added[number].get("normalized", False):
                token = tokenizer.decode(
                    tokenizer.encode(token, add_special_tokens=False).ids, skip_special_tokens=False
                )
            special = added[number].get("special", False) or looks_special(token)
            kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
        tokens.append(token)
        types.append(kind)
    return Vocab("gpt2", tokens, [int(kind) for kind in types], pre=pre or pre_tokenizer(path, content))


def _bpe_of_sentencepiece(model: ExportModel, content: TokenizerJson, rows: int, architecture: Architecture) -> Vocab:
    """A SentencePiece BPE that only tokenizer.json tells of (Llama 2 style).

    The scores of the pieces are gone, but not what they decide: which merge comes first. A piece is scored by the rank
    of its first merge. Its id would not do: Llama 2's "▁▁" has the lowest score of all, and the first id.
    """
    vocab = {number: token for token, number in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    vocab |= {number: token["content"] for number, token in added.items()}
    _refuse_beyond(vocab, rows)
    tokens, types, scores = [], [], []
    ranks = _merge_ranks(content["model"]["merges"])
    for number in range(rows):
        token = vocab.get(number)
        kind = _piece_kind(token, added.get(number), number == content["model"].get("unk_id"))
        if token == content["model"].get("unk_token"):
            kind = TokenType.UNKNOWN
        tokens.append((token if token is not None else f"[PAD{number}]").encode())
        types.append(int(kind))
        scores.append(-1000.0 if number in added else -float(ranks.get(token or "", len(ranks))))
    return Vocab("llama", tokens, types, scores, pre="default", extra=_space_prefix(architecture, model))


def _merge_ranks(merges: Sequence[str | Sequence[str]]) -> dict[str, int]:
    """Piece -> the place, among all pieces, of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for merge in merges:
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), len(ranks))
    return ranks


def _piece_kind(token: str | None, added: AddedToken | None, unknown: bool) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    if unknown:
        return TokenType.UNKNOWN
    if added is not None:
        special = added.get("special", False) or looks_special(token)
        return TokenType.CONTROL if special else TokenType.USER_DEFINED
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return TokenType.BYTE
    return TokenType.NORMAL


def _sentencepiece(model: ExportModel, rows: int, architecture: Architecture) -> Vocab:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor()
    pieces.LoadFromFile(str(model.files["tokenizer.model"]))
    count = max(rows, pieces.vocab_size())
    tokens = [f"[PAD{number}]".encode() for number in range(count)]
    types, scores = [int(TokenType.UNUSED)] * count, [-10000.0] * count
    for number in range(pieces.vocab_size()):
        tokens[number] = pieces.IdToPiece(number).encode()
        scores[number] = pieces.GetScore(number)
        types[number] = int(_sentencepiece_kind(pieces, number))
    for number, token in _added_pieces(model).items():
        if number < count:
            special = token.get("special", False) or looks_special(token["content"])
            tokens[number] = token["content"].replace("▁", " ").encode()
            types[number] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
            scores[number] = -1000.0
    return Vocab(
        "llama", tokens[:rows], types[:rows], scores[:rows], pre="default", extra=_space_prefix(architecture, model)
    )


def _sentencepiece_kind(pieces: SentencePieceProcessor, number: int) -> TokenType:
    for kind, is_kind in (
        (TokenType.UNKNOWN, pieces.IsUnknown),
        (TokenType.CONTROL, pieces.IsControl),
        (TokenType.UNUSED, pieces.IsUnused),
        (TokenType.BYTE, pieces.IsByte),
    ):
        if is_kind(number):
            return kind
    return TokenType.NORMAL


def _added_pieces(model: ExportModel) -> dict[int, AddedToken]:
    """Tokens beside the SentencePiece model, from tokenizer_config.json."""
    path = model.files.get("tokenizer_config.json")
    decoder = json.loads(path.read_text(encoding="utf-8")).get("added_tokens_decoder", {}) if path else {}
    return {int(number): token for number, token in decoder.items()}


def _space_prefix(architecture: Architecture, model: ExportModel) -> dict[str, GgufValue]:
    """llama.cpp's ``add_space_prefix``: a space before each text and after each special token, by default."""
    if architecture.add_space_prefix is None and space_scheme(model) not in ("first", "never"):
        return {}
    return {"tokenizer.ggml.add_space_prefix": bool(architecture.add_space_prefix)}


def name_for_llama_cpp(model: ExportModel) -> str:
    """The model's name with or without "phi-3" in it.

    By that word alone llama.cpp decides that special tokens take the white space after them along (src/llama-vocab.cpp,
    "set attributes by model/tokenizer/architecture name"), and that there is a token ``</s>``: else it does not load.
    """
    added = added_tokens(model)
    strips = any(token.get("rstrip") for token in added) and any(token["content"] == "</s>" for token in added)
    named = re.search("phi-?3", model.name, re.IGNORECASE)
    if strips and not named:
        return f"{model.name} (phi-3)"
    return model.name if strips or not named else re.sub("(?i)(phi)-?3", r"\1 3", model.name)


def _refuse_beyond(by_id: Mapping[int, str], rows: int) -> None:
    beyond = [number for number in by_id if number >= rows]
    if beyond:
        raise ExportError(
            f"tokenizer: token {max(beyond)} ({by_id[max(beyond)]!r}), but the embedding has {rows} rows",
            "train with the embedding resized to the tokenizer, or use the base's own tokenizer",
        )
