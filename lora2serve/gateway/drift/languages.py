"""Which language a text is in: by its script, and for Latin script by its most frequent words. No library."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping

LOOKED_AT = 600  # characters
FEWEST_WORDS = 2  # of one language's, before it is taken for that
WORD = re.compile(r"[^\W\d_]+")
# Words that are frequent in one of these languages and rare in the others.
FREQUENT: Mapping[str, frozenset[str]] = {
    code: frozenset(words.split())
    for code, words in {
        "en": "the and of is to in it its that for with what this are you how from which not have by at or but they",
        "de": "der die und das ist nicht ein eine mit ich wie auf dem von zu sich auch wird kann",
        "fr": "le les et est une des pour que qui dans sur pas du avec vous quel quelle sont",
        "es": "el los las y es una por con para del como se qué cuál son pero más",
        "it": "il che è di una per con sono della gli come non quale nel anche più questo",
        "pt": "o os um uma é não com para da dos das como são você qual mais pelo",
        "nl": "het een van en is dat niet zijn voor met wat hoe ook naar deze wordt ik",
        "pl": "jest nie się na że jak co to czy dla są przez który jego tylko od",
        "tr": "bir ve bu için ile ne nasıl değil daha çok olarak kadar mi nedir var",
        "sv": "och att det är som en på för med inte av till hur vad jag den har",
    }.items()
}
OF_WORD: dict[str, list[str]] = {}  # a frequent word -> the languages that have it
for _code, _words in FREQUENT.items():
    for _word in _words:
        OF_WORD.setdefault(_word, []).append(_code)
SCRIPTS = {
    "CYRILLIC": "cyrillic", "CJK": "zh", "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "ARABIC": "ar",
    "DEVANAGARI": "hi", "HEBREW": "he", "GREEK": "el", "THAI": "th", "BENGALI": "bn", "TAMIL": "ta",
}  # fmt: skip
OTHER = "other"


def language(text: str) -> str:
    """``en``, ``ja``, ``cyrillic``, ...; "latin" for Latin script in no known language, "other" for no letters."""
    text = text[:LOOKED_AT]
    if not text.isascii():
        scripts = Counter(_script(letter) for letter in text[:: max(1, len(text) // 100)] if letter.isalpha())
        script = scripts.most_common(1)[0][0] if scripts else OTHER
        if "ja" in scripts and script in ("zh", "ja"):
            return "ja"
        if script != "latin":
            return script
    words = WORD.findall(text.lower())
    counts = Counter(code for word in words for code in OF_WORD.get(word, ()))
    code, count = counts.most_common(1)[0] if counts else ("", 0)
    return code if count >= FEWEST_WORDS else "latin" if words else OTHER


def _script(letter: str) -> str:
    if letter.isascii():
        return "latin"
    first = unicodedata.name(letter, "").split(" ")[0].split("-")[0]
    return "latin" if first == "LATIN" else SCRIPTS.get(first, OTHER)
