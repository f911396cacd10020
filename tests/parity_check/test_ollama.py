"""Parity's Ollama engine: against llama.cpp and Go's templates behind our server, or a true one (``-m ollama``)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from lora2serve.artifacts.parity_report import ComparisonResult
from lora2serve.artifacts.run import Run
from lora2serve.errors import EngineError
from lora2serve.parity_check.comparator import check
from lora2serve.parity_check.comparisons import Comparison, of_exports
from lora2serve.parity_check.engine_process import EngineMissing
from lora2serve.parity_check.engines.ollama_engine import Ollama
from lora2serve.parity_check.trained_model import TrainedModel, of_run
from lora2serve.progress import Silent
from lora2serve.serving.ollama import OllamaClient, server_address
from tests.conftest import lora2serve
from tests.support.golang import Renderer
from tests.support.ollama_server import OllamaServer

OPENING = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module", params=["ours", pytest.param("true", marks=pytest.mark.ollama)])
def address(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, go_render: Renderer
) -> Iterator[str]:
    """OLLAMA_HOST, for the children too."""
    with pytest.MonkeyPatch.context() as patch, OllamaServer(tmp_path_factory.mktemp("ollama"), go_render) as ours:
        if request.param == "ours":
            patch.setenv("OLLAMA_HOST", ours.url)
        OllamaClient().version()
        yield server_address()


def damaged(export: Path, folder: Path, old: str, new: str) -> Path:
    copy = Path(shutil.copytree(export, folder))
    text = (copy / "Modelfile").read_text()
    assert old in text
    (copy / "Modelfile").write_text(text.replace(old, new))
    return copy


def origin_of(run: Run) -> TrainedModel:
    origin = of_run(run, Path(run.record.base.path))
    settings = replace(origin.settings, tokens=300, window=64, prompts=2, allow=("Modelfile*", "template*"))
    return replace(origin, settings=settings)


def in_ollama(run: Run, export: Path) -> Comparison:
    return next(one for one in of_exports(origin_of(run), [export]) if one.engine == "ollama")


def compared(run: Run, subjects: Mapping[str, Comparison]) -> dict[str, ComparisonResult]:
    report = check(origin_of(run), list(subjects.values()), progress=Silent())
    return dict(zip(subjects, report.rows, strict=True))


@pytest.fixture(scope="module")
def rows(
    address: str, demo_run: Run, demo_exports: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ComparisonResult]:
    """The export, and with one byte less in its template."""
    folder = tmp_path_factory.mktemp("parity")
    sound = Path(shutil.copytree(demo_exports["ollama-Q4_K_M"], folder / "sound"))
    newline = damaged(sound, folder / "newline", OPENING, OPENING.rstrip())
    return compared(demo_run, {path.name: in_ollama(demo_run, path) for path in (sound, newline)})


def test_met(rows: dict[str, ComparisonResult]) -> None:
    """All gates, by what Ollama's API shows."""
    row = rows["sound"]
    assert [gate.status for gate in row.gates] == ["met", "met", "met", "met"], row.gate
    assert row.version.startswith("ollama 0.")
    kl, same, known = (row.check(name) for name in ("mean_kl", "top1", "known"))
    assert kl and same
    assert 0 < kl.value < 0.05
    assert same.value > 0.9
    assert known is None or known.value > 0.8


def test_a_lost_newline_is_red(rows: dict[str, ComparisonResult]) -> None:
    gate = rows["newline"].gate
    assert gate is not None
    assert (gate.name, gate.status) == ("tokens", "missed")
    assert gate.cause.startswith("template: white space")


@pytest.mark.slow
def test_the_adapter_alone_and_a_lost_one(
    address: str, demo_run: Run, demo_exports: Mapping[str, Path], tmp_path: Path
) -> None:
    """The control, the base under the export's name, is red by behavior alone."""
    base = Path(demo_run.record.base.path)
    words = ("-t", "gguf", "-q", "F32", "-t", "ollama", "-q", "Q4_K_M", "-o", tmp_path / "base")
    exports = lora2serve("export", base, *words, cwd=tmp_path).split()
    words = ("-t", "ollama", "--as", "adapter", "--from", next(Path(exports[0]).glob("*.gguf")), "-o", tmp_path)
    (adapter,) = lora2serve("export", demo_run.path, *words, cwd=tmp_path).split()
    blind = replace(in_ollama(demo_run, demo_exports["ollama-Q4_K_M"]), path=None)
    lost = replace(blind, options={**blind.options, "export": exports[-1]})
    rows = compared(demo_run, {"adapter": in_ollama(demo_run, Path(adapter)), "lost": lost})
    found = rows["adapter"]
    assert [gate.status for gate in found.gates] == ["met", "met", "met", "met"], found.gate
    assert (found.kind, found.reference) == ("lora", "original")
    gate = rows["lost"].gate
    assert gate is not None
    assert gate.name == "behaviour"
    assert gate.cause.startswith("adapter: not applied")


def test_nothing_is_left_there(rows: dict[str, ComparisonResult], address: str) -> None:
    assert not [name for name in OllamaClient(address).models() if name.startswith("lora2serve-parity")]


@pytest.fixture
def export(demo_exports: Mapping[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_exports["ollama-Q4_K_M"], tmp_path / "ollama-Q4_K_M"))


def test_not_running(demo_run: Run, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing engine; that such a row is red only where it is required, test_engines shows."""
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    with pytest.raises(EngineMissing, match="not running: no Ollama answers at http://127"):
        Ollama(str(export), str(demo_run.adapter), 64)


def test_an_answer_that_is_not_done(ollama: OllamaServer, demo_run: Run, export: Path) -> None:
    engine = Ollama(str(export), str(demo_run.adapter), 64)
    ids = engine.tokenizer("Hello there")["input_ids"]
    for endpoint, ask in (
        ("generate", lambda: list(engine.score([ids]))),
        ("generate", lambda: engine.generate([ids], 3)),
        ("chat", lambda: engine.prompt_ids([{"role": "user", "content": "Hi"}], "")),
    ):
        assert ask() is not None
        ollama.fail(endpoint, "undone", times=99)
        with pytest.raises(EngineError, match="not complete"):
            ask()
        ollama.faults.clear()


def test_bos_is_counted(ollama: OllamaServer, demo_run: Run, export: Path) -> None:
    """By the server's count: a BOS that the template writes and the engine adds again is there twice."""
    messages = [{"role": "user", "content": "Hello"}]
    for text, times in (("", 1), ("<|endoftext|>", 2)):
        modelfile = export / "Modelfile"
        modelfile.write_text(modelfile.read_text().replace('TEMPLATE """', f'TEMPLATE """{text}'))
        engine = Ollama(str(export), str(demo_run.adapter), 64)
        ollama.models[f"{engine.model}:latest"].adds_bos = True
        bos = engine.tokenizer.bos_token_id
        found = engine.prompt_ids(messages, "") or []
        assert found[: times + 1].count(bos) == times
        assert (engine.render(messages) or "").startswith("<|endoftext|>")
        assert (engine.prompt_ids([], "Hello") or [])[0] == bos
        engine.close()
    assert not ollama.models
