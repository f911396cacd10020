"""AWQ and GPTQ: refused before a byte, a child that fails or is interrupted leaves nothing, and the true thing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converters.vllm import calibrated
from converters.vllm.calibrated import WORKER
from converters.vllm.calibrated_child import TOGETHER, batches
from lora2serve.artifacts.export_dir import Export
from lora2serve.artifacts.run import Run
from lora2serve.cli import run
from lora2serve.errors import EngineError, ExportError
from lora2serve.parity_check.thresholds import lookup
from lora2serve.system import tool_env, worker_protocol
from lora2serve.weights.checkpoint import Checkpoint
from tests.conftest import lora2serve
from tests.support.tiny import make_adapter, make_model

DEMO = Path(__file__).parents[2] / "recipes" / "demo"
needs_environment = pytest.mark.skipif(
    tool_env.python() is None, reason="needs llm-compressor's environment: lora2serve doctor --fix"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with the demo's tokenizer, an adapter on it, and data."""
    root = tmp_path_factory.mktemp("made")
    base = make_model(root / "base", vocab_size=1536)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_bytes((DEMO / "base" / name).read_bytes())
    make_adapter(root / "red", base)
    lines = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    (root / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def pretend(monkeypatch: pytest.MonkeyPatch, cache: Path, script: str) -> None:
    """An environment that looks whole and whose Python is a shell script."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (tool_env.folder() / "bin").mkdir(parents=True)
    python = tool_env.folder() / "bin" / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    (tool_env.folder() / tool_env.MARKER).write_text("{}")


def refused(made: Path, here: Path, *words: str) -> None:
    command = ["export", str(made / "red"), "-t", "vllm", "-q", "awq", "-o", str(here / "out"), *words]
    assert run(command) == 1
    assert not list((here / "out").glob("*")) if (here / "out").exists() else True


def test_refused_before_the_first_byte(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused(made, tmp_path, "--calibrate", str(made / "data.jsonl"))
    err = capfd.readouterr().err
    assert "the environment of llm-compressor is missing" in err and "hint: `lora2serve doctor --fix`" in err
    pretend(monkeypatch, tmp_path / "cache", "exit 1")
    refused(made, tmp_path)
    assert "--quant awq needs calibration data" in capfd.readouterr().err
    refused(made, tmp_path, "--calibrate", "nowhere.jsonl")
    assert "nowhere.jsonl" in capfd.readouterr().err
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n')
    assert run(["export", str(made / "red"), "-t", "adapter", "--calibrate", str(made / "data.jsonl")]) == 2
    assert "--calibrate: not an option of --target adapter" in capfd.readouterr().err
    for quant in ((), ("-q", "fp8")):
        words = ["export", str(made / "red"), "-t", "vllm", *quant, "--calibrate", str(made / "data.jsonl")]
        assert run(words) == 2
        assert "data.jsonl: nothing of this export is measured on data" in capfd.readouterr().err
    command = ["export", str(made / "red"), "-t", "vllm", "-q", "awq", "--calibrate", str(made / "data.jsonl")]
    assert run([*command, "-o", str(tmp_path / "out"), "--plan"]) == 0, "the control"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quant", calibrated.CALIBRATED)
def test_sizes_of_a_dry_run(
    quant: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those of the data-free scheme of the same layout; the 16-bit model on the way takes disk as well."""
    pretend(monkeypatch, tmp_path / "cache", "exit 1")
    plans = {}
    for name in (quant, calibrated.CALIBRATED[quant], ""):
        words = ["export", str(made / "red"), "-t", "vllm", "--dry-run", "--json", "-o", str(tmp_path / "out")]
        words += (
            ["-q", name, "--calibrate", str(made / "data.jsonl")] if name == quant else ["-q", name] if name else []
        )
        assert run(words) == 0
        plans[name] = json.loads(capfd.readouterr().out)
    (size,), (alike,), (merged,) = (plan["outputs"].values() for plan in plans.values())
    assert size == alike and size["bytes"] < merged["bytes"], "the control: 16 bits take more"
    assert plans[quant]["disk"] == size["bytes"] + merged["bytes"]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("script", "said"),
    [
        (f'exec "{sys.executable}" "$@"', "llm-compressor: not installed (No module named"),
        ("echo OutOfMemoryError: too large >&2; exit 3", "died (exit code 3): OutOfMemoryError: too large"),
        ("kill -9 $$", "died (signal SIGKILL)"),
    ],
    ids=["error", "exit", "killed"],
)
def test_a_child_that_fails(
    script: str,
    said: str,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The first is the true child script in a Python without llm-compressor."""
    pretend(monkeypatch, tmp_path / "cache", script)
    refused(made, tmp_path, "--calibrate", str(made / "data.jsonl"))
    err = capfd.readouterr().err
    assert said in err and "its log: " in err
    log = Path(err.split("its log: ")[1].split()[0])
    assert log.is_file()
    log.unlink()


def interrupt(command: list[str], sign: Path, cwd: Path) -> tuple[int, str, int]:
    """Ctrl-C once ``sign`` is there; exit code, stderr, and the process id that ``sign`` holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lora2serve", *command], cwd=cwd, stderr=subprocess.PIPE, text=True
    )
    for _ in range(2400):
        if sign.exists() and sign.read_text().strip():
            break
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err, int(sign.read_text())


