"""Go templates from Jinja ones: rendered by real Go and by transformers, over a corpus of real templates."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.gguf.jinja_template import Jinja, TrainedJinja
from converters.ollama import template_dates
from converters.ollama.chat import Chat
from converters.ollama.conversations import answer_first, apart, conversations, said, turns
from converters.ollama.go_template import (
    DerivedTemplate,
    compile_go,
    default_system,
    derive,
    ollama_data,
    prefers_jinja,
)
from converters.ollama.ollama_sink import LOOKALIKE_GUARD
from converters.ollama.template_not_proven import TemplateNotProven
from converters.ollama.template_parts import TemplateParts, quote, write_go
from tests.support.drawn import examples
from tests.support.golang import Renderer
from tests.support.llama_cpp_source import chat_templates

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
DAY = date(2026, 3, 9)
Go = Callable[..., list[str]]


@pytest.fixture(scope="session")
def go(go_render: Renderer) -> Go:
    """Renders (template, messages) pairs with Go's own text/template."""
    return lambda cases, day=DAY: [go_render(template, ollama_data(messages), day) for template, messages in cases]


def attempt(template: str) -> DerivedTemplate | str:
    try:
        return derive(TrainedJinja(template, SPECIAL))
    except TemplateNotProven as reason:
        return str(reason)


@pytest.mark.engine
def test_corpus(go: Go) -> None:
    """Every real template is proven in real Go on all conversations, or refused; the counts stand in docs/ollama.md."""
    results = {name: attempt(template) for name, template in chat_templates().items()}
    proven = {name: derived for name, derived in results.items() if isinstance(derived, DerivedTemplate)}
    assert len(results) >= 60
    for name, derived in proven.items():
        template = TrainedJinja(chat_templates()[name], SPECIAL)
        cases = list(conversations(derived.pieces.before_system is not None))
        for day in (DAY, date(2031, 11, 30)) if derived.dated else (DAY,):
            render = template.at(template_dates.on(day))
            answers = go([(derived.go(), messages) for messages in cases], day)
            assert answers == [render(messages) for messages in cases], name
        compare_apart(go, name, template, derived)
    refused = {name: derived for name, derived in results.items() if not isinstance(derived, DerivedTemplate)}
    print(f"{len(proven)} proven, {len(refused)} refused: {refused}")
    text = Path(__file__).parents[2].joinpath("docs", "ollama.md").read_text(encoding="utf-8")
    assert f"{len(results)} templates: {len(proven)} proven, {len(refused)} refused" in text


def compare_apart(go: Go, name: str, template: Jinja, derived: DerivedTemplate) -> None:
    """Conversations apart: the same in real Go, unless it is told that they differ; none that is told for nothing."""
    clock = template_dates.on(DAY)
    for kind, cases in apart(derived.pieces.before_system is not None).items():
        expected = [template.attempt(messages, clock) for messages in cases]
        answers = go([(derived.go(), messages) for messages in cases])
        same = all(text in (None, answer) for text, answer in zip(expected, answers, strict=True))
        assert (kind in derived.differ, kind in derived.refuses) == (not same, None in expected), (name, kind)


def test_gotpl_agrees_with_go(go: Go) -> None:
    """What proves a template at export time renders as Go does."""
    template = derive(Jinja(CHATML, SPECIAL)).go()
    cases = list(conversations(True))
    assert go([(template, messages) for messages in cases]) == [compile_go(template)(messages) for messages in cases]


