"""The HTTP client against real sockets: what it sends, what it makes of good answers, and one line for each bad one."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora2serve.errors import EngineError, UsageError
from lora2serve.system import doctor, http
from lora2serve.system.http import (
    ConnectionLost,
    HttpClient,
    HttpError,
    HttpStatus,
    InvalidAnswer,
    NoResponse,
    Unreachable,
    check_address,
    without_credentials,
)
from lora2serve.system.json_values import at, objects
from tests.support.raw_server import CLOSE, HANG, NO_BODY, RESET, RawServer, Step, answer, chunk, head

PATIENCE = 0.5
SECRET = "s3cret/@:x"
GOOD = {"a": [1, "two", None]}
HALF = json.dumps(GOOD).encode()[:9]
STREAM = {"Content-Type": "application/x-ndjson", "Transfer-Encoding": "chunked"}


def client(server: RawServer, **options: str) -> HttpClient:
    return HttpClient(server.url, patience=PATIENCE, **options)


def test_json_in_and_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "token-1")
    with RawServer(answer(GOOD)) as server:
        spoken = client(server, key_variable="A_KEY")
        assert spoken.call("POST", "/v1/x", {"text": "é"}) == GOOD
        assert spoken.call("GET", "/v1/y") == GOOD
        assert spoken.send("DELETE", "/v1/z", {"n": 1}) == json.dumps(GOOD).encode()
    (first, body), (second, nothing), (third, more) = server.requests
    assert first.startswith("POST /v1/x HTTP/1.1") and json.loads(body) == {"text": "é"}
    lines = {line.lower() for line in first.split("\n")}
    assert {"authorization: bearer token-1", "content-type: application/json", "user-agent: lora2serve"} <= lines
    assert second.startswith("GET /v1/y ") and nothing == b"" and "content-type" not in second.lower()
    assert third.startswith("DELETE /v1/z ") and more == b'{"n": 1}'
    assert server.connections == 1, "kept between requests"


def test_an_address_with_a_prefix_and_an_empty_answer() -> None:
    with RawServer([NO_BODY]) as server:
        spoken = HttpClient(f"{server.url}/behind/proxy/", patience=PATIENCE)
        assert spoken.call("POST", "/api/x", {}) == {}
        assert spoken.address == f"{server.url}/behind/proxy"
    assert server.requests[0][0].startswith("POST /behind/proxy/api/x ")


@pytest.mark.parametrize(
    ("content", "reply"),
    [
        ({"error": "model 'x' not found"}, "model 'x' not found"),  # Ollama
        ({"error": {"message": "too\n  long", "code": 400}}, "too long"),  # OpenAI, vLLM
        ({"object": "error", "message": "older"}, "older"),
        ({"detail": [{"msg": "field required"}]}, '[{"msg": "field required"}]'),  # FastAPI
        ("plain words", "plain words"),
        (b"\xff" * 100_000, "\ufffd" * 300),
        ("[" * 50_000, "[" * 300),
        ("", "nothing"),
    ],
)
def test_a_status_comes_with_what_the_server_says(content: object, reply: str) -> None:
    with RawServer(answer(content, 404)) as server, pytest.raises(HttpStatus) as caught:
        client(server).call("GET", "/x")
    assert (caught.value.status, caught.value.reply) == (404, reply)
    assert caught.value.message == f"{server.url}/x answers 404: {reply}"


def test_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirect and a refused key say what helps; the control is a status that no address and no key mends."""
    hints = {}
    for status in (307, 401, 403, 500):
        where = {"Location": "https://user:pw@other/x"} if status == 307 else {}
        with RawServer(answer({}, status, **where)) as server, pytest.raises(HttpStatus) as caught:
            client(server, key_variable="A_KEY").call("GET", "/x")
        hints[status] = caught.value.hint
        assert len(server.requests) == 1, "not followed"
    key = "A_KEY holds the server's key"
    assert hints == {307: "it redirects to https://other/x: give that address", 401: key, 403: key, 500: ""}


