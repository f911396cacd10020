"""Architectures that are not ours: llama.cpp's own converter on our merged tensors, beside its own files and transformers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.gguf import imatrix
from converters.gguf.gguf_adapter_reader import GgufAdapterReader
from converters.gguf.row_map import RowMaps
from converters.gguf.upstream import llama_cpp_source
from converters.gguf.upstream.converter_process import ConverterProcess
from converters.gguf.upstream.upstream_backend import UpstreamBackend
from lora2serve.artifacts.manifest import Manifest
from lora2serve.cli import run
from lora2serve.exporting.open_model import OpenOptions, open_adapters, open_plain
from lora2serve.weights.checkpoint import SafetensorsFiles
from tests.converters.test_gguf_adapter import by_llama_cpp, exported, nmse
from tests.converters.test_gguf_families import (
    CARD,
    DEMO,
    SHAPE,
    _sharpen,
    by_transformers,
    differences,
    export,
    read,
    sentencepiece_tokenizer,
    upstream,
)
from tests.merge.test_binding import QWEN_VISION, make_multimodal
from tests.support.llama_cpp_source import llama_cpp_dir
from tests.support.processes import watch
from tests.support.sight import seen
from tests.support.tiny import make_adapter, make_model
from tests.support.upstream import convert

pytestmark = pytest.mark.engine

# fmt: off
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi-2": ("phi", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4, "intermediate_size": 1024}),
    "stablelm": ("stablelm", {}),
    "gemma": ("gemma", {"head_dim": 64, "tie_word_embeddings": True}),
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2, "ffn_hidden_size": 1024}),
    "gpt-2": ("gpt2", {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512, "tie_word_embeddings": True}),
    "gpt-neox": ("gpt_neox", {"intermediate_size": 1024}),
    "starcoder2": ("starcoder2", {"use_bias": True, "tie_word_embeddings": True}),
    "cohere": ("cohere", {"tie_word_embeddings": True, "logit_scale": 0.5}),
    "deepseek-v2": ("deepseek_v2", {"q_lora_rank": 64, "kv_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "head_dim": 32, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "first_k_dense_replace": 1, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0, "norm_topk_prob": False}),
    "qwen3-next": ("qwen3_next", {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64}),
    "mamba-2": ("mamba2", {"num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1, "expand": 2}),
}
# fmt: on
# What its own program cannot read as transformers 5 saves it, and ours can: names of the config that were given up.
RENAMED = ("gpt-2", "gpt-neox", "qwen3-next")
OFTEN = ("phi-2", "gpt-2")
FAMILIES = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama_cpp_dir()
    return tmp_path_factory.mktemp("upstream")


def model_of(root: Path, name: str) -> Path:
    path = root / name
    if not path.exists():
        kind, changes = SHAPES[name]
        make_model(path, kind, **{**SHAPE, **changes})
        dress(path)
        if name == "gemma":
            sentencepiece_tokenizer(path)
    return path


def dress(path: Path, by: float = 3) -> None:
    _sharpen(path, by)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(DEMO / file, path / file)
    (path / "README.md").write_text(CARD)


@pytest.mark.parametrize("name", FAMILIES)
def test_same_logits_and_bytes(root: Path, tmp_path: Path, name: str) -> None:
    """F16 answers as transformers does; with ``--match-reference`` tensors and metadata are those of upstream."""
    model = model_of(root, name)
    expected = by_transformers(model)
    got = by_llama_cpp(export(model, tmp_path / "f16", "-q", "F16"))
    assert expected.std() > 0.1, "far from uniform"
    assert nmse(got, expected) < 1e-5
    assert nmse(got[::-1], expected) > 0.01
    if name in RENAMED:
        return
    keys, tensors = read(export(model, tmp_path / "q", "-q", "Q4_K_M", "--match-reference"))
    their_keys, theirs = read(upstream(model, tmp_path, "Q4_K_M", keys["tokenizer.ggml.pre"]))
    assert {n: t for n, (t, _) in tensors.items()} == {n: t for n, (t, _) in theirs.items()}
    assert [n for n in tensors if tensors[n] != theirs[n]] == []
    assert differences(keys, their_keys) == {}


def by_peft(base: Path, adapter: Path) -> np.ndarray:
    """The logits of base and adapter on the ids that ``by_llama_cpp`` is given."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        ids = torch.tensor([list(range(20, 90))])
        result: np.ndarray = PeftModel.from_pretrained(plain, adapter)(ids).logits[0].double().numpy()
    return result


