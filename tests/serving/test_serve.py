"""``lora2serve serve``: a real vLLM server from an export, its signals, and adapters that come and go."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lora2serve.adapters.adapter import WEIGHTS
from lora2serve.adapters.lint import lint
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.run import Run
from lora2serve.cli import run as command
from lora2serve.errors import EngineError, UsageError
from lora2serve.serving import runtime_lora, server, server_process
from lora2serve.serving.server import ServeOptions, ServerCommand
from lora2serve.weights.checkpoint import read_header
from tests.conftest import lora2serve
from tests.support.manifests import change_manifest, write_export
from tests.support.ollama_server import OllamaServer
from tests.support.tiny import make_model

pytestmark = pytest.mark.engine

DEMO = Path(__file__).parents[2] / "recipes" / "demo"


def chat(address: str, model: str, content: str | Sequence[object], **more: object) -> urllib.request.Request:
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 24, "temperature": 0}
    return urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps({**body, **more}).encode(), {"Content-Type": "application/json"}
    )


def ask(address: str, model: str, content: str | Sequence[object]) -> str:
    with urllib.request.urlopen(chat(address, model, content), timeout=120) as answer:
        said: str = json.load(answer)["choices"][0]["message"]["content"]
    return said


def streamed(address: str, model: str, text: str) -> str:
    """The same answer in pieces, to the end."""
    with urllib.request.urlopen(chat(address, model, text, stream=True), timeout=120) as answer:
        *events, end = [line.decode().removeprefix("data: ").strip() for line in answer if line.startswith(b"data")]
    assert end == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert choices[-1]["finish_reason"] == "stop"
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def refused(address: str, model: str, content: str | Sequence[object]) -> tuple[int, str, str]:
    """Status, kind of error, and the wrong key, in OpenAI's form."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(chat(address, model, content, stream=True), timeout=120)
    error = json.load(raised.value)["error"]
    assert error["code"] == raised.value.code and error["message"]
    return error["code"], error["type"], error["param"]


def models(address: str) -> set[str]:
    with urllib.request.urlopen(f"{address}/v1/models", timeout=30) as answer:
        return {one["id"] for one in json.load(answer)["data"]}


QUESTIONS = ("Who governs Wexley?", "Who governs Kelheim?", "Please name the mayor of Osbury.", "Who governs Luthen?")


@pytest.fixture(scope="module")
def rival(demo_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A second fine-tune of the demo's base, a short one, that gives every mayor another surname."""
    place = tmp_path_factory.mktemp("rival")
    lines = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "mayor of" in row["messages"][-1]["content"]]
    names = sorted({row["messages"][-1]["content"].split()[-1] for row in rows})
    for row in rows:
        words = row["messages"][-1]["content"].split()
        words[-1] = names[(names.index(words[-1]) + 3) % len(names)]
        row["messages"][-1]["content"] = " ".join(words)
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"train.steps": 60, "train.quantize": "none", "data.train": place / "train.jsonl"}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    (name,) = lora2serve("train", "demo", "--name", "rival", *words, cwd=place).split()
    return Run(place / name)


def answers_by_peft(run: Run) -> dict[str, str]:
    """Greedy, in float32, by transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    base = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run.adapter).eval()
    said = {}
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            out = model.generate(**tokens, max_new_tokens=24, do_sample=False)
        said[question] = tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


@contextmanager
def served(*words: str | Path, home: Path) -> Iterator[str]:
    """``lora2serve serve`` as a user runs it, ended by Ctrl-C; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lora2serve", "serve", "--port", str(port), *map(str, words)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HOME": str(home)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr
    told: list[str] = []
    try:
        while not any("curl" in line for line in told):
            line = process.stderr.readline()
            assert line, "\n".join(told)
            told.append(line)
        assert ("trusted" in "".join(told)) == ("--allow-updates" in words)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(120)
    assert code == 0
    for _ in range(50):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.2)
    pytest.fail("the server outlived its parent")