FAULTS: dict[str, tuple[Sequence[Step], type[HttpError], str]] = {
    "hangs at once": ([HANG], NoResponse, r"/x: no response for 0.2 s$"),
    "hangs within the head": ([b"HTTP/1.1 200 OK\r\nContent-"], NoResponse, "no response"),
    "hangs within the body": ([head(200, {"Content-Length": "20"}), HALF, HANG], NoResponse, "no response"),
    "closes at once": ([CLOSE], ConnectionLost, r"/x: connection lost \("),
    "resets at once": ([RESET], ConnectionLost, r"connection lost \(Connection reset by peer\)"),
    "cuts the head": ([b"HTTP/1.1 200 OK\r\nContent-", CLOSE], ConnectionLost, "connection lost"),
    "cuts the body": ([head(200, {"Content-Length": "20"}), HALF, CLOSE], ConnectionLost, "connection lost"),
    "resets in the body": ([head(200, {"Content-Length": "20"}), HALF, RESET], ConnectionLost, "connection lost"),
    "is no HTTP": ([b"220 mail.example ESMTP\r\n", CLOSE], ConnectionLost, "connection lost"),
    "sends half JSON": (answer(HALF), InvalidAnswer, r'/x: not a JSON object: \{"a": \[1,$'),
    "sends a list": (answer([1, 2]), InvalidAnswer, r"not a JSON object: \[1, 2\]"),
    "sends HTML": (answer("<html>\n hello", kind="text/html"), InvalidAnswer, "not a JSON object: <html> hello"),
    "nests too deep": (answer("[" * 200_000), InvalidAnswer, "not a JSON object"),
    "sends broken gzip": (answer(GOOD, **{"Content-Encoding": "gzip"}), InvalidAnswer, "cannot be decoded"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that(fault: str) -> None:
    """Each fault is named in one line, in time; the control is the same client on a good answer."""
    steps, kind, message = FAULTS[fault]
    with RawServer(steps) as server:
        began = time.monotonic()
        with pytest.raises(kind, match=message) as caught:
            HttpClient(server.url, patience=0.2 if kind is NoResponse else PATIENCE).call("GET", "/x")
        assert "\n" not in caught.value.message and server.url in caught.value.message
        assert time.monotonic() - began < 10 * PATIENCE
    with RawServer(answer(GOOD)) as server:
        assert client(server).call("GET", "/x") == GOOD


def test_patience_is_with_silence_not_with_work() -> None:
    """Slow parts, each within the limit, take longer together than the limit."""
    body = json.dumps(GOOD).encode()
    waits = [threading.Event() for _ in range(4)]
    steps: list[Step] = [head(200, {"Content-Length": str(len(body))})]
    for number, wait in enumerate(waits):
        steps += [wait, body[number * 6 : number * 6 + 6] if number < 3 else body[18:]]
        threading.Timer(0.6 * PATIENCE * (number + 1), wait.set).start()
    with RawServer(steps) as server:
        began = time.monotonic()
        assert client(server).call("GET", "/x") == GOOD
        assert time.monotonic() - began > 2 * PATIENCE
    with RawServer([HANG]) as server, pytest.raises(NoResponse, match=r"for 0\.3 s$"):
        HttpClient(server.url, patience=60).call("GET", "/x", patience=0.3)


def test_nothing_listens() -> None:
    with RawServer([]) as server:
        pass
    with pytest.raises(Unreachable, match=r"no answer \(Connection refused\)$") as caught:
        client(server, hint="start it").call("GET", "/x")
    assert (caught.value.hint, caught.value.reason) == ("start it", "Connection refused")
    with pytest.raises(Unreachable, match="no answer"):
        HttpClient("http://nobody.invalid", patience=PATIENCE).call("GET", "/x")


@pytest.mark.parametrize(
    "address",
    ["localhost:8000", "ftp://x", "http://", "http://x:port", "http://x:99999", "http://[::1", "", "http://x..y",
     "http://" + "x" * 64, "http://é..y", "http://x/\x01"],
)  # fmt: skip
def test_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="invalid address, expected http://host:port"):
        HttpClient(address, patience=1)


# -- streams


def test_lines_come_as_they_are_sent() -> None:
    """The second is only sent once the first was read; a line separator within a string ends no line."""
    read = threading.Event()
    first, second = {"status": "one\u2028\x85"}, {"status": "two"}
    raw = [json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in (first, second)]
    parts: list[Step] = [chunk(raw[0][:5]), chunk(raw[0][5:]), read, chunk(b"\n" + raw[1].rstrip()), chunk(b"")]
    with RawServer([head(200, STREAM), *parts]) as server:
        lines = client(server).lines("/x", {"stream": True})
        assert next(lines) == first
        read.set()
        assert list(lines) == [second]
    assert json.loads(server.requests[0][1]) == {"stream": True}


STREAM_FAULTS: dict[str, tuple[Sequence[Step], type[HttpError]]] = {
    "cuts a line": ([head(200, STREAM), chunk(b'{"n": 1}\n{"n"'), CLOSE], ConnectionLost),
    "resets": ([head(200, STREAM), chunk(b'{"n": 1}\n{"n"'), RESET], ConnectionLost),
    "ends within a line": ([head(200, STREAM), chunk(b'{"n": 1}\n{"n"'), chunk(b"")], InvalidAnswer),
    "ends without a length": ([head(200, {"Connection": "close"}), b'{"n": 1}\n{"n"', CLOSE], InvalidAnswer),
    "hangs": ([head(200, STREAM), chunk(b'{"n": 1}\n{"n"'), HANG], NoResponse),
    "sends no JSON": ([head(200, STREAM), chunk(b'{"n": 1}\nnull\n'), chunk(b"")], InvalidAnswer),
}


@pytest.mark.parametrize("fault", STREAM_FAULTS)
def test_a_stream_that(fault: str) -> None:
    """What came before the fault is there."""
    steps, kind = STREAM_FAULTS[fault]
    with RawServer(steps) as server:
        lines = client(server).lines("/x", {})
        if steps[-1] != RESET:  # which may take back what was not read yet
            assert next(lines) == {"n": 1}
        with pytest.raises(kind, match="/x: "):
            list(lines)


def test_a_line_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_LINE", 1 << 16)
    with (
        RawServer([head(200, STREAM), *[chunk(b"x" * 4096)] * 100, HANG]) as server,
        pytest.raises(InvalidAnswer, match="a line of more than 65536 bytes"),
    ):
        list(client(server).lines("/x", {}))


# -- uploads


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    """More than the sockets hold between them."""
    path = tmp_path / "blob"
    path.write_bytes(bytes(range(256)) * (12 << 12))
    return path


def test_upload(blob: Path) -> None:
    sent: list[int] = []
    with RawServer([NO_BODY]) as server:
        client(server).upload("/blobs/x", blob, sent.append)
    ((request, body),) = server.requests
    assert body == blob.read_bytes() and f"content-length: {len(body)}" in request.lower()
    assert sum(sent) == len(body) and max(sent) == http.UPLOAD_BYTES
    (blob.parent / "empty").touch()
    with RawServer([NO_BODY]) as server:
        client(server).upload("/blobs/x", blob.parent / "empty", sent.append)
    assert server.requests[0][1] == b""


@pytest.mark.parametrize(
    ("steps", "kind", "message"),
    [
        ([*answer({"error": "no space left"}, 507), RESET], HttpStatus, "answers 507: no space left"),
        ([*answer({"error": "no space left"}, 507), CLOSE], HttpStatus, "answers 507: no space left"),
        ([RESET], ConnectionLost, "connection lost"),
        ([CLOSE], ConnectionLost, "connection lost"),
        ([HANG], NoResponse, "no response"),
    ],
)
def test_an_upload_that_is_not_taken(blob: Path, steps: Sequence[Step], kind: type[HttpError], message: str) -> None:
    """Some of the body is read, then this; what the server said before it hung up is told."""
    sent: list[int] = []
    pause = threading.Event()
    threading.Timer(0.2, pause.set).start()
    ending = steps if len(steps) == 1 else [*steps[:-1], pause, steps[-1]]
    with RawServer(ending, read=1 << 16) as server, pytest.raises(kind, match=message):
        HttpClient(server.url, patience=0.2 if kind is NoResponse else PATIENCE).upload("/blobs/x", blob, sent.append)
    assert sum(sent) < blob.stat().st_size


def test_a_file_that_shrinks(blob: Path) -> None:
    def advance(count: int) -> None:
        with blob.open("r+b") as file:
            file.truncate(2 << 20)

    with RawServer([NO_BODY]) as server, pytest.raises(EngineError, match="shorter than when its upload began"):
        client(server).upload("/blobs/x", blob, advance)


def test_has() -> None:
    def answers(request: str, body: bytes) -> list[Step]:
        return [head(200 if "/there " in request else 404, {"Content-Length": "0"})]

    with RawServer(answers) as server:
        assert client(server).has("/there")
        assert not client(server).has("/gone")
    assert [request.split()[0] for request, _ in server.requests] == ["HEAD", "HEAD"]


# -- credentials, proxies, connections


def test_credentials_are_used_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the server repeats them; the control is that it does get them."""
    monkeypatch.setenv("A_KEY", "key-1234")
    host = "s3cret%2F%40%3Ax"
    repeated = answer({"error": f"no user with password {SECRET}, nor key key-1234"}, 401)
    with RawServer(repeated) as server:
        cases = ((server.url.replace("//", f"//me:{host}@"), None, SECRET), (server.url, "A_KEY", "key-1234"))
        for address, variable, secret in cases:
            spoken = HttpClient(address, patience=PATIENCE, key_variable=variable)
            assert spoken.address == server.url
            with pytest.raises(HttpStatus, match=r"\*\*\*") as caught:
                spoken.call("GET", "/x")
            assert not any(word in f"{caught.value}{caught.value.hint}{caught.value.reply}" for word in (secret, host))
    pair = base64.b64encode(f"me:{SECRET}".encode()).decode()
    assert f"authorization: basic {pair}".lower() in server.requests[0][0].lower()
    assert "authorization: bearer key-1234" in server.requests[1][0].lower()
    for address in (f"http://me:{host}@127.0.0.1:9", "http://me:pw@127.0.0.1:port", "http://me:p/w@x", "me:pw@host:1"):
        with pytest.raises((Unreachable, UsageError)) as error:
            HttpClient(address, patience=PATIENCE).call("GET", "/x")
        assert not any(word in str(error.value) for word in (host, "pw", "p/w", "me:"))
    assert without_credentials("http://me:p@w@h:1/v1/a@b") == "http://h:1/v1/a@b"


def test_doctor_shows_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("OLLAMA_HOST", "https://me:secret@box:99")
    (fact,) = [fact for fact in doctor.examine() if fact.name == "ollama"]
    assert fact.value == "https://box:99"


def test_no_proxy_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control, another host, does go through it."""
    for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with RawServer(answer({"by": "proxy"})) as proxy, RawServer(answer({"by": "server"})) as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        port = server.url.rpartition(":")[2]
        for here in (server.url, f"http://localhost:{port}"):
            assert HttpClient(here, patience=PATIENCE).call("GET", "/x") == {"by": "server"}
        assert HttpClient("http://example.invalid", patience=PATIENCE).call("GET", "/x") == {"by": "proxy"}
    assert proxy.requests[0][0].startswith("GET http://example.invalid/x ")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HTTP_PROXY", "socks9://me:pw@h:1", "a proxy that cannot be used: http_proxy=socks9://h:1"),
        ("HTTP_PROXY", "ftp://h:1", "a proxy that cannot be used: http_proxy=ftp://h:1"),
        ("HTTPS_PROXY", "http://me:pw@[::1", "a proxy that cannot be used: https_proxy=http://[::1"),
        ("ALL_PROXY", "http://x..y", "https://example.invalid: no answer (no such proxy)"),
        ("A_KEY", "clé", "A_KEY: a character that no key has, expected printable ASCII"),
        ("A_KEY", "key\n", "A_KEY: a character that no key has, expected printable ASCII"),
        ("SSL_CERT_FILE", "/nope", "SSL_CERT_FILE=/nope: no certificates can be read (No such file or directory)"),
        ("OTHER", "", "https://example.invalid: no answer (Name or service not known)"),
    ],
)
def test_an_environment_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    """One line and a way out, without a password; the control, last, is a fault of the server's name alone."""
    for name in ("no_proxy", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises((UsageError, Unreachable)) as caught:
        HttpClient("https://example.invalid", patience=PATIENCE, key_variable="A_KEY").call("GET", "/x")
    assert (caught.value.message, caught.value.hint != "") == (message, True)


def test_a_connection_that_the_server_closed_meanwhile() -> None:
    with RawServer([*answer(GOOD), CLOSE]) as server:
        spoken = client(server)
        for _ in range(3):
            assert spoken.call("GET", "/x") == GOOD
            time.sleep(0.1)
    assert server.connections == 3


def test_threads_share_a_client() -> None:
    def answers(request: str, body: bytes) -> list[Step]:
        return answer(json.loads(body))

    with RawServer(answers) as server, ThreadPoolExecutor(16) as pool:
        spoken = client(server)
        bodies = [{"n": number} for number in range(64)]
        assert list(pool.map(lambda body: spoken.call("POST", "/x", body), bodies)) == bodies
    assert server.connections <= 16


def test_the_way_into_json() -> None:
    value = {"a": [{"b": 1}, 2, {"b": 3}], "c": "text"}
    assert at(value, "a", 0, "b") == 1 and at(value, "a", -1, "b") == 3
    assert [at(value, *path) for path in (("x",), ("a", 5), ("a", "b"), ("c", 0), ("a", 1, "b"))] == [None] * 5
    assert objects(value["a"]) == [{"b": 1}, {"b": 3}] and objects(value) == [] and objects(None) == []


@pytest.mark.parametrize(
    "address",
    ["http://h/v1?key=SECRET", "http://u:SECRET@h/?a=b", "http://h/#SECRET", "http://u:SEC/SECRET@h", "//u:SECRET@h"],
)
def test_an_address_that_is_refused_shows_no_secret(address: str) -> None:
    """A query would be dropped on the way, and many a key is put there."""
    with pytest.raises(UsageError) as caught:
        check_address(address)
    assert "SECRET" not in f"{caught.value.message} {caught.value.hint}"
    assert check_address("http://u:SECRET@h:80/v1").hostname == "h", "the control"


EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Transfer-Encoding": "chunked"}


def test_server_sent_events() -> None:
    """Each as it comes, whatever its line ends with and whatever stands between; nothing behind ``[DONE]``."""
    sent = [b'data: {"n": 1}\r\n\r\n: ping\n\nid: 7\ndata:{"n"', b": 2}\n\n", b"data: [DONE]\n\ndata: {}\n\n"]
    with RawServer([head(200, EVENTS), *map(chunk, sent), chunk(b"")]) as server:
        assert list(client(server).events("/x", {})) == [{"n": 1}, {"n": 2}]


def test_a_server_that_does_not_stream_answers_at_once() -> None:
    with RawServer(answer(GOOD)) as server:
        assert list(client(server).events("/x", {})) == [GOOD]


def test_a_stream_of_events_that_breaks_off() -> None:
    """What came before is there."""
    with RawServer([head(200, EVENTS), chunk(b'data: {"n": 1}\n\n'), RESET]) as server:
        events = client(server).events("/x", {})
        assert next(events) == {"n": 1}
        with pytest.raises(ConnectionLost):
            list(events)
    for ending in (RESET, CLOSE):  # of the server, or of what stands between
        with RawServer([head(200, {"Content-Type": "text/event-stream"}), b'data: {"n": 1}\n\n', ending]) as server:
            events = client(server).events("/x", {})
            assert next(events) == {"n": 1}
            with pytest.raises(ConnectionLost):
                next(events)
    no_json = [head(200, EVENTS), chunk(b"data: {no json\n\n"), chunk(b"")]
    with RawServer(no_json) as server, pytest.raises(InvalidAnswer):
        list(client(server).events("/x", {}))