def test_an_adapter_is_folded(root: Path, tmp_path: Path) -> None:
    """The lane reads the merged model; the base alone, the control, is far off. Nothing else is written to disk."""
    base = model_of(root, "falcon")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["query_key_value", "dense"], std=0.1)
    expected = by_peft(base, adapter)
    file = export(adapter, tmp_path / "out", "--base", str(base), "-q", "F16")
    assert nmse(by_llama_cpp(file), expected) < 1e-5
    assert nmse(by_transformers(base), expected) > 1e-3


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        pytest.param("falcon", ["query_key_value", "dense"], marks=pytest.mark.slow),  # heads in another order
        ("gpt-2", ["c_attn", "c_proj", "c_fc"]),  # stored as (in, out)
        pytest.param("gemma", ["q_proj", "k_proj", "down_proj"], marks=pytest.mark.slow),
        pytest.param("gpt-neox", ["query_key_value", "dense_h_to_4h"], marks=pytest.mark.slow),
    ],
)
def test_an_adapter_beside_its_base(root: Path, tmp_path: Path, name: str, modules: list[str]) -> None:
    """The adapter alone as GGUF, on the base's: as PEFT answers. The base without it, the control, is far off."""
    base = model_of(root, name)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=modules, std=0.1)
    expected = by_peft(base, adapter)
    alone = export(base, tmp_path / "base", "-q", "F32")
    beside = exported(tmp_path / "out", adapter, "--base", base, "-t", "gguf-adapter")
    assert nmse(by_llama_cpp(alone, beside), expected) < 1e-5
    assert nmse(by_llama_cpp(alone), expected) > 1e-3
    model = open_adapters([adapter], base, str(base), OpenOptions())
    reader = GgufAdapterReader(beside.parent, Manifest(target="gguf-adapter"), model)
    assert reader.differences == []
    assert set(reader.wanted) == set(model.source.changed())
    for spec in model.source.specs():
        if spec.name in reader.wanted:
            _, planned, stored = reader.pair(spec, slice(0, spec.rows), model.source.read(spec.name).values)
            assert torch.allclose(planned, stored, atol=1e-6)


def test_half_an_adapter_is_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix that leaves no trace, or only one of its halves, has no place; as it really is, the control, it has."""
    base = model_of(root, "falcon")
    model = open_plain(base, str(base), OpenOptions())
    name = "transformer.h.0.self_attention.query_key_value.weight"
    targets = UpstreamBackend.targets
    with RowMaps(model) as moves:
        (move,) = moves.of(name)
        assert sorted(move.outputs.tolist()) == list(range(512))
        for count in (0, 256):
            lost = lambda *args, count=count: ((t, n, v[:count]) for t, n, v in targets(*args))  # noqa: E731
            monkeypatch.setattr(UpstreamBackend, "targets", lost)
            assert moves.of(name) == []


def test_a_plan_reads_no_weights(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a tensor that the converter computes either; the export itself, the control, reads them."""
    seen: list[str] = []
    fill = SafetensorsFiles._fill
    monkeypatch.setattr(
        SafetensorsFiles, "_fill",
        lambda self, item, view, offset: (seen.append(item.spec.name), fill(self, item, view, offset))[1],
    )  # fmt: skip
    words = ["export", str(model_of(root, "falcon")), "-t", "gguf", "-q", "F16", "-o", str(tmp_path)]
    assert run([*words, "--plan"]) == 0
    assert seen == []
    assert run(words) == 0
    assert "transformer.h.0.self_attention.query_key_value.weight" in seen


