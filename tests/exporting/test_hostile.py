"""Damaged and hostile input: one line each, what and which value, before anything is written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora2serve.adapters.adapter import open_adapter
from lora2serve.adapters.meta_model import meta_model, ties_by_default
from lora2serve.cli import run
from lora2serve.errors import AdapterError, CheckpointError, ExportError, InputError, Lora2ServeError, MergeError
from lora2serve.weights.checkpoint import INDEX, SINGLE, Checkpoint, read_header
from tests.support.drawn import examples
from tests.support.folding import export_merged
from tests.support.runs import DEMO
from tests.support.tiny import make_adapter, make_model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("hostile")
    base = make_model(root / "base")
    return base, make_adapter(root / "adapter", base)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("whole") / "sharded", shard="60KB")


@pytest.fixture
def sharded(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "sharded")


def change_index(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    content = json.loads((path / INDEX).read_text())
    change(content["weight_map"])
    (path / INDEX).write_text(json.dumps(content))


ESCAPES = [
    "../outside.safetensors",
    "/etc/hostname",
    "a\\b.safetensors",
    "a\0b",
    "C:x",
    ".",
    "..",
    "",
    "sub/x.safetensors",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_an_index_that_leads_away(sharded: Path, name: str) -> None:
    first = next(iter(json.loads((sharded / INDEX).read_text())["weight_map"]))
    change_index(sharded, lambda names: names.update({first: name}))
    with pytest.raises(CheckpointError, match="plain name") as caught:
        Checkpoint(sharded)
    assert caught.value.hint


def test_a_link_that_leads_away(sharded: Path, tmp_path: Path) -> None:
    shard = next(sharded.glob("model-*.safetensors"))
    outside = tmp_path / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside the model directory"):
        Checkpoint(sharded)


def test_a_link_into_the_cache_of_the_hub_is_fine(tmp_path: Path) -> None:
    base = make_model(tmp_path / "cache" / "snapshots" / "abc")
    blobs = tmp_path / "cache" / "blobs"
    blobs.mkdir()
    (base / SINGLE).rename(blobs / "0")
    (base / SINGLE).symlink_to(blobs / "0")
    assert Checkpoint(base).specs()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda names: names.update({"model.ghost.weight": next(iter(names.values()))}), "has no such tensor"),
        (lambda names: names.pop(next(iter(names))), "the index says nothing"),
        (lambda names: names.update({next(iter(names)): 7}), "expected a file name"),
        (lambda names: names.update({next(iter(names)): "model-99999.safetensors"}), "missing, but named by the index"),
    ],
)
def test_an_index_that_disagrees(sharded: Path, change: Callable[[dict[str, Any]], None], said: str) -> None:
    change_index(sharded, change)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    one, two = sorted(sharded.glob("model-*.safetensors"))[:2]
    tensors = load_file(two)
    save_file({**tensors, next(iter(load_file(one))): torch.zeros(2)}, two)
    with pytest.raises(CheckpointError, match="in both"):
        Checkpoint(sharded)


def header(content: bytes | dict[str, Any], data: int = 0, length: int | None = None) -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data)


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


LYING = {
    "empty file": b"",
    "short file": b"\1\2\3",
    "header beyond the file": header({"a": entry([1], 0, 4)}, 4, length=10_000),
    "header of 2^63 bytes": header({"a": entry([1], 0, 4)}, 4, length=1 << 63),
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a pickle": pickle.dumps({"a": 1}),
    "not JSON": header(b"{" + b"x" * 20),
    "a space before the brace": header(b" " + json.dumps({"a": entry([1], 0, 4)}).encode(), 4),
    "a list": header(b"[]"),
    "one key twice": header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    "a hole": header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12),
    "an overlap": header({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, 8),
    "bytes behind": header({"a": entry([1], 0, 4)}, 8),
    "bytes missing": header({"a": entry([2], 0, 8)}, 4),
    "shape against bytes": header({"a": entry([3], 0, 4)}, 4),
    "a shape that overflows": header({"a": entry([1 << 40, 1 << 40], 0, 4)}, 4),
    "a negative shape": header({"a": entry([-1, -4], 0, 4)}, 4),
    "unknown dtype": header({"a": entry([1], 0, 4, "F7")}, 4),
    "deep nesting": header(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "no offsets": header({"a": {"dtype": "F32", "shape": [1]}}, 4),
}  # fmt: skip


@pytest.mark.parametrize("kind", LYING)
def test_a_header_that_lies(tmp_path: Path, kind: str) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(LYING[kind])
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


@settings(max_examples=examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 40))
def test_any_damaged_byte_is_read_or_refused(tmp_path: Path, place: int, value: int, cut: int) -> None:
    """Never a traceback of another kind, and never a tensor that reaches beyond the file."""
    raw = bytearray(header({"a": entry([2, 3], 0, 24), "b": entry([1], 24, 26, "BF16")}, 26))
    raw[place % len(raw)] = value
    path = tmp_path / "any.safetensors"
    path.write_bytes(bytes(raw[: len(raw) - cut]))
    try:
        stored = read_header(path)
    except CheckpointError:
        return
    assert sum(item.spec.nbytes for item in stored) <= path.stat().st_size


@pytest.mark.parametrize("name", ["config.json", INDEX, "adapter_config.json"])
def test_200_megabytes_of_json_are_not_read(sharded: Path, name: str) -> None:
    with (sharded / name).open("wb") as file:
        file.truncate(200_000_000)  # a hole: reading it would take memory, and the parser would meet NULs
    opener = open_adapter if name.startswith("adapter") else Checkpoint
    with pytest.raises(InputError, match=f"{name}: 200000000 bytes, expected 100000000 at most"):
        opener(sharded)


def test_a_wrong_total_size_is_put_right(sharded: Path, tmp_path: Path) -> None:
    """No loader needs it, and repositories have it wrong; ours is counted."""
    content = json.loads((sharded / INDEX).read_text())
    right, content["metadata"]["total_size"] = content["metadata"]["total_size"], 7
    (sharded / INDEX).write_text(json.dumps(content))
    out = export_merged(sharded, [], tmp_path / "out", shard_size=60_000)
    assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == right


def test_names_that_lead_away_are_names_only(tmp_path: Path) -> None:
    """A tensor may be called ``../../x``: no file is ever called after a tensor."""
    base = make_model(tmp_path / "deep" / "base")
    tensors = load_file(base / SINGLE)
    save_file({**tensors, "../../x": torch.ones(2)}, base / SINGLE, {"format": "pt"})
    out = export_merged(base, [], tmp_path / "deep" / "out")
    assert load_file(out / SINGLE)["../../x"].tolist() == [1, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}


def test_links_where_output_goes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Neither the target nor its lock is followed."""
    base, adapter = pair
    victim = tmp_path / "victim"
    victim.write_text("keep")
    (tmp_path / ".out.lock").symlink_to(victim)
    with pytest.raises(ExportError, match=r"\.out\.lock: Too many levels of symbolic links"):
        export_merged(base, [adapter], tmp_path / "out")
    (tmp_path / ".out.lock").unlink()
    with pytest.raises(ExportError, match=r"victim: (File exists|Not a directory)"):
        export_merged(base, [adapter], victim / "out")
    assert victim.read_text() == "keep"


