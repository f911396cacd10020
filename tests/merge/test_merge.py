"""The fold against PEFT's own merge in float32, for every adapter kind on several model shapes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora2serve.adapters.adapter import open_adapter
from lora2serve.adapters.meta_model import TRANSPOSED
from lora2serve.errors import ExportError, MergeError
from lora2serve.merge.merged import Merged
from lora2serve.progress import Silent
from lora2serve.weights.checkpoint import Checkpoint
from lora2serve.weights.dequantize import Dequantized
from tests.support.folding import export_merged, fold, stored, worst_ulp
from tests.support.tiny import load_model, make_adapter, make_model, merged_by_peft, model_state

SLOW = pytest.mark.slow
RARE_TIES = ("qwen2", "qwen3", "gemma2", "mistral")
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ALL_LINEAR},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ALL_LINEAR},
    "patterns": {
        "rank_pattern": {"q_proj": 8, "layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 3},
    },
    "rslora-patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding-dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved-modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved-norm": {"modules_to_save": ["norm"]},
    "tokens": {"trainable_token_indices": [3, 7, 319]},
    "layers": {"layers_to_transform": [1]},
    "eva-init": {"init_lora_weights": "gaussian"},
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 16, "tie_word_embeddings": True},
}
TIED = (
    "embedding",
    "embedding-dora",
    "head",
    "saved-modules",
)  # one half of a tied pair: PEFT merges into both; see test_untied
# What a kind does, it does on llama; what a shape has of its own (biases, norms, a tie), one kind shows. Of those left
# out, test_merge_properties.py draws combinations.
LEFT_OUT = ("rslora", "patterns", "layers", "eva-init")
OFTEN = {
    "llama": tuple(kind for kind in KINDS if kind not in LEFT_OUT), "qwen2": ("lora",), "gemma2": ("dora",),
    "gemma3_text": ("tokens",),
}  # fmt: skip
FOLDED = [
    pytest.param(shape, kind, marks=[] if kind in OFTEN[shape] else [SLOW])
    for shape, changes in SHAPES.items()
    for kind in KINDS
    if kind not in TIED or not changes.get("tie_word_embeddings")
]
Folded = Callable[[str, str], tuple[Path, dict[str, torch.Tensor]]]


class Told(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: make_model(root / kind, kind, **changes) for kind, changes in SHAPES.items()}


@pytest.fixture(scope="module")
def folded(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Folded:
    """An adapter of a kind on a shape, which nobody writes to, and what PEFT makes of both."""

    @cache
    def make(shape: str, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
        adapter = make_adapter(tmp_path_factory.mktemp("folded") / "adapter", bases[shape], **KINDS[kind])
        return adapter, merged_by_peft(bases[shape], adapter)

    return make


@pytest.fixture(scope="module")
def plain(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on llama, which nobody writes to."""
    return make_adapter(tmp_path_factory.mktemp("plain") / "adapter", bases["llama"])


def check_equal(out: Path, oracle: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    """bf16 output: every value is PEFT's float32 sum, rounded once, or one unit in the last place off."""
    got = stored(out)
    worst = worst_ulp(got, {name: oracle[name] for name in got})
    assert max(worst.values()) <= 1, worst
    off = sum(int((got[n] != oracle[n].to(got[n].dtype)).sum()) for n in got)
    assert off <= 1e-4 * sum(t.numel() for t in got.values()), f"{off} values are off by one unit"


@pytest.mark.parametrize(("shape", "kind"), FOLDED)
def test_equals_peft(bases: dict[str, Path], folded: Folded, tmp_path: Path, shape: str, kind: str) -> None:
    adapter, oracle = folded(shape, kind)
    out = export_merged(bases[shape], [adapter], tmp_path / "out")
    check_equal(out, oracle)
    base = stored(bases[shape])
    assert any(not torch.equal(base[name], tensor) for name, tensor in stored(out).items()), (
        "the control: something changed"
    )


def test_control_wrong_alpha_is_seen(bases: dict[str, Path], folded: Folded, tmp_path: Path) -> None:
    right, oracle = folded("llama", "lora")
    adapter = Path(shutil.copytree(right, tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * 1.1}))
    with pytest.raises(AssertionError):
        check_equal(export_merged(bases["llama"], [adapter], tmp_path / "out"), oracle)


