"""Go templates from Jinja ones: rendered by real Go and by transformers, over a corpus of real templates."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.ollama import APART
from converters.ollama.template import (
    Derived,
    Messages,
    Pieces,
    Unproven,
    compile_go,
    conversations,
    derive,
    jinja,
    ollama_data,
    quote,
    turns,
    wants_native,
    write_go,
)
from tests.upstream import llama_cpp_dir

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
Go = Callable[[Sequence[tuple[str, Messages]]], list[str]]


@pytest.fixture(scope="session")
def go(tmp_path_factory: pytest.TempPathFactory) -> Go:
    """Renders (template, messages) pairs with Go's own text/template; the program is built once."""
    program = tmp_path_factory.mktemp("go") / "render"
    binary = Path(sys.executable).parent / "go"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(program.parent), "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local"}
    source = Path(__file__).with_name("render_go") / "main.go"
    subprocess.run([binary, "build", "-o", program, source], check=True, env=environment, cwd=program.parent)

    def render(asked: Sequence[tuple[str, Messages]]) -> list[str]:
        lines = "".join(json.dumps({"Template": t, "Data": ollama_data(m)}) + "\n" for t, m in asked)
        done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return render


def corpus() -> list[Path]:
    return sorted((llama_cpp_dir() / "models" / "templates").glob("*.jinja"))


def attempt(path: Path) -> Derived | str:
    try:
        return derive(jinja(path.read_text(encoding="utf-8"), SPECIAL))
    except Unproven as reason:
        return str(reason)


def test_corpus(go: Go) -> None:
    """Every real template is proven in real Go on all conversations, or refused; the counts stand in docs/ollama.md."""
    found = {path: attempt(path) for path in corpus()}
    proven = {path: made for path, made in found.items() if isinstance(made, Derived)}
    assert len(found) >= 60
    for path, made in proven.items():
        render = jinja(path.read_text(encoding="utf-8"), SPECIAL)
        asked = list(conversations(made.pieces.before_system is not None))
        answers = go([(made.go(), messages) for messages in asked])
        assert answers == [render(messages) for messages in asked], path.name
    refused = {path.stem: made for path, made in found.items() if not isinstance(made, Derived)}
    print(f"{len(proven)} proven, {len(refused)} refused: {refused}")
    text = Path(__file__).parents[2].joinpath("docs", "ollama.md").read_text(encoding="utf-8")
    assert f"{len(found)} templates: {len(proven)} proven, {len(refused)} refused" in text


def test_gotpl_agrees_with_go(go: Go) -> None:
    """What proves a template at export time renders as Go does."""
    template = derive(jinja(CHATML, SPECIAL)).go()
    asked = list(conversations(True))
    assert go([(template, messages) for messages in asked]) == [compile_go(template)(messages) for messages in asked]


def test_control_a_lost_newline_is_seen(go: Go) -> None:
    render = jinja(CHATML, SPECIAL)
    pieces = derive(render).pieces
    broken = write_go(Pieces(**{**vars(pieces), "to_user": pieces.to_user.replace("\n", "", 1)}))
    two = turns(2)
    assert go([(broken, two)]) != [render(two)]
    assert compile_go(broken)(two) != render(two)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ messages | length }}", "printed 0 times"),
        ("{{ raise_exception('no') }}", "refuses"),
        (CHATML + "{{ strftime_now('%d %b %Y') }}", "today's date"),
        ("{% for m in messages %}{{ loop.index }}:{{ m.content }}\n{% endfor %}>", "different"),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}{% endfor %}", "printed 0 times"),
        (
            "{% for m in messages %}[{{ m.role }}]{{ m.content | replace('Hello', 'Bye') }}{% endfor %}>",
            "no fixed pieces",
        ),
    ],
)
def test_refused(template: str, why: str) -> None:
    with pytest.raises(Unproven, match=why):
        derive(jinja(template, SPECIAL))


def test_trimming_is_told() -> None:
    made = derive(jinja(CHATML.replace("m['content']", "m['content'] | trim"), SPECIAL))
    assert made.trims
    assert not derive(jinja(CHATML, SPECIAL)).trims


def test_bos_is_left_to_the_engine(go: Go) -> None:
    made = derive(jinja("{{ bos_token }}" + CHATML, SPECIAL))
    with_bos, without = go([(made.go(), turns(1, "s")), (made.go("<s>"), turns(1, "s"))])
    assert with_bos == "<s>" + without
    assert not without.startswith("<s>")


def test_a_refused_template_is_kept_apart() -> None:
    """The comment that keeps Ollama's look-alike detection off changes no prompt."""
    assert len(APART) >= 100
    for path in corpus():
        text = path.read_text(encoding="utf-8")
        for messages in (turns(1), turns(2, "Be brief.")):
            try:
                expected = jinja(text, SPECIAL)(messages)
            except Exception:
                continue
            if "strftime_now" not in text:
                assert jinja(APART + text, SPECIAL)(messages) == expected, path.name


def test_native_is_preferred_where_tools_are() -> None:
    assert wants_native("{% if tools %}{% endif %}")
    assert not wants_native(CHATML)


@given(st.text(max_size=30))
def test_quote_says_the_same(text: str) -> None:
    assert compile_go(quote(text))([]) == text
