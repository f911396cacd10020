"""Ids of texts that grow: those of the tokenizer, and a completion without the space that SentencePiece adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora2serve.data.rendering import IGNORE, Renderer
from lora2serve.data.rows import ChatRow, CompletionRow, TextRow
from lora2serve.data.served_template import ChatTemplate
from lora2serve.data.text_encoder import GrowingText, TextEncoder
from lora2serve.data.tokenizer import encode
from tests.data.test_chat_turns import CHATML, TURNS, learned, served, tokenizer_with
from tests.support.llama_cpp_source import sentencepiece_tokenizer, vocabulary

PIECES = st.lists(
    st.sampled_from(
        ["<|im_start|>", "<|im_end|>", "\n", "\n\n", " ", "a", " word", "é", "🙂", "<|im_", "assistant\n", "12"]
    ),
    max_size=12,
)


@given(st.lists(PIECES, min_size=1, max_size=5))
@settings(deadline=None, max_examples=150)
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
    assert encoder.encode("something else") == encode(tokenizer, "something else", special=False)


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