def test_a_matrix_for_another_family(root: Path, tmp_path: Path) -> None:
    """``--calibrate``: every matrix but head and embedding has its importance, fused ones too."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"The square of {n} is {n * n}."}) + "\n" for n in range(20)))
    file = export(model_of(root, "falcon"), tmp_path / "out", "-q", "IQ3_XXS", "--calibrate", str(data))
    means = imatrix.read(tmp_path / "out" / "imatrix.gguf").means
    kinds = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    assert set(means) == {f"blk.{layer}.{kind}.weight" for layer in range(2) for kind in kinds}
    assert np.isfinite(by_llama_cpp(file)).all()


def test_refused_before_the_first_byte(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody knows it; its name is a little wrong; llama.cpp's graph has no such shape; the tree is not there."""
    model = Path(shutil.copytree(model_of(root, "phi-2"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())

    def refusal(**changes: Any) -> str:
        (model / "config.json").write_text(json.dumps({**config, **changes}))
        assert run(["export", str(model), "-t", "gguf", "-o", str(tmp_path / "out")]) == 1
        assert not list((tmp_path / "out").glob("*"))
        return capfd.readouterr().err

    known = refusal(architectures=["PhyForCausalLM"])
    assert "did you mean 'PhiForCausalLM'?" in known
    assert "known: PhiForCausalLM" in known, "the nearest first"
    assert all(name in known for name in ("LlamaForCausalLM", "MambaForCausalLM"))
    assert "wrong shape" in refusal(hidden_size=128)


def test_without_the_tree(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    model = model_of(root, "phi-2")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    assert llama_cpp_source.converter() is None
    assert run(["export", str(model), "-t", "gguf", "-o", str(tmp_path / "out")]) == 1
    err = capfd.readouterr().err
    assert "architecture PhiForCausalLM" in err
    assert "lora2serve doctor --fix" in err


def test_its_gguf_stays_out_of_our_process(root: Path, tmp_path: Path) -> None:
    """Planning and writing by that lane imports neither its ``conversion`` nor its ``gguf`` here."""
    program = (
        "import sys; from lora2serve.cli import run;"
        "code = run(['export', sys.argv[1], '-t', 'gguf', '-q', 'Q8_0', '-o', sys.argv[2]]);"
        "import gguf; print(code, 'conversion' in sys.modules, 'site-packages' in gguf.__file__)"
    )
    command = [sys.executable, "-c", program, str(model_of(root, "gpt-2")), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.splitlines()[-1] == "0 False True"


def test_no_child_stays(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter's process ends with the export, also where that is refused."""
    running = watch(monkeypatch)

    def children() -> list[str]:
        return [name for name in (child.name() for child in running()) if name.startswith("llama.cpp's con")]

    plan, seen = ConverterProcess.plan, list[str]()
    monkeypatch.setattr(ConverterProcess, "plan", lambda self: (plan(self), seen.extend(children()))[0])
    export(model_of(root, "gpt-2"), tmp_path / "out", "-q", "Q8_0")
    assert (
        run(["export", str(model_of(root, "gpt-2")), "-t", "gguf", "-o", str(tmp_path), "--tensor-type", "x=Q8_0"]) == 1
    )
    assert len(seen) == 2, "the control: it is seen while it runs"
    assert children() == []


def multimodal(root: Path, kind: str) -> Path:
    """A small model with random weights that sees, and what its processor is told."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    path = root / kind
    if path.exists():
        return path
    text = {k: v for k, v in SHAPE.items() if not k.endswith("token_id")}
    if kind == "gemma3":
        text |= {
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "vocab_size": 888,
            "tie_word_embeddings": True,
            "sliding_window": 64,
            "model_type": "gemma3_text",
        }
        vision = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "model_type": "siglip_vision_model",
        }
        extra: dict[str, Any] = {
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
            "tie_word_embeddings": True,
        }
    else:
        text |= {
            "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
            "model_type": "qwen2_vl_text",
        }
        vision = {
            "embed_dim": 64,
            "hidden_size": 256,
            "depth": 4,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "image_size": 56,
        }
        extra = {
            "image_token_id": 5,
            "video_token_id": 6,
            "vision_start_token_id": 7,
            "vision_end_token_id": 8,
            "tie_word_embeddings": False,
        }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **extra)
    model = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    for name, weight in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):  # zero in a fresh model: no image would make a difference
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(path)
    dress(path, by=2)
    settings = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_seq_length": 4,
        "min_pixels": 3136,
        "max_pixels": 12544,
        "size": {"shortest_edge": 3136, "longest_edge": 12544},
    }
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


def as_on_the_hub(model: Path, out: Path) -> Path:
    """The same model under the names of older releases of transformers, which are all that upstream's program knows."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    renamed = {re.sub("^vision_tower[.]", "vision_tower.vision_model.", name): value for name, value in tensors.items()}
    save_file(renamed, out / "model.safetensors", {"format": "pt"})
    return out


def image_rows(loaded: Any, kind: str, pixels: np.ndarray) -> np.ndarray:
    """What transformers' vision tower and projector make of an image: (n, hidden)."""
    values = torch.tensor((pixels / 255 - 0.5) / 0.5, dtype=torch.float32).permute(2, 0, 1)[None]
    grid = {}
    if kind == "qwen2_vl":  # patches of 14 in groups of 2 by 2, each the same image twice
        side = pixels.shape[0] // 14
        grid = {"image_grid_thw": torch.tensor([[1, side, side]])}
        cut = values.reshape(3, side // 2, 2, 14, side // 2, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)
        values = cut.reshape(side * side, 3, 1, 14 * 14).expand(-1, -1, 2, -1).reshape(side * side, -1)
    with torch.no_grad():
        result = loaded.model.get_image_features(pixel_values=values, **grid).pooler_output
    rows = result[0] if isinstance(result, (tuple, list)) else result
    return rows.reshape(-1, rows.shape[-1]).double().numpy()


# nothing of ours knows either of them: what passes for the one passes for the other
@pytest.mark.parametrize("kind", ["qwen2_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_multimodal(root: Path, tmp_path: Path, kind: str) -> None:
    """The text model answers as transformers' does and sees an image as there; the projector is upstream's own."""
    from transformers import AutoModelForImageTextToText

    model = multimodal(root, kind)
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected: np.ndarray = loaded(torch.tensor([list(range(20, 90))])).logits[0].double().numpy()
    file = export(model, tmp_path / "out", "-q", "F16", "--match-reference")
    got = by_llama_cpp(file)
    assert nmse(got, expected) < 3e-5  # upstream's own file of Qwen2-VL, the same bytes, is at 1.3e-5, at F32 too
    assert nmse(got[::-1], expected) > 0.01
    (projector,) = file.parent.glob("mmproj-*.gguf")
    side = 56 if kind == "gemma3" else 112  # pixels: a size that neither scales
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    rows, shown = seen(file, projector, pixels, tmp_path), image_rows(loaded, kind, pixels)
    assert nmse(rows, shown) < 1e-5
    assert nmse(rows[::-1], shown) > 0.01
    keys, tensors = read(projector)
    their_keys, theirs = read(convert(as_on_the_hub(model, tmp_path / "hub"), tmp_path / "theirs.gguf", "--mmproj"))
    assert [name for name in theirs if tensors.get(name) != theirs[name]] == []
    assert tensors.keys() == theirs.keys()
    assert differences(keys, their_keys) == {}
    manifest = json.loads((file.parent / "lora2serve.json").read_text())
    assert (manifest["file"], manifest["projector"]) == (file.name, projector.name)


GRANITE_4 = {
    "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 512, "mamba_n_heads": 8,
    "mamba_d_head": 64, "mamba_expand": 2, "mamba_d_state": 64, "mamba_n_groups": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "positions"),
    [(["mamba", "attention"], "nope"), (["attention"] * 2, "rope"), (["attention"] * 2, "nope")],
)
def test_granite_4(tmp_path: Path, layers: list[str], positions: str) -> None:
    """Hybrid and dense, by one class: layers by the names of the Hub's config, positions as transformers has them."""
    from gguf import GGUFReader

    changes = {"layer_types": layers, "position_embedding_type": positions}
    model = make_model(tmp_path / "granite", "granitemoehybrid", **{**SHAPE, **GRANITE_4, **changes})
    dress(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))  # transformers 5 has other names for layers
    file = export(model, tmp_path / "out", "-q", "F16")
    assert nmse(by_llama_cpp(file), by_transformers(model)) < 1e-4
    fields = GGUFReader(file).fields
    (turned,) = [name for name in fields if name.endswith("rope.scaling.finetuned")]
    assert bool(fields[turned].contents()) == (positions == "rope")


QWEN_3_5 = {
    "num_hidden_layers": 4, "head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
PICTURES = {
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 16, "merge_size": 2,
    "size": {"shortest_edge": 56, "longest_edge": 1000},
}  # fmt: skip


@pytest.mark.slow
def test_qwen_3_5(tmp_path: Path) -> None:
    """Trained as a language model on a base with other names: merged and alone it answers as PEFT does. Its linear
    attention lies in other columns, too. The base without it, the control, is far off.
    """
    base = make_multimodal(
        tmp_path / "base", "qwen3_5", SHAPE | QWEN_3_5, vision_config=QWEN_VISION | {"out_hidden_size": 256}
    )
    dress(base)
    (base / "preprocessor_config.json").write_text(json.dumps(PICTURES))
    adapter = make_adapter(
        tmp_path / "adapter", base, target_modules=["q_proj", "in_proj_qkv", "out_proj", "down_proj"], std=0.1
    )
    expected = by_peft(base, adapter)
    merged = export(adapter, tmp_path / "merged", "--base", str(base), "-q", "F32")
    alone = export(base, tmp_path / "alone", "-q", "F32")
    beside = exported(tmp_path / "out", adapter, "--base", base, "-t", "gguf-adapter")
    assert nmse(by_llama_cpp(merged), expected) < 1e-5
    assert nmse(by_llama_cpp(alone, beside), expected) < 1e-5
    assert nmse(by_llama_cpp(alone), expected) > 1e-3
    model = open_adapters([adapter], base, str(base), OpenOptions())
    reader = GgufAdapterReader(beside.parent, Manifest(target="gguf-adapter"), model)
    assert (reader.differences, set(reader.wanted)) == ([], set(model.source.changed()))
    for spec in (spec for spec in model.source.specs() if spec.name in reader.wanted):
        _, planned, stored = reader.pair(spec, slice(0, spec.rows), model.source.read(spec.name).values)
        assert torch.allclose(planned, stored, atol=1e-6)
