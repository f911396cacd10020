"""Requests and answers that nobody should send: what is refused, what still flows, what others never notice."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from logging.handlers import BufferingHandler
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from lora2serve.gateway import client_side, http_protocol
from lora2serve.gateway.model_names import DEEPEST
from tests.support.gateways import CHAT, TestBed, call, chat, metrics, test_bed, total, wait_for
from tests.support.stub_upstream import running_stub

BODY = json.dumps({"model": "towns", "messages": [{"role": "user", "content": "x"}]}).encode()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


@pytest.fixture
def bed(tmp_path: Path, seed: Path) -> Iterator[TestBed]:
    with test_bed(tmp_path, seed) as made:
        yield made


def raw(url: str, data: bytes, patience: float = 30.0) -> bytes:
    """What comes back for these bytes until the connection ends."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=patience) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def test_requests_with_two_ends(bed: TestBed) -> None:
    """No second request hides in the first: what says its length in two ways reaches no server."""
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    assert status(raw(bed.url, POST + LENGTH + b"\r\n" + BODY)) == 200
    assert status(raw(bed.url, POST + CHUNKED + b"\r\n" + chunks)) == 200
    known = len(bed.stub.asked())
    for head, body in (
        (LENGTH + b"Content-Length: 3\r\n", BODY), (LENGTH + CHUNKED, chunks), (b"Content-Length: +5\r\n", BODY),
        (b"Transfer-Encoding: xchunked\r\n", chunks), (LENGTH + b"X-A: a\rX-B: b\r\n", BODY),
        (LENGTH + b"X-A: a\0b\r\n", BODY),
    ):  # fmt: skip
        assert status(raw(bed.url, POST + head + b"\r\n" + body)) == 400, head
    assert len(bed.stub.asked()) == known


def test_paths_that_are_none(bed: TestBed) -> None:
    """None names another server, and none makes the gateway believe that its server is gone."""
    close = b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    for target in (b"*", b"@127.0.0.1:9/echo", b"127.0.0.1:9"):
        assert status(raw(bed.url, b"OPTIONS " + target + close)) == 400, target
    assert raw(bed.url, b"GET http://127.0.0.1:9/echo" + close).startswith(b"HTTP/1.1 201"), "our own server answers"
    for path in ("/v1/load_lora_adapter/.", "/v1/x/../load_lora_adapter", "/v1/load_lora_adapter/x/..", "/./metrics/."):
        assert call(bed.url, path, {"lora_name": "x", "lora_path": "y"}).status == 403, path
    assert "no answer" not in json.dumps(bed.told.warnings) and chat(bed.url).status == 200


