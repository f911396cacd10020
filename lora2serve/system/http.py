"""The one HTTP client: JSON in and out, streams of lines, uploads. Every failure is one line with a hint.

HttpError               a server that does not do what it was asked
├── Unreachable         no connection: nothing listens there, no such host, a proxy that refuses
├── NoResponse          connected, but silent for too long
├── ConnectionLost      the connection ended before the answer was complete
├── InvalidAnswer       not the JSON that was expected
└── HttpStatus          a status of 300 or more, with the server's own message

Credentials in an address are used and never shown. What listens on this machine is reached without a proxy; for other
hosts the environment says which (HTTP_PROXY, NO_PROXY).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

from lora2serve.errors import EngineError, UsageError
from lora2serve.system.json_values import Json, JsonValue, at

if TYPE_CHECKING:
    import httpx2

CONNECT = 10.0  # seconds to get a connection
KEEP = 2.0  # seconds to keep an idle connection: servers close theirs after 5
UPLOAD_BYTES = 1 << 20  # bytes of an upload sent at once
MAX_LINE = 1 << 24  # bytes of one line in a stream
MAX_MESSAGE = 1 << 16  # bytes of an error that are read
CREDENTIALS = re.compile(r"(^|//)[^/?#\s]*@")


class HttpError(EngineError):
    """A server that does not do what it was asked."""


class Unreachable(HttpError):
    """No connection; ``reason`` is the system's word for it."""

    def __init__(self, message: str, hint: str, reason: str) -> None:
        super().__init__(message, hint)
        self.reason = reason


class NoResponse(HttpError):
    """Connected, but silent for too long."""


class ConnectionLost(HttpError):
    """The connection ended before the answer was complete."""


class InvalidAnswer(HttpError):
    """Not the JSON that was expected."""


class HttpStatus(HttpError):
    """A status of 300 or more; ``reply`` is the server's own message."""

    def __init__(self, message: str, hint: str, status: int, reply: str) -> None:
        super().__init__(message, hint)
        self.status, self.reply = status, reply


def without_credentials(address: str) -> str:
    """An address as it may be shown."""
    return CREDENTIALS.sub(r"\1", address)