@pytest.mark.parametrize("kind", ["lora", "dora", "embedding", "tokens"])
def test_float32_output(bases: dict[str, Path], folded: Folded, tmp_path: Path, kind: str) -> None:
    """In float32 B @ A itself may round differently: within two ulps of the larger summand."""
    adapter, oracle = folded("llama", kind)
    out = export_merged(bases["llama"], [adapter], tmp_path / "out", "F32")
    base = {name: tensor.float() for name, tensor in stored(bases["llama"]).items()}
    for name, tensor in stored(out).items():
        assert tensor.dtype == torch.float32
        size = torch.maximum(base[name].abs(), oracle[name].abs()) + (oracle[name] - base[name]).abs()
        assert ((tensor - oracle[name]).abs() <= 4 * torch.finfo(torch.float32).eps * size + 1e-12).all(), name


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("qwen3_moe", marks=SLOW)])
def test_moe_attention(tmp_path: Path, kind: str) -> None:
    extra = {
        "mixtral": {"num_local_experts": 4},
        "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    }[kind]
    base = make_model(tmp_path / "base", kind, num_hidden_layers=1, **extra)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "o_proj"])
    out = export_merged(base, [adapter], tmp_path / "out")
    expected = merged_by_peft(base, adapter)
    got = model_state(out)
    assert max(float((got[n] - t.bfloat16().float()).abs().max()) for n, t in expected.items()) < 0.02
    assert {n: t.shape for n, t in stored(out).items()} == {n: t.shape for n, t in stored(base).items()}, (
        "same layout on disk"
    )


@pytest.mark.parametrize("kind", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.engine)])
def test_experts(tmp_path: Path, kind: str) -> None:
    """``target_parameters`` on transformers' fused experts, one file per expert on disk."""
    extra = {
        "mixtral": {"num_local_experts": 4},
        "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    }[kind]
    base = make_model(tmp_path / "base", kind, num_hidden_layers=1, **extra)
    adapter = make_adapter(
        tmp_path / "adapter",
        base,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    out = export_merged(base, [adapter], tmp_path / "out")
    expected, got, before = merged_by_peft(base, adapter), model_state(out), model_state(base)
    for name, tensor in expected.items():
        assert worst_ulp({name: got[name].bfloat16()}, {name: tensor})[name] <= 1, name
    experts = [n for n in expected if "experts" in n]
    assert all(not torch.equal(got[n], before[n]) for n in experts), "the control: every expert tensor changed"


def test_fan_in_fan_out(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=64)
    for kind in ({}, {"use_dora": True}):
        adapter = make_adapter(
            tmp_path / f"adapter{len(kind)}", base, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **kind
        )
        out = export_merged(base, [adapter], tmp_path / f"out{len(kind)}")
        oracle = merged_by_peft(base, adapter)
        got = stored(out)
        pairs = {n: next(t for o, t in oracle.items() if o.endswith(n)) for n in got}
        assert max(worst_ulp(got, pairs).values()) <= 1


CONV1D: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gpt2": ({"n_embd": 64, "n_layer": 1, "n_head": 4}, ["attn.c_proj", "lm_head"]),  # square, and a plain linear layer
    "openai-gpt": ({"n_embd": 64, "n_layer": 1, "n_head": 4}, ["attn.c_proj"]),
    "llama": ({}, ["q_proj", "o_proj"]),  # the control: no Conv1D at all
    "qwen3": ({"head_dim": 16}, ["q_proj", "o_proj"]),
    "gpt_neox": ({}, ["dense", "query_key_value"]),
}


def logits_of(base: Path, adapter: Path) -> tuple[Any, Any]:
    """PEFT's on 48 tokens, without merging, and the base's."""
    from peft import PeftModel

    tokens = torch.arange(5, 53)[None]
    with torch.no_grad():
        before = load_model(base).eval()(tokens).logits
        return PeftModel.from_pretrained(load_model(base), adapter).eval()(tokens).logits, before


HEADS: dict[str, dict[str, Any]] = {
    "gpt_neox": {},  # stored as embed_out
    "mamba": {"state_size": 16},  # its embedding is called backbone.embeddings
    "openai-gpt": {"n_embd": 64, "n_layer": 1, "n_head": 4},  # tokens_embed
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 128},
    "qwen3": {"head_dim": 16},
    "cohere": {},
}


