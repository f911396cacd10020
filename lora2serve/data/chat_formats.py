"""Well-known chat formats by name, for base models whose tokenizer has no template: what `data.chat_template` names.

Each is written from the format's published facts: which tokens open and close a turn, and where space stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora2serve.data.chat_beginnings import compiled
from lora2serve.data.tokenizer import Tokenizer
from lora2serve.errors import DataError, did_you_mean, first_line


@dataclass(frozen=True)
class ChatFormat:
    """A Jinja template, and the tokens that the vocabulary must have for it."""

    template: str
    tokens: tuple[str, ...]


_EACH = "{% for message in messages %}"
_END = "{% endfor %}{% if add_generation_prompt %}"
CHAT_FORMATS: Mapping[str, ChatFormat] = {
    "chatml": ChatFormat(
        _EACH + "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        + _END + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": ChatFormat(
        "{{ bos_token }}" + _EACH
        + "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
        + _END + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": ChatFormat(  # its system turn is the beginning of the user's first
        "{{ bos_token }}{% set started = namespace(text='') %}" + _EACH
        + "{% if message.role == 'system' %}{% set started.text = message.content | trim + '\n\n' %}{% else %}"
        "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' + started.text"
        " + message.content | trim + '<end_of_turn>\n' }}{% set started.text = '' %}{% endif %}"
        + _END + "{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "mistral": ChatFormat(  # its system turn is the beginning of the user's first
        "{{ bos_token }}{% set started = namespace(text='') %}" + _EACH
        + "{% if message.role == 'system' %}{% set started.text = message.content + '\n\n' %}"
        "{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}{% else %}"
        "{{ '[INST] ' + started.text + message.content + ' [/INST]' }}{% set started.text = '' %}{% endif %}"
        "{% endfor %}",
        (),
    ),
    "phi3": ChatFormat(
        _EACH + "{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}"
        + _END + "{{ '<|assistant|>\n' }}{% endif %}",
        ("<|user|>", "<|assistant|>", "<|end|>"),
    ),
}  # fmt: skip


def set_chat_template(tokenizer: Tokenizer, name: str) -> None:
    """Give ``tokenizer`` the template of a file, or one of ``CHAT_FORMATS``.

    DataError for a name that is neither, and for a format whose tokens the vocabulary has not.
    """
    if Path(name).is_file():
        tokenizer.chat_template = _template_of(Path(name))
        return
    if name not in CHAT_FORMATS:
        near = did_you_mean(name, CHAT_FORMATS)
        raise DataError(
            f"data.chat_template: {name!r}, expected a file or one of {', '.join(CHAT_FORMATS)}{near}",
            "paths are relative to the recipe's file",
        )
    known = tokenizer.get_vocab()
    missing = [token for token in CHAT_FORMATS[name].tokens if token not in known]
    if missing:
        fitting = [other for other, form in CHAT_FORMATS.items() if all(token in known for token in form.tokens)]
        raise DataError(
            f"data.chat_template: {name} needs {', '.join(missing)}, which this tokenizer does not have",
            f"it has the tokens of {', '.join(fitting)}",
        )
    tokenizer.chat_template = CHAT_FORMATS[name].template


def _template_of(path: Path) -> str:
    """The text of a file; DataError for one that holds no template."""
    from jinja2 import TemplateSyntaxError

    try:
        text = path.read_text(encoding="utf-8")
        compiled(text)
    except OSError as error:
        raise DataError(f"data.chat_template: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"data.chat_template: {path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except TemplateSyntaxError as error:
        raise DataError(f"data.chat_template: {path}:{error.lineno}: no template ({first_line(error)})") from None
    if not text.strip():
        raise DataError(f"data.chat_template: {path}: empty")
    return text