class HttpClient:
    """One server at ``address``, such as ``http://host:port/prefix``. Threads may share a client.

    ``patience`` is how many seconds the server may be silent, ``key_variable`` the environment variable of a bearer
    token, ``hint`` what to do where nothing listens.
    """

    def __init__(
        self, address: str, *, patience: float, key_variable: str | None = None, connect: float = CONNECT,
        hint: str = "check the address, and that the server runs",
    ) -> None:  # fmt: skip
        import httpx2

        self.address = without_credentials(address).rstrip("/")
        self.patience, self._connect, self._hint = patience, connect, hint
        self._key_variable = key_variable
        key = _key(key_variable) if key_variable else ""
        url = check_address(address)
        self._secrets = [secret for secret in (key, unquote(url.password or "")) if secret]
        with _environment_errors():
            self._client = httpx2.Client(
                base_url=address.rstrip("/"),
                headers={"User-Agent": "lora2serve", **({"Authorization": f"Bearer {key}"} if key else {})},
                limits=httpx2.Limits(keepalive_expiry=KEEP),
                trust_env=not _is_here(url.hostname or ""),
                verify=url.scheme == "https",  # reading the certificates takes long, and http has none
            )

    def close(self) -> None:
        """End its connections."""
        self._client.close()

    def send(
        self, method: str, path: str, body: Mapping[str, object] | None = None, *, patience: float | None = None
    ) -> bytes:
        """The whole answer, whatever it is made of."""
        with self._response(method, path, *_encoded(body), patience) as response:
            return response.read()

    def call(
        self, method: str, path: str, body: Mapping[str, object] | None = None, *, patience: float | None = None
    ) -> Json:
        """The answer, a JSON object; an empty answer is an empty one."""
        raw = self.send(method, path, body, patience=patience)
        return self._parsed(path, raw) if raw.strip() else {}

    def lines(self, path: str, body: Mapping[str, object]) -> Iterator[Json]:
        """The answer of a server that sends one JSON object a line, each as soon as it is there."""
        with self._response("POST", path, *_encoded(body)) as response:
            for line in self._split(path, response.iter_bytes()):
                if line.strip():
                    yield self._parsed(path, line)

    def events(self, path: str, body: Mapping[str, object]) -> Iterator[Json]:
        """The objects of a stream of server-sent events up to ``[DONE]``, each as soon as it is there.

        A server that does not stream gives its whole answer as the only one. ConnectionLost where the stream ends
        before that word: HTTP does not tell of it where the server closes the connection to end an answer.
        """
        with self._response("POST", path, *_encoded(body)) as response:
            if "text/event-stream" not in response.headers.get("Content-Type", ""):
                yield self._parsed(path, response.read())
                return
            for line in self._split(path, response.iter_bytes()):
                name, _, data = line.strip().partition(b":")
                if name == b"data" and data.strip() == b"[DONE]":
                    return
                if name == b"data":
                    yield self._parsed(path, data)
        raise ConnectionLost(f"{self.address}{path}: connection lost (the stream breaks off)", "see the server's log")

    def has(self, path: str) -> bool:
        """Whether the server knows that path, by its answer to HEAD."""
        try:
            self.send("HEAD", path)
        except HttpStatus:
            return False
        return True

    def upload(self, path: str, file: Path, advance: Callable[[int], object], *, method: str = "POST") -> None:
        """Send a file in blocks, so that memory does not grow with it; ``advance`` hears of each that was sent."""
        size = file.stat().st_size
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        with self._response(method, path, _blocks(file, size, advance), headers) as response:
            response.read()

    @contextmanager
    def _response(
        self, method: str, path: str, content: bytes | Iterable[bytes] | None, headers: Mapping[str, str],
        patience: float | None = None,
    ) -> Iterator[httpx2.Response]:  # fmt: skip
        """The response once its head is there and good; httpx's errors become ours, while it is read too."""
        import httpx2

        silence = patience or self.patience
        timeout = httpx2.Timeout(silence, connect=self._connect)
        try:
            with self._client.stream(method, path, content=content, headers=headers, timeout=timeout) as response:
                if response.status_code >= httpx2.codes.MULTIPLE_CHOICES:
                    raise self._refusal(path, response)
                yield response
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            reason = self._reason(error)
            raise Unreachable(f"{self.address}: no answer ({reason})", self._hint, reason) from None
        except UnicodeError:  # of a proxy's name: that of the server was checked
            raise Unreachable(f"{self.address}: no answer (no such proxy)", _proxy_hint(), "no such proxy") from None
        except httpx2.TimeoutException:
            raise NoResponse(
                f"{self.address}{path}: no response for {silence:g} s", "see whether the server is busy or hangs"
            ) from None
        except httpx2.DecodingError as error:
            raise InvalidAnswer(f"{self.address}{path}: the answer cannot be decoded ({self._reason(error)})") from None
        except httpx2.RequestError as error:
            raise ConnectionLost(
                f"{self.address}{path}: connection lost ({self._reason(error)})", "see the server's log"
            ) from None

    def _refusal(self, path: str, response: httpx2.Response) -> HttpStatus:
        import httpx2

        raw = b""
        with suppress(httpx2.RequestError):  # the part that arrived will do
            for part in response.iter_bytes():
                raw += part
                if len(raw) >= MAX_MESSAGE:
                    break
        status, reply = response.status_code, self._plain(_message(raw))
        target = without_credentials(response.headers.get("Location", ""))
        hint = f"it redirects to {target}: give that address" if target else ""
        if self._key_variable and status in (httpx2.codes.UNAUTHORIZED, httpx2.codes.FORBIDDEN):
            hint = f"{self._key_variable} holds the server's key"
        return HttpStatus(f"{self.address}{path} answers {status}: {reply}", hint, status, reply)

    def _parsed(self, path: str, raw: bytes) -> Json:
        try:
            value: JsonValue = json.loads(raw)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise InvalidAnswer(
                f"{self.address}{path}: not a JSON object: {self._plain(raw.decode('utf-8', 'replace'))}",
                "check that the address is that of the right server",
            )
        return value

    def _split(self, path: str, parts: Iterable[bytes]) -> Iterator[bytes]:
        """Lines as they end, and what is left when the stream ends. Only a newline ends one: JSON may hold others."""
        rest = b""
        for part in parts:
            *lines, rest = (rest + part).split(b"\n")
            yield from lines
            if len(rest) > MAX_LINE:
                raise InvalidAnswer(f"{self.address}{path}: a line of more than {MAX_LINE} bytes")
        yield rest

    def _reason(self, error: BaseException) -> str:
        """The system's own message, which is the cause of httpx's error."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.strerror:
                return cause.strerror
            cause = cause.__cause__ or cause.__context__
        return self._plain(str(error) or type(error).__name__)

    def _plain(self, text: str) -> str:
        """One line, not too long, without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split())[:300] or "nothing"


