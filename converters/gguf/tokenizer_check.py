"""Proof that llama.cpp splits text as the Hugging Face tokenizer does: the header alone, loaded and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.gguf.gguf_plan import GgufPlan
from converters.gguf.llama.llama_process import Llama, TokenAnswer
from converters.gguf.tokenizer_files import added_tokens, space_scheme, tokenizer_directory
from lora2serve.errors import ExportError
from lora2serve.exporting.sinks import ExportModel
from lora2serve.system import scratch

SAMPLE_TEXT = """Hello, World! It's a test: they've, I'M, we'll, D'Artagnan's 3.14 1234567 12 345,678 0x1F 1e-5
def f(x, *, y=None):\n\treturn {"a": [x ** 2, y // 3]}  # comment\n\n\n    if x != y:\n        pass\r\n
Grüße aus Köln, où est la bibliothèque? ¿Dónde está? Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया
你好，世界！今天天气很好。こんにちは、世界。カタカナ 안녕하세요 세계 สวัสดีชาวโลก Xin chào thế giới
🚀🙂 👩‍👩‍👧‍👦 ✅ 🦙🦙 3️⃣ 🇪🇺 ½ ² Ⅷ ①② ﬁ é é ñ \u00a0 \u3000 \u200b end
   leading,  double,   triple    spaces\t\ttabs \n \n\n \n\n\n trailing   \n\
https://example.org/a?b=c&d=%20 user@mail.com C++ C# <b>html</b>
 ' '' ''' '''' !!!!!! ...... ------ ======= 你a你1你 a1b2c3 CamelCaseWord snake_case_word UPPER lower MiXeD
1st 2nd 3RD"""


@dataclass(frozen=True)
class TokenizerCheck:
    """``compared`` ids were equal, 0 without llama.cpp; ``adds_bos``: it puts BOS before every prompt by itself;
    ``stops``: it knows the token with which the chat template closes an answer.
    """

    compared: int
    adds_bos: bool
    stops: bool = False


def check(model: ExportModel, plan: GgufPlan, llama: Llama) -> TokenizerCheck:
    """Compare ids on the text above and on every special token; ExportError names the first that differs.

    llama.cpp gets the planned file with its metadata and its tensors' names, types and shapes, but without their data:
    it loads that without allocating them, so what its graph cannot take is found now.
    """
    if not llama.installed:
        return TokenizerCheck(0, False)  # nothing to ask: the manifest says that no token was compared
    texts = _texts(model)
    answer = _ask(model, plan, llama, texts)
    return TokenizerCheck(_compare(model, texts, answer["ids"]), answer["adds_bos"], answer["stops"])


def without_proof(model: ExportModel, plan: GgufPlan, llama: Llama) -> TokenizerCheck | None:
    """What ``check`` finds, without comparing tokens; None without llama.cpp."""
    if not llama.installed:
        return None
    answer = _ask(model, plan, llama, [])
    return TokenizerCheck(0, answer["adds_bos"], answer["stops"])


def ending(model: ExportModel, plan: GgufPlan) -> GgufPlan:
    """The file that also names the token with which the chat template closes an answer, if there is such a token."""
    return plan.ending_with(model.answer_end[1]) if model.answer_end else plan


def _ask(model: ExportModel, plan: GgufPlan, llama: Llama, texts: Sequence[str]) -> TokenAnswer:
    with scratch.temporary_folder("vocab") as folder:
        path = Path(folder) / "empty.gguf"
        plan.write_empty(path)
        answer = llama.tokens(path, texts, model.answer_end[1] if model.answer_end else None)
    if "refused" in answer:
        raise _not_loaded(answer["refused"])
    return answer


def _texts(model: ExportModel) -> list[str]:
    specials = _special_tokens(model)
    before = specials[0] if specials and space_scheme(model) == "first" else ""  # as in a prompt, which BOS begins
    texts = [*SAMPLE_TEXT.splitlines(keepends=True), SAMPLE_TEXT, *specials, f"a {' b '.join(specials)} c"]
    return [before + text for text in texts]


def _not_loaded(why: str) -> ExportError:
    of_tokens = "vocab" in why or "token" in why
    return ExportError(
        f"llama.cpp does not load this model: {why}",
        "try another --pre" if of_tokens else "serve it with --target vllm",
    )


def _compare(model: ExportModel, texts: Sequence[str], theirs: Sequence[Sequence[int]]) -> int:
    """How many ids there are, every one of them the same; ExportError with the first that is not."""
    encode = _encoder(model)
    for text, ids in zip(texts, theirs, strict=True):
        expected = encode(text)
        if expected != ids:
            first = next(
                (n for n, (a, b) in enumerate(zip(expected, ids, strict=False)) if a != b), min(len(expected), len(ids))
            )
            raise ExportError(
                f"llama.cpp splits {text[:40]!r} differently: id {first} is {ids[first : first + 3]}, "
                f"expected {expected[first : first + 3]}",
                "the pre-tokenizer is a different one: name it with --pre",
            )
    return sum(len(ids) for ids in theirs)


def _encoder(model: ExportModel) -> Callable[[str], list[int]]:
    if "tokenizer.json" in model.files:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model.files["tokenizer.json"]))
        return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)
    from transformers import AutoTokenizer

    with tokenizer_directory(model) as folder:
        slow = AutoTokenizer.from_pretrained(str(folder))
    return lambda text: list(slow.encode(text, add_special_tokens=False))


def _special_tokens(model: ExportModel) -> list[str]:
    contents = [token["content"] for token in added_tokens(model) if token.get("special")]
    return [content for content in contents if content.strip()][:64]
