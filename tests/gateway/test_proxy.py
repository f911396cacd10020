"""What a client of the gateway sees, to the byte, and what reaches the servers behind it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.gateways import CHAT, TestBed, call, chat, metrics, test_bed, total, wait_for
from tests.support.stub_upstream import StubUpstream


@pytest.fixture
def bed(tmp_path: Path, seed: Path) -> Iterator[TestBed]:
    with test_bed(tmp_path, seed) as made:
        yield made


def test_an_alias_becomes_its_version_and_back(bed: TestBed) -> None:
    got = chat(bed.url, "who is it", temperature=0.5)
    assert got.status == 200 and got.text == "towns-1 says who is it"
    assert got.json["model"] == "towns", "the client sees the name that it sent"
    assert got.version == "towns@1" and got.headers["x-lora2serve-arm"] == "champion"
    path, headers, body = bed.stub.requests[-1]
    assert (path, body["model"], body["temperature"]) == (CHAT, "towns-1", 0.5)
    assert headers["x-request-id"] == got.headers["x-request-id"]
    assert bed.stub.asked(warm=True)[0] == "towns-1" and bed.stub.calls[0] == "load towns-1"
    named = chat(bed.url, model="towns@champion")
    assert named.json["model"] == "towns@champion" and named.headers["x-lora2serve-arm"] == "named"


def test_a_stream_is_as_from_the_server(bed: TestBed) -> None:
    """Chunk by chunk, and to the byte what the server itself sends to whoever asks for the version."""
    chat(bed.url)
    body = {"model": "towns-1", "messages": [{"role": "user", "content": 'a "model":"towns-1" \\ é'}], "stream": True}
    direct = call(bed.stub.url, CHAT, body)
    got = call(bed.url, CHAT, {**body, "model": "towns"})
    assert got.body == direct.body.replace(b'"model":"towns-1"', b'"model":"towns"')
    assert b"[DONE]" in got.body and b'"usage"' not in got.body and b'"model":"towns-1"' not in got.body
    counted = {**body, "model": "towns", "stream_options": {"include_usage": True}}
    assert b'"usage"' in call(bed.url, CHAT, counted).body, "who asks for it gets it"

    bed.stub.faults.gate = threading.Event()
    place = urlsplit(bed.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
    connection.request("POST", CHAT, json.dumps({**body, "model": "towns"}).encode())
    response = connection.getresponse()
    first = response.read1(1 << 16)
    assert first.endswith(b"\n\n") and first.count(b"data:") == 1, "the first event is there while the server waits"
    bed.stub.faults.gate.set()
    assert first + response.read() == got.body
    connection.close()


def test_everything_else_passes_as_bytes(bed: TestBed) -> None:
    sent = bytes(range(256)) * 50
    got = call(bed.url, "/echo?a=%2F&b=c+d", sent, {"Content-Type": "application/octet-stream"})
    assert (got.status, got.body, got.headers["x-echo"]) == (201, sent, "a=%2F&b=c+d")
    assert chat(bed.url, model="base").text == "base says hi"
    missing = chat(bed.url, model="nobody")
    assert missing.status == 404 and missing.body == chat(bed.stub.url, model="nobody").body
    spaced = b'{ "model" :\t"towns", "messages": [{"role": "user", "content": "x"}], "n": 1.0, "big": 123456789012345678901234567890}'
    assert call(bed.url, CHAT, spaced).text == "towns-1 says x"
    assert bed.stub.requests[-1][2]["big"] == 123456789012345678901234567890


def test_models_are_aliases(bed: TestBed) -> None:
    chat(bed.url)
    names = [entry["id"] for entry in call(bed.url, "/v1/models").json["data"]]
    assert names == ["base", "towns", "towns@champion"], "what the gateway has loaded is its own affair"
    assert call(bed.url, "/v1/models/towns").json["id"] == "towns"
    assert call(bed.url, "/v1/models/nobody").status == 404


def test_a_client_that_leaves_ends_the_work(bed: TestBed) -> None:
    chat(bed.url)
    bed.stub.faults.gate = threading.Event()
    place = urlsplit(bed.url)
    for model in ("towns", "base"):
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
        body = {"model": model, "messages": [{"role": "user", "content": "a b c"}], "stream": True}
        connection.request("POST", CHAT, json.dumps(body).encode())
        response = connection.getresponse()
        response.read1(100)
        connection.close()
        response.close()
    wait_for(lambda: sorted(bed.stub.left) == ["base", "towns-1"], "the server noticed")
    bed.stub.faults.gate = None
    bed.stub.faults.hang = True
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
    connection.request("POST", CHAT, json.dumps({"model": "towns", "messages": []}).encode())
    wait_for(lambda: bed.stub.requests[-1][2]["messages"] == [], "it is there")
    connection.close()
    wait_for(lambda: bed.stub.left[2:] == ["towns-1"], "the server noticed, before it answered")
    assert [record.error for record in bed.records(3)] == ["", "client_left", "client_left"]


def test_a_promotion_is_seen(bed: TestBed) -> None:
    """Streams under way finish on the old version, and every answer is of one version as a whole."""
    bed.stub.faults.token_seconds = 0.05
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(chat(bed.url, "a b c d e f", stream=True))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(bed.stub.asked()) == 3, "three streams")
    start = time.monotonic()
    bed.registry.promote("towns@2")
    bed.becomes(2)
    assert time.monotonic() - start < 5, "a poll takes a tenth of a second here"
    assert chat(bed.url).version == "towns@2"
    for thread in threads:
        thread.join()
    assert [answer.text for answer in answers] == ["towns-1 says a b c d e f"] * 3
    assert "load towns-2" in bed.stub.calls and bed.stub.asked(warm=True).count("towns-2") == 2, "warmed, then asked"
    loads = list(bed.stub.calls)
    bed.registry.rollback("towns")
    bed.becomes(1)
    assert chat(bed.url).version == "towns@1" and bed.stub.calls == loads, "it was kept"


def test_an_alias_that_is_removed(bed: TestBed) -> None:
    """Also the only one of its name: nothing answers for it, and no figure says so."""
    chat(bed.url)
    bed.registry.unset("towns@champion")
    bed.becomes(None)
    assert chat(bed.url).status == 404 and bed.version() is None


def test_a_version_that_cannot_be_loaded_changes_nothing(bed: TestBed) -> None:
    chat(bed.url)
    bed.stub.faults.load_status = 500
    bed.registry.promote("towns@2")
    wait_for(lambda: any("answers 500" in warning for warning in bed.told.warnings), "a warning")
    assert chat(bed.url).version == "towns@1"


def test_a_server_that_was_started_again(bed: TestBed) -> None:
    """It has lost its adapters: they are loaded again, and the client does not notice."""
    chat(bed.url)
    bed.stub.adapters.clear()
    assert chat(bed.url).text == "towns-1 says hi"
    bed.stub.adapters.clear()
    assert chat(bed.url, stream=True).text == "towns-1 says hi"


def test_a_server_that_breaks_off(bed: TestBed) -> None:
    chat(bed.url)
    bed.stub.faults.cut = 2
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        chat(bed.url, "a b c d", stream=True)
    bed.stub.faults.cut = 0
    bed.stub.faults.status = 503
    broken = chat(bed.url)
    assert broken.status == 503 and broken.json["error"]["message"] == "broken", "its own words"
    bed.stub.faults.status = 422
    assert chat(bed.url).status == 422
    records = bed.records(4)
    assert [(record.status, record.error, record.ok) for record in records] == [
        (200, "", True), (200, "cut_off", False), (503, "http", False), (422, "refused", True),
    ]  # fmt: skip
    assert total(metrics(bed.url), "lora2serve_errors_total") == 2, "what is refused is the client's fault"


def test_a_server_that_is_gone(tmp_path: Path, seed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a gateway without a configuration keeps its records in the current folder
    stub = StubUpstream()
    with test_bed(tmp_path, seed, stubs={"prod": stub}) as bed:
        chat(bed.url)
        port = urlsplit(stub.url).port
        assert port
    # the bed ended its servers; a gateway on its registry, in front of nothing, still lists what it has
    from lora2serve import Registry, start_gateway

    with (
        Registry(tmp_path / "registry") as registry,
        start_gateway(upstreams=[f"prod=http://127.0.0.1:{port}"], registry=registry, port=0) as gateway,
    ):
        got = chat(gateway.address)
        assert got.status == 502 and "towns@1 cannot be served: prod: no answer" in got.json["error"]["message"]
        assert chat(gateway.address, model="base").status == 502
        names = [entry["id"] for entry in call(gateway.address, "/v1/models").json["data"]]
        assert names == ["towns", "towns@champion"]


def test_merged_production_beside_separate_staging(tmp_path: Path, seed: Path) -> None:
    """One name: version 1 is a model of its own at one server, version 2 an adapter at the other."""
    stubs = {"prod": StubUpstream(models=("merged",), takes_adapters=False), "staging": StubUpstream()}
    aliases, routes = {"champion": 1, "challenger": 2}, {"towns": {"challenger": {"share": 0.5}}}
    upstreams = {"prod": {"serves": {"towns@1": "merged"}}}
    with test_bed(tmp_path, seed, stubs=stubs, upstreams=upstreams, aliases=aliases, routes=routes) as bed:
        for number in range(40):
            got = chat(bed.url, headers={"x-session-id": f"user-{number}"})
            expected = {"towns@1": "merged says hi", "towns@2": "towns-2 says hi"}[got.version]
            assert got.text == expected and got.json["model"] == "towns"
        assert set(stubs["prod"].asked()) == {"merged"} and set(stubs["staging"].asked()) == {"towns-2"}
        bed.registry.promote("towns@2")
        bed.becomes(2)
        assert chat(bed.url).version == "towns@2"


def test_a_challenger_that_is_gone_hurts_nobody(tmp_path: Path, seed: Path) -> None:
    upstreams = {"staging": {"url": "http://127.0.0.1:9", "serves": {"towns@2": "other"}}}  # nothing listens there
    aliases = {"champion": 1, "challenger": 2}
    with test_bed(
        tmp_path, seed, upstreams=upstreams, aliases=aliases, routes={"towns": {"challenger": {"share": 1.0}}}
    ) as bed:
        got = chat(bed.url)
        assert (got.status, got.version) == (200, "towns@1")
        assert [(record.arm, record.error) for record in bed.records(2)] == [
            ("challenger", "upstream_gone"), ("champion", ""),
        ]  # fmt: skip


def test_counts_equal_the_requests(bed: TestBed) -> None:
    for number in range(7):
        chat(bed.url, stream=number % 2 == 0)
    for _ in range(3):
        chat(bed.url, model="base")
    for number in range(50):
        chat(bed.url, model=f"made-up-{number}")
    samples = metrics(bed.url)
    count = "lora2serve_requests_total"
    assert total(samples, count, adapter="towns", version="1", arm="champion", code="200") == 7
    assert total(samples, count, adapter="other", code="200") == 3 and total(samples, count) == 60
    assert total(samples, "lora2serve_first_token_seconds_count", adapter="towns") == 4
    assert total(samples, "lora2serve_tokens_total", adapter="towns", kind="completion") == 7 * 3
    assert total(samples, "lora2serve_in_flight", adapter="towns") == 0
    assert not [labels for _, labels in samples if any("made-up" in value for _, value in labels)]
