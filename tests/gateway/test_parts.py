"""The parts of the gateway by themselves: bodies, limits, paths, adapters that come and go, configurations."""

from __future__ import annotations

import http.client
import itertools
import json
import shutil
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Mount

from lora2serve import Registry, start_gateway
from lora2serve.errors import RecipeError, UsageError
from lora2serve.gateway import gateway_config
from lora2serve.gateway.exchange import Recorder, prompt_text, read_reply
from lora2serve.gateway.gateway_config import CaptureConfig, GatewayConfig, RouteConfig, UpstreamConfig
from lora2serve.gateway.middleware import GatewayMiddleware
from lora2serve.gateway.model_names import AnswerNames, counting_tokens, parse_object, with_model
from lora2serve.gateway.security import is_closed
from tests.support.gateways import call, chat, metrics, test_bed, total, wait_for
from tests.support.stub_upstream import StubUpstream, answer, serving

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("towns"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["model", "a", 'b"model'] ), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=40)
@given(before=VALUES, after=VALUES, ascii=st.booleans(), indent=st.sampled_from([None, 2]), nested=st.booleans())
def test_only_the_name_changes(before: Any, after: Any, ascii: bool, indent: int | None, nested: bool) -> None:
    content = {"x": before, "model": "towns", "y": after}
    content = {"y": {"model": "towns", "z": after}, **content} if nested else content
    body = json.dumps(content, ensure_ascii=ascii, indent=indent).encode("utf-8", "surrogatepass")
    parsed = parse_object(body)
    if parsed is None:
        return  # half a character: no JSON that a server would read
    changed = with_model(body, parsed, "towns-1")
    assert json.loads(changed) == {**content, "model": "towns-1"}
    assert len(changed) == len(body) + 2, "nothing else has changed"


@pytest.mark.parametrize(
    "body",
    [
        b'{"mod\\u0065l": "towns", "a": {"model": "towns"}}', b'{"model": "t\\u006fwns"}',
        '{"model": "towns"}'.encode("utf-16"), b'{"model": "x", "model": "towns"}',
    ],
)  # fmt: skip
def test_names_in_other_spellings(body: bytes) -> None:
    content = parse_object(body)
    assert content is not None
    changed = json.loads(with_model(body, content, "towns-1"))
    assert changed["model"] == "towns-1" and changed.get("a") == content.get("a")


@settings(max_examples=40)
@given(cuts=st.lists(st.integers(0, 400), max_size=6), newline=st.sampled_from(["\n", "\r\n"]))
def test_events_in_any_pieces(cuts: list[int], newline: str) -> None:
    said = 'he said "model":"towns-1" é 🙂 \\'
    events = [
        {"model": "towns-1", "choices": [{"delta": {"content": said}}]}, {"response": {"model": "towns-1"}},
        {"model": "towns-10", "choices": []}, {"model": "towns-1", "choices": [], "usage": {"prompt_tokens": 1}},
    ]  # fmt: skip
    lines = [f"data: {json.dumps(event, ensure_ascii=False)}{newline}{newline}" for event in events]
    whole = "".join(lines).encode() + b"data: [DONE]" + newline.encode() * 2
    places = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    names = AnswerNames("towns-1", "towns", usage=True)
    got = b"".join(names.events(whole[start:end]) for start, end in itertools.pairwise(places)) + names.last()
    expected = [{**events[0], "model": "towns"}, {"response": {"model": "towns"}}, events[2]]
    data = [line[6:] for line in got.decode().split(newline) if line.startswith("data: ")]
    assert [json.loads(line) for line in data[:-1]] == expected and data[-1] == "[DONE]"
    untouched = AnswerNames("other", "towns")
    assert untouched.events(whole) + untouched.last() == whole


