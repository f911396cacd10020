"""llama.cpp through llama-cpp-python: a GGUF, with a LoRA adapter as GGUF if there is one."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora2serve.errors import EngineError
from lora2serve.parity_check import own_sampling
from lora2serve.parity_check.engines import Ids, Messages, Scores, Tools
from lora2serve.parity_check.engines.chat_engine import LONGEST_ANSWER, AnswerOptions, End, Say, TokenText, prompt

TEMPLATE = "tokenizer.chat_template"
BATCH = 64  # tokens at a time: llama.cpp holds the logits of a batch beside those of the text
CHAT_BATCH = 512  # without them
CHANCE: Mapping[str, float] = {"temp": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # where the file says nothing


class LlamaCpp:
    """``model`` is a GGUF file, the first one where it is split; answers are as its ``modelfile`` sets them, if any.

    Without ``scores`` it holds the logits of no text, to answer in less memory.
    """

    def __init__(
        self, model: str, window: int, adapter: str | None = None, modelfile: str | None = None,
        threads: int | None = None, *, scores: bool = True,
    ) -> None:  # fmt: skip
        from llama_cpp import Llama

        batch = BATCH if scores else CHAT_BATCH
        self._holds_all = scores
        try:
            self.llm: Any = Llama(
                model, n_ctx=window, n_batch=batch, logits_all=scores, lora_path=adapter, n_threads=threads,
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

    def score(self, sequences: Sequence[Ids], tail: int = 0) -> Iterator[Scores]:
        for ids in sequences:
            if not self._holds_all:
                yield Scores(self._score_stepwise(list(ids), tail or len(ids) - 1))
                continue
            self.llm.reset()
            self.llm.eval(list(ids))
            first, last = (len(ids) - 1 - tail if tail else 0), len(ids) - 1
            yield Scores(self.llm.scores[first:last])  # seen, not copied: the next text writes over them

    def _score_stepwise(self, ids: list[int], tail: int) -> NDArray[np.float32]:
        """(tail, V) logits of the last positions, one token after the other."""
        import llama_cpp

        begun, rows = ids[: len(ids) - tail], list[NDArray[np.float32]]()
        self._forget_all_but(begun)
        self.llm.eval(begun[self.llm.n_tokens :])
        for token in [*ids[len(begun) : -1], None]:
            logits = llama_cpp.llama_get_logits_ith(self.llm.ctx, -1)
            rows.append(np.ctypeslib.as_array(logits, shape=(self.llm.n_vocab(),)).astype(np.float32))
            if token is not None:
                self.llm.eval([token])
        return np.stack(rows)

    def generate(self, prompts: Sequence[Ids], new_tokens: int) -> list[list[int]]:
        return [self._answer(list(ids), self._own.most(new_tokens)) for ids in prompts]

    def reply(self, messages: Messages, options: AnswerOptions, say: Say) -> End:
        """As ``ChatEngine``; by the sampling that the file names, and where it names none, the likeliest tokens."""
        most = min(int(self.llm.n_ctx()), int(self.llm._model.n_ctx_train()))
        ids = prompt(self, messages, most)
        text = TokenText(lambda tokens: str(self.llm.detokenize(tokens).decode("utf-8", "replace")), self._own.stops)
        limit = min(options.max_tokens or self._own.most(LONGEST_ANSWER), most - len(ids))
        self._forget_all_but(ids)
        count = 0
        for count, token in enumerate(self._tokens(ids, self._chance(options.temperature)), 1):
            say(text.add(token))
            if count == limit or text.stopped:
                break
        say(text.rest())
        return "length" if count == limit and not text.stopped else "stop"

    def _answer(self, ids: list[int], length: int) -> list[int]:
        answer: list[int] = []
        self.llm.reset()
        for token in self._tokens(ids, CHANCE):
            text = self.llm.detokenize([*answer, token], special=True)
            if any(word.encode() in text for word in self._own.stops):
                break
            answer.append(token)
            if len(answer) == length:
                break
        return answer

    def _tokens(self, ids: list[int], chance: Mapping[str, float]) -> Iterator[int]:
        """One token after the other, up to one that ends an answer."""
        import llama_cpp

        stop = set(self.stop_ids() or ())
        with self._sampler(ids, chance) as sampler:
            self.llm.eval(ids[self.llm.n_tokens :])
            while (token := int(llama_cpp.llama_sampler_sample(sampler, self.llm.ctx, -1))) not in stop:
                yield token
                self.llm.eval([token])

    def _forget_all_but(self, ids: list[int]) -> None:
        """Of what was computed before, keep what ``ids`` begin with, apart from their last."""
        known = self.llm.input_ids[: self.llm.n_tokens].tolist()
        same = next((n for n, (old, new) in enumerate(zip(known, ids[:-1], strict=False)) if old != new), None)
        same = min(len(known), len(ids) - 1) if same is None else same
        if same and self.llm._ctx.kv_cache_seq_rm(-1, same, -1):
            self.llm.n_tokens = same
        else:
            self.llm.reset()

    def _chance(self, temperature: float | None) -> Mapping[str, float]:
        """The file's own sampling, with this temperature if one is given."""
        named = {name: self.llm.metadata.get(f"general.sampling.{name}") for name in CHANCE}
        chance = {**CHANCE, **{name: type(CHANCE[name])(value) for name, value in named.items() if value is not None}}
        return chance if temperature is None else {**chance, "temp": temperature}

    @contextmanager
    def _sampler(self, prompt: list[int], chance: Mapping[str, float]) -> Iterator[Any]:
        """By ``chance``, after the export's own penalties, which have seen the prompt: the order of llama-server."""
        import llama_cpp

        own = self._own
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        samplers = [
            llama_cpp.llama_sampler_init_penalties(
                self.llm.n_vocab(), own.last, own.repeat, own.frequency, own.presence
            )
        ]
        if chance["temp"] > 0:
            samplers += [
                llama_cpp.llama_sampler_init_top_k(int(chance["top_k"])),
                llama_cpp.llama_sampler_init_top_p(chance["top_p"], 1),
                llama_cpp.llama_sampler_init_min_p(chance["min_p"], 1),
                llama_cpp.llama_sampler_init_temp(chance["temp"]),
                llama_cpp.llama_sampler_init_dist(secrets.randbits(32)),
            ]
        else:
            samplers.append(llama_cpp.llama_sampler_init_greedy())
        for sampler in samplers:
            llama_cpp.llama_sampler_chain_add(chain, sampler)
        for token in prompt:
            llama_cpp.llama_sampler_accept(chain, token)
        try:
            yield chain
        finally:
            llama_cpp.llama_sampler_free(chain)

    def _piece(self, token: int) -> str:
        return str(self.llm._model.token_get_text(token))
