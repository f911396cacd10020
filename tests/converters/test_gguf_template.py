"""The GGUF's copy of a chat template, in llama.cpp's own engine with llama-server's variables: what training rendered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from converters.gguf import gguf_settings, header, template_copy
from converters.gguf.jinja_template import Jinja
from converters.gguf.template_copy import ADD_BOS, COMMENT, KEY, MODEL, as_trained, as_trained_keys, probes
from converters.ollama.conversations import answer_first, conversations, later_system
from converters.ollama.ollama_sink import LOOKALIKE_GUARD
from lora2serve.artifacts.manifest import Manifest
from tests.support.jinja_engine import JinjaEngine, build
from tests.support.llama_cpp_source import chat_templates
from tests.support.runs import make_chat_model
from tests.support.settings import exported

DAY = date(2026, 3, 9)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clock(pattern: str) -> str:
    return DAY.strftime(pattern)


def sample() -> list[Any]:
    """36 conversations: plain ones, with thoughts, beginning with an answer, with later system messages."""
    plain, thoughts = list(conversations(True))[::4], [probe.messages for probe in probes() if not probe.tools]
    return [*plain, *thoughts[:7], *list(answer_first(True))[::7], *list(later_system())[::5]][:36]


@pytest.fixture(scope="module")
def engine() -> Iterator[JinjaEngine]:
    running = JinjaEngine(build())
    yield running
    running.close()


def differing(engine: JinjaEngine, jinja: Jinja, text: str, cases: list[Any], thinking: bool = True) -> list[int]:
    """The conversations that llama-server renders otherwise from ``text`` than training did from ``jinja``."""
    trained = [jinja.attempt(messages, clock) for messages in cases]
    served = engine(text, cases, TOKENS, DAY, thinking)
    pairs = enumerate(zip(trained, served, strict=True))
    return [number for number, (expected, prompt) in pairs if expected is not None and prompt != expected]


@pytest.mark.engine
@pytest.mark.parametrize(("step", "fewest", "controls"), [(6, 10, 2), pytest.param(1, 60, 18, marks=pytest.mark.slow)])
def test_real_templates(engine: JinjaEngine, step: int, fewest: int, controls: int) -> None:
    """Those of llama.cpp on 36 conversations; the control is the templates as they are."""
    cases, changed, unlike = sample(), [], []
    assert len(cases) == 36
    templates = dict(list(chat_templates().items())[::step])
    assert len(templates) >= fewest
    for name, template in templates.items():
        jinja = Jinja(template, TOKENS)
        copy = as_trained(jinja)
        assert differing(engine, jinja, copy, cases) == [], name
        changed += [name] if copy != template else []
        unlike += [name] if differing(engine, jinja, template, cases) else []
    assert len(unlike) >= controls
    assert set(unlike) <= set(changed)


@pytest.mark.engine
@pytest.mark.parametrize("thinking", [True, False])
def test_variables_of_a_server(engine: JinjaEngine, thinking: bool) -> None:
    """One that is set, one with a default of the template's own, one that the tokenizer has not; white space stays."""
    text = (
        "\n  {% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{% if not date_string is defined %}"
        "{% set date_string = '1 May' %}{% endif %} {{ date_string }}{{ bos_token }}{{ documents is defined }}\n"
        + CHATML
    )
    jinja = Jinja(text, {"eos_token": "</s>"})
    copy = as_trained(jinja)
    names = {line.split()[2] for line in copy.removesuffix(text).splitlines()[1:]}
    assert names == {"enable_thinking", "date_string", "bos_token", "documents"}
    assert differing(engine, jinja, copy, sample()[:4], thinking) == []
    assert differing(engine, jinja, text, sample()[:4], thinking)
    assert differing(engine, jinja, LOOKALIKE_GUARD + copy, sample()[:4], thinking) == []


def test_what_a_server_renders_alike_stays() -> None:
    """Thinking on by itself: the copy is the template, and a request can turn it off."""
    text = CHATML + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>{% endif %}"
    assert as_trained(Jinja(text, TOKENS)) == text
    assert as_trained(Jinja(text.replace("is false", "is true"), TOKENS)).startswith(COMMENT)


@pytest.mark.parametrize(
    ("keys", "adds"),
    [
        ({ADD_BOS: True, MODEL: "gpt2"}, True),
        ({MODEL: "llama"}, True),
        ({ADD_BOS: False, MODEL: "llama"}, False),
        ({MODEL: "gpt2"}, False),
    ],
)
def test_bos_that_training_had_not(tmp_path: Path, keys: dict[str, Any], adds: bool) -> None:
    """A tokenizer that adds BOS, and a template that prints none; the control prints it."""
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    files = {"tokenizer_config.json": tmp_path / "tokenizer_config.json"}
    for text, foreign in ((CHATML, adds), ("{{ bos_token }}" + CHATML, False), ("<s>" + CHATML, False)):
        before = header.typed({**keys, KEY: text, f"{KEY}.tool_use": text})
        after = as_trained_keys(files, before)
        expected = header.typed({ADD_BOS: False}) if foreign else {}
        assert after == {**before, **expected}


def test_every_template_of_a_file() -> None:
    """The one for tools as well."""
    text = CHATML + "{{ enable_thinking }}"
    after = as_trained_keys({}, header.typed({KEY: text, f"{KEY}.tool_use": text}))
    assert after[KEY].value == after[f"{KEY}.tool_use"].value == template_copy.as_trained(Jinja(text, {}))
    assert str(after[KEY].value).endswith(text)
    assert after[KEY].value != text


@pytest.mark.engine
def test_an_export(tmp_path: Path) -> None:
    """Thinking, which the server would turn on, and BOS, which the tokenizer adds: neither was in training."""
    base = make_chat_model(tmp_path / "base")
    text = CHATML + "{% if enable_thinking %}<think>{% endif %}"
    (base / "chat_template.jinja").write_text(text)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"bos_token": "<|endoftext|>", "add_bos_token": True}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    export = exported(base, tmp_path / "out", "ollama", quants="F16")
    stored = gguf_settings.read(next(export.glob("*.gguf")))
    line = "{%- set enable_thinking = undefined %}\n"
    assert (stored[KEY].value, stored[ADD_BOS].value) == (COMMENT + line + text, False)
    told = Manifest.read(export).to_json()["template"]
    assert isinstance(told, dict)
    assert (told["kind"], told["native_preferred"], told["ollama_renders"]) == ("go", True, False)
    assert (told["refuses"], told["differ"]) == ([], [])
