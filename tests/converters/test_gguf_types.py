"""All types in one pass, beside llama.cpp's own quantizer and run by it; what does not fit; no library at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.gguf.header import GgufTensor
from converters.gguf.presets import PRESETS, PRESETS_THAT_NEED_IMATRIX, what_it_is
from lora2serve.cli import run
from lora2serve.weights.checkpoint import SafetensorsFiles
from tests.converters.test_gguf_adapter import by_llama_cpp, nmse
from tests.converters.test_gguf_families import export, model_of, read
from tests.support.upstream import convert, quantize

# NMSE of the logits against F16's, of a random model whose weights are far from uniform: about twice what was measured.
WORST = {"F32": 1e-5, "BF16": 1e-4, "Q8_0": 5e-3, "Q6_K": 0.02, "Q5": 0.1, "Q4": 0.4, "IQ4": 0.4, "MXFP4": 1.0}


EVERY = tuple(kind for kind in PRESETS if kind not in PRESETS_THAT_NEED_IMATRIX)


@pytest.mark.engine
@pytest.mark.parametrize("kinds", [("F16", "Q8_0", "Q4_K_M"), pytest.param(EVERY, marks=pytest.mark.slow)], ids=len)
def test_every_type(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...]
) -> None:
    """One command, one read of the base; each file has upstream's types and bytes, and llama.cpp runs it."""
    model = model_of(models, "llama")
    seen: Counter[tuple[str, int]] = Counter()
    fill = SafetensorsFiles._fill
    monkeypatch.setattr(
        SafetensorsFiles, "_fill",
        lambda self, item, view, offset: (seen.update([(item.spec.name, offset)]), fill(self, item, view, offset))[1],
    )  # fmt: skip
    quants = [word for kind in kinds for word in ("-q", kind)]
    words = ["export", str(model), "-t", "gguf", "-o", str(tmp_path), "--match-reference", *quants]
    assert run(words) == 0
    assert set(seen.values()) == {1}, "each block is read once, for all of them"
    files = {kind: next((tmp_path / f"gguf-{kind}").glob("*.gguf")) for kind in kinds}
    pre = read(files["F16"])[0]["tokenizer.ggml.pre"]
    f16 = convert(model, tmp_path / "f16.gguf", pre=pre)
    expected = by_llama_cpp(f16)
    problems: dict[str, Any] = {}
    for kind, file in files.items():
        theirs = f16 if kind == "F16" else tmp_path / f"{kind}.gguf"
        if kind == "F32":
            convert(model, theirs, pre=pre, outtype="f32")
        elif kind != "F16":
            quantize(f16, theirs, kind)
        ours, other = read(file)[1], read(theirs)[1]
        differ = [(name, ours[name][0], other[name][0]) for name in other if ours.get(name) != other[name]]
        bound = next((worst for part, worst in WORST.items() if kind.startswith(part)), 2.0)
        error = nmse(by_llama_cpp(file), expected)
        if differ or error > bound:
            problems[kind] = (len(differ), differ[:2], error)
    assert problems == {}


# the second without llama.cpp's quantizer
@pytest.mark.parametrize(
    ("preset", "some", "others"),
    [pytest.param("Q4_K_M", "Q8_0", "Q4_K", marks=pytest.mark.engine), ("F16", "F32", "F16")],
)
def test_another_type_for_some(
    models: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], preset: str, some: str, others: str
) -> None:
    model = model_of(models, "llama")
    _, tensors = read(
        export(model, tmp_path, "-q", preset, "--tensor-type", f"attn_v={some}", "--tensor-type", "0.ffn=BF16")
    )
    assert {kind for name, (kind, _) in tensors.items() if "attn_v" in name} == {some}
    assert {kind for name, (kind, _) in tensors.items() if "blk.0.ffn_" in name and "norm" not in name} == {"BF16"}
    assert tensors["blk.1.ffn_up.weight"][0] == others
    words = ["export", str(model), "-t", "gguf", "-o", str(tmp_path / "no"), "--tensor-type"]
    assert run([*words, "attn_v=Q9_X"]) == 1
    assert "unknown type 'Q9_X'" in capfd.readouterr().err
    assert run([*words, "nothing=Q8_0"]) == 1
    assert "no tensor matches" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("preset", "types", "said"),
    [
        ("MXFP4", {"token_embd": "Q8_0", "blk.0.ffn_up": "Q8_0", "output_norm": "F32"}, "it is Q8_0"),
        ("MXFP4", {"token_embd": "Q8_0", "blk.0.ffn_up_exps": "MXFP4"}, None),
        ("Q4_K_M", {"token_embd": "Q6_K", "blk.0.ffn_up": "Q8_0"}, None),  # rows that hold no whole blocks
    ],
)
def test_a_preset_without_its_type(preset: str, types: dict[str, str], said: str | None) -> None:
    tensors = [GgufTensor(name, (64, 64) if "norm" not in name else (64,), kind) for name, kind in types.items()]
    warnings = what_it_is(preset, tensors)
    assert bool(warnings) == bool(said)
    assert said is None or said in warnings[0]


def test_rows_that_hold_no_whole_blocks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ggml would end the process on an assertion; it is said before the first byte."""
    from tests.converters.test_gguf_families import DEMO, SHAPE
    from tests.support.tiny import make_model

    model = make_model(tmp_path / "narrow", "llama", **{**SHAPE, "hidden_size": 224})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, model / name)
    words = ["export", str(model), "-t", "gguf", "-o", str(tmp_path / "out"), "-q", "Q4_K_M"]
    assert run([*words, "--tensor-type", "attn_q=Q4_K"]) == 1
    assert "rows of 224 values, expected a multiple of 256 for Q4_K" in capfd.readouterr().err
    assert not (tmp_path / "out" / "gguf-Q4_K_M").exists()
    assert run(words) == 0, "llama.cpp's own fallback for such rows"


def test_a_value_beyond_f16(models: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = Path(shutil.copytree(model_of(models, "llama"), tmp_path / "large"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert run(["export", str(model), "-t", "gguf", "-q", "F16", "-o", str(tmp_path / "out")]) == 1
    err = capfd.readouterr().err
    assert "does not fit F16" in err
    assert "--quant BF16" in err
    assert not (tmp_path / "out" / "gguf-F16").exists()
    assert torch.isfinite(tensors["model.layers.0.mlp.up_proj.weight"]).all()
    export(model, tmp_path / "bf16", "-q", "BF16")


@pytest.mark.engine
def test_without_the_library(models: dict[str, Path], tmp_path: Path) -> None:
    """gguf's numpy code writes the same Q8_0; what it cannot is refused by name; the manifest says nothing is proven."""
    program = (
        "import sys, importlib.util as u; find = u.find_spec; sys.modules['llama_cpp'] = None;"
        "u.find_spec = lambda name, *more: None if name == 'llama_cpp' else find(name, *more);"
        "from lora2serve.cli import run; sys.exit(run(['export', *sys.argv[1:]]))"
    )
    model = model_of(models, "llama")

    def without(kind: str) -> Any:
        words = [str(model), "-t", "gguf", "-q", kind, "-o", str(tmp_path / "without")]
        return subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)

    assert without("Q8_0").returncode == 0
    (file,) = (tmp_path / "without" / "gguf-Q8_0").glob("*.gguf")
    assert read(file) == read(export(model, tmp_path / "with", "-q", "Q8_0"))
    assert json.loads((file.parent / "lora2serve.json").read_text())["tokens_proven"] == 0
    refused = without("Q4_K_M")
    assert refused.returncode == 1
    assert "mixed types need llama.cpp's library" in refused.stderr
