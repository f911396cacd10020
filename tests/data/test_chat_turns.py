"""A turn is trained as it is served: over real chat templates, held to what transformers renders for a server."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from datetime import date
from functools import cache
from typing import Any

import pytest
from jinja2 import TemplateError, UndefinedError
from transformers import AddedToken, AutoTokenizer

from benchmarks.turns import plainly
from lora2serve.data.chat_formats import set_chat_template
from lora2serve.data.rendering import IGNORE, RenderedSample, Renderer
from lora2serve.data.rows import ChatRow, Message
from lora2serve.data.served_template import ChatTemplate
from lora2serve.errors import DataError
from tests.support.llama_cpp_source import chat_templates, in_a_few_templates
from tests.support.runs import DEMO

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
# Like Qwen3, Qwen3.5 and gpt-oss: the last answer is written otherwise than earlier ones.
THINK = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{'<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if loop.last else '') + m.content + '<|im_end|>\n'}}"
    "{% else %}{{'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
# Like DeepSeek-R1's distills and QwQ: the generation prompt opens a thought that history does not have.
OPENED = CHATML.replace("assistant\n'}}{% endif %}", "assistant\n<think>\n'}}{% endif %}")
TURNS: list[Message] = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "ALPHA."},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "BRAVO."},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "CHARLIE."},
]
ANSWERS = ("ALPHA.", "BRAVO.", "CHARLIE.")
REFUSED = {  # a template that wants tools, or a variable of its own
    "CohereForAI-c4ai-command-r-plus-tool_use", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "fireworks-ai-llama-3-firefunction-v2",
}  # fmt: skip
# What ends a turn there, beside the special tokens that the test's tokenizer finds in a template by their form.
ENDS = {
    "Apertus-8B-Instruct": "<|assistant_end|>", "Apriel-1.6-15b-Thinker-fixed": "<|end|>",
    "ByteDance-Seed-OSS": "<seed:eos>", "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|END_OF_TURN_TOKEN|>",
    "GLM-4.6": "<|user|>", "GLM-4.7-Flash": "<|user|>", "NVIDIA-Nemotron-Nano-v2": "<SPECIAL_12>",
    "Reka-Edge": "<sep>", "Cohere2MoE": "<|END_OF_TURN_TOKEN|>", "Kimi-K3": "<|end_of_msg|>",
    "upstage-Solar-Open-100B": "<|end|>", "microsoft-Phi-3.5-mini-instruct": "<|end|>", "google-gemma-4-31B-it": "<turn|>",
    "google-gemma-4-31B-it-interleaved": "<turn|>", "tencent-Hy3": "<｜hy_eos:opensource｜>",
    "poolside-Laguna-S-2.1": "</assistant>", "poolside-Laguna-XS-2.1": "</assistant>",
    "poolside-Laguna-XS.2": "</assistant>", "unsloth-Apriel-1.5": "<|end|>",
}  # fmt: skip
SPECIAL = re.compile(r"<[|｜][^<>'\"{}\n]+[|｜]>|<\w*(?:_of_|im_)\w+>|\[e~\[|\]~b\]|\[/?[A-Z_]+\]")


@cache
def every_special_token() -> Any:
    """The demo's tokenizer with the special tokens of all templates."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    found = {name for template in chat_templates().values() for name in SPECIAL.findall(template)}
    names = sorted({*found, *ENDS.values()} - set(tokenizer.get_vocab()))
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    tokenizer.model_max_length = 1 << 20
    return tokenizer


def tokenizer_with(template: str) -> Any:
    """The demo's tokenizer with a template."""
    tokenizer = copy.copy(every_special_token())
    tokenizer.chat_template = template
    return tokenizer


def renderer(tokenizer: Any, *ends: str) -> Renderer:
    return Renderer(ChatTemplate(tokenizer, tuple(tokenizer.convert_tokens_to_ids(list(ends)))))


def learned(samples: Sequence[RenderedSample]) -> list[tuple[list[int], list[int]]]:
    """Each run of learned tokens, with the ids before it."""
    runs = []
    for sample in samples:
        assert len(sample.ids) == len(sample.labels)
        start = 0
        for place, label in enumerate([*sample.labels, IGNORE]):
            before = IGNORE if place == 0 else sample.labels[place - 1]
            start = place if label != IGNORE and before == IGNORE else start
            if label == IGNORE and before != IGNORE:
                assert sample.labels[start:place] == sample.ids[start:place]
                runs.append((sample.ids[:start], sample.ids[start:place]))
    return runs