INDEXES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=INDEXES)
def test_any_index_is_read_or_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": content}))
    with pytest.raises(CheckpointError):
        Checkpoint(tmp_path)


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "peft_type": st.sampled_from(["LORA", "lora", "PREFIX_TUNING", "NONSENSE", 7, None]),
        "r": st.sampled_from([8, 0, -1, "8", None, 1.5]),
        "lora_alpha": st.sampled_from([16, 0, "x", None]),
        "rank_pattern": st.sampled_from([{}, {"q_proj": 4}, {"(": 4}, None, [], 3]),
        "alpha_pattern": st.sampled_from([{}, {"q_proj": 4.0}, None]),
        "use_rslora": st.sampled_from([True, False, None]),
        "fan_in_fan_out": st.sampled_from([True, False]),
        "init_lora_weights": st.sampled_from([True, "pissa", "olora", "eva", "loftq", "corda"]),
        "target_modules": st.sampled_from([["q_proj"], "all-linear", None, []]),
        "layer_replication": st.sampled_from([None, [], [[0, 2]], [[0, 9]], "x"]),
    },
)


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CONFIGS)
def test_any_adapter_config_is_folded_or_refused(
    pair: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    base, adapter = pair
    copy = tmp_path / "copy"
    copy.mkdir(exist_ok=True)
    content = json.loads((adapter / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**content, **changes}))
    if not (copy / "adapter_model.safetensors").exists():
        os.link(adapter / "adapter_model.safetensors", copy / "adapter_model.safetensors")
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = run(["export", str(copy), "--base", str(base), "-t", "vllm", "-o", str(tmp_path / "out"), "--plan"])
    assert code in (0, 1)
    assert "unexpected" not in said.getvalue()


def nan_in(path: Path, part: str) -> None:
    tensors = load_file(path)
    name = next(name for name in tensors if part in name)
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, path)


