"""llama.cpp through llama-cpp-python: a GGUF, with a LoRA adapter as GGUF if there is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora2serve.errors import EngineError
from lora2serve.parity_check.engines import Ids, Messages, Scores, Tools, own_sampling

TEMPLATE = "tokenizer.chat_template"
BATCH = 64  # tokens at a time: llama.cpp holds the logits of a batch beside those of the text


class LlamaCpp:
    """``model`` is a GGUF file, the first one where it is split; answers are as its ``modelfile`` sets them, if any."""

    def __init__(
        self, model: str, window: int, adapter: str | None = None, modelfile: str | None = None,
        threads: int | None = None,
    ) -> None:  # fmt: skip
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
        self._own = own_sampling.of_modelfile(Path(modelfile)) if modelfile else own_sampling.of_gguf(self.llm.metadata)

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
        return [self._answer(list(ids), self._own.most(new_tokens)) for ids in prompts]

    def _answer(self, ids: list[int], length: int) -> list[int]:
        import llama_cpp

        stop, answer = set(self.stop_ids() or ()), list[int]()
        self.llm.reset()
        with self._sampler(ids) as sampler:
            self.llm.eval(ids)
            while len(answer) < length:
                token = int(llama_cpp.llama_sampler_sample(sampler, self.llm.ctx, -1))
                answer.append(token)
                text = self.llm.detokenize(answer, special=True)
                if token in stop or any(word.encode() in text for word in self._own.stops):
                    return answer[:-1]
                self.llm.eval([token])
        return answer

    @contextmanager
    def _sampler(self, prompt: list[int]) -> Iterator[Any]:
        """The likeliest token after the export's own penalties, which have seen the prompt, as on llama-server."""
        import llama_cpp

        own = self._own
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        penalties = llama_cpp.llama_sampler_init_penalties(
            self.llm.n_vocab(), own.last, own.repeat, own.frequency, own.presence
        )
        for sampler in (penalties, llama_cpp.llama_sampler_init_greedy()):
            llama_cpp.llama_sampler_chain_add(chain, sampler)
        for token in prompt:
            llama_cpp.llama_sampler_accept(chain, token)
        try:
            yield chain
        finally:
            llama_cpp.llama_sampler_free(chain)

    def _piece(self, token: int) -> str:
        return str(self.llm._model.token_get_text(token))
