"""The trained tokenizer alone, to put ids in words."""

from __future__ import annotations


class TokenizerEngine:
    """No engine, but run like one: the parent imports no library."""

    def __init__(self, tokenizer: str) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