def test_control_a_lost_newline_is_seen(go: Go) -> None:
    render = Jinja(CHATML, SPECIAL)
    pieces = derive(render).pieces
    broken = write_go(TemplateParts(**{**vars(pieces), "to_user": pieces.to_user.replace("\n", "", 1)}))
    two = turns(2)
    assert go([(broken, two)]) != [render(two)]
    assert compile_go(broken)(two) != render(two)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ messages | length }}", "printed 0 times"),
        ("{{ raise_exception('no') }}", "refuses"),
        (CHATML + "{{ strftime_now('%H:%M') }}", "knows only the date"),
        (CHATML + "{{ strftime_now('%A') }}", "knows only the date"),
        (CHATML + "{{ strftime_now('%m')|int }}", "no fixed pieces"),
        (CHATML.replace("m['content']", "strftime_now('%Y')[2:] + m['content']"), "no fixed pieces"),
        ("{% for m in messages %}{{ loop.index }}:{{ m.content }}\n{% endfor %}>", "different"),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}{% endfor %}", "printed 0 times"),
        (
            "{% for m in messages %}[{{ m.role }}]{{ m.content | replace('Hello', 'Bye') }}{% endfor %}>",
            "no fixed pieces",
        ),
    ],
)
def test_refused(template: str, why: str) -> None:
    with pytest.raises(TemplateNotProven, match=why):
        derive(Jinja(template, SPECIAL))


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_an_answer_that_comes_first(go: Go, system: str | None) -> None:
    """As Ollama sends it once the question before it no longer fits; the control is what an empty question would do."""
    template = Jinja(DEFAULT, SPECIAL)
    derived = derive(template)
    first = said(system=system) if system else []
    for messages in answer_first(False):
        expected = template([*first, *messages])
        assert go([(derived.go(), [*first, *messages])]) == [expected]
        assert go([(derived.go(), [*first, *said(user=""), *messages])]) != [expected]


def test_an_answer_that_comes_first_and_is_refused(go: Go) -> None:
    """It is left out: the prompt is that of the conversation from its first question on."""
    strict = "{% if messages[0].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    template = Jinja(strict, SPECIAL)
    derived = derive(template)
    assert derived.refuses == ("answer_first",)
    for messages in answer_first(False):
        assert go([(derived.go(), messages)]) == [template(messages[1:])]


@pytest.mark.parametrize(
    "strict", ["", "{% if messages[0].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"]
)
def test_a_system_message_that_is_refused(go: Go, strict: str) -> None:
    """As in training, it stands before the first question, or is one; the control leaves it out."""
    refusing = "{% for m in messages if m.role == 'system' %}{{ raise_exception('no') }}{% endfor %}"
    template = TrainedJinja(strict + refusing + CHATML, SPECIAL)
    derived = derive(template)
    assert derived.refuses == (*(("answer_first",) if strict else ()), "later_system")
    assert derived.differ == ()
    for messages in conversations(True):
        system, *others = messages
        if system["role"] == "system":
            merged = [said(user=f"{system['content']}\n\n{others[0]['content']}")[0], *others[1:]]
            assert go([(derived.go(), messages)]) == [Jinja(CHATML, SPECIAL)(merged)]
            assert go([(derived.go(), others)]) == [Jinja(CHATML, SPECIAL)(others)]
    first = [*said(system="Be brief."), *turns(2)[1:]]
    assert go([(derived.go(), first)]) == [Jinja(CHATML, SPECIAL)([*said(user="Be brief."), *first[1:]])]


@pytest.mark.parametrize(
    ("before", "place", "differ"),
    [
        ("", "each", ()),
        (
            "{% set messages = [messages[0]] + messages[1:] | rejectattr('role', 'equalto', 'system') | list %}",
            "first",
            (),
        ),
        (
            "{% set ns = namespace(s='') %}{% for m in messages if m.role == 'system' %}{% set ns.s = ns.s ~ m.content %}"
            "{% endfor %}{% if ns.s %}<<{{ ns.s }}>>{% endif %}{% set messages = messages | rejectattr('role', 'equalto',"
            " 'system') | list %}",
            "front",
            ("later_system",),
        ),
    ],
)
def test_later_system_messages(go: Go, before: str, place: str, differ: tuple[str, ...]) -> None:
    """In their place, nowhere or in front, as the Jinja has them; what Ollama joins otherwise is told."""
    template = Jinja(before + CHATML, SPECIAL)
    derived = derive(template)
    assert (derived.pieces.place, derived.differ) == (place, differ)
    compare_apart(go, place, template, derived)