@given(cuts=st.lists(st.integers(0, 400), max_size=4))
@settings(max_examples=20)
def test_a_fingerprint_stays(cuts: list[int]) -> None:
    """vLLM has it in the event that tells tokens, or where that is not asked for in the one before."""
    events = [
        {"model": "m", "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]},
        {"model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    ]  # fmt: skip
    told = {"model": "m", "choices": [], "usage": {"prompt_tokens": 1}, "system_fingerprint": "vllm-1"}

    def written(*content: object) -> bytes:
        return b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in content)

    whole = written(*events, told) + b"data: [DONE]\n\n"
    places = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    names = AnswerNames("m", "m", usage=True)
    got = b"".join(names.events(whole[start:end]) for start, end in itertools.pairwise(places)) + names.last()
    expected = written(events[0], {**events[1], "system_fingerprint": "vllm-1"}) + b"data: [DONE]\n\n"
    assert got.replace(b'},"system', b'}, "system').replace(b'],"system', b'], "system') == expected
    first = AnswerNames("m", "m", usage=True)
    assert first.events(written(events[0])) == written(events[0]), "only the end waits"


def test_tokens_are_asked_for_only_where_that_is_known() -> None:
    path = "/v1/chat/completions"
    for content, added in (
        ({"stream": True}, True), ({"stream": False}, False), ({}, False), ({"stream": 1}, False),
        ({"stream": True, "stream_options": None}, False), ({"stream": True, "n": 2}, False),
    ):  # fmt: skip
        body = json.dumps({"model": "a", **content}).encode()
        changed, counted = counting_tokens(body, {"model": "a", **content}, path)
        assert counted == added and (changed == body) == (not added)
        if added:
            assert json.loads(changed)["stream_options"] == {"include_usage": True}
    assert counting_tokens(b'{"stream": true}', {"stream": True}, "/v1/responses") == (b'{"stream": true}', False)


def test_answers_in_all_forms() -> None:
    chat_form = {"choices": [{"index": 0, "message": {"content": "a", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
                              "finish_reason": "tool_calls"}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}  # fmt: skip
    reply = read_reply(json.dumps(chat_form).encode(), stream=False)
    assert (reply.text, reply.finish, reply.prompt_tokens, reply.completion_tokens) == ("af{}", "tool_calls", 3, 4)
    responses = {
        "output": [{"content": [{"type": "output_text", "text": "b"}]}],
        "usage": {"input_tokens": 1, "output_tokens": 2},
    }
    reply = read_reply(json.dumps(responses).encode(), stream=False)
    assert (reply.text, reply.completion_tokens) == ("b", 2)
    lines = [{"message": {"content": "c"}}, {"message": {"content": "d"}, "done": True, "done_reason": "stop"}]
    reply = read_reply("\n".join(map(json.dumps, lines)).encode(), stream=True)
    assert (reply.text, reply.finish) == ("cd", "stop"), "Ollama's own"
    assert read_reply(b"<html>", stream=False) == read_reply(b"data: {", stream=True)
    parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:..."}}]
    assert prompt_text({"messages": [{"role": "user", "content": parts}, {"content": None}]}) == "x\n\n"
    assert prompt_text({"prompt": ["a", "b"]}) == "a\nb" and prompt_text({"prompt": [1, 2]}) == "\n"


def test_paths_that_clients_may_not_reach() -> None:
    for path in (
        "/v1/load_lora_adapter", "/v1//unload_lora_adapter/", "/V1/Load_LoRA_Adapter", "/adapters/x", "/sleep",
        "/metrics/", "/api/pull", "/api/blobs/sha256:0", "/collective_rpc", "/update_weights",
    ):  # fmt: skip
        assert is_closed(path), path
    for path in (
        "/v1/chat/completions",
        "/v1/models",
        "/health",
        "/tokenize",
        "/api/chat",
        "/",
        "/v1/responses/x/cancel",
    ):
        assert not is_closed(path), path


def test_limits_and_closed_paths(tmp_path: Path, seed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"body_bytes": 2000, "header_bytes": 1500, "requests": 3}
    with test_bed(tmp_path, seed, limits=limits) as bed:
        chat(bed.url)
        before = len(bed.stub.requests)
        assert chat(bed.url, "x" * 3000).status == 413
        assert call(bed.url, "/echo", b"x" * 3000).status == 413
        assert chat(bed.url, headers={"x-long": "x" * 2000}).status == 431
        for path in ("/v1/load_lora_adapter", "/v1/%6Coad_lora_adapter", "/v1//load_lora_adapter"):
            assert call(bed.url, path, {"lora_name": "evil", "lora_path": "/etc"}).status == 403
        assert bed.stub.calls == ["load towns-1"] and len(bed.stub.requests) == before
        assert call(bed.url, "/gateway/routes").status == 403, "no key is set"
        monkeypatch.setenv("LORA2SERVE_ADMIN_KEY", "k")
        assert call(bed.url, "/gateway/routes").status == 401
        state = call(bed.url, "/gateway/routes", headers={"Authorization": "Bearer k"}).json
        assert state == {"routes": {"towns": {"champion": 1}}, "loaded": {"prod": ["towns@1"]}, "requests": 1}
        assert call(bed.url, "/gateway/health").json == {"status": "ok"}
        assert len(chat(bed.url, headers={"x-request-id": "bad id\t"}).headers["x-request-id"]) == 32
        evil = [{"role": "user", "content": "x"}]
        assert call(bed.url, body={"model": ["towns"], "messages": evil}).status == 404, "no name: passed on as it is"
        assert call(bed.url, "/v1/chat/completions", b"[" * 900).status != 500
        bed.stub.faults.gate = gate = threading.Event()
        before = len(bed.stub.requests)
        with ThreadPoolExecutor(3) as pool:
            under_way = [pool.submit(chat, bed.url, stream=True) for _ in range(3)]
            wait_for(lambda: len(bed.stub.requests) == before + 3, "three are under way")
            assert chat(bed.url).status == 503
            assert call(bed.url, "/gateway/health").status == 200, "busy, and not ill"
            assert total(metrics(bed.url), "lora2serve_in_flight") == 3
            gate.set()
            assert [future.result().status for future in under_way] == [200] * 3


def test_adapters_make_room(tmp_path: Path, seed: Path) -> None:
    """Never more than the server holds; pinned ones stay, and one that a request names stays until it is over."""
    upstreams = {"prod": {"max_cpu_loras": 2}}
    aliases = {"champion": 1, "a": 2, "b": 3}
    with test_bed(tmp_path, seed, upstreams=upstreams, aliases=aliases) as bed:
        assert chat(bed.url).version == "towns@1"
        assert chat(bed.url, model="towns@a").version == "towns@2"
        assert chat(bed.url, model="towns@b").version == "towns@3"
        assert sorted(bed.stub.adapters) == ["towns-1", "towns-3"], "the champion is pinned"
        bed.stub.faults.gate = gate = threading.Event()
        under_way = threading.Thread(target=lambda: chat(bed.url, "x y", model="towns@b", stream=True))
        under_way.start()
        wait_for(lambda: bed.stub.asked()[-1] == "towns-3" and bed.stub.requests[-1][2].get("stream"), "it is there")
        bed.stub.faults.gate = None
        assert chat(bed.url, model="towns@a").version == "towns@2"
        assert "towns-3" in bed.stub.adapters, "a request names it"
        gate.set()
        under_way.join()
        samples = metrics(bed.url)
        loads = "lora2serve_adapter_loads_total"
        assert total(samples, loads, version="2", result="ok") == 2 and total(samples, loads, result="failed") == 0
        assert total(samples, "lora2serve_adapter_resident", version="1") == 1
        assert total(samples, "lora2serve_adapter_bytes", version="1", where="slot") > 0
        path = Path(bed.stub.adapters["towns-1"])
        assert path.parent == tmp_path / "copies" and path.name.startswith("towns-1-"), "a copy that stays as it is"


def test_a_second_gateway_finds_what_is_there(tmp_path: Path, seed: Path) -> None:
    with test_bed(tmp_path, seed) as bed:
        chat(bed.url)
        with start_gateway(tmp_path / "gateway.yaml", registry=tmp_path / "registry", port=0) as second:
            assert chat(second.address).version == "towns@1"
            assert bed.stub.calls == ["load towns-1"], "not loaded twice"
            bed.registry.promote("towns@2")
            bed.becomes(2)
            wait_for(lambda: chat(second.address).version == "towns@2", "both see it")


class WebPage(StubUpstream):
    """What answers at a wrong address: its list of models is no JSON."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/models":
            await answer(send, 200, b"<html>", kind=b"text/html")
        else:
            await super().__call__(scope, receive, send)


def test_a_server_of_something_else(tmp_path: Path, seed: Path) -> None:
    """It is said what it answers, to clients and where the gateway runs, and the next look may be better."""
    with test_bed(tmp_path, seed, stubs={"prod": WebPage()}) as bed:
        got = chat(bed.url)
        assert (got.status, got.json["error"]["message"]) == (
            502, "towns@1 cannot be served: prod: /v1/models answers 200: <html>",
        )  # fmt: skip
        wait_for(lambda: any("answers 200: <html>" in warning for warning in bed.told.warnings), "a warning")
        assert [entry["id"] for entry in call(bed.url, "/v1/models").json["data"]] == ["towns", "towns@champion"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{}", "upstreams: none, expected one or more"),
        ("upstreams: {a: {url: ftp://x}}", "upstreams.a.url: ftp://x: invalid address"),
        ("upstreams: {a: {}}", "upstreams.a.url: missing"),
        ("upstreams: {a: {url: 'http://x', serves: {towns: m}}}", "upstreams.a.serves: 'towns', expected NAME@NUMBER"),
        ("upstreams: {a: {url: 'http://x'}}\nroutes: {m: {challenger: {share: 2}}}", "routes.m.challenger.share: 2.0, expected 0"),
        ("upstreams: {a: {url: 'http://x'}}\nroutes: {m: {shadow: {alias: '7'}}}", "routes.m.shadow.alias: alias '7'"),
        ("upstreams: {a: {url: 'http://x'}}\ncapture: {text: 1}", "capture.text: unknown key (did you mean 'capture.texts'?)"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError) as raised:
        gateway_config.load(path, [])
    assert problem in raised.value.message


def test_the_docs_have_all_keys_and_their_defaults(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text(encoding="utf-8")
    text = page.partition("## All keys of gateway.yaml")[2].partition("```yaml\n")[2].partition("```")[0]
    path = tmp_path / "gateway.yaml"
    path.write_text(text)
    config = gateway_config.load(path, [])
    prod = UpstreamConfig(url="http://localhost:8000")
    assert config == GatewayConfig(upstreams={"prod": prod}, routes={"medical-qa": RouteConfig()})

    def keys(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: keys(each) for name, each in value.items()}
        return {each.name: keys(getattr(value, each.name)) for each in fields(value)} if is_dataclass(value) else None

    assert keys(yaml.safe_load(text)) == keys(config), "each key stands there"


def test_all_problems_at_once(tmp_path: Path) -> None:
    """What is wrong in one place hides nothing elsewhere, nor is said to be missing what only does not fit."""
    path = tmp_path / "gateway.yaml"
    path.write_text(
        "upstreams: {a: {url: nowhere, timeout: -1}, b: {}}\n"
        "routes: {m: {unit_header: '', decisions: {rules: [{measure: truht}, {measure: errors, worse_by: 2}]}}, n: 5}\n"
        "capture: {redact: privacy}\n"
    )
    with pytest.raises(RecipeError) as raised:
        gateway_config.load(path, [])
    assert [line.removeprefix(f"{path}: ").partition(":")[0] for line in raised.value.message.splitlines()] == [
        "upstreams.a.timeout", "routes.m.decisions.rules[0].measure", "routes.n", "upstreams.a.url", "upstreams.b.url",
        "routes.m.decisions.rules[1].worse_by", "routes.m.unit_header", "capture.redact",
    ]  # fmt: skip
    path.write_text("upstreams: 5")
    with pytest.raises(RecipeError) as raised:
        gateway_config.load(path, [])
    assert raised.value.message == f"{path}: upstreams: 5, expected keys and values"


def test_upstreams_of_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text("upstreams: {a: {url: 'http://x', max_cpu_loras: 3}}")
    config = gateway_config.load(path, ["a=http://y:1", "b=http://z"])
    assert [(name, one.url, one.max_cpu_loras) for name, one in config.upstreams.items()] == [
        ("a", "http://y:1", 3), ("b", "http://z", 8),
    ]  # fmt: skip
    for words in (["a"], ["=http://x"], ["a=http://x", "a=http://y"]):
        with pytest.raises(UsageError, match="--upstream"):
            gateway_config.load(None, words)
    for name in ("nowhere:f", "json:nothing", "json", "json:__name__"):
        with pytest.raises(UsageError, match=r"capture\.redact"):
            Recorder(CaptureConfig(redact=name))


def test_inside_another_application(tmp_path: Path, seed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same middleware around the server itself, in its process; one of Starlette, as vLLM is."""
    shutil.copytree(seed / "registry", tmp_path / "registry")
    with Registry(tmp_path / "registry") as registry:
        registry.promote("towns@1")
    path = tmp_path / "gateway.yaml"
    path.write_text(f"upstreams: {{vllm: {{folder: {tmp_path}/copies}}}}\ncapture: {{folder: {tmp_path}/records}}\n")
    monkeypatch.setenv("LORA2SERVE_GATEWAY", str(path))
    monkeypatch.setenv("LORA2SERVE_REGISTRY", str(tmp_path / "registry"))
    stub = StubUpstream()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, str]]:
        app.state.own = "of the application"
        yield {"own": "of each request"}

    async def handle(scope: Any, receive: Any, send: Any) -> None:
        assert (scope["app"].state.own, scope["state"]["own"]) == ("of the application", "of each request")
        await stub(scope, receive, send)

    app = Starlette(routes=[Mount("/", handle)], lifespan=lifespan)
    app.add_middleware(GatewayMiddleware)
    with serving(app) as url:
        got = chat(url, "a b", stream=True)
        assert got.text == "towns-1 says a b" and got.version == "towns@1" and b'"model":"towns"' in got.body
        assert chat(url, model="base").text == "base says hi"
        assert call(url, "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "y"}).status == 403
        assert total(metrics(url), "vllm:num_requests_waiting") == 0 and b"vllm:" in call(url, "/metrics").body
        assert stub.calls == ["load towns-1"]
        stub.faults.gate = threading.Event()
        place = urlsplit(url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
        body = {"model": "towns", "stream": True, "messages": [{"role": "user", "content": "x"}]}
        connection.request("POST", "/v1/chat/completions", json.dumps(body).encode())
        response = connection.getresponse()
        response.read1(10)
        connection.close()
        response.close()
        wait_for(lambda: stub.left == ["towns-1"], "the application noticed")
