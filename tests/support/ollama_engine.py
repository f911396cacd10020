"""What computes in the Ollama of ``ollama_server``: llama.cpp, by llama-cpp-python, and Go's own templates.

The rules are those of Ollama 0.30 and newer: the Go TEMPLATE renders, unless there is none or the GGUF's Jinja knows
tools or thinking; then the Jinja does. BOS is llama.cpp's own business (``add_bos_token``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.golang import Renderer

Messages = Sequence[Mapping[str, str]]
SERVED = {"enable_thinking": True, "preserve_thinking": True, "clear_thinking": False}  # by llama-server, unless asked
TOOLS, THINKING = ("tools", "tool_call"), ("<think>", "</think>", "enable_thinking", "reasoning_content", "thinking")


@dataclass
class Stored:
    """One model: its layers, as ``/api/create`` left them."""

    model: Path
    adapter: Path | None = None
    template: str | None = None
    system: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    requires: str = ""
    adds_bos: bool | None = None  # None: as the GGUF says


@dataclass(frozen=True)
class Said:
    """A continuation: its tokens with the likeliest at each step."""

    text: str
    reason: str
    prompt_tokens: int
    logprobs: list[dict[str, Any]]


class Loaded:
    """A model in llama.cpp."""

    def __init__(self, stored: Stored, render: Renderer) -> None:
        from llama_cpp import Llama

        adapter = str(stored.adapter) if stored.adapter else None
        self.stored, self._render = stored, render
        self.llm: Any = Llama(
            str(stored.model), n_ctx=640, n_batch=640, logits_all=True, lora_path=adapter, verbose=False, n_threads=2
        )
        self._lock = threading.Lock()

    @property
    def jinja(self) -> str:
        return str(self.llm.metadata.get("tokenizer.chat_template", ""))

    @property
    def native(self) -> bool:
        """Whether the Jinja renders."""
        more = any(word in self.jinja for word in (*TOOLS, *THINKING))
        return bool(self.jinja) and (self.stored.template is None or more)

    def prompt(self, messages: Messages) -> str:
        messages = [*self.stored.messages, *messages]
        if self.stored.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.stored.system}, *messages]
        if self.native:
            return self._by_jinja(messages)
        template = self.stored.template or "{{ .Prompt }}"
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        if ".Messages" in template:
            return self._render(template, {"System": system, "Messages": list(_collated(messages))}, date.today())
        return "".join(
            self._render(template, {"System": "", "Prompt": m["content"], "Response": ""}, date.today())
            for m in messages
        )

    def complete(self, prompt: str, options: Mapping[str, Any], top: int | None) -> Said:
        """``top``: how many of the likeliest tokens to show; None shows no log-probabilities."""
        with self._lock:
            return self._complete(prompt, options, top)

    def _complete(self, prompt: str, options: Mapping[str, Any], top: int | None) -> Said:
        import llama_cpp

        by_file = self.llm.metadata.get("tokenizer.ggml.add_bos_token", "false") == "true"
        adds = by_file if self.stored.adds_bos is None else self.stored.adds_bos
        bos = self._piece(self.llm.token_bos(), special=True) if adds else b""
        if self.native and bos:  # llama-server takes the template's own away; a text's it does not
            prompt = prompt.removeprefix(bos.decode())
        tokens = [self.llm.token_bos()] * adds + self.llm.tokenize(prompt.encode(), add_bos=False, special=True)
        vocab = llama_cpp.llama_model_get_vocab(self.llm.model)
        most, text, shown, reason = int(options.get("num_predict", 128)), b"", [], "length"
        how = {"temp": float(options.get("temperature", 0.8)), "top_k": int(options.get("top_k", 40)),
               "top_p": float(options.get("top_p", 0.9)), "min_p": float(options.get("min_p", 0.0)),
               "repeat_penalty": float(options.get("repeat_penalty", 1.0))}  # fmt: skip
        self.llm.set_seed(int(options.get("seed", 0)))
        for count, token in enumerate(self.llm.generate(tokens, **how), 1):
            if top is not None:
                shown.append(self._shown(token, top))
            if llama_cpp.llama_vocab_is_eog(vocab, token):
                reason = "stop"
                break
            text += self._piece(token)
            cut = min((at for stop in options.get("stop", ()) if (at := text.find(stop.encode())) >= 0), default=-1)
            if cut >= 0:
                text, reason = text[:cut], "stop"
                break
            if count == most:
                break
        return Said(text.decode("utf-8", "replace"), reason, len(tokens), shown)

    def _shown(self, token: int, top: int) -> dict[str, Any]:
        logits = self.llm._scores[-1].astype(np.float64)
        logprobs = logits - logits.max()
        logprobs -= np.log(np.exp(logprobs).sum())
        best = np.argsort(-logprobs)[:top]
        return {**self._one(token, logprobs), "top_logprobs": [self._one(int(n), logprobs) for n in best]}

    def _one(self, token: int, logprobs: Any) -> dict[str, Any]:
        piece = self._piece(token)
        return {"token": piece.decode("utf-8", "replace"), "logprob": float(logprobs[token]), "bytes": list(piece)}

    def _piece(self, token: int, special: bool = False) -> bytes:
        """As llama-server shows it: nothing for a control token."""
        return bytes(self.llm._model.detokenize([token], special=special))

    def _by_jinja(self, messages: Messages) -> str:
        bos, eos = (
            self._piece(n, special=True).decode() if n >= 0 else ""
            for n in (self.llm.token_bos(), self.llm.token_eos())
        )
        return render_jinja(self.jinja, messages, bos, eos)


def render_jinja(template: str, messages: Messages, bos: str = "", eos: str = "") -> str:
    """As llama-server does, with the variables that it sets."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    formatter = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)
    return str(formatter(messages=list(messages), **SERVED, date_string=f"{date.today():%d %b %Y}").prompt)


def _collated(messages: Messages) -> Iterator[dict[str, str]]:
    """Neighbors of one role are one message."""
    before: dict[str, str] | None = None
    for message in messages:
        if before and before["Role"] == message["role"]:
            before["Content"] += "\n\n" + message["content"]
            continue
        if before:
            yield before
        before = {"Role": message["role"], "Content": message["content"]}
    if before:
        yield before