@pytest.mark.parametrize("pattern", ["%Y-%m-%d", "%d %b %Y", "%B %d, %Y", "%F", "%y/%m/%d %%", "the %d.%m."])
def test_a_date_of_every_day(go: Go, pattern: str) -> None:
    """For three years, in real Go, what strftime says; the control is the day before."""
    text = template_dates.in_go(pattern)
    for day in (date(2027, 1, 1) + timedelta(n) for n in range(0, 1096, 13)):
        expected = template_dates.on(day)(pattern)
        assert go([(text, [])], day) == [expected] == [compile_go(text, day)([])]
        assert expected == day.strftime(pattern)
    assert go([(text, [])], DAY - timedelta(1)) != [template_dates.on(DAY)(pattern)]


def test_two_formats_in_one_template(go: Go) -> None:
    text = "{{ bos_token }}Year {{ strftime_now('%Y') }}.\n" + CHATML + "{{ strftime_now('%d %B') }}:"
    derived = derive(Jinja(text, SPECIAL))
    assert derived.dated
    assert "2026" not in derived.go()
    for day in template_dates.days():
        assert go([(derived.go(), turns(2))], day) == [Jinja(text, SPECIAL).at(template_dates.on(day))(turns(2))]


def test_a_system_message_in_the_last_turn(go: Go) -> None:
    """As Mistral Nemo has it."""
    text = (
        "{{ bos_token }}{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST]"
        "{% if loop.last and messages[0].role == 'system' %}<<{{ messages[0].content }}>>{% endif %}{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    derived = derive(Jinja(text, SPECIAL))
    assert derived.pieces.system_last
    cases = list(conversations(True))
    assert go([(derived.go("<s>"), messages) for messages in cases]) == [
        Jinja(text, SPECIAL)(messages).removeprefix("<s>") for messages in cases
    ]


def test_the_generation_tag(go: Go) -> None:
    """transformers' mark for what assistants say prints nothing."""
    marked = CHATML.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")
    assert derive(Jinja(marked, SPECIAL)).go() == derive(Jinja(CHATML, SPECIAL)).go()


def test_trimming_is_told() -> None:
    derived = derive(Jinja(CHATML.replace("m['content']", "m['content'] | trim"), SPECIAL))
    assert derived.trims
    assert not derive(Jinja(CHATML, SPECIAL)).trims


def test_bos_is_left_to_the_engine(go: Go) -> None:
    derived = derive(Jinja("{{ bos_token }}" + CHATML, SPECIAL))
    with_bos, without = go([(derived.go(), turns(1, "s")), (derived.go("<s>"), turns(1, "s"))])
    assert with_bos == "<s>" + without
    assert not without.startswith("<s>")


def test_thoughts_are_told() -> None:
    """Where the Jinja takes them out of earlier answers and a Go template cannot; the control takes nothing out."""
    drops = CHATML.replace("m['content']", "m['content'].split('</think>')[-1].lstrip('\\n')")
    assert derive(Jinja(drops, SPECIAL)).drops_thoughts
    assert not derive(Jinja(CHATML, SPECIAL)).drops_thoughts


DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Wexley.\nBe kind.<|im_end|>\n{% endif %}" + CHATML
)


def test_a_default_system_message(go: Go) -> None:
    """It becomes SYSTEM where that changes no prompt: Ollama then sends it itself."""
    template = Jinja(DEFAULT, SPECIAL)
    derived = derive(template)
    system = default_system(template, derived)
    assert system == "You are Wexley.\nBe kind."
    for messages in conversations(False):
        sent = [{"role": "system", "content": system}, *messages]
        assert go([(derived.go(), sent)]) == [template(messages)] == go([(derived.go(), messages)])