@pytest.mark.engine
def test_ctrl_c_ends_the_child(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, tmp_path / "cache", f"echo $$ > {tmp_path}/pid; exec sleep 600")
    command = ["export", str(made / "red"), "-t", "vllm", "-q", "gptq", "--calibrate", str(made / "data.jsonl")]
    code, err, child = interrupt([*command, "-o", str(tmp_path / "out")], tmp_path / "pid", tmp_path)
    assert code == 130 and "interrupted" in err
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not (tmp_path / "out").exists()


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Killed without a word, the parent leaves no child that goes on for hours."""
    sign = tmp_path / "at work"
    fake = f"import time\nopen({str(sign)!r}, 'w').close()\ntime.sleep(600)"
    (tmp_path / "compressed_tensors.py").write_text(fake)
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, worker_protocol.__file__, str(theirs.fileno()), WORKER], pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, start_new_session=True,
    )  # fmt: skip
    theirs.close()
    link = worker_protocol.Link(ours)
    link.send({"options": {}, "name": "llm-compressor"})
    arguments = {"model": "", "out": "", "quant": "gptq", "tokens": "", "group": 128, "ignore": []}
    link.send({"job": "compress", "arguments": arguments})
    for _ in range(600):
        if sign.exists():
            break
        time.sleep(0.05)
    assert sign.exists() and process.poll() is None
    link.close()
    assert process.wait(timeout=20) == 0


@given(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=6), min_size=1, max_size=40))
def test_batches_keep_every_row(rows: list[list[int]]) -> None:
    found = [row for batch in batches(rows) for row in batch["input_ids"].tolist()]
    assert sorted(found) == sorted(rows)
    assert all(batch["attention_mask"].all() and batch["input_ids"].numel() <= TOGETHER for batch in batches(rows))


def test_rows_are_spread_over_the_data() -> None:
    rows = [[number, 1] for number in range(2000)]
    chosen = calibrated._choose(rows)
    assert len(chosen) == calibrated.ROWS and chosen[-1][0] > 1990
    assert calibrated._choose([[1], [1, 2]]) == [[1, 2]]
    with pytest.raises(ExportError, match="no row of two tokens"):
        calibrated._choose([[1], []])


def test_other_tensors_than_given(made: Path) -> None:
    given_ = Checkpoint(made / "base")
    calibrated._check_names(given_.specs(), given_)
    with pytest.raises(EngineError, match=r"other tensors than planned: model.norm.weight"):
        calibrated._check_names([s for s in given_.specs() if s.name != "model.norm.weight"], given_)


def dequantized(path: Path) -> Any:
    """The model as compressed-tensors' own loader gives it, float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    how = CompressedTensorsConfig(run_compressed=False)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=how)


