"""llama.cpp's names for pre-tokenizers (``tokenizer.ggml.pre``), by the rules of a tokenizer.json.

The regular expressions and steps are those of the models' own tokenizer.json files; which name has which rules is in
llama.cpp's ``src/llama-vocab.cpp``. A name taken by mistake is found out by tokenizer_check.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from converters.gguf.tokenizer_files import PreTokenizerStep, TokenizerJson
from converters.gguf.upstream import llama_cpp_source
from lora2serve.errors import ExportError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s" + _TAIL
_MARKED = (  # combining marks belong to their letters
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s"
_ENDING = _CONTRACTION + "?"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_REST = r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = _LEAD + _CASED % ("*", "+") + "%s|" + _LEAD + _CASED % ("+", "*") + "%s" + _REST
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_SIGNS = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_ALPHABETS = (  # Latin, Greek, Cyrillic and other letters with cases
    "[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)

# The split patterns (with the digit, punctuation and byte-level steps around them) -> llama.cpp's name.
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("bytelevel:regex",): "gpt-2",
    ("digits:single", "bytelevel:regex"): "smollm",
    (_WORDS % "{1,3}", "bytelevel"): "llama-bpe",
    (_WORDS % "", "bytelevel"): "qwen2",
    (_MARKED, "bytelevel"): "qwen35",
    (_GPT4O % ("", "", ""), "bytelevel"): "tekken",
    (_GPT4O % (_ENDING, _ENDING, "{1,3}"), "bytelevel"): "gpt-4o",
    ("punctuation", "bytelevel:regex", "digits", "[0-9][0-9][0-9]"): "falcon",
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, "digits:single", "bytelevel"): "deepseek-coder",
    (r"[\r\n]", rf"\s?{_ALPHABETS}", rf"\s?{_SIGNS}", r"\s+$", _HAN, "digits:single", "bytelevel"): "deepseek-llm",
    (r"\p{N}{1,3}", _KANA, _DEEPSEEK3, "bytelevel"): "deepseek-v3",
}


def pre_tokenizer(path: Path, content: TokenizerJson) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json: by its steps, else by upstream's hash.

    ExportError where neither knows it.
    """
    steps = tuple(_steps(content.get("pre_tokenizer") or {}))
    name = PRE_TOKENIZERS.get(steps)
    if name == "llama-bpe" and not content["model"].get("ignore_merges"):
        name = "dbrx"  # the same rules, and a word that is a token is put together by merges like any other
    name = name or llama_cpp_source.pre_tokenizer_by_hash(path)
    if name is None:
        raise ExportError(
            f"tokenizer: no llama.cpp name is known for the pre-tokenizer {' + '.join(steps)[:160] or 'none'}",
            "name it with --pre (such as llama-bpe, qwen2, gpt-2): it is checked before anything is written",
        )
    return name


def _steps(step: PreTokenizerStep) -> Iterator[str]:
    kind = step.get("type")
    if kind == "Sequence":
        for inner in step.get("pretokenizers", []):
            yield from _steps(inner)
    elif kind == "Split":
        pattern = step.get("pattern", {})
        regex = pattern.get("Regex") or f"text:{pattern.get('String')}"
        yield regex.replace("\r", r"\r").replace("\n", r"\n")  # some files spell them, some hold them
    elif kind == "Digits":
        yield "digits:single" if step.get("individual_digits") else "digits"
    elif kind == "ByteLevel":
        yield "bytelevel:regex" if step.get("use_regex", True) else "bytelevel"
    elif kind:
        yield str(kind).lower()
