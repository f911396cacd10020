"""Characters that a reader sees are whole: in the tokens of a text, and where two answers part."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lora2serve.parity_check.report.characters import start_of_character
from lora2serve.parity_check.token_pieces import PART, token_pieces

TEXT = "Wexley: 東京 👩‍👩‍👧 groß 🇩🇪 नमस्ते"


def of_bytes() -> Tokenizer:
    """Each byte is a token, as in a byte-level tokenizer that has learned nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def of_pieces() -> Tokenizer:
    """As SentencePiece has it: a mark for the space, and bytes for what it does not know."""
    words = ["▁", *"Wexlygroß:", "▁gro", *(f"<0x{byte:02X}>" for byte in range(256)), "<unk>"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize("make", [of_bytes, of_pieces])
def test_characters_of_several_tokens_are_whole(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    ids = tokenizer.encode(TEXT).ids

    def decode(part: list[int]) -> str:
        return str(tokenizer.decode(part))

    pieces = token_pieces(decode, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == decode(ids) == TEXT
    assert PART not in "".join(pieces)
    alone = [decode([token]) for token in ids]
    assert PART in "".join(alone), "the control: each alone"
    if make is of_pieces:
        assert "".join(alone).replace(PART, "") != "".join(c for c in TEXT if c.isascii()), (
            "the control: spaces are lost"
        )


def test_a_part_of_a_character_at_the_end() -> None:
    tokenizer = of_bytes()
    ids = tokenizer.encode("ok 東").ids
    assert token_pieces(lambda part: str(tokenizer.decode(part)), ids[:-1])[:3] == ["o", "k", " "]
    assert len(token_pieces(lambda part: str(tokenizer.decode(part)), ids[:-1])) == len(ids) - 1


@pytest.mark.parametrize(
    ("text", "at", "start"),
    [
        ("Lake", 2, 2),
        ("e\u0301a", 1, 0),
        ("a👍🏽b", 2, 1),
        ("a👩‍👩‍👧", 5, 1),
        ("🇩🇪🇫🇷", 1, 0),
        ("🇩🇪🇫🇷", 2, 2),
        ("नमस्ते", 5, 4),
        ("ab", 2, 2),
        ("\u0301a", 0, 0),
    ],
)
def test_where_a_character_begins(text: str, at: int, start: int) -> None:
    assert start_of_character(text, at) == start
