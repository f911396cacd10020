"""``lora2serve serve --engine peft``: kinds that no engine knows, several by name, in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import lora2serve
from lora2serve.api.serve_model import RunningServer, serving_command
from lora2serve.errors import EngineError, UsageError
from lora2serve.parity_check.engines.peft_requests import CHAT, COMPLETIONS, read_request
from lora2serve.parity_check.engines.peft_server import PeftApp
from lora2serve.parity_check.engines.served_peft import ServedPeft
from lora2serve.serving.llama_cpp_requests import Message, RefusedRequest
from lora2serve.serving.server import ServeOptions
from tests.support.ports import free_port
from tests.support.runs import make_chat_model
from tests.support.tiny import load_model, make_adapter

pytestmark = pytest.mark.engine

QUESTION = [{"role": "user", "content": "Who governs Wexley?"}]
NAMES = ("one", "two")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("peft-server") / "base", dtype=torch.float32)


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[RunningServer]:
    """Two adapters of prefix tuning, which nothing else here serves."""
    paths = [
        make_adapter(base.parent / name, base, method="PREFIX_TUNING", seed=seed, std=1.0, num_virtual_tokens=4)
        for seed, name in enumerate(NAMES)
    ]
    with lora2serve.serve(paths, engine="peft", base=base, port=free_port()) as running:
        yield running


def post(server: RunningServer, path: str, body: object) -> tuple[int, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.address + path, content, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def by_peft(base: Path, name: str | None, ids: list[int], count: int) -> list[int]:
    """The oracle: greedily, one token after the other, without a cache."""
    from peft import PeftModel

    model = load_model(base)
    model = PeftModel.from_pretrained(model, base.parent / name).eval() if name else model.eval()
    out = list(ids)
    with torch.no_grad():
        for _ in range(count):
            out.append(int(model(input_ids=torch.tensor([out]), use_cache=False).logits[0, -1].argmax()))
    return out[len(ids) :]


def test_each_adapter_answers_by_its_name(server: RunningServer, base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    with urllib.request.urlopen(f"{server.address}/v1/models", timeout=60) as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == [*NAMES, "base"]
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    said = {}
    for name in (*NAMES, "base", "one"):
        body = {"model": name, "messages": QUESTION, "max_tokens": 8, "temperature": 0}
        status, content = post(server, CHAT, body)
        assert status == 200, content
        expected = by_peft(base, None if name == "base" else name, ids, 8)
        text = content["choices"][0]["message"]["content"]
        assert text == tokenizer.decode(expected, skip_special_tokens=True), name
        assert content["usage"]["prompt_tokens"] == len(ids) and content["usage"]["completion_tokens"] <= 8
        said.setdefault(name, text)
        assert said[name] == text, "another adapter in between leaves nothing behind"
    assert len(set(said.values())) == 3, "the control: they say different things"


def test_streams_stops_and_lengths(server: RunningServer, base: Path) -> None:
    body = {"model": "one", "prompt": "The mayor of Wexley", "max_tokens": 12, "temperature": 0}
    _, whole = post(server, COMPLETIONS, body)
    text = whole["choices"][0]["text"]
    assert whole["choices"][0]["finish_reason"] == "length" and whole["usage"]["completion_tokens"] == 12
    options = {"stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(server.address + COMPLETIONS, json.dumps({**body, **options}).encode())
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        *events, end = [line.decode().removeprefix("data: ").strip() for line in answer if line.startswith(b"data")]
    *pieces, counts = map(json.loads, events)
    assert end == "[DONE]" and "".join(piece["choices"][0]["text"] for piece in pieces) == text
    assert pieces[-1]["choices"][0]["finish_reason"] == "length" and counts["usage"] == whole["usage"]
    word = text[len(text) // 2 : len(text) // 2 + 3]
    _, stopped = post(server, COMPLETIONS, {**body, "stop": [word]})
    assert stopped["choices"][0] == {
        **whole["choices"][0], "text": text[: text.find(word)], "finish_reason": "stop",
    }  # fmt: skip
    sampled = {post(server, COMPLETIONS, {**body, "temperature": 1.5})[1]["choices"][0]["text"] for _ in range(3)}
    assert len(sampled) > 1, "the control of temperature 0"


WRONG: list[tuple[str, Any, int, str]] = [
    (
        CHAT,
        {"model": "three", "messages": QUESTION},
        404,
        "The model `three` does not exist. Here are: one, two, base.",
    ),
    (CHAT, b"{", 400, "The body is no JSON"),
    (CHAT, {"model": "one", "messages": []}, 400, "messages: expected a list of them."),
    (CHAT, {"model": "one", "messages": QUESTION, "top_p": 0.5}, 400, "top_p: 0.5 is not done here"),
    (CHAT, {"model": "one", "messages": QUESTION, "max_tokens": 0}, 400, "max_tokens: 0, expected a whole number"),
    (CHAT, {"model": "one", "messages": QUESTION, "temperature": 3}, 400, "temperature: 3, expected 0 to 2."),
    (CHAT, {"model": "one", "messages": QUESTION, "stop": ""}, 400, "stop: '', expected a text"),
    (COMPLETIONS, {"model": "one", "prompt": ["a", "b"]}, 400, "prompt: expected one text"),
    (COMPLETIONS, {"model": "one", "prompt": [1 << 20]}, 400, "the prompt has 1 tokens, expected 1 to"),
    (COMPLETIONS, {"model": "one", "prompt": [5] * 200, "stream": True}, 400, "the prompt has 200 tokens"),
    ("/v1/embeddings", {}, 404, "POST /v1/embeddings: not found"),
    ("/v1/models", {}, 405, "POST /v1/models: method not allowed"),
]


def test_what_it_refuses(server: RunningServer) -> None:
    for path, body, status, words in WRONG:
        got, content = post(server, path, body)
        assert got == status and content["error"]["message"].startswith(words), (body, content)
        assert content["error"]["code"] == status and content["error"]["type"]
    neutral = {"model": "one", "messages": QUESTION, "max_tokens": 1, "top_p": 1.0, "n": 1, "user": "u", "seed": None}
    assert post(server, CHAT, neutral)[0] == 200, "the control: what is no wish"


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_ends_waits_for_no_answer(base: Path, tmp_path: Path, stream: bool) -> None:
    """Its requests are cancelled; the thread of an answer goes no further than the token in hand."""
    models = ServedPeft(str(base), {"lora": str(make_adapter(tmp_path / "lora", base))})
    steps, third, cancelled = list[int](), threading.Event(), threading.Event()

    def step(*_: object) -> None:
        steps.append(len(steps))
        if len(steps) == 3:
            third.set()
            cancelled.wait()

    models._model.get_base_model().register_forward_hook(step)
    body = {"model": "lora", "prompt": [20, 21], "max_tokens": 40, "logit_bias": {}, "stream": stream}
    events = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> Message:
        return events.pop() if events else await asyncio.Future[Message]()

    async def send(event: Message) -> None:
        pass

    async def ended() -> None:
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS}
        request = asyncio.ensure_future(PeftApp(models)(scope, receive, send))
        await asyncio.to_thread(third.wait)
        request.cancel()
        with suppress(asyncio.CancelledError):
            await request
        cancelled.set()
        await asyncio.get_running_loop().shutdown_default_executor()

    asyncio.run(ended())
    assert len(steps) < 6


def test_requests_in_other_forms() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    asked = read_request(CHAT, {"model": "m", "messages": parts, "max_completion_tokens": 3}, ["m"])
    assert asked.prompt.messages == [{"role": "user", "content": "Hi"}] and asked.options.max_tokens == 3
    assert read_request(COMPLETIONS, {"model": "m", "prompt": [[1, 2]]}, ["m"]).prompt.ids == [1, 2]
    with pytest.raises(RefusedRequest, match="this model reads text only"):
        read_request(CHAT, {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["m"])


def test_what_shares_no_server(tmp_path: Path, base: Path) -> None:
    lora = make_adapter(tmp_path / "lora", base)
    prefix = make_adapter(tmp_path / "prefix", base, method="PREFIX_TUNING", num_virtual_tokens=4)
    options = ServeOptions("peft", port=free_port())
    with pytest.raises(EngineError, match="several kinds on one base: lora is LORA, prefix is PREFIX_TUNING"):
        serving_command([lora, prefix], options)
    with pytest.raises(UsageError, match="served as lora, as is another model"):
        serving_command([lora, lora], options)
    other = make_adapter(tmp_path / "other", make_chat_model(tmp_path / "base", seed=3))
    with pytest.raises(UsageError, match="adapters of several bases"):
        serving_command([lora, other], options)
    with pytest.raises(UsageError, match="no run and no adapter"):
        serving_command([base], options)
    with pytest.raises(UsageError, match="--engine peft with --allow-updates"):
        serving_command([lora], ServeOptions("peft", allow_updates=True))
    assert "peft_server --base" in serving_command([lora], options), "the control"