OFTEN_HEADS = [("gpt_neox", True), ("mamba", True), ("qwen3", False)]


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        pytest.param(kind, tied, marks=[] if (kind, tied) in OFTEN_HEADS else [SLOW])
        for kind in HEADS
        for tied in (True, False)
    ],
)
def test_a_head_of_any_name(tmp_path: Path, kind: str, tied: bool) -> None:
    """LoRA on the head, tied or not: the export answers as the trained model does, and not as the base."""
    base = make_model(tmp_path / "base", kind, tie_word_embeddings=tied, num_hidden_layers=1, **HEADS[kind])
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["lm_head"])
    out = export_merged(base, [adapter], tmp_path / "out")
    trained, before = logits_of(base, adapter)
    with torch.no_grad():
        served = load_model(out).eval()(torch.arange(5, 53)[None]).logits
    scale = trained.abs().max()
    assert (served - trained).abs().max() < 0.01 * scale < 0.1 * scale < (before - trained).abs().max()
    names = [name for name in stored(out) if name.endswith(("lm_head.weight", "embed_out.weight"))]
    assert len(names) == 1


@pytest.mark.parametrize("kind", ["llama", "gemma", *(pytest.param(kind, marks=SLOW) for kind in RARE_TIES)])
def test_a_tie_that_is_none(tmp_path: Path, kind: str) -> None:
    """The flag says tied and the head is another: transformers loads the head, and so does whoever reads the export."""
    extra = {"head_dim": 16} if kind in ("qwen3", "gemma", "gemma2") else {}
    base = make_model(tmp_path / "base", kind, num_hidden_layers=1, **extra)
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings")
    flag = {} if kind == "gemma" else {"tie_word_embeddings": True}  # which is that class's default
    (base / "config.json").write_text(json.dumps({**config, **flag}))
    adapter = make_adapter(tmp_path / "adapter", base)
    out = export_merged(base, [adapter], tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    check_equal(out, merged_by_peft(base, adapter))


def test_a_tie_that_is_one(tmp_path: Path) -> None:
    """The control: a stored copy of the embedding beside the flag."""
    base = make_model(tmp_path / "base", "llama", num_hidden_layers=1)
    tensors = stored(base)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    out = export_merged(base, [make_adapter(tmp_path / "adapter", base)], tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("kind", "saved"),
    [
        pytest.param(kind, saved, marks=[] if kind == "gpt2" or (saved and kind == "llama") else [SLOW])
        for kind in CONV1D
        for saved in (True, False)
    ],
)
def test_what_the_config_says_of_all_modules_is_decided_by_each(tmp_path: Path, kind: str, saved: bool) -> None:
    """PEFT saves the ``fan_in_fan_out`` of the module it came to last; square weights fit either way."""
    config, targets = CONV1D[kind]
    base = make_model(tmp_path / "base", kind, num_hidden_layers=1, **config)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=targets)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fan_in_fan_out": saved}))
    oracle = merged_by_peft(base, adapter)
    got = model_state(export_merged(base, [adapter], tmp_path / "out"))
    before = model_state(base)
    assert any(not torch.equal(got[name], before[name]) for name in oracle)
    assert max(worst_ulp({n: t.bfloat16() for n, t in got.items()}, oracle, before).values()) <= 1


