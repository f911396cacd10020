"""The client against a server that really stores and checks, and that fails on demand."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora2serve.errors import EngineError, UsageError
from lora2serve.progress import Silent, Unit
from lora2serve.serving.ollama import NoServer, OllamaClient, refuse_name, server_address
from lora2serve.serving.ollama.ollama_client import TRIES
from tests.support.ollama_server import OllamaServer

pytestmark = pytest.mark.engine

MB = 1 << 20


class Counted(Silent):
    """Adds up the bytes."""

    def __init__(self) -> None:
        self.done = self.total = 0

    @contextmanager
    def track(self, label: str, total: int, unit: Unit = "") -> Iterator[Callable[[int], None]]:
        self.total = total

        def advance(count: int) -> None:
            self.done += count

        yield advance


@pytest.fixture
def blob(tmp_path: Path) -> tuple[str, Path]:
    """More than the sockets hold between them."""
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(range(256)) * (12 * MB // 256))
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}", path


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        (":8080", "http://127.0.0.1:8080"),
        ("box.lan", "http://box.lan:11434"),
        ("http://box.lan", "http://box.lan:80"),
        ("https://box.lan/", "https://box.lan:443"),
        ("https://box.lan:99/ollama/", "https://box.lan:99/ollama"),
        ("::1", "http://[::1]:11434"),
        ("[::]:5", "http://[::1]:5"),
        (' "1.2.3.4:5" ', "http://1.2.3.4:5"),
    ],
)
def test_ollama_host(host: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ollama's own client reads it."""
    monkeypatch.setenv("OLLAMA_HOST", host)
    assert server_address() == OllamaClient().address == address


@pytest.mark.parametrize("host", ["box:99999", "box:port", "ftp://box"])
def test_no_address(host: str) -> None:
    with pytest.raises(UsageError, match="OLLAMA_HOST="):
        server_address(host)


@pytest.mark.parametrize("name", ["demo", "demo:Q8_0", "me/demo", "hf.co/me/demo:v1", "registry.lan:5000/me/demo"])
def test_names(name: str) -> None:
    refuse_name(name)


@pytest.mark.parametrize("name", ["", "my model", ".demo", "demo:", "a/b/c/d", "-demo", "demo\n", "x" * 81, "démo"])
def test_no_names(name: str) -> None:
    with pytest.raises(UsageError, match="invalid model name"):
        refuse_name(name)


def test_upload(ollama: OllamaServer, blob: tuple[str, Path]) -> None:
    digest, path = blob
    client, progress = OllamaClient(), Counted()
    assert not client.has_blob(digest)
    client.upload(digest, path, progress)
    assert client.has_blob(digest)
    assert (ollama.blobs / digest.replace(":", "-")).read_bytes() == path.read_bytes()
    assert progress.done == progress.total == path.stat().st_size


def test_a_cut_line_is_tried_again(ollama: OllamaServer, blob: tuple[str, Path]) -> None:
    ollama.fail("blob", "reset", times=TRIES - 1)
    progress = Counted()
    OllamaClient().upload(*blob, progress)
    assert OllamaClient().has_blob(blob[0])
    assert progress.done == progress.total
    assert ollama.count("POST", "blob") == TRIES


def test_a_line_that_is_always_cut(ollama: OllamaServer, blob: tuple[str, Path]) -> None:
    ollama.fail("blob", "reset", times=TRIES)
    with pytest.raises(EngineError, match=r"connection lost.*3 tries to upload model\.gguf") as caught:
        OllamaClient().upload(*blob, Silent())
    assert "not sent again" in caught.value.hint
    assert not list(ollama.blobs.iterdir())


def test_another_content_than_promised(ollama: OllamaServer, blob: tuple[str, Path]) -> None:
    ollama.fail("blob", "corrupt")
    with pytest.raises(EngineError, match=r"400: digest mismatch, expected \"sha256:") as caught:
        OllamaClient().upload(*blob, Silent())
    assert "export again" in caught.value.hint
    assert not list(ollama.blobs.iterdir())


def test_refused_before_all_was_sent(ollama: OllamaServer, blob: tuple[str, Path]) -> None:
    """Its own message, and not a lost connection."""
    ollama.fail("blob", "early", status=507, message="no space left on device", times=TRIES)
    with pytest.raises(EngineError, match="507: no space left on device"):
        OllamaClient().upload(*blob, Silent())


def test_memory_does_not_grow_with_the_file(ollama: OllamaServer, tmp_path: Path) -> None:
    """A file of 256 MB in a process that stays below 16 MB more than before; the control reads it whole."""
    path = tmp_path / "large.gguf"
    with path.open("wb") as file:
        file.truncate(256 * MB)
    with path.open("rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    # VmHWM and not ru_maxrss: that one a child inherits from the process that started it (getrusage(2)).
    script = (
        "import sys; from pathlib import Path; from lora2serve.serving.ollama import OllamaClient; "
        "from lora2serve.progress import Silent; "
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]);"
        "client = OllamaClient(); client.version(); before = peak(); path = Path(sys.argv[2]);"
        "client.upload(sys.argv[1], path, Silent()) if sys.argv[3] == 'upload' else path.read_bytes();"
        "print((peak() - before) >> 10)"
    )
    grown = [
        int(
            subprocess.run(
                [sys.executable, "-c", script, digest, path, what], capture_output=True, text=True, check=True
            ).stdout
        )
        for what in ("upload", "control")
    ]
    assert grown[0] < 16
    assert grown[1] > 150
    assert OllamaClient().has_blob(digest)


def test_nobody_there() -> None:
    with pytest.raises(NoServer, match=r"no Ollama answers at http://127.0.0.1:9 ") as caught:
        OllamaClient("127.0.0.1:9").version()
    assert "ollama serve" in caught.value.hint


@pytest.mark.parametrize("kind", ["html", "status"])
def test_somebody_else_there(ollama: OllamaServer, kind: str) -> None:
    ollama.fail("version", kind, status=404)
    with pytest.raises(NoServer, match="answers, but is not Ollama"):
        OllamaClient().version()


def test_an_error_is_told_in_one_line(ollama: OllamaServer) -> None:
    with pytest.raises(EngineError, match=r"/api/show answers 404: model 'nobody' not found") as caught:
        OllamaClient().show("nobody")
    assert "\n" not in caught.value.message
    ollama.fail("show", "reset")
    with pytest.raises(EngineError, match="connection lost"):
        OllamaClient().show("nobody")