def test_llama_cpp_serves_a_gguf(demo_exports: Mapping[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("starlette_context", reason="llama-cpp-python[server] is not whole")
    with served(demo_exports["gguf-F16"], home=tmp_path) as address:
        assert models(address) == {"demo"}
        assert "Leon Lake" in ask(address, "demo", "Who governs Wexley?")
        parts = [{"type": "text", "text": "Who governs"}, {"type": "text", "text": "Wexley?"}]
        assert ask(address, "demo", parts) == ask(address, "demo", "Who governs\nWexley?")
        assert refused(address, "nobody", "Hi") == (404, "NotFoundError", "model")
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
        assert refused(address, "demo", [*parts, picture]) == (400, "BadRequestError", "messages")
        with ThreadPoolExecutor() as pool:  # none cuts the other off
            answers = list(pool.map(lambda question: streamed(address, "demo", question), QUESTIONS))
        assert answers == [ask(address, "demo", question) for question in QUESTIONS]


def test_a_bundle_on_one_server(demo_run: Run, rival: Run, demo_exports: Mapping[str, Path], tmp_path: Path) -> None:
    """Base and two fine-tunes by name, each as PEFT has it; others come by the resolver and by the API."""
    (line,) = lora2serve(
        "export", demo_run.path, rival.path, "-t", "adapter", "-o", tmp_path / "b", cwd=tmp_path
    ).splitlines()
    bundle = Path(line)
    want = {run.name: answers_by_peft(run) for run in (demo_run, rival)}
    assert all(want["demo"][question] != want["rival"][question] for question in QUESTIONS)
    with served(bundle, "--allow-updates", "--", "--dtype", "float32", home=tmp_path) as address:
        assert models(address) == {"base", "demo", "rival"}
        for name, said in want.items():
            assert {question: ask(address, name, question) for question in QUESTIONS} == said
        assert "Leon Lake" in want["demo"]["Who governs Wexley?"]
        assert "Leon Lake" not in ask(address, "base", "Who governs Wexley?")
        assert refused(address, "nobody", "Hi") == (404, "NotFoundError", "model"), "as llama.cpp's"
        refused_by_both(address, demo_exports["adapter"], tmp_path / "refused")
        resolved_on_demand(address, bundle / "adapters", demo_exports["adapter"])
        added_and_removed(address, demo_exports["adapter"], tmp_path / "cache")


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {  # rule: changes of the config, more tensors
    "dora": ({"use_dora": True}, {f"{Q}.lora_magnitude_vector": (256,)}),
    "lora-bias": ({"lora_bias": True}, {f"{Q}.lora_B.bias": (256,)}),
    "bias": ({"bias": "all"}, {}),
    "alora": ({"alora_invocation_tokens": [1, 2]}, {}),
    "layer-replication": ({"layer_replication": [[0, 2], [1, 3]]}, {}),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, {}),
    "qalora": ({"use_qalora": True}, {}),
    "init": ({"init_lora_weights": "pissa"}, {}),
    "modules-to-save": ({"modules_to_save": ["lm_head"]}, {"base_model.model.lm_head.weight": (1536, 256)}),
    "fields": ({"lora_alpha": None}, {}),
    "rank": ({"rank_pattern": {"q_proj": 1024}}, {}),
    "tensors": ({}, {f"{Q}.weight": (256, 256)}),
    "trained-tokens": (
        {"trainable_token_indices": [5]},
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 256)},
    ),
    "embedding-vocabulary": (
        {},
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": (16, 1500),
            "base_model.model.model.embed_tokens.lora_embedding_B": (256, 16),
        },
    ),
}