def served(tokenizer: Any, messages: Sequence[Message], **arguments: Any) -> list[list[int]]:
    """What transformers makes of the conversation before each answer, as a server asks for it."""
    return [
        list(tokenizer.apply_chat_template(messages[:n], add_generation_prompt=True, return_dict=False, **arguments))
        for n, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


@in_a_few_templates
def test_every_answer_of_every_template(few: bool) -> None:
    """Three answers are learned with their end, each after the very ids that a server holds.

    The control: cut where answers begin, a whole rendering would not be what a server sends for many of them.
    """
    shared, rewritten = 0, 0
    for name in chat_templates(few):
        if name in REFUSED:
            with pytest.raises((TypeError, UndefinedError)):
                tokenizer_with(chat_templates()[name]).apply_chat_template(TURNS, tokenize=False)
            continue
        samples, whole = every_answer(name)
        shared += samples == 1
        rewritten += whole
    assert shared >= (13 if few else 40)
    assert rewritten >= (5 if few else 15)


def every_answer(name: str) -> tuple[int, bool]:
    """How many samples there are, and whether the template writes history otherwise than it is served."""
    end = ENDS.get(name, "<|im_end|>")
    tokenizer = tokenizer_with(chat_templates()[name])
    samples = renderer(tokenizer, end).render(ChatRow(TURNS)).samples
    runs = learned(samples)
    prompts = served(tokenizer, TURNS)
    assert [before for before, _ in runs] == prompts, name
    for (_, ids), answer in zip(runs, ANSWERS, strict=True):
        text = tokenizer.decode(ids)
        assert text.count(answer) == 1, name
        assert text.rstrip().endswith(tuple(renderer(tokenizer, end).template.ends.texts)), name
        assert text.split(answer)[0].count("</think>") < 2
    assert [text for sample in samples for text in sample.learned] == [tokenizer.decode(ids) for _, ids in runs]
    assert all(tokenizer.decode(sample.ids) == sample.text for sample in samples)
    whole = list(tokenizer.apply_chat_template(TURNS, return_dict=False))
    return len(samples), any(whole[: len(prompt)] != prompt for prompt in prompts)


@pytest.mark.parametrize("name", ["chatml", "meta-llama-Llama-3.1-8B-Instruct", "google-gemma-2-2b-it"])
def test_a_template_that_rewrites_nothing_gives_one_sample(name: str) -> None:
    """The ids and labels of the whole rendering, bit by bit."""
    tokenizer = tokenizer_with(chat_templates().get(name, CHATML))
    end = {"chatml": "<|im_end|>", "google-gemma-2-2b-it": "<end_of_turn>"}.get(name, "<|eot_id|>")
    chats: list[list[Message]] = [
        TURNS,
        TURNS[:2],
        [*TURNS[:3], {"role": "assistant", "content": "Grüße, 東京\n\n🙂 {}"}],
    ]
    for messages in chats:
        (sample,) = renderer(tokenizer, end).render(ChatRow(messages)).samples
        assert (sample.ids, sample.labels) == plainly(tokenizer, messages)


def texts(template: str, messages: Sequence[Message], **row: Any) -> list[list[str]]:
    """The learned texts of each sample."""
    tokenizer = tokenizer_with(template)
    return [sample.learned for sample in renderer(tokenizer).render(ChatRow(messages, **row)).samples]


def test_an_answer_that_is_rewritten_later_has_a_sample_of_its_own() -> None:
    assert texts(CHATML, TURNS) == [["ALPHA.<|im_end|>\n", "BRAVO.<|im_end|>\n", "CHARLIE.<|im_end|>\n"]]
    assert texts(THINK, TURNS) == [[f"<think>\n\n</think>\n\n{answer}<|im_end|>\n"] for answer in ANSWERS]


def test_a_thought_that_the_prompt_opens_is_ended_before_the_answer() -> None:
    assert texts(OPENED, TURNS) == [[f"\n</think>\n\n{answer}<|im_end|>\n"] for answer in ANSWERS]
    thinking: list[Message] = [TURNS[0], {"role": "assistant", "content": "ALPHA.", "reasoning_content": "Hm."}]
    inside: list[Message] = [TURNS[0], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nALPHA."}]
    for messages in (thinking, inside):
        assert texts(OPENED, messages) == [["Hm.\n</think>\n\nALPHA.<|im_end|>\n"]]


def test_weight_0_is_not_learned() -> None:
    skipped: list[Message] = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]
    assert texts(CHATML, skipped) == [["BRAVO.<|im_end|>\n", "CHARLIE.<|im_end|>\n"]]
    tokenizer = tokenizer_with(CHATML)
    one, other = (renderer(tokenizer).render(ChatRow(chat)).samples for chat in (TURNS, skipped))
    assert [sample.ids for sample in one] == [sample.ids for sample in other]


def test_the_assistant_speaks_first() -> None:
    chat: list[Message] = [{"role": "assistant", "content": "Welcome!"}, *TURNS[:2]]
    assert texts(CHATML, chat) == [["Welcome!<|im_end|>\n", "ALPHA.<|im_end|>\n"]]
    strict = "{% if messages[0].role == 'system' %}!{% endif %}" + CHATML  # as Qwen2.5's: it wants a first message
    with pytest.raises(UndefinedError):
        ChatTemplate(tokenizer_with(strict)).serve(ChatRow(chat)).render([], generation_prompt=True)
    assert texts(strict, chat) == [["Welcome!<|im_end|>\n", "ALPHA.<|im_end|>\n"]]


def test_an_end_that_no_template_writes_is_added_or_refused() -> None:
    end = "('' if loop.last and m.role == 'assistant' else '<|im_end|>\n')"
    bare = CHATML.replace("m['content'] + '<|im_end|>\n'", f"m['content'] + {end}")
    assert texts(bare, TURNS) == [["ALPHA.<|im_end|>", "BRAVO.<|im_end|>", "CHARLIE.<|im_end|>"]]
    tokenizer = tokenizer_with(bare.replace("<|im_end|>", "###"))
    assert [run[1][-1] for run in learned(renderer(tokenizer).render(ChatRow(TURNS)).samples)] == [
        tokenizer.eos_token_id
    ] * 3
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="writes no end of an answer"):
        renderer(tokenizer).render(ChatRow(TURNS)).samples


