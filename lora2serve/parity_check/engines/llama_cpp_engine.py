"""llama.cpp through llama-cpp-python: a GGUF, with a LoRA adapter as GGUF if there is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from lora2serve.errors import EngineError
from lora2serve.parity_check.engines import Ids, Messages, Scores, Tools

TEMPLATE = "tokenizer.chat_template"
BATCH = 64  # tokens at a time: llama.cpp holds the logits of a batch beside those of the text


class LlamaCpp:
    """``model`` is a GGUF file, the first one where it is split."""

    def __init__(self, model: str, window: int, adapter: str | None = None, threads: int | None = None) -> None:
        from llama_cpp import Llama

        try:
            self.llm: Any = Llama(
                model, n_ctx=window, n_batch=BATCH, logits_all=True, lora_path=adapter, n_threads=threads,
                n_threads_batch=threads, n_gpu_layers=-1, verbose=False, seed=0,
            )  # fmt: skip
        except ValueError as error:
            raise EngineError(f"llama.cpp does not load {model}: {error}", "export again") from error
        self.version = f"llama-cpp-python {version('llama-cpp-python')}"
        self._stops: list[int] | None = None

    def render(self, messages: Messages, tools: Tools = ()) -> str | None:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        template = self.llm.metadata.get(TEMPLATE)
        if not template:
            return None
        bos, eos = self.llm.token_bos(), self.llm.token_eos()
        names = [self._piece(token) if token >= 0 else "" for token in (bos, eos)]
        formatter = Jinja2ChatFormatter(template, eos_token=names[1], bos_token=names[0], add_generation_prompt=True)
        return str(formatter(messages=list(messages), tools=list(tools) or None).prompt)

    def prompt_ids(self, messages: Messages, text: str, tools: Tools = ()) -> list[int] | None:
        """As llama.cpp's own server does it: BOS is added where the file says so and the template has not."""
        if messages:
            text = self.render(messages, tools) or ""
        adds = self.llm.metadata.get("tokenizer.ggml.add_bos_token", "false") == "true"
        bos = self._piece(self.llm.token_bos()) if self.llm.token_bos() >= 0 else ""
        add = adds and not (messages and bos and text.startswith(bos))
        return list(self.llm.tokenize(text.encode(), add_bos=add, special=True))

    def stop_ids(self) -> list[int] | None:
        if self._stops is None:
            import llama_cpp

            vocab = llama_cpp.llama_model_get_vocab(self.llm.model)
            self._stops = [token for token in range(self.llm.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, token)]
        return self._stops

    def eos_id(self) -> int | None:
        """The end token that the file names; llama.cpp knows others by their text."""
        token = int(self.llm.token_eos())
        return token if token >= 0 else None

    def score(self, sequences: Sequence[Ids]) -> Iterator[Scores]:
        for ids in sequences:
            self.llm.reset()
            self.llm.eval(list(ids))
            yield Scores(self.llm.scores[: len(ids) - 1])  # seen, not copied: the next text writes over them

    def generate(self, prompts: Sequence[Ids], new_tokens: int) -> list[list[int]]:
        stop = set(self.stop_ids() or ())
        answers = []
        for ids in prompts:
            self.llm.reset()
            answer: list[int] = []
            for token in self.llm.generate(list(ids), temp=0.0, top_k=1, repeat_penalty=1.0):
                if token in stop or len(answer) == new_tokens:
                    break
                answer.append(int(token))
            answers.append(answer)
        return answers

    def _piece(self, token: int) -> str:
        return str(self.llm._model.token_get_text(token))
