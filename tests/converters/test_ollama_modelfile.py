"""The Modelfile's grammar: what is written is what Ollama reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.ollama.modelfile import Modelfile, ModelfileError, parse
from lora2serve.errors import ExportError


def test_every_command() -> None:
    text = (
        '\ufeff# a comment\nFROM ./a.gguf\nparameter temperature 0.7\nPARAMETER stop "<|im_end|>"\n'
        'TEMPLATE """{{ .Prompt }}\nsay """ twice\n"""\nSYSTEM Be brief. \nMESSAGE user Hello there\nREQUIRES 0.30.0'
    )
    assert parse(text) == [
        ("from", "./a.gguf"),
        ("temperature", "0.7"),
        ("stop", "<|im_end|>"),
        ("template", '{{ .Prompt }}\nsay """ twice\n'),
        ("system", "Be brief."),
        ("message", "user: Hello there"),
        ("requires", "0.30.0"),
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("PARAMETER stop x", "no FROM"),
        ("FROM a\nPARAMETER  stop x", "expected a word"),
        ('FROM a\nSYSTEM "hi" he said', "unexpected EOF"),
        ('FROM a\nTEMPLATE """open', "unexpected EOF"),
        ("FORM a", "command must be one of"),
    ],
)
def test_refused_as_ollama_does(text: str, why: str) -> None:
    with pytest.raises(ModelfileError, match=why):
        parse(text)


@pytest.mark.parametrize("lost", ["\u00a0", "\u3000", "\u200d", "\u2028", "\x1b", "\ue000"])
def test_characters_that_ollama_drops(lost: str) -> None:
    with pytest.raises(ExportError, match="would read"):
        Modelfile("./a.gguf", system=f"a{lost}b").write()
    with pytest.raises(ExportError, match="would read"):
        Modelfile("./a.gguf", stop=(f"<{lost}>",)).write()


def test_the_control() -> None:
    """A mark that closes the text early is found."""
    with pytest.raises((ExportError, ModelfileError)):
        Modelfile("./a.gguf", system='one """\ntwo').write()


PLAIN = st.text(st.characters(exclude_categories=("C", "Z")) | st.sampled_from(' \n\t{}"'), min_size=1, max_size=60)


@given(PLAIN, PLAIN)
def test_reads_what_was_written_or_says_so(system: str, stop: str) -> None:
    made = Modelfile("./a.gguf", system=system, stop=(stop,), parameters={"temperature": 0.7, "top_k": 20})
    try:
        text = made.write()
    except (ExportError, ModelfileError):
        return
    assert dict(parse(text)) == {
        "from": "./a.gguf",
        "system": system,
        "stop": stop,
        "temperature": "0.7",
        "top_k": "20",
    }


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text)
    except ModelfileError:
        return