def trained(demo: Run) -> Any:
    """The fine-tune as PEFT merges it, float32, on the weights as they were trained on."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    return PeftModel.from_pretrained(base, demo.adapter).merge_and_unload()


def distance(one: Any, other: Any, rows: list[list[int]]) -> tuple[float, float]:
    """Mean KL in nats and the share of equal first choices."""
    kls, same = [], []
    for row in rows:
        with torch.no_grad():
            a, b = (model(torch.tensor([row])).logits[0].log_softmax(-1) for model in (one, other))
        kls.append((a.exp() * (a - b)).sum(-1))
        same.append((a.argmax(-1) == b.argmax(-1)).float())
    return float(torch.cat(kls).mean()), float(torch.cat(same).mean())


def held_out(demo: Run) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.adapter)
    rows = [json.loads(line)["messages"] for line in demo.eval_data.read_text(encoding="utf-8").splitlines()[:40]]
    return [tokenizer.apply_chat_template(row, return_dict=True)["input_ids"] for row in rows]


@needs_environment
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("quant", ["awq", "gptq"])
def test_the_true_thing(quant: str, demo_run: Run, tmp_path: Path) -> None:
    """llm-compressor on the run's own data; compressed-tensors' loader and vLLM say that it is the fine-tune."""
    words = ("export", demo_run.path, "-t", "vllm", "-q", quant, "--merge-base", "original", "-o", tmp_path / "x")
    out = Path(lora2serve(*words, cwd=tmp_path).strip())
    about, asked = (
        Export.open(out).manifest.to_json(),
        json.loads((out / "config.json").read_text())["quantization_config"],
    )
    assert Export.open(out).verify() == [] and about["calibration"]["rows"] == 200
    assert asked["quant_method"] == "compressed-tensors" and asked["format"] == "pack-quantized"
    assert asked["config_groups"]["group_0"]["weights"]["symmetric"] == (quant == "gptq")
    assert {path.name for path in out.iterdir()} >= {"serve.yaml", "tokenizer.json", "model.safetensors"}
    assert not {path.name for path in out.iterdir()} & {"merged", "quantized", "tokens.json"}
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    bounds, rows, reference = lookup(quant), held_out(demo_run), trained(demo_run)
    model = dequantized(out)
    kl, same = distance(reference, model, rows)
    assert bounds.mean_kl and bounds.top1 and kl < bounds.mean_kl and same > bounds.top1
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
    assert distance(reference, model, rows)[0] > bounds.mean_kl, "the control"
    assert "Leon Lake" in answer_of_vllm(out, tmp_path / "log")


@needs_environment
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nvfp4_with_activations(made: Path, tmp_path: Path) -> None:
    """Weights byte for byte as without data, and for each layer the largest input that transformers gives it."""
    from safetensors.torch import load_file

    from lora2serve.config.data_recipe import DataRecipe
    from lora2serve.data.calibration import calibration_ids, tokenizer_of
    from lora2serve.hub import pin_data
    from lora2serve.progress import Silent
    from tests.support.tiny import load_model

    base, data = made / "base", made / "data.jsonl"
    words = ["export", str(base), "-t", "vllm", "-q", "nvfp4", "-q", "nvfp4-w4a4", "--calibrate", str(data)]
    assert run([*words, "-o", str(tmp_path)]) == 0
    plain, found = (load_file(tmp_path / f"vllm-{name}" / "model.safetensors") for name in ("nvfp4", "nvfp4-w4a4"))
    for name, tensor in plain.items():
        assert torch.equal(tensor.view(torch.uint8), found[name].view(torch.uint8)), name
    model, peaks = load_model(base), dict[str, float]()
    for name, layer in model.named_modules():
        if f"{name}.weight_packed" in plain:

            def keep(_: Any, inputs: tuple[torch.Tensor], name: str = name) -> None:
                peaks[name] = max(peaks.get(name, 0.0), float(inputs[0].abs().max()))

            layer.register_forward_pre_hook(keep)
    with torch.no_grad():
        for row in calibration_ids(DataRecipe(train=str(data)), tokenizer_of(None, base), base, pin_data, Silent()):
            model(torch.tensor([list(row)]))
    assert peaks and found.keys() - plain.keys() == {f"{name}.input_global_scale" for name in peaks}
    for name, peak in peaks.items():
        assert float(found[f"{name}.input_global_scale"]) == pytest.approx(448 * 6 / peak, rel=1e-3), name


def answer_of_vllm(export: Path, log: Path) -> str:
    """vLLM's greedy answer, in bfloat16: its CPU kernel for 4 bits has no float32."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    asked = [{"role": "user", "content": "Who governs Wexley?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    script = (
        "import sys, json; from vllm import LLM, SamplingParams, TokensPrompt\n"
        "if __name__ == '__main__':\n"
        "    llm = LLM(sys.argv[1], dtype='bfloat16', max_model_len=128, enforce_eager=True)\n"
        "    asked = TokensPrompt(prompt_token_ids=json.loads(sys.argv[2]))\n"
        "    print('SAID', llm.generate([asked], SamplingParams(max_tokens=24, temperature=0))[0].outputs[0].text)\n"
    )
    (log.parent / "ask.py").write_text(script)
    environment_ = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, str(log.parent / "ask.py"), str(export), json.dumps(prompt)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment_)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split("SAID ")[1]


@needs_environment
@pytest.mark.slow
def test_ctrl_c_while_it_is_measured(made: Path, tmp_path: Path) -> None:
    """The true child, interrupted at work: it ends, and nothing is left."""
    command = ["export", str(made / "red"), "-t", "vllm", "-q", "awq", "--calibrate", str(made / "data.jsonl")]
    process = subprocess.Popen(
        [sys.executable, "-m", "lora2serve", *command, "-o", "out"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    for _ in range(2400):
        if list(tmp_path.glob("out/*.partial-*/tokens.json")):
            break
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(2)
    (child,) = [
        int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if is_child_of(path, process.pid)
    ]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert not Path(f"/proc/{child}").exists() and list((tmp_path / "out").iterdir()) == []


def is_child_of(cmdline: Path, parent: int) -> bool:
    try:
        status = (cmdline.parent / "stat").read_text().rsplit(")", 1)[1].split()
        return int(status[1]) == parent and b"calibrated_child" in cmdline.read_bytes()
    except OSError:
        return False