def check_address(address: str) -> SplitResult:
    """The parts of a server's address; UsageError, which shows no credentials, where it is none."""
    import httpx2

    if "?" in address or "#" in address:  # it would be dropped; and many a key is put there
        shown = without_credentials(re.split("[?#]", address, maxsplit=1)[0])
        raise UsageError(
            f"{shown}?...: an address with a query, expected one without", "a key goes into OPENAI_API_KEY"
        )
    try:
        url = urlsplit(address)
        if url.scheme in ("http", "https") and url.hostname and (url.port is None or url.port > 0):
            httpx2.URL(address).raw_host.decode().encode("idna")  # as sockets do: no empty part, none too long
            return url
    except (ValueError, httpx2.InvalidURL):
        pass
    raise UsageError(
        f"{address.rpartition('@')[2]}: invalid address, expected http://host:port or https://host",
        "such as http://localhost:8000",
    )


def _key(variable: str) -> str:
    key = os.environ.get(variable, "")
    if not (key.isascii() and key.isprintable()):
        raise UsageError(
            f"{variable}: a character that no key has, expected printable ASCII", "set it to the server's key alone"
        )
    return key


@contextmanager
def _environment_errors() -> Iterator[None]:
    """What a client is refused for that does not depend on the address: proxies and certificates."""
    import httpx2

    try:
        yield
    except OSError as error:
        settings = [f"{name}={os.environ[name]}" for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
        where = settings[0] if settings else "this system's certificates"
        raise UsageError(
            f"{where}: no certificates can be read ({error.strerror or type(error).__name__})",
            "let SSL_CERT_FILE name a PEM file of certificates, or unset it",
        ) from None
    except (ImportError, ValueError, httpx2.InvalidURL):
        raise UsageError(f"a proxy that cannot be used: {_proxies()}", _proxy_hint()) from None


def _proxies() -> str:
    from urllib.request import getproxies  # it brings a client and ssl: every command loads this module

    shown = []
    for name in ("http", "https", "all"):
        scheme, _, rest = getproxies().get(name, "").rpartition("://")
        shown += [f"{name}_proxy={scheme}{scheme and '://'}{rest.rpartition('@')[2]}"] if rest else []
    return ", ".join(shown)


def _proxy_hint() -> str:
    return "set HTTP_PROXY, HTTPS_PROXY and ALL_PROXY as http://host:port, or name the server in NO_PROXY"


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _encoded(body: Mapping[str, object] | None) -> tuple[bytes | None, dict[str, str]]:
    return (None, {}) if body is None else (json.dumps(body).encode(), {"Content-Type": "application/json"})


def _blocks(file: Path, size: int, advance: Callable[[int], object]) -> Iterator[bytes]:
    """Exactly ``size`` bytes of a file."""
    with file.open("rb") as source:
        left = size
        while left:
            block = source.read(min(UPLOAD_BYTES, left))
            if not block:
                raise EngineError(f"{file}: {left} bytes shorter than when its upload began", "run the command again")
            yield block
            left -= len(block)
            advance(len(block))


def _message(raw: bytes) -> str:
    """A server's message: from one of the keys where JSON APIs put it, or the text as it is."""
    text = raw.decode("utf-8", "replace")
    try:
        value: JsonValue = json.loads(raw)
    except (ValueError, RecursionError):
        return text
    for path in (("error", "message"), ("error",), ("message",), ("detail",)):
        message = at(value, *path)
        if message:
            return message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
    return text