def test_bodies_that_are_nested(bed: TestBed) -> None:
    """What could not be read to its end somewhere inside is refused; nothing is left under way."""
    for deep in (400, 900):
        inside = b"[" * deep + b"]" * deep
        for body in (
            b'{"model": "towns", "messages": [{"role": "user", "content": %s}]}' % inside,
            b'{"model": "t\\u006fwns", "prompt": %s}' % inside,
        ):
            got = call(bed.url, CHAT, body)
            assert got.status == 400 and got.json["error"]["message"] == f"body: nested over {DEEPEST} levels"
    assert call(bed.url, CHAT, b'{"model": "towns", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}").status != 200
    below = DEEPEST - 4
    content = b'{"model": "towns", "messages": [{"role": "user", "content": %s}]}'
    assert call(bed.url, CHAT, content % (b"[" * below + b'"x"' + b"]" * below)).status == 200
    wide = {"model": "towns", "messages": [{"role": "user", "content": "x"}] * 300}
    assert call(bed.url, CHAT, wide).status == 200, "many messages are not deep"
    assert total(metrics(bed.url), "lora2serve_in_flight") == 0
    assert [record.prompt_length for record in bed.records(2)] == [1, 599]


def test_headers_in_any_writing(bed: TestBed) -> None:
    """As they came where that is UTF-8, which is all that HTTP clients of today send."""
    head = POST + LENGTH + b"X-Utf: caf\xc3\xa9\r\nX-Old: caf\xe9\r\n\r\n"
    assert status(raw(bed.url, head + BODY)) == 200
    sent = bed.stub.requests[-1][1]
    assert (sent["x-utf"], sent["x-old"]) == ("café", "café")


def test_an_address_with_a_password(tmp_path: Path, seed: Path) -> None:
    """It goes with what has no key of its own: one request has one, and neither is shown."""
    with running_stub() as stub:
        address = stub.url.replace("//", "//user:secret@")
        upstreams = {"prod": {"url": address}, "gone": {"url": "http://user:secret@127.0.0.1:9", "adapters": False}}
        with test_bed(tmp_path, seed, stubs={}, upstreams=upstreams) as bed:
            for sent, received in (("Bearer sk-client", "Bearer sk-client"), ("", "Basic dXNlcjpzZWNyZXQ=")):
                got = chat(bed.url, headers={"Authorization": sent} if sent else {})
                assert (got.status, stub.requests[-1][1]["authorization"]) == (200, received)
            assert "secret" not in json.dumps(bed.told.warnings) + json.dumps(bed.told.notes)


def test_bodies_that_do_not_come(bed: TestBed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_side, "PATIENCE", 0.2)
    for path in (CHAT, "/echo", "/v1/feedback"):
        answer = raw(bed.url, POST.replace(CHAT.encode(), path.encode()) + LENGTH + b"\r\n" + BODY[:9])
        assert status(answer) == (403 if path == "/v1/feedback" else 408), answer
    assert chat(bed.url).status == 200


def test_heads_that_do_not_end(bed: TestBed, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused while they come, whatever has no end: one header, many, an address, what follows the last part."""
    part = b"a" * 20_000
    chunks = b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    for head, repeated in (
        (POST + b"X-A: ", part), (POST, b"X-A: " + part + b"\r\n"), (b"GET /", part),
        (POST + CHUNKED + b"\r\n" + chunks, b"X-A: " + part + b"\r\n"),
    ):  # fmt: skip
        place = urlsplit(bed.url)
        with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
            connection.sendall(head)
            with suppress(OSError):
                for _ in range(20):
                    connection.sendall(repeated)
                    time.sleep(0.005)
                assert connection.recv(1 << 16)[9:12] == (b"400" if CHUNKED not in head else b"200")
                assert connection.recv(1 << 16) == b"", "the connection is over"
    monkeypatch.setattr(http_protocol, "PATIENCE", 0.2)
    assert b"headers: not complete in 0.2 s" in raw(bed.url, POST + b"X-A")
    assert chat(bed.url).status == 200


def test_what_the_log_says(bed: TestBed, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that a server breaks off is one line, and no traceback of the gateway."""
    log = BufferingHandler(1000)
    monkeypatch.setattr(logging.getLogger(http_protocol.LOG), "handlers", [log])
    bed.stub.faults.cut = 2
    for model in ("towns", "base"):
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            chat(bed.url, "a b c", model=model, stream=True)
    upgrade = b"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with pytest.raises(TimeoutError):
        raw(bed.url, upgrade, patience=0.2)
    lines = [record.getMessage().partition(" (")[0] for record in log.buffer]
    own = [line for line in lines if line != "Exception in ASGI application\n"]  # the stub's, which breaks off
    assert own == ["prod: connection lost"] * 2 + ["Unsupported upgrade request."]
    text = "\n".join(map(log.format, log.buffer))
    assert "UpstreamError" not in text and "RuntimeError: cut off" in text


def test_answers_that_are_compressed(bed: TestBed) -> None:
    """The server was asked not to; the client gets its own name for the model, event by event, and a whole record."""
    chat(bed.url)
    assert bed.stub.requests[-1][1]["accept-encoding"] == "identity"
    bed.stub.faults.compress = True
    whole = chat(bed.url, "a b")
    assert (whole.text, whole.json["model"]) == ("towns-1 says a b", "towns")
    bed.stub.faults.token_seconds = 0.05
    stream = chat(bed.url, "a b", stream=True)
    assert stream.text == "towns-1 says a b" and b'"model":"towns-1"' not in stream.body and len(stream.chunks) > 2
    assert "content-encoding" not in whole.headers | stream.headers
    assert [record.answer_length for record in bed.records(3)] == [15, 16, 16]
    bed.stub.faults.cut = 2
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        chat(bed.url, "a b", stream=True)


def test_failures_inside_a_stream(bed: TestBed) -> None:
    """Behind a status of 200: an error as an event, and an end that nobody has announced."""
    chat(bed.url, "fine", stream=True)
    bed.stub.faults.error_event = 2
    got = chat(bed.url, "a b c", stream=True)
    assert got.status == 200 and b"the engine is dead" in got.body, "the client sees what the server sent"
    bed.stub.faults.error_event, bed.stub.faults.quiet_end = 0, 2
    chat(bed.url, "a b c", stream=True)
    bed.stub.faults.quiet_end = 0
    chat(bed.url, "fine again", stream=True)
    assert [(record.status, record.error) for record in bed.records(4)] == [
        (200, ""), (200, "in_stream"), (200, "cut_off"), (200, ""),
    ]  # fmt: skip
    errors = "lora2serve_errors_total"
    assert total(metrics(bed.url), errors, kind="in_stream") == total(metrics(bed.url), errors, kind="cut_off") == 1


def test_feedback_is_counted_once(bed: TestBed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends it again says nothing new; one that says something else does."""
    monkeypatch.setenv("LORA2SERVE_FEEDBACK_KEY", "secret")
    key = {"Authorization": "Bearer secret"}

    def truth(**content: object) -> int:
        return call(bed.url, "/v1/feedback", {"request_id": "id-1", **content}, key).status

    chat(bed.url, headers={"x-request-id": "id-1"})
    wait_for(lambda: truth(score=1) == 200, "it is on record")
    assert [truth(score=1), truth(score=1), truth(score=0)] == [200, 200, 200]
    for score in ("NaN", "1e400", "-Infinity", "true"):
        body = b'{"request_id": "id-1", "score": %s}' % score.encode()
        assert call(bed.url, "/v1/feedback", body, key).status == 400, score
    for identity in ("\ud800", "a b", "x" * 200, "\x00"):
        assert call(bed.url, "/v1/feedback", {"request_id": identity, "score": 1}, key).status == 400
    samples = metrics(bed.url)
    assert [total(samples, "lora2serve_truth_total", outcome=word) for word in ("right", "wrong")] == [1, 1]
    chat(bed.url, headers={"x-request-id": "id-1"})
    wait_for(lambda: len(bed.entries()) == 4, "another request of that id")
    assert truth(score=1) == 200 and total(metrics(bed.url), "lora2serve_truth_total", outcome="right") == 2
