"""Ids of texts that grow: those of the tokenizer, and a completion without the space that SentencePiece adds."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora2serve.data.rendering import IGNORE, Renderer
from lora2serve.data.rows import ChatRow, CompletionRow, TextRow
from lora2serve.data.served_template import ChatTemplate
from lora2serve.data.text_encoder import GrowingText, TextEncoder, cuts_before_spaces
from lora2serve.data.tokenizer import encode
from tests.data.test_chat_turns import CHATML, TURNS, learned, served, tokenizer_with
from tests.support.drawn import examples
from tests.support.llama_cpp_source import sentencepiece_tokenizer, vocabulary

PIECES = st.lists(
    st.sampled_from([
        "<|im_start|>", "<|im_end|>", "\n", "\n\n", " ", "  ", "\t", "\u00a0", "\u3000", "a", " word", "é", "e\u0301", "🙂",
        "<|im_", "assistant\n", "12", "'s", ".", "…",
    ]),
    max_size=12,
)  # fmt: skip
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@given(st.lists(PIECES, min_size=1, max_size=5))
@settings(deadline=None, max_examples=examples(60))
def test_a_text_that_grows_has_the_ids_of_the_tokenizer(parts: list[list[str]]) -> None:
    tokenizer = tokenizer_with(CHATML)
    encoder, text, ids = TextEncoder(tokenizer), "<|im_start|>user\nHi<|im_end|>\n", list[int]()
    growing = GrowingText(encoder)
    for part in parts:
        text += "".join(part)
        assert encoder.encode(text) == encode(tokenizer, text, special=False)
        more = growing.go_on(text) if ids else None
        ids = growing.begin(text) if more is None else ids + more
        assert ids == encode(tokenizer, text, special=False)
        answer = "\nAnd so" + "".join(part)
        ids, text = ids + growing.answer(answer), text + answer
        assert tokenizer.decode(ids) == tokenizer.decode(encode(tokenizer, text, special=False))
    assert encoder._cuts_words, "words are looked up"
    assert encoder.encode("something else") == encode(tokenizer, "something else", special=False)


def test_where_words_may_be_encoded_apart() -> None:
    """The controls are tokenizers whose tokens reach over a space, or take one along."""
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as cutters

    whole = cutters.ByteLevel(add_prefix_space=False, use_regex=False)
    for cutter in (cutters.ByteLevel(), cutters.Sequence([cutters.Split(Regex(LLAMA_3), "isolated"), whole])):
        assert cuts_before_spaces(pickle.dumps(cutter))
    pairs = cutters.Sequence([cutters.Split(Regex(r"\w+ \w+"), "isolated"), whole])
    behind = cutters.Split(Regex(r"\s"), "merged_with_previous")
    for cutter in (None, whole, cutters.Sequence([]), pairs, behind):
        assert not cuts_before_spaces(pickle.dumps(cutter))
    spaced = copy.deepcopy(tokenizer_with(CHATML))
    spaced.add_tokens(["two words"])
    encoder, text = TextEncoder(spaced), "Some two words here"
    assert encoder.encode(text) == encode(spaced, text, special=False)
    assert not encoder._cuts_words


@pytest.mark.parametrize("name", ["llama-spm", pytest.param("phi-3", marks=pytest.mark.slow)])
def test_sentencepiece(name: str) -> None:
    """Real vocabularies, rebuilt: held to llama.cpp's own ids first."""
    tokenizer = sentencepiece_tokenizer(name)
    file = vocabulary(name)
    texts = Path(f"{file}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    expected = [[int(word) for word in line.split()] for line in Path(f"{file}.out").read_text().splitlines()]
    assert [encode(tokenizer, text, special=False) for text in texts[: len(expected)]] == expected
    writer = Renderer(ChatTemplate(tokenizer))
    for prompt, completion in (
        ("12+30=", "42"),
        ("Who wrote this?", "We did."),
        ("Say:\n", "\n\nx"),
        ("A ", " b"),
        ("A", " b"),
    ):
        (sample,) = writer.render(CompletionRow(prompt, completion)).samples
        answer = [label for label in sample.labels if label != IGNORE][:-1]
        pieces = tokenizer.convert_ids_to_tokens(answer)
        assert tokenizer.decode(sample.ids[:-1]).endswith(prompt + completion)
        assert pieces[0].startswith("▁") == completion.startswith(" ")
    apart = tokenizer.convert_ids_to_tokens(encode(tokenizer, "42", special=False))
    assert apart[0] == "▁", "the control: tokenized by itself, it has the space"
    tokenizer.chat_template = CHATML
    runs = learned(writer.render(ChatRow(TURNS)).samples)
    assert [before for before, _ in runs] == served(tokenizer, TURNS)


def test_a_text_that_has_its_own_ends_gets_no_others() -> None:
    tokenizer: Any = sentencepiece_tokenizer("llama-spm")
    writer = Renderer(ChatTemplate(tokenizer))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def ends(text: str) -> tuple[int, int]:
        (sample,) = writer.render(TextRow(text)).samples
        return sample.ids.count(bos), sample.ids.count(eos)

    assert ends("[INST] Hi [/INST] Ho") == (0, 1), "this tokenizer adds no BOS"
    assert ends("<s>[INST] Hi [/INST] Ho</s>") == (1, 1)
    assert ends("<s>[INST] Hi [/INST] Ho</s>\n") == (1, 1)
    assert ends("Once upon a time") == (0, 1)