def test_every_model_with_conv1d_is_known() -> None:
    """Each of transformers' modeling files that use Conv1D belongs to a type of the table."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    uses = [path for path in models.glob("*/modeling_*.py") if re.search(r"import .*\bConv1D\b", path.read_text())]
    found = {
        re.search(r'model_type = "([^"]+)"', next(path.parent.glob("configuration_*.py")).read_text()) for path in uses
    }
    assert {match[1].removesuffix("_encoder").removesuffix("_decoder") for match in found if match} == set(TRANSPOSED)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_bias(tmp_path: Path, bias: str) -> None:
    base = make_model(tmp_path / "base", "llama", attention_bias=True, num_hidden_layers=1)
    adapter = make_adapter(tmp_path / "adapter", base, bias=bias)
    check_equal(export_merged(base, [adapter], tmp_path / "out"), merged_by_peft(base, adapter))


def test_lora_bias(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "llama", attention_bias=True, num_hidden_layers=1)
    adapter = make_adapter(tmp_path / "adapter", base, lora_bias=True, target_modules=["q_proj", "v_proj"])
    check_equal(export_merged(base, [adapter], tmp_path / "out"), merged_by_peft(base, adapter))


def test_several_adapters_in_turn(bases: dict[str, Path], tmp_path: Path) -> None:
    adapters = [make_adapter(tmp_path / f"a{n}", bases["llama"], seed=n, target_modules=ALL_LINEAR) for n in (1, 2)]
    check_equal(export_merged(bases["llama"], adapters, tmp_path / "out"), merged_by_peft(bases["llama"], *adapters))


def test_resized_vocabulary(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(
        tmp_path / "adapter", bases["llama"], resize=330, target_modules=["q_proj", "embed_tokens", "lm_head"]
    )
    out = export_merged(bases["llama"], [adapter], tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 330
    got = stored(out)
    assert got["model.embed_tokens.weight"].shape == got["lm_head.weight"].shape == (330, 64)
    load_model(out)(torch.tensor([[329]]))


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_of_a_resized_vocabulary(tmp_path: Path, tied: bool) -> None:
    """PEFT then saves the whole table beside the rows that were trained, under its wrapper's own name."""
    base = make_model(tmp_path / "base", "llama", tie_word_embeddings=tied, num_hidden_layers=1)
    tokens = [325, 326] if tied else {"embed_tokens": [325, 326], "lm_head": [325, 326]}
    adapter = make_adapter(tmp_path / "adapter", base, resize=330, trainable_token_indices=tokens)
    out = export_merged(base, [adapter], tmp_path / "out")
    check_equal(out, merged_by_peft(base, adapter, resize=330))
    table = stored(out)["model.embed_tokens.weight"]
    assert table.shape == (330, 64) and not torch.equal(table[325], table[327])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("change", ["vocabulary", "untied", "replicated"])
