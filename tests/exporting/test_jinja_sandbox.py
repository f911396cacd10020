"""Chat templates in our sandbox and in transformers' own: the same text, or both refuse."""

from __future__ import annotations

from converters.gguf.jinja_template import Jinja
from converters.gguf.template_copy import probes
from tests.support.llama_cpp_source import chat_templates, in_a_few_templates

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def clock(pattern: str) -> str:
    return f"<{pattern}>"


@in_a_few_templates
def test_it_renders_what_transformers_does(few: bool) -> None:
    """On conversations with and without system messages, thoughts and tools."""
    from transformers.utils.chat_template_utils import render_jinja_template

    for name, template in chat_templates(few).items():
        rendered = 0
        for probe in probes():
            try:
                expected = render_jinja_template(
                    [[dict(message) for message in probe.messages]], chat_template=template, add_generation_prompt=True,
                    tools=[dict(tool) for tool in probe.tools] if probe.tools else None, strftime_now=clock, **SPECIAL,
                )[0][0]  # fmt: skip
                rendered += 1
            except Exception:
                expected = None
            assert Jinja(template, SPECIAL).attempt(probe.messages, clock, probe.tools) == expected, name
        assert rendered or name == "fireworks-ai-llama-3-firefunction-v2"  # which wants a variable of its own
