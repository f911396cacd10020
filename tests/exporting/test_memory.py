"""Memory and planning: what is merged may be larger than what is free, and a plan reads no weight."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.models import config, make
from lora2serve.artifacts.export_dir import Export
from lora2serve.cli import run
from lora2serve.system import malloc, own_process
from tests.support.folding import export_merged
from tests.support.tiny import make_adapter, make_model

ROOM = 100 << 20  # bytes beyond what importing the libraries takes
PROGRAM = """
import resource, sys
import torch, safetensors.torch
import transformers, peft
{imports}
torch.set_num_threads(2)
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + {room}, used + {room}))
{work}
"""
OURS = "sys.exit(run(['export', sys.argv[1], '-t', 'vllm', '-o', sys.argv[2]]))"
WHOLE = "state = safetensors.torch.load(open(sys.argv[3], 'rb').read()); sys.exit(0 if state else 1)"


def limited(work: str, *words: Path) -> subprocess.CompletedProcess[str]:
    imports = "from lora2serve.cli import run; from lora2serve.system import own_process; own_process.claim(); import lora2serve.exporting.stream, lora2serve.exporting.open_model, lora2serve.merge.merged, lora2serve.adapters.peft_layers"
    program = PROGRAM.format(imports=imports, room=ROOM, work=work)
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.mark.engine
def test_tensors_that_exceed_the_memory(tmp_path: Path) -> None:
    """350 MB of tensors in 100 MB; the control, which reads them whole, does not get through."""
    make(tmp_path, 1)
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert size > 3 * ROOM
    words = (tmp_path / "adapter", tmp_path / "out", tmp_path / "base" / "model.safetensors")
    done = limited(OURS, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Export.open(tmp_path / "out" / "vllm").verify() == []
    control = limited(WHOLE, *words)
    assert control.returncode != 0
    assert "Memory" in control.stderr or "memory" in control.stderr


def test_malloc_is_tuned_by_the_command_line_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds for the whole process, which is not ours where a program calls the export."""
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    calls: list[str] = []
    monkeypatch.setattr(malloc, "keep_freed_memory", lambda: calls.append("tuned"))
    for ours in (False, True):
        monkeypatch.setattr(own_process, "is_ours", lambda ours=ours: ours)
        export_merged(base, [adapter], tmp_path / f"out-{ours}")
        assert calls == ["tuned"] * ours


@pytest.fixture
def seventy(tmp_path: Path) -> Path:
    """A model of Llama 70B's shape whose weights are holes in sparse files."""
    hidden, layers, wide, kv, vocabulary = 8192, 80, 28672, 1024, 128256
    base = tmp_path / "70b"
    base.mkdir()
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": wide, "vocab_size": vocabulary}
    shape |= {"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    (base / "config.json").write_text(json.dumps(config(layers) | shape))
    linears = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    shards = [
        {
            "model.embed_tokens.weight": (vocabulary, hidden),
            "lm_head.weight": (vocabulary, hidden),
            "model.norm.weight": (hidden,),
        }
    ]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        found = {f"{prefix}.self_attn.{name}.weight": size for name, size in linears.items()}
        found |= {f"{prefix}.mlp.{name}.weight": (wide, hidden) for name in ("gate_proj", "up_proj")}
        found |= {f"{prefix}.mlp.down_proj.weight": (hidden, wide)}
        found |= {f"{prefix}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shards.append(found)
    index = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        offset, header = 0, {}
        for tensor, size in tensors.items():
            count = 2 * size[0] * (size[1] if len(size) > 1 else 1)
            header[tensor] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, offset + count]}
            offset += count
            index[tensor] = name
        raw = json.dumps(header).encode()
        with (base / name).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + offset)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return base


def test_a_plan_for_70b(
    seventy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Sizes, disk and memory without a weight; the time is told, and far from what reading 141 GB would take."""
    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    assert run(["export", str(seventy), "-t", "vllm", "-o", "out", "--plan", "--json"]) == 0
    seconds = time.perf_counter() - started
    said = capfd.readouterr()
    plan = json.loads(said.out)
    assert plan["tensors"] == 723
    assert ("141.1 GB to write" in said.err) == (plan["free"] < plan["disk"]), "the disk is asked"
    assert plan["disk"] > 141_000_000_000
    assert plan["memory"] < 300 << 20
    assert not (tmp_path / "out").exists()
    print(f"planned in {seconds:.2f} s")
    assert sum(path.stat().st_blocks for path in seventy.iterdir()) * 512 < 10_000_000, "the weights are holes"


def test_a_plan_names_every_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.support.tiny import make_model

    monkeypatch.chdir(tmp_path)
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], use_dora=True)
    assert run(["export", str(adapter), "-t", "vllm", "-t", "adapter", "-t", "gguf", "--plan"]) == 1
    said = capfd.readouterr().err
    assert "dora" in said.lower()
    assert "tokenizer" in said.lower()
