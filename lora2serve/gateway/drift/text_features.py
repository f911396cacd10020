"""Figures of a prompt and its answer, taken before the texts go: they tell drift, and not what was asked.

A category is a key of its own: ``prompt.language:en`` is 1. Word pairs are in one of 4,096 buckets, of which at most 24
are kept: enough to see that other things are talked about, too little to read them.
"""

from __future__ import annotations

import json
import re
import zlib
from itertools import pairwise

from lora2serve.gateway.drift.languages import language

BUCKETS = 4096
MOST_PAIRS = 24
LOOKED_AT = 2000  # characters of each text: a gateway does this between two requests
LONGEST_JSON = 200_000  # characters of an answer that is tried as JSON
PAIR = "pair:"  # before the number of a bucket
WORD = re.compile(r"[^\W\d_]+|\d+")
FENCE = re.compile(r"^```(?:json)?\s*(.*?)\s*```$", re.DOTALL)
REPEATED = 4  # words that make a repetition
REFUSAL = re.compile(
    r"^\W*(?:i['\u2019]?m (?:really |very )?sorry|i am sorry|sorry,|i apologi[sz]e|i (?:can['\u2019]?t|cannot|can not|"
    r"am unable|won['\u2019]?t|am not able)|unfortunately,? i|as an ai|es tut mir leid|ich kann (?:leider )?nicht|"
    r"je suis d\u00e9sol|je ne peux pas|lo siento|no puedo|mi dispiace|non posso|desculpe|sinto muito)",
    re.IGNORECASE,
)


def describe(prompt: str, answer: str) -> dict[str, float]:
    """The figures of one request."""
    json_kind, prompt, answer = _json(answer), prompt[:LOOKED_AT], answer[:LOOKED_AT]
    features = {
        f"prompt.language:{language(prompt)}": 1.0,
        f"answer.language:{language(answer)}": 1.0,
        "answer.refusal": float(bool(REFUSAL.match(answer))),
        "answer.empty": float(not answer.strip()),
        "answer.repetition": round(_repetition(answer), 4),
        f"answer.json:{json_kind}": 1.0,
    }
    return features | {f"{PAIR}{bucket}": 1.0 for bucket in pairs(prompt)}


def pairs(text: str) -> list[int]:
    """The buckets of its word pairs with the smallest hashes, which are the same pairs in any text that has them."""
    words = WORD.findall(text.lower())
    if len(words) < 6:  # one long word: a language without spaces
        words = list("".join(words))
    codes = [word.encode("utf-8", "surrogatepass") for word in words]
    hashes = {zlib.crc32(second, zlib.crc32(first)) for first, second in pairwise(codes)}
    return [value % BUCKETS for value in sorted(hashes)[:MOST_PAIRS]]  # ordered by its high bits, told by its low ones


def _repetition(text: str) -> float:
    """The share of runs of four words that were there before."""
    words = text.split()
    runs = [tuple(words[start : start + REPEATED]) for start in range(len(words) - REPEATED + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _json(text: str) -> str:
    """``valid``, ``broken``, ``long`` for what is not tried, or ``none`` for what does not begin like JSON."""
    if len(text) > LONGEST_JSON:
        return "long"
    text = text.strip()
    fenced = FENCE.match(text)
    text = fenced[1] if fenced else text
    if text[:1] not in ("{", "["):
        return "none"
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return "broken"
    return "valid"