def losses(template: str, messages: Sequence[Message], **row: Any) -> set[str]:
    return set(renderer(tokenizer_with(template)).render(ChatRow(messages, **row)).losses)


def test_what_a_template_leaves_out() -> None:
    """Each of it once a row; nothing of a conversation that is written whole."""
    system: list[Message] = [{"role": "system", "content": "Be brief."}, *TURNS]
    tool = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}
    call: dict[str, Any] = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
    calling: list[Message] = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"seen":1}'},
        {"role": "assistant", "content": "ALPHA.", "reasoning_content": "Hm."},
        TURNS[2],
        {"role": "assistant", "content": "BRAVO.", "reasoning_content": "So."},
    ]
    qwen3 = chat_templates()["Qwen-Qwen3-0.6B"]
    assert losses(qwen3, system) == set()
    assert losses(qwen3, calling, tools=[tool]) == {"thoughts of an earlier answer"}
    assert losses(CHATML, calling, tools=[tool], chat_template_kwargs={"enable_thinking": True}) == {
        "a call of a tool that is learned", "an earlier call of a tool", "thoughts of an answer that is learned",
        "thoughts of an earlier answer", "a tool that may be called", "chat_template_kwargs.enable_thinking",
    }  # fmt: skip
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    assert losses(silent, system) == {"a system turn"}


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("chatml", "Qwen3-Coder"), ("llama3", "meta-llama-Llama-3.1-8B-Instruct"), ("gemma", "google-gemma-2-2b-it"),
        ("phi3", "microsoft-Phi-3.5-mini-instruct"), ("mistral", "unsloth-mistral-Devstral-Small-2507"),
    ],
)  # fmt: skip
def test_formats_by_name_are_those_of_the_models(name: str, like: str) -> None:
    """What stands around the turns is what the published template writes, but for system turns that it adds."""
    tokenizer = tokenizer_with("")
    set_chat_template(tokenizer, name)
    ours = tokenizer.apply_chat_template(TURNS, tokenize=False)
    theirs = tokenizer_with(chat_templates()[like]).apply_chat_template(TURNS, tokenize=False)
    if name == "mistral":  # the newest writes no space around
        ours = ours.replace("[INST] ", "[INST]").replace(" [/INST] ", "[/INST]")
    for text in (ours, theirs):
        assert text.count("one?") == 1
    inner = [text[text.index("one?") : text.index("CHARLIE.")] for text in (ours, theirs)]
    before = [text[: text.index("one?")][-12:] for text in (ours, theirs)]
    assert inner[0] == inner[1]
    assert before[1].endswith(before[0][-6:])
    assert [len(sample.learned) for sample in renderer(tokenizer).render(ChatRow(TURNS)).samples] == [3]
    system: list[Message] = [{"role": "system", "content": "Be brief."}, *TURNS]
    assert renderer(tokenizer).render(ChatRow(system)).losses == frozenset()


def test_the_day_is_pinned() -> None:
    template = "{{ strftime_now('%d %b %Y') }}|" + CHATML
    pinned = ChatTemplate(tokenizer_with(template), day=date(2024, 2, 29))
    assert not pinned.prints_date
    (sample,) = Renderer(pinned).render(ChatRow(TURNS)).samples
    assert sample.text.startswith("29 Feb 2024|<|im_start|>user")
    assert pinned.prints_date
    today = ChatTemplate(tokenizer_with(template))
    assert Renderer(today).render(ChatRow(TURNS)).samples[0].text.startswith(f"{date.today():%d %b %Y}|")
    assert not ChatTemplate(tokenizer_with(CHATML)).prints_date