def test_the_config_of_the_base_stays_as_it_is(tmp_path: Path, change: str, nested: bool) -> None:
    base = make_model(tmp_path / "base", "llama", tie_word_embeddings=change == "untied")
    options: dict[str, Any] = {
        "vocabulary": {"resize": 330, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        "untied": {"modules_to_save": ["lm_head"]},
        "replicated": {"layer_replication": [[0, 2], [1, 2]], "target_modules": ALL_LINEAR},
    }[change]
    adapter = open_adapter(make_adapter(tmp_path / "adapter", base, **options))
    checkpoint = Checkpoint(base)
    if nested:
        checkpoint.config["text_config"] = {"vocab_size": checkpoint.config.pop("vocab_size")}
    before = json.dumps(checkpoint.config)
    merged = Merged(Dequantized(checkpoint), [adapter], checkpoint.config)
    assert json.dumps(merged.config) != before, "the merged model has another"
    assert json.dumps(checkpoint.config) == before
    if nested:
        merged.config["text_config"]["vocab_size"] = 1
        assert json.dumps(checkpoint.config) == before, "nothing inside is shared"
        dict(checkpoint.config)["text_config"]["vocab_size"] = 1
        assert json.dumps(checkpoint.config) != before, "the control: a shallow copy shares it"


def test_layer_replication(bases: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = make_adapter(
        tmp_path / "adapter", bases["llama"], layer_replication=[[0, 2], [1, 2]], target_modules=ALL_LINEAR
    )
    out = export_merged(bases["llama"], [adapter], tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3
    # PEFT's merge folds twice into a weight that two copies share, so the unmerged model is the judge here.
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        trained = PeftModel.from_pretrained(load_model(bases["llama"]), adapter)(tokens).logits
        assert (trained - load_model(out)(tokens).logits).abs().max() < 0.05 < trained.abs().max()


@pytest.mark.parametrize("kind", ["embedding", "head", "saved-embedding", "saved-head"])
def test_untied(tmp_path: Path, kind: str) -> None:
    """One half of a tied pair was trained: the served model answers like the trained one, with a head of its own."""
    from peft import PeftModel

    base = make_model(tmp_path / "base", "llama", tie_word_embeddings=True, num_hidden_layers=1)
    given: dict[str, Any] = {
        "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
        "head": {"target_modules": ["q_proj", "lm_head"]},
        "saved-embedding": {"modules_to_save": ["embed_tokens"]},
        "saved-head": {"modules_to_save": ["lm_head"]},
    }[kind]
    adapter = make_adapter(tmp_path / "adapter", base, **given)
    out = export_merged(base, [adapter], tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        trained = PeftModel.from_pretrained(load_model(base), adapter)(tokens).logits
        served = load_model(out)(tokens).logits
        still_tied = load_model(base)(tokens).logits
    assert (trained - served).abs().max() < 0.05 < (trained - still_tied).abs().max()


@pytest.mark.parametrize(
    "given", [{"trainable_token_indices": [5, 6]}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}]
)
def test_stays_tied(tmp_path: Path, given: dict[str, Any]) -> None:
    base = make_model(tmp_path / "base", "llama", tie_word_embeddings=True, num_hidden_layers=1)
    adapter = make_adapter(tmp_path / "adapter", base, **given)
    out = export_merged(base, [adapter], tmp_path / "out")
    assert "lm_head.weight" not in stored(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_untouched_tensors_keep_their_bytes(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases["llama"], target_modules=["q_proj"])
    got, before = stored(export_merged(bases["llama"], [adapter], tmp_path / "out")), stored(bases["llama"])
    changed = {name for name in got if not torch.equal(got[name].view(torch.int16), before[name].view(torch.int16))}
    assert changed == {f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)}


def test_adapter_of_another_base(bases: dict[str, Path], tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "llama", num_hidden_layers=3, hidden_size=32)
    adapter = make_adapter(tmp_path / "adapter", other)
    with pytest.raises(MergeError, match=r"3 of 9 changes fit no weight"):
        fold(bases["llama"], [adapter])


def test_shapes_of_another_base(bases: dict[str, Path], tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "llama", hidden_size=32)
    with pytest.raises(MergeError) as caught:
        fold(bases["llama"], [make_adapter(tmp_path / "adapter", other)])
    assert caught.value.message.count("the adapter is for") == 6, "all of them at once"


def test_fresh_adapter_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases["llama"], std=0.0)
    with pytest.raises(MergeError, match="changes nothing"):
        export_merged(bases["llama"], [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_nan_is_named(bases: dict[str, Path], tmp_path: Path, where: str) -> None:
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    adapter = make_adapter(tmp_path / "adapter", base)
    file = base / "model.safetensors" if where == "base" else adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if re.search(r"layers.1.self_attn.v_proj.*(weight)", n))
    tensors[name].view(-1)[7] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        MergeError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight: NaN or infinity, from the " + where
    ):
        export_merged(base, [adapter], tmp_path / "out")


@pytest.mark.parametrize(
    ("base_type", "value", "dtype", "said", "way_out"),
    [
        (torch.bfloat16, 1e6, "F16", r"9.994e\+05 does not fit float16", "bf16"),
        (torch.float32, 3.4e38, "BF16", r"3.4e\+38 does not fit bfloat16", "fp32"),
    ],
)
def test_an_overflow_is_named(
    tmp_path: Path, base_type: torch.dtype, value: float, dtype: Any, said: str, way_out: str
) -> None:
    from safetensors.torch import load_file, save_file

    base = make_model(tmp_path / "base", dtype=base_type, num_hidden_layers=1)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = value
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=f"model.norm.weight: {said}") as caught:
        export_merged(base, [], tmp_path / "out", dtype)
    assert way_out in caught.value.hint


@pytest.mark.parametrize("base_type", [torch.float32, torch.bfloat16])
def test_an_adapter_below_the_step_of_the_type_has_vanished(tmp_path: Path, base_type: torch.dtype) -> None:
    """What rounding the base alone changes is no part of the delta: a float32 base must not hide the loss."""
    base = make_model(tmp_path / "base", dtype=base_type)
    adapter = make_adapter(tmp_path / "adapter", base, lora_alpha=1e-7)
    with pytest.raises(MergeError, match=r"the adapter changes nothing: at most 0\.00"):
        export_merged(base, [adapter], tmp_path / "out", "BF16")
    if base_type is torch.float32:  # the control: in float32 it survives
        export_merged(base, [make_adapter(tmp_path / "more", base, lora_alpha=1e-3)], tmp_path / "kept", "F32")


def test_one_module_that_vanished_is_told(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases["llama"], alpha_pattern={"layers.1.self_attn.v_proj": 1e-7})
    told = Told()
    out = export_merged(bases["llama"], [adapter], tmp_path / "out", progress=told)
    shares = json.loads((out / "lora2serve.json").read_text())["survival"]
    assert [name for name, share in shares.items() if share < 0.01] == ["model.layers.1.self_attn.v_proj.weight"]
    assert told.warnings == [
        "the adapter changes nothing in 1 of 6 tensors: model.layers.1.self_attn.v_proj.weight (0.0000 survives)"
    ]


def test_survival_is_measured(bases: dict[str, Path], plain: Path, tmp_path: Path) -> None:
    small = make_adapter(tmp_path / "small", bases["llama"], std=0.05, lora_alpha=0.01)
    shares = {}
    for path in (plain, small):
        out = export_merged(bases["llama"], [path], tmp_path / f"out-{path.name}")
        shares[path.name] = json.loads((out / "lora2serve.json").read_text())["survival"]
    assert all(0.98 < share < 1.02 for share in shares["adapter"].values())
    assert any(not 0.98 < share < 1.02 for share in shares["small"].values()), "a delta below the type's step shows"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("moe") / "base", "qwen3_moe", num_experts=4, moe_intermediate_size=32, head_dim=16
    )


OFTEN_EXPERTS = ("dora", "patterns", "saved-modules")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[] if kind in OFTEN_EXPERTS else [SLOW]) for kind in KINDS])
def test_mixture_of_experts_equals_peft(moe: Path, tmp_path: Path, kind: str) -> None:
    """Every kind again on a mixture of experts: transformers fuses the experts, the files keep one each."""
    given = {**KINDS[kind]}
    if kind == "dora":  # PEFT has no DoRA for the experts' parameters
        given["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if kind == "patterns":
        given["rank_pattern"] = {"q_proj": 8, "layers.1.self_attn.v_proj": 2}
    adapter = make_adapter(tmp_path / "adapter", moe, **given)
    got = model_state(export_merged(moe, [adapter], tmp_path / "out"), torch.bfloat16)
    oracle, before = merged_by_peft(moe, adapter), model_state(moe, torch.bfloat16)
    worst = worst_ulp(got, oracle)
    assert max(worst.values()) <= 1, worst
    assert any(not torch.equal(got[name], before[name]) for name in got), "the control: something changed"
