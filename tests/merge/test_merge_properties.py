"""Properties of the merge: any LoRA configuration that PEFT takes, and any layout of tensors in shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lora2serve.errors import CheckpointError
from lora2serve.weights.checkpoint import INDEX, Checkpoint
from lora2serve.weights.tensors import DType
from tests.support.drawn import examples
from tests.support.folding import export_merged, stored, worst_ulp
from tests.support.tiny import make_adapter, make_model, merged_by_peft

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = st.integers(1, 9)
ALPHAS = st.floats(0.5, 40)
PATTERNS = st.sampled_from([*LINEARS, r"layers.1.self_attn.q_proj", r"layers\.0\..*", r".*mlp\..*_proj"])
CONFIGS = st.fixed_dictionaries(
    {
        "target_modules": st.lists(st.sampled_from(LINEARS), min_size=1, unique=True),
        "r": RANKS,
        "lora_alpha": ALPHAS,
        "use_rslora": st.booleans(),
    },
    optional={
        "use_dora": st.booleans(),
        # one each: PEFT saves patterns sorted, and cannot load its own file where two fit one module
        "rank_pattern": st.dictionaries(PATTERNS, RANKS, max_size=1),
        "alpha_pattern": st.dictionaries(PATTERNS, ALPHAS, max_size=1),
        "layers_to_transform": st.sampled_from([[0], [1], [0, 1]]),
        "exclude_modules": st.just(["none_of_this_name"]),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "modules_to_save": st.sampled_from([["lm_head"], ["norm"], ["embed_tokens", "lm_head"]]),
        "trainable_token_indices": st.lists(st.integers(0, 319), min_size=1, max_size=4, unique=True),
        "init_lora_weights": st.sampled_from([True, "gaussian", "pissa", "olora"]),
    },
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "llama", attention_bias=True)


CANCELS = {  # the orthonormal start takes away most of a small weight
    "target_modules": ["down_proj"],
    "r": 3,
    "lora_alpha": 12.73948308170152,
    "use_rslora": True,
    "use_dora": True,
    "init_lora_weights": "olora",
    "trainable_token_indices": [0, 1],
}


@settings(max_examples=examples(8), suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(config=CANCELS, dtype="BF16", shard=20_000)
@given(config=CONFIGS, dtype=st.sampled_from(["BF16", "F16"]), shard=st.integers(20_000, 400_000))
def test_any_lora_equals_peft(
    base: Path, tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], dtype: DType, shard: int
) -> None:
    """One unit in the last place of the output's type, whatever is combined; names and shapes stay."""
    if "embed_tokens" in config.get("modules_to_save", []):
        config.pop("trainable_token_indices", None)  # PEFT takes one of the two
    place = tmp_path_factory.mktemp("any")
    adapter = make_adapter(place / "adapter", base, std=0.02, **config)
    oracle = merged_by_peft(base, adapter)
    got = stored(export_merged(base, [adapter], place / "out", dtype, shard_size=shard))
    assert {name: tensor.shape for name, tensor in got.items()} == {n: t.shape for n, t in stored(base).items()}
    worst = {name: ulp for name, ulp in worst_ulp(got, oracle, stored(base)).items() if ulp > 1}
    assert not worst


TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(TYPES), st.integers(0, 2)),
    min_size=1,
    max_size=8,
)


def write_shards(path: Path, tensors: dict[str, tuple[list[int], torch.dtype, int]]) -> dict[str, torch.Tensor]:
    """Random tensors in up to three shards, by the safetensors library, with an index."""
    values = {
        name: torch.randint(-9, 9, shape).to(torch.float32).to(dtype) for name, (shape, dtype, _) in tensors.items()
    }
    weight_map = {name: f"model-{number}.safetensors" for name, (_, _, number) in tensors.items()}
    for file in set(weight_map.values()):
        save_file({name: values[name] for name in values if weight_map[name] == file}, path / file)
    (path / "config.json").write_text("{}")
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return values


@settings(max_examples=examples(30))
@given(tensors=TENSORS, data=st.data())
def test_any_shards_are_read_as_safetensors_reads_them(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[list[int], torch.dtype, int]],
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("shards")
    values = write_shards(path, tensors)
    checkpoint = Checkpoint(path)
    assert {spec.name for spec in checkpoint.specs()} == values.keys()
    for name, value in values.items():
        rows = slice(*sorted(data.draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))))
        found = checkpoint.read(name, rows).values if value.dim() else checkpoint.read(name).values
        expected = value[rows] if value.dim() else value
        assert found.dtype == value.dtype
        assert found.view(torch.uint8).equal(expected.contiguous().view(torch.uint8)) if found.dim() else True
        assert tuple(found.shape) == tuple(expected.shape)


LIES: dict[str, Callable[[dict[str, str], str], object]] = {
    "left out": lambda names, one: names.pop(one),
    "one more": lambda names, one: names.update({f"{one}2": names[one]}),
    "elsewhere": lambda names, one: names.update({one: "model-9.safetensors"}),
    "outside": lambda names, one: names.update({one: f"../{names[one]}"}),
}


@settings(max_examples=examples(25))
@given(tensors=TENSORS, lie=st.sampled_from(sorted(LIES)), data=st.data())
def test_any_index_that_lies_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[list[int], torch.dtype, int]],
    lie: str,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("lies")
    write_shards(path, tensors)
    content = json.loads((path / INDEX).read_text())
    names: dict[str, str] = content["weight_map"]
    files = list(names.values())
    # a shard that the index names no more cannot disagree with it
    liars = sorted(name for name in names if lie != "left out" or files.count(names[name]) > 1)
    assume(liars)
    one = data.draw(st.sampled_from(liars))
    assume(lie != "one more" or f"{one}2" not in names)
    LIES[lie](names, one)
    (path / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        Checkpoint(path)
