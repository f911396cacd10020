"""vLLM's own way from a request for a chat to the token ids of its prompt, without an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from tests.support.runs import DEMO


@cache
def _config() -> Any:
    from vllm.config import ModelConfig, VllmConfig

    return VllmConfig(model_config=ModelConfig(model=str(DEMO / "base")))


class VllmRenderer:
    """Answers with what a server of vLLM would give to its engine."""

    def __init__(self, tokenizer: Any) -> None:
        from vllm.renderers.hf import HfRenderer

        self._renderer = HfRenderer(_config(), tokenizer)

    def prompt_ids(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None = None,
        arguments: Mapping[str, object] | None = None,
    ) -> list[int]:
        """The ids of the prompt of ``POST /v1/chat/completions``."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest(messages=messages, tools=tools, chat_template_kwargs=arguments)
        given = None if request.tools is None else [tool.model_dump() for tool in request.tools]
        params = request.build_chat_params(None, "auto").with_defaults({"tools": given})
        _, prompt = self._renderer.render_messages(request.messages, params)
        ids = prompt.get("prompt_token_ids")
        assert ids is not None
        return list(ids)