@pytest.mark.parametrize(("where", "part"), [("base", "layers.0.self_attn.q_proj"), ("base", "embed_tokens"), ("adapter", "lora_A"), ("adapter", "lora_B")])  # fmt: skip
def test_values_that_are_not_finite(tmp_path: Path, where: str, part: str) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    nan_in(base / SINGLE if where == "base" else adapter / "adapter_model.safetensors", part)
    with pytest.raises(MergeError, match=rf"model\.(layers|embed_tokens).*{where}"):
        export_merged(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float16_overflow_names_the_tensor(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    tensors = load_file(base / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 2] = 1e6
    save_file(tensors, base / SINGLE, {"format": "pt"})
    with pytest.raises(Lora2ServeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .* float16") as caught:
        export_merged(base, [make_adapter(tmp_path / "adapter", base)], tmp_path / "out", "F16")
    assert "bf16" in caught.value.hint


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch bomb-went-off",)


def convert_here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """What the child does, in this process, which has torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command[3:])
        try:
            exec(command[3], {})
        except Exception:
            return subprocess.CompletedProcess(command, 1, "", traceback.format_exc())
    return subprocess.CompletedProcess(command, 0)


@pytest.mark.parametrize("starts", [False, pytest.param(True, marks=pytest.mark.engine)], ids=["here", "in a child"])
def test_pickles(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    starts: bool,
) -> None:  # fmt: skip
    """Refused; with --allow-pickle weights are converted, and code is never run."""
    base, adapter = pair
    monkeypatch.chdir(tmp_path)
    if not starts:
        monkeypatch.setattr(subprocess, "run", convert_here)
    old = tmp_path / "old"
    old.mkdir()
    (old / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, old / "adapter_model.bin")
    words = ["export", str(old), "--base", str(base), "-t", "vllm", "-o", "out"]
    assert run(words) == 1
    assert "--allow-pickle" in capfd.readouterr().err
    assert run([*words, "--allow-pickle"]) == 0
    assert run(["export", str(adapter), "--base", str(base), "-t", "vllm", "-o", "plain"]) == 0
    assert (tmp_path / "out" / "vllm" / SINGLE).read_bytes() == (tmp_path / "plain" / "vllm" / SINGLE).read_bytes()
    torch.save({**tensors, "bomb": Bomb()}, old / "adapter_model.bin")
    assert run([*words, "--allow-pickle", "--overwrite"]) == 1
    assert "not plain weights" in capfd.readouterr().err
    assert not (tmp_path / "bomb-went-off").exists()


def test_code_is_neither_run_nor_copied(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "modeling_evil.py").write_text("raise SystemExit('code was run')")
    adapter = make_adapter(tmp_path / "adapter", pair[0])
    out = export_merged(base, [adapter], tmp_path / "out")
    assert not list(out.rglob("*.py"))
    assert run(["inspect", str(base)]) == 0


def test_weights_in_pickles_only(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    (base / SINGLE).rename(base / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle weights only"):
        Checkpoint(base)


def test_an_adapter_cut_short(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    raw = (adapter / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(raw[:-10])
    with pytest.raises((CheckpointError, AdapterError), match=r"the file is truncated|expected"):
        export_merged(base, [cut], tmp_path / "out")


CARDS = (
    "---\nlicense: [\n---\n",
    "---\n" + "[" * 200_000 + "\n---\n",
    "---\n- a\n---\n",
    "---\nlicense: 2026-99-99\n---\n",
)


def test_a_card_that_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The base's: GGUF takes its license over, and goes without where the head of the card cannot be read, at once."""
    base = shutil.copytree(DEMO / "base", tmp_path / "base")
    for number, card in enumerate(CARDS):
        (base / "README.md").write_text(card)
        words = ["export", str(base), "-t", "gguf", "-q", "F16", "--dry-run", "-o", str(tmp_path / f"out{number}")]
        started = time.process_time()
        assert run(words) == 0, capfd.readouterr().err
        assert time.process_time() - started < 20


CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "types": (
        {"architectures": "LlamaForCausalLM", "model_type": ["llama"], "text_config": [1], "vision_config": {"depth": 1 << 40}},
        ["architectures: 'LlamaForCausalLM', expected a list", "model_type: ['llama'], expected a name", "text_config: [1],",
         "vision_config.depth: 1099511627776, expected 2000 at most"],
    ),
    "a long name": ({"architectures": ["A" * 3_000_000], "model_type": "x" * 3_000_000}, ["expected a list of names", "expected a name"]),
    "many layers": ({"num_hidden_layers": 10**9}, ["num_hidden_layers: 1000000000, expected 2000 at most"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_lies(kind: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """In a line for each key, and at once: no name is compared with others for hours, no model of a billion layers made."""
    changes, problems = CONFIGS[kind]
    base, adapter = shutil.copytree(pair[0], tmp_path / "base"), pair[1]
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **changes}))
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        export_merged(base, [adapter], tmp_path / "out")
    lines = caught.value.message.splitlines()
    assert len(lines) == len(problems) and all(len(line) < 1000 for line in lines)
    assert all(any(text in line for line in lines) for text in problems), lines
    assert time.process_time() - started < 20


def test_values_that_transformers_refuses() -> None:
    """Of a config that must be loaded to find its modules: the reason in a line; the control is loaded."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    assert type(meta_model(config)).__name__ == "LlamaForCausalLM"
    other = meta_model({**config, "architectures": ["Trainer"]})
    assert type(other).__name__ == "LlamaForCausalLM", "what is no model is not called"
    wrong = {**config, "vocab_size": float("inf")}
    with pytest.raises(MergeError, match=r"transformers does not take the base's config.json: .*vocab_size"):
        meta_model(wrong)
    assert ties_by_default(wrong) is False