def test_a_system_turn_that_a_template_refuses_is_put_before_the_user() -> None:
    gemma = tokenizer_with(chat_templates()["google-gemma-2-2b-it"])
    system: list[Message] = [{"role": "system", "content": "Be brief."}, *TURNS]
    with pytest.raises(TemplateError, match="System role not supported"):
        gemma.apply_chat_template(system, tokenize=False)
    rendered = renderer(gemma, "<end_of_turn>").render(ChatRow(system))
    (sample,) = rendered.samples
    assert "<start_of_turn>user\nBe brief.\n\none?<end_of_turn>" in sample.text
    assert len(sample.learned) == 3
    assert len(rendered.losses) == 1 and "a system turn, which it refuses" in min(rendered.losses)
    nemo = tokenizer_with(chat_templates()["mistralai-Mistral-Nemo-Instruct-2407"])  # writes it before the last user's
    samples = renderer(nemo).render(ChatRow(system)).samples
    assert [before for before, _ in learned(samples)] == served(nemo, system)
    assert [sample.learned for sample in samples] == [[f"{answer}<|im_end|>"] for answer in ANSWERS]


def test_weight_0_in_a_whole_conversation() -> None:
    """Everything else is learned; where a template rewrites the answer, it is refused and not learned after all."""
    skipped: list[Message] = [*TURNS[:3], {**TURNS[3], "weight": 0}, *TURNS[4:]]
    (sample,) = renderer(tokenizer_with(CHATML)).render(ChatRow(skipped), completion_only=False).samples
    (plain,) = renderer(tokenizer_with(CHATML)).render(ChatRow(TURNS), completion_only=False).samples
    assert plain.labels == plain.ids == sample.ids
    assert [label for label in sample.labels if label == IGNORE]
    assert "BRAVO.<|im_end|>\n".join(sample.learned) == plain.text
    decoded = every_special_token().decode([token for token in sample.labels if token != IGNORE])
    assert decoded == "".join(sample.learned)
    with pytest.raises(DataError, match=r"messages\[3\]: weight 0"):
        renderer(tokenizer_with(THINK)).render(ChatRow(skipped), completion_only=False)


@in_a_few_templates
def test_an_assistant_who_speaks_first_in_every_template(few: bool) -> None:
    """Where transformers renders such a conversation, both answers are learned, the second as it is served."""
    chat: list[Message] = [{"role": "assistant", "content": "Welcome."}, TURNS[0], TURNS[1]]
    learning = 0
    for name, template in chat_templates(few).items():
        tokenizer = tokenizer_with(template)
        try:
            alone = tokenizer.apply_chat_template(chat[:1], tokenize=False)
            expected = tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True, return_dict=False)
        except Exception:  # a template raises what it likes: many want a user first
            continue
        if "Welcome." not in alone:
            continue
        runs = learned(renderer(tokenizer, ENDS.get(name, "<|im_end|>")).render(ChatRow(chat)).samples)
        texts = [tokenizer.decode(ids) for _, ids in runs]
        assert len(runs) == 2 and "Welcome." in texts[0] and "ALPHA." in texts[1], name
        assert runs[1][0] == list(expected), name
        learning += 1
    assert learning >= (15 if few else 20)


@in_a_few_templates
def test_tools_in_every_template(few: bool) -> None:
    """Every prompt of a conversation with a call, its result and an answer is what transformers renders of it."""
    tool = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
    call: dict[str, Any] = {
        "id": "call12345",
        "type": "function",
        "function": {"name": "look", "arguments": {"at": "x"}},
    }
    chat: list[Message] = [
        TURNS[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"seen": 1}', "tool_call_id": "call12345", "name": "look"},
        {"role": "assistant", "content": "ALPHA."},
    ]
    tools, shown, calls = [{"type": "function", "function": tool}], 0, set()
    for name, template in chat_templates(few).items():
        tokenizer = tokenizer_with(template)
        try:
            expected = served(tokenizer, chat, tools=tools)
            tokenizer.apply_chat_template(chat, tools=tools, tokenize=False)
        except Exception:  # a template raises what it likes
            continue
        rendered = renderer(tokenizer, ENDS.get(name, "<|im_end|>")).render(ChatRow(chat, tools=tools))
        assert [before for before, _ in learned(rendered.samples)] == expected, name
        shown += "Looks." in rendered.samples[0].text
        if "look" in rendered.samples[0].learned[0]:
            calls.add(name)
        else:
            assert "a call of a tool that is learned" in rendered.losses, name
    assert shown >= (13 if few else 40) and len(calls) >= (13 if few else 45)
    assert "NVIDIA-Nemotron-Nano-v2" in calls, "which opens a thought before words, and none before a call"
