"""The Modelfile's grammar: what is written is what Ollama reads."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.ollama.modelfile import PARAMETER_NAMES, Modelfile
from converters.ollama.modelfile_parser import COMMANDS, DEPRECATED, PARAMETERS, ModelfileError, is_printable, parse
from lora2serve.errors import ExportError
from tests.support.drawn import examples


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
    ("text", "read"),
    [
        ("FROM a\r\nSYSTEM x\r\n", [("from", "a"), ("system", "x")]),
        ("FROM a\nSYSTEM \nLICENSE y", [("from", "a"), ("system", ""), ("license", "y")]),  # an empty value ends too
        ('FROM a\nSYSTEM """\none\n"""', [("from", "a"), ("system", "\none\n")]),
        ('FROM a\nSYSTEM """one """ two"""', [("from", "a"), ("system", 'one """ two')]),
        ("\u00a0FROM a", [("from", "a")]),  # dropped before it is seen
        ("FROM a\nSYSTEM a\u00a0b\u200dc\u3000d", [("from", "a"), ("system", "abcd")]),
        ("FROM a\nSYSTEM x # no comment", [("from", "a"), ("system", "x # no comment")]),
        ("FROM a\nPARAMETER mirostat 1", [("from", "a"), ("mirostat", "1")]),  # deprecated, warned there
        ("FROM a\nMESSAGE assistant \"\"\"b\nc\"\"\"", [("from", "a"), ("message", "assistant: b\nc")]),
    ],
)  # fmt: skip
def test_read_as_ollama_does(text: str, read: list[tuple[str, str]]) -> None:
    assert parse(text) == read


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("PARAMETER stop x", "no FROM"),
        ("FROM a\nPARAMETER  stop x", "unknown parameter ''"),
        ("FROM a\nPARAMETER temprature 1", "unknown parameter 'temprature'"),
        ("FROM a\nPARAMETER stop:x", "unexpected EOF"),
        ('FROM a\nSYSTEM "hi" he said', "unexpected EOF"),
        ('FROM a\nTEMPLATE """open', "unexpected EOF"),
        ('FROM a\nSYSTEM """one """\ntwo"""', "command must be one of"),
        ("FROM a\nMESSAGE tool x", "message role"),
        ("FORM a", "command must be one of"),
        ("FROM", "unexpected EOF"),
        ("FROM a\nSYSTEM", "unexpected EOF"),
    ],
)
def test_refused_as_ollama_does(text: str, why: str) -> None:
    with pytest.raises(ModelfileError, match=why):
        parse(text)


@pytest.mark.parametrize("lost", ["\u00a0", "\u3000", "\u200d", "\u2028", "\x1b", "\ue000"])
def test_characters_that_ollama_drops(lost: str) -> None:
    with pytest.raises(ExportError, match="it drops"):
        Modelfile("./a.gguf", system=f"a{lost}b").write()
    with pytest.raises(ExportError, match="it drops"):
        Modelfile("./a.gguf", stop=(f"<{lost}>",)).write()


@pytest.mark.engine
def test_printable_is_what_go_says(go_program: Path) -> None:
    """Every code point; a difference may only be one that we refuse and a newer Unicode of Go's takes."""
    printed = subprocess.run([go_program, "printable"], capture_output=True, text=True, check=True).stdout
    theirs = {c for start, end in json.loads(printed) for c in range(start, end)}
    ours = {c for c in range(0x110000) if is_printable(chr(c))}
    assert len(theirs) > 140_000
    assert not ours - theirs


def test_no_line_that_ollama_deprecates_or_does_not_know() -> None:
    """What we write by name is a parameter, with one space after PARAMETER; its values are numbers."""
    assert set(PARAMETER_NAMES.values()) <= set(PARAMETERS)
    assert not set(PARAMETERS) & set(DEPRECATED)
    text = Modelfile("./a.gguf", parameters=dict.fromkeys(PARAMETER_NAMES.values(), 1), stop=("a", "b")).write()
    lines = [line for line in text.splitlines() if line.startswith("PARAMETER")]
    assert len(lines) == len(PARAMETER_NAMES) + 2
    assert all(line.split(" ")[1] in PARAMETERS for line in lines)


@pytest.mark.parametrize(
    "modelfile",
    [
        {"model": "./a\nb.gguf"},
        {"system": 'one """\ntwo'},
        {"system": 'one """ \ntwo'},
        {"model": "./a.gguf", "requires": "0.30.0\nSYSTEM x"},
        {"adapter": '"a.gguf'},
    ],
)
def test_the_control(modelfile: dict[str, Any]) -> None:
    """What would end early, or become another command, is refused in one line."""
    with pytest.raises(ExportError) as caught:
        Modelfile(**{"model": "./a.gguf", **modelfile}).write()
    assert "\n" not in caught.value.message
    assert caught.value.hint


NASTY = st.sampled_from(
    ['"', '"""', '"""\n', ' """ ', "\n", "\r\n", "\t", " ", "{{ .System }}", "{{", "}}", "#", "FROM b", "\u00a0",
     "\u200d", "\u3000", "\u2028", "\ufe0f", "▁", "｜", "é", "🙂", "\\n", "'", "PARAMETER stop x\n", "\x1b", "\ufeff"]
)  # fmt: skip
TEXT = st.lists(NASTY | st.text(max_size=8), max_size=12).map("".join)
MODELFILES = st.builds(
    Modelfile,
    model=st.sampled_from(["./a.gguf", "./my model.gguf", "./é-Q4_K_M.gguf", "llama3.2:1b"]),
    template=st.none() | TEXT,
    system=st.none() | TEXT,
    parameters=st.dictionaries(
        st.sampled_from(sorted(PARAMETER_NAMES.values())),
        st.integers(-9, 99) | st.floats(0, 10, allow_nan=False) | st.booleans(),
    ),
    stop=st.lists(TEXT.filter(bool), max_size=4).map(tuple),
    adapter=st.none() | st.just("./a-lora.gguf"),
    requires=st.none() | st.just("0.30.0"),
)


@settings(max_examples=examples(40))
@given(MODELFILES)
def test_reads_what_was_written_or_says_so(modelfile: Modelfile) -> None:
    try:
        text = modelfile.write()
    except ExportError as error:
        assert "\n" not in error.message
        return
    assert parse(text) == list(modelfile.commands())


PLAIN = st.text(st.characters(exclude_categories=("C", "Z")) | st.sampled_from(" \n\t{}'"), min_size=1, max_size=60)


@settings(max_examples=examples(40))
@given(PLAIN, PLAIN, PLAIN)
def test_plain_contents_are_never_refused(template: str, system: str, stop: str) -> None:
    """Text without quotes and without characters that Ollama drops always passes, so the test above is no empty one."""
    modelfile = Modelfile("./a.gguf", template=template, system=system, stop=(stop,))
    clean = (
        all(is_printable(c) or c in "\n\t" for c in template + system + stop) and '"' not in template + system + stop
    )
    if clean:
        assert parse(modelfile.write()) == list(modelfile.commands())


@settings(max_examples=examples(40))
@given(st.lists(st.sampled_from([c.upper() + " " for c in COMMANDS]) | NASTY | st.text(max_size=20)).map("".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        commands = parse(text)
    except ModelfileError:
        return
    assert all(is_printable(c) or c in "\t\r\n" for _, value in commands for c in value)
