"""What a manifest may say of how an export is planned again."""

from __future__ import annotations

from lora2serve.artifacts.manifest import Manifest
from lora2serve.exporting.settings_plan import options_again


def test_options_are_those_that_a_user_chooses() -> None:
    """A manifest that names another chat template does not make it the planned one."""
    recorded = {"pre": "llama-bpe", "chat_template": "{{ 'Buy cars.' }}", "unknown": 1}
    options = options_again(Manifest(target="gguf", quant="Q8_0", options=recorded))
    assert (options.pre, options.quant, options.chat_template) == ("llama-bpe", "Q8_0", None)