@pytest.mark.parametrize(
    "text",
    [
        CHATML,
        DEFAULT.replace("Wexley", "Wexley, on {{ strftime_now('%Y') }}"),
        DEFAULT.replace("Wexley", "Wex\u00a0ley"),  # a Modelfile cannot say it
        DEFAULT.replace("Wexley", "Wexley{# tools #}"),  # newer servers render the Jinja, with tools in it
        DEFAULT.replace(
            "{% endif %}" + CHATML, "{% else %}!{% endif %}" + CHATML
        ),  # one that is given is set otherwise
    ],
)
def test_no_default_system_message(text: str) -> None:
    template = Jinja(text, SPECIAL)
    assert default_system(template, derive(template)) is None


def distance(a: str, b: str) -> int:
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


@pytest.mark.engine
def test_a_refused_template_is_kept_apart() -> None:
    """The comment changes no prompt, and no template with fewer than 100 tildes is within 100 edits of it."""
    assert LOOKALIKE_GUARD.count("~") == 200
    alike = CHATML.replace("<|im_start|>", "<|start|>").replace("<|im_end|>", "<|end|>")
    assert distance(alike, CHATML) < 100  # what Ollama would take for ChatML
    assert distance(LOOKALIKE_GUARD + alike, CHATML) >= 200
    for name, text in chat_templates().items():
        assert text.count("~") < 100
        for messages in (turns(1), turns(2, "Be brief.")):
            try:
                expected = Jinja(text, SPECIAL).at(template_dates.on(DAY))(messages)
            except Exception:
                continue
            assert Jinja(LOOKALIKE_GUARD + text, SPECIAL).at(template_dates.on(DAY))(messages) == expected, name


def test_what_the_manifest_says_of_ollama_and_of_a_base() -> None:
    """Who renders, and what a base that is not exported here adds to prompts; the control's template prints BOS."""
    thinks, plain = CHATML + "{% if enable_thinking %}<think>{% endif %}", "{{ bos_token }}" + CHATML
    for text, architecture, renders, unlike in (
        (thinks, "gemma4", True, ["variables", "bos"]),
        (plain, "llama", False, []),
    ):
        chat = Chat(text, SPECIAL, derive(TrainedJinja(text, SPECIAL)), "", None, (), {}, adds_bos=True)
        record = chat.template_record(architecture, on_base=True).to_json()
        assert (record["ollama_renders"], record["base_unlike_training"]) == (renders, unlike)
        assert "base_unlike_training" not in chat.template_record(architecture).to_json()


def test_native_is_preferred_where_tools_are() -> None:
    assert prefers_jinja("{% if tools %}{% endif %}")
    assert not prefers_jinja(CHATML)


REAL = ("Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "mistralai-Mistral-Nemo-Instruct-2407",
        "google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct")  # fmt: skip
CONTENTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40).filter(
    lambda text: text == text.strip()
)


@cache
def real(name: str) -> tuple[Jinja, DerivedTemplate]:
    template = Jinja(chat_templates()[name], SPECIAL)
    return template, derive(template)


@settings(max_examples=examples(30))
@given(
    st.sampled_from(REAL[: examples(len(REAL))]),
    st.lists(CONTENTS, min_size=1, max_size=7).filter(lambda contents: len(contents) % 2),
    st.none() | CONTENTS,
    st.dates(),
)
def test_any_conversation(name: str, contents: list[str], system: str | None, day: date) -> None:
    """What nobody thought of: any text without white space around it, on any day."""
    template, derived = real(name)
    messages = turns(
        len(contents) // 2 + 1, system if derived.pieces.before_system is not None else None, contents.__getitem__
    )
    if day.year >= 1900:
        assert compile_go(derived.go(), day)(messages) == template.at(template_dates.on(day))(messages)


@given(st.text(max_size=30))
def test_quote_says_the_same(text: str) -> None:
    assert compile_go(quote(text))([]) == text
