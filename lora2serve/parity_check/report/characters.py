"""Where a character that a reader sees begins: marks and joined emoji are not cut in two."""

from __future__ import annotations

import unicodedata

JOINER = "\u200d"
SKIN_TONES = range(0x1F3FB, 0x1F400)
FLAG_LETTERS = range(0x1F1E6, 0x1F200)


def start_of_character(text: str, at: int) -> int:
    """``at``, or the place before it where the character begins that it would cut."""
    while 0 < at < len(text) and _goes_on(text, at):
        at -= 1
    return at


def _goes_on(text: str, at: int) -> bool:
    """Whether what stands at ``at`` belongs to what is before it."""
    char = text[at]
    if char == JOINER or text[at - 1] == JOINER or ord(char) in SKIN_TONES:
        return True
    if unicodedata.category(char) in ("Mn", "Me", "Mc"):  # accents, signs of vowels, variation selectors
        return True
    letters = 0  # of flags, which stand in pairs, before it
    while letters < at and ord(text[at - letters - 1]) in FLAG_LETTERS:
        letters += 1
    return ord(char) in FLAG_LETTERS and letters % 2 == 1
