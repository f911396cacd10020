"""What a worker process does for the harness, beside answering: ids, texts and continuations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from lora2serve.data.rows import Message
from lora2serve.errors import EngineError
from lora2serve.evaluation.answer_worker import AnswerWorker


class HarnessWorker(AnswerWorker):
    """Its public methods are the jobs."""

    def only_text(self) -> bool:
        """Whether nobody here knows its tokens: a server that is asked by its address alone."""
        return getattr(self._engine, "_tokenizer", None) == ""

    def special_tokens(self) -> dict[str, int | None]:
        """``bos`` and ``eos`` of the vocabulary, and the ``longest`` text in tokens."""
        llama_cpp = getattr(self._engine, "llm", None)
        if llama_cpp is not None:
            ids = {"bos": int(llama_cpp.token_bos()), "eos": int(llama_cpp.token_eos())}
            longest = min(int(llama_cpp.n_ctx()), int(llama_cpp._model.n_ctx_train())) - 1
            return {**{name: token if token >= 0 else None for name, token in ids.items()}, "longest": longest}
        tokenizer = self._own_tokenizer()
        positions = getattr(self._engine, "positions", None)
        return {
            "bos": getattr(tokenizer, "bos_token_id", None), "eos": getattr(tokenizer, "eos_token_id", None),
            "longest": positions() if positions else None,
        }  # fmt: skip

    def encode(self, text: str, special: bool | None) -> list[int]:
        """``special``: with what the tokenizer puts before a text; None does where the text has none of it yet."""
        llama_cpp = getattr(self._engine, "llm", None)
        if llama_cpp is not None:
            adds = llama_cpp.metadata.get("tokenizer.ggml.add_bos_token", "false") == "true"
            begins = llama_cpp._model.token_get_text(llama_cpp.token_bos()) if llama_cpp.token_bos() >= 0 else ""
            wanted = adds and special is not False and not (begins and text.startswith(begins))
            return list(llama_cpp.tokenize(text.encode(), add_bos=wanted, special=True))
        tokenizer = self._own_tokenizer()
        if special is None:
            begins = str(getattr(tokenizer, "bos_token", None) or "")
            special = not (begins and text.startswith(begins))
        ids = getattr(tokenizer, "encode")(text, add_special_tokens=special)  # noqa: B009
        return list(ids)

    def render(self, messages: Sequence[Mapping[str, object]], opening: bool) -> str | None:
        """A conversation by the engine's own template; without ``opening`` it goes on with its last turn."""
        turns = cast("Sequence[Message]", messages)
        if opening or turns[-1]["role"] != "assistant":
            return self._rendered(turns)
        before = self._rendered(turns[:-1])
        return None if before is None else before + str(turns[-1]["content"])

    def _rendered(self, turns: Sequence[Message]) -> str | None:
        """Of a server of an export, which shows no text, by the template that it was started with."""
        text = self._scoring.render(turns)
        if text is not None or not hasattr(self._engine, "served") or self.only_text():
            return text
        write = getattr(self._own_tokenizer(), "apply_chat_template")  # noqa: B009
        return str(write(turns, tokenize=False, add_generation_prompt=True))

    def continuation(self, begun: Sequence[int], rest: Sequence[int], base: bool) -> tuple[float, bool]:
        """The log-probability of ``rest`` behind ``begun``, and whether it is the likeliest at each step."""
        return self._likelihood(list(begun), list(rest), base=base)

    def continue_text(self, ids: Sequence[int], new_tokens: int, base: bool) -> str:
        """The likeliest continuation in words."""
        with self._without_adapter(base):
            (answer,) = self._scoring.generate([list(ids)], new_tokens)
        llama_cpp = getattr(self._engine, "llm", None)
        if llama_cpp is not None:
            return str(llama_cpp.detokenize(answer, prev_tokens=list(ids)).decode("utf-8", "replace"))
        decode = getattr(self._own_tokenizer(), "decode")  # noqa: B009
        whole, before = (str(decode(part, skip_special_tokens=True)) for part in ([*ids, *answer], list(ids)))
        return whole[len(before) :] if whole.startswith(before) else str(decode(answer, skip_special_tokens=True))

    def continue_words(
        self, text: str, turns: Sequence[Mapping[str, object]], new_tokens: int, stops: Sequence[str]
    ) -> str:
        """The same by a server that is only told words: of ``text``, or the answer to ``turns`` where there are any."""
        if not turns:
            return str(getattr(self._engine, "continue_text")(text, new_tokens, stops))  # noqa: B009
        said = self.answer(turns, new_tokens, 0.0, base=False)
        if "error" in said:
            raise EngineError(said["error"], said["hint"])
        return said["text"]

    def _own_tokenizer(self) -> object:
        if self.only_text():
            raise EngineError(f"{self._engine.version}: its tokenizer is not here", "evaluate an export: it has one")
        return getattr(self._engine, "tokenizer")  # noqa: B009
