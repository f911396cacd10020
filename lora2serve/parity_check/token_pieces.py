"""A text's tokens as they stand in it: a character that several tokens make together is whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

PART = "\ufffd"  # what a tokenizer prints for bytes that are no whole character
LONGEST = 16  # tokens that are printed together at most


def token_pieces(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """One text for each token; of those that end in the middle of a character, the first has it and the others none.

    Each is printed behind the one before it: a tokenizer of SentencePiece drops a space at the start.
    """
    pieces: list[str] = []
    before: list[int] = []
    while len(pieces) < len(ids):
        start = len(pieces)
        count = next((n for n in range(1, LONGEST + 1) if _is_whole(decode, ids[start : start + n])), 1)
        group = list(ids[start : start + count])
        pieces += [_behind(decode, before, group), *[""] * (len(group) - 1)]
        before = group
    return pieces


def _is_whole(decode: Callable[[list[int]], str], group: Sequence[int]) -> bool:
    return PART not in decode(list(group))


def _behind(decode: Callable[[list[int]], str], before: list[int], group: list[int]) -> str:
    context = decode(before) if before else ""
    text = decode(before + group)
    return text[len(context) :] if text.startswith(context) else decode(group)


def quoted(piece: str) -> str:
    """In quotation marks, ends of lines as ``\\n``; joined emoji stay joined."""
    return json.dumps(piece, ensure_ascii=False)