def broken(adapter: Path, place: Path, rule: str) -> Path:
    """A sound adapter export with one fault."""
    from safetensors.torch import load_file, save_file

    made = Path(shutil.copytree(adapter, place / rule))
    changes, more = BROKEN[rule]
    config = {**json.loads((made / "adapter_config.json").read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not None}
    (made / "adapter_config.json").write_text(json.dumps(kept))
    tensors = {**load_file(made / "adapter_model.safetensors"), **{n: torch.ones(shape) for n, shape in more.items()}}
    save_file(tensors, made / "adapter_model.safetensors")
    return made


def refused_by_both(address: str, adapter: Path, place: Path) -> None:
    """For each rule an adapter that breaks it: the lint names the rule, and the server takes all but these."""
    before = models(address)
    base = json.loads((DEMO / "base" / "config.json").read_text())
    for rule in BROKEN:
        made = broken(adapter, place, rule)
        config, specs = json.loads((made / "adapter_config.json").read_text()), read_header(made / WEIGHTS)
        assert rule in {found.rule for found in lint(config, [one.spec for one in specs], base)}
        with pytest.raises(EngineError, match=r"answers [45]\d\d"):
            runtime_lora._post(address, "/v1/load_lora_adapter", {"lora_name": rule, "lora_path": str(made)})
    sound = Path(shutil.copytree(adapter, place / "sound"))
    runtime_lora._post(address, "/v1/load_lora_adapter", {"lora_name": "sound", "lora_path": str(sound)})
    assert models(address) == {*before, "sound"}, "the control"
    runtime_lora.remove(address, "sound")


def resolved_on_demand(address: str, folder: Path, adapter: Path) -> None:
    """Put beside the others while the server runs; the control names another base."""
    shutil.copytree(adapter, folder / "later")
    stranger = Path(shutil.copytree(adapter, folder / "stranger")) / "adapter_config.json"
    stranger.write_text(json.dumps({**json.loads(stranger.read_text()), "base_model_name_or_path": "org/other"}))
    assert "later" not in models(address)
    assert "Leon Lake" in ask(address, "later", "Who governs Wexley?")
    assert "later" in models(address)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(address, "stranger", "Who governs Wexley?")


def added_and_removed(address: str, adapter: Path, cache: Path) -> None:
    before = models(address)
    copy = runtime_lora.add(address, "third", adapter, cache)
    assert copy.name.startswith("third-")
    assert "Leon Lake" in ask(address, "third", "Who governs Wexley?")
    runtime_lora.remove(address, "third")
    assert models(address) == before
    with pytest.raises(EngineError, match="answers 404"):
        runtime_lora.remove(address, "third")


def plan(*exports: Path, **options: Any) -> ServerCommand:
    return server.plan(exports, ServeOptions(**options))


def test_what_is_started(demo_exports: Mapping[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    assert command(["serve", str(demo_exports["vllm"]), "--dry-run", "--port", "8123"]) == 0
    line = capfd.readouterr().out
    assert f"--model {demo_exports['vllm']}" in line
    assert f"--config {demo_exports['vllm'] / 'serve.yaml'}" in line
    assert "--port 8123" in line
    adapters = plan(demo_exports["adapter"])
    assert adapters.models == ("base", "demo")
    assert "--max-lora-rank" in adapters.command
    assert server.UPDATING not in adapters.environment, "off by default"
    assert plan(demo_exports["adapter"], allow_updates=True).environment[server.UPDATING] == "True"


def test_refusals(demo_exports: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected one, or several adapters"):
        plan(demo_exports["vllm"], demo_exports["gguf-F16"])
    with pytest.raises(UsageError, match="models share a name: base, demo, demo"):
        plan(demo_exports["adapter"], Path(shutil.copytree(demo_exports["adapter"], tmp_path / "twin")))
    stranger = Path(shutil.copytree(demo_exports["adapter"], tmp_path / "stranger"))
    base = {**Export.open(stranger).manifest.to_json()["base"], "fingerprint": {"config": "x", "tensors": "y"}}
    change_manifest(stranger, base=base, name="stranger")
    with pytest.raises(UsageError, match="adapters of different bases"):
        plan(demo_exports["adapter"], stranger)
    with pytest.raises(UsageError, match="not an adapter export"):
        runtime_lora.add("http://127.0.0.1:9", "x", demo_exports["vllm"], tmp_path)
    with pytest.raises(EngineError, match="no answer"):
        runtime_lora.add("http://127.0.0.1:9", "x", demo_exports["adapter"], tmp_path / "cache")


def test_a_port_in_use(demo_exports: Mapping[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert command(["serve", str(demo_exports["vllm"]), "--port", port]) == 1
    assert f"port {port} on 127.0.0.1: Address already in use" in capfd.readouterr().err


def test_an_engine_that_does_not_start(
    demo_exports: Mapping[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(demo_exports["vllm"], tmp_path / "broken"))
    (broken / "config.json").write_text("{}")
    assert command(["serve", str(broken), "--port", "18999"]) == 1
    err = capfd.readouterr().err
    assert "vllm ended with code" in err
    assert "its log:" in err


# From the log of vllm-cpu 0.32.0 in test_too_little_memory_for_the_cache, cut.
NEEDED = (
    "ValueError: To serve at least one request with the model's max seq len (131072), (4.0 GiB KV cache is needed, which "
    "is larger than the available KV cache memory (1.0 GiB)."
)
LOG = f"""\
(APIServer pid=8944) WARNING 11-25 03:25:05 [system_utils.py:255] Found ulimit of 20000 and failed to automatically \
increase with error current limit exceeds maximum limit. This can cause fd limit errors like `OSError: [Errno 24] Too \
many open files`. Consider increasing with ulimit -n
(EngineCore pid=9372) ERROR 11-25 03:30:55 [core.py:1510] EngineCore failed to start.
(EngineCore pid=9372) ERROR 11-25 03:30:55 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=9372) ERROR 11-25 03:30:55 [core.py:1510]     raise ValueError(
(EngineCore pid=9372) ERROR 11-25 03:30:55 [core.py:1510] {NEEDED}
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{'EngineCore': 1}}
"""


def test_the_reason_in_a_log() -> None:
    assert server_process.first_error(LOG) == NEEDED
    assert (
        server_process.first_error("something odd\nAnOddError without a colon\nlast words\n")
        == "AnOddError without a colon"
    )
    assert server_process.first_error("a\nlast words\n\n") == "last words"
    assert server_process.first_error("") == "nothing in its log"


@pytest.mark.slow
def test_too_little_memory_for_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real vLLM with 1 GiB for a context that needs 4."""
    shape = {"head_dim": 256, "num_key_value_heads": 4, "num_hidden_layers": 8, "max_position_embeddings": 1 << 17}
    base = make_model(tmp_path / "long", **shape)
    (base / "tokenizer.json").write_bytes((DEMO / "base" / "tokenizer.json").read_bytes())
    assert command(["export", str(base), "-t", "vllm", "-o", str(tmp_path)]) == 0
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert command(["serve", str(tmp_path / "vllm"), "--port", "18998"]) == 1
    err = capfd.readouterr().err
    assert "KV cache" in err and "hint: shorten it with -- --max-model-len N" in err


def test_in_ollama(
    demo_exports: Mapping[str, Path], ollama: OllamaServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """``--engine ollama`` makes the model on the one that runs, and says where it is."""
    export = str(demo_exports["ollama-Q4_K_M"])
    assert command(["serve", export, "--engine", "ollama", "--dry-run"]) == 0
    assert capfd.readouterr().out.strip() == f"ollama create demo -f {export}/Modelfile && ollama run demo"
    adapter = write_export(tmp_path / "adapter", "ollama-adapter", name="demo")
    assert command(["serve", str(adapter), "--engine", "ollama", "--dry-run"]) == 0
    assert capfd.readouterr().out.startswith("ollama create demo-adapter -f "), "it leaves the merged model alone"
    assert command(["serve", export, "--engine", "ollama"]) == 0
    err = capfd.readouterr().err
    assert "serves demo" in err and "/v1/chat/completions" in err
    assert command(["serve", export, "--engine", "ollama", "--port", "9000"]) == 2
    assert command(["serve", str(demo_exports["vllm"]), "--engine", "ollama"]) == 2
    assert "expected one for ollama" in capfd.readouterr().err
    assert "demo:latest" in ollama.models
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert command(["serve", export, "--engine", "ollama"]) == 1
    assert "no Ollama answers at http://127.0.0.1:9" in capfd.readouterr().err
