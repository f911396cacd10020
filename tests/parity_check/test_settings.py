"""Gate 0: what lies beside the weights is red where it is not as planned, and its key is named; sound exports are met."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.gguf import presets
from lora2serve.artifacts.manifest import NAME as MANIFEST
from lora2serve.artifacts.manifest import Manifest
from lora2serve.cli import run as command
from lora2serve.exporting import settings_plan
from lora2serve.exporting.settings_plan import PlannedSettings
from lora2serve.parity_check.settings_gate import MOST_OF_FILE, SettingsResult, judge
from lora2serve.parity_check.trained_model import of_parts, open_model
from tests.support.runs import make_chat_model
from tests.support.settings import (
    Damage,
    both,
    checked,
    damaged,
    exported,
    gguf,
    in_json,
    in_manifest,
    keys,
    rewritten,
    signed_again,
    text,
)
from tests.support.tiny import make_adapter, make_imatrix

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [3, 0]}


@dataclass(frozen=True)
class Exports:
    """One adapter on one base, for every target."""

    base: Path
    adapter: Path
    paths: Mapping[str, Path]
    plans: dict[str, PlannedSettings] = field(default_factory=dict)  # by what a manifest says of a plan

    def check(self, export: Path, *allow: str) -> SettingsResult:
        """Planned once for all exports with the same target and type."""
        manifest = Manifest.read(export)
        name = f"{manifest.target} {manifest.quant}"
        if name not in self.plans:
            model = open_model(of_parts("tiny", self.base, (self.adapter,), self.base).json(), manifest)
            planned = settings_plan.plan_again(model, manifest)
            assert planned is not None
            self.plans[name] = planned
        return judge(export, manifest, self.plans[name], allow)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    root = tmp_path_factory.mktemp("settings")
    base = make_chat_model(root / "base", hidden_size=256, tie_word_embeddings=False)
    (base / "generation_config.json").write_text(json.dumps(SAMPLING))
    adapter = make_adapter(root / "adapter", base)
    targets: dict[str, dict[str, Any]] = {
        "vllm": {}, "adapter": {}, "gguf": {"quants": "Q4_K_M"}, "ollama": {"quants": "Q4_K_M"}, "gguf-adapter": {},
    }  # fmt: skip
    paths = {name: exported(adapter, root / "out", name, base, **options) for name, options in targets.items()}
    return Exports(base, adapter, paths)


def add_normalizer(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def swap_tokens(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def swapped(tokens: list[str]) -> list[str]:
    return [*tokens[:300], tokens[301], tokens[300], *tokens[302:]]


def lose_merge(content: dict[str, Any]) -> None:
    content["model"]["merges"].pop(5)


def lose_special(content: dict[str, Any]) -> None:
    content["added_tokens"][-1]["special"] = False


FOURTH_TURN = "{%- if messages | length > 3 %}{{- 'Answer in French. ' }}{%- endif %}"


def longer_template(export: Path) -> None:
    template = (export / "chat_template.jinja").read_text(encoding="utf-8")
    rewritten(export / "chat_template.jinja", FOURTH_TURN + template)


def other_model(export: Path) -> None:
    rewritten(export / "Modelfile", 'FROM llama3.2:1b\nSYSTEM """You sell cars."""\n')


def nobody_planned(name: str) -> Damage:
    return lambda export: rewritten(export / name, "{}")


def lost(name: str) -> Damage:
    return lambda export: (export / name).unlink()


def second_from(export: Path) -> None:
    """Ollama takes the files of both."""
    rewritten(export / "Modelfile", "FROM llama3.2:1b\n" + (export / "Modelfile").read_text(encoding="utf-8"))


# name -> target, damage, the setting that must be named
DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "temperature": ("vllm", keys("generation_config.json", temperature=1.9), "generation_config.json:temperature"),
    "repetition penalty": ("vllm", keys("generation_config.json", repetition_penalty=1.9), "generation_config.json:repetition_penalty"),
    "full stop ends": ("vllm", keys("generation_config.json", eos_token_id=[3, 0, 17]), "generation_config.json:eos_token_id"),
    "max_new_tokens": ("vllm", keys("generation_config.json", max_new_tokens=3), "generation_config.json:max_new_tokens"),
    "no sampling": ("vllm", keys("generation_config.json", do_sample=False), "generation_config.json:do_sample"),
    "max-model-len": ("vllm", text("serve.yaml", "max-model-len: 128", "max-model-len: 16"), "serve.yaml:max-model-len"),
    "float16 served": ("vllm", text("serve.yaml", "dtype: bfloat16", "dtype: float16"), "serve.yaml:dtype"),
    "an argument of vLLM's": ("vllm", lambda e: rewritten(e / "serve.yaml", (e / "serve.yaml").read_text() + "quantization: fp8\n"), "serve.yaml:quantization"),
    "served under another name": ("vllm", text("serve.yaml", '"adapter"', '"base"'), "serve.yaml:served-model-name"),
    "float16 in the config": ("vllm", keys("config.json", dtype="float16"), "config.json:dtype"),
    "float16 everywhere": ("vllm", both(keys("config.json", dtype="float16"), text("serve.yaml", "bfloat16", "float16"), in_manifest(dtype="float16")), "config.json:dtype"),
    "rope scaling": ("vllm", keys("config.json", rope_scaling={"rope_type": "linear", "factor": 4.0}), "config.json:rope_scaling"),
    "rope theta": ("vllm", in_json("config.json", lambda c: c["rope_parameters"].update(rope_theta=5e5)), "config.json:rope_parameters.rope_theta"),
    "rms epsilon": ("vllm", keys("config.json", rms_norm_eps=1e-2), "config.json:rms_norm_eps"),
    "window": ("vllm", keys("config.json", sliding_window=16), "config.json:sliding_window"),
    "heads": ("vllm", keys("config.json", num_key_value_heads=4), "config.json:num_key_value_heads"),
    "tied": ("vllm", keys("config.json", tie_word_embeddings=True), "config.json:tie_word_embeddings"),
    "other class": ("vllm", keys("config.json", architectures=["MistralForCausalLM"]), "config.json:architectures[0]"),
    "remote code": ("vllm", keys("config.json", auto_map={"AutoModelForCausalLM": "x.Y"}), "config.json:auto_map"),
    "quantized": ("vllm", keys("config.json", quantization_config={"quant_method": "fp8"}), "config.json:quantization_config"),
    "true for one": ("vllm", keys("config.json", attention_bias=0), "config.json:attention_bias"),
    "a key twice": ("vllm", text("config.json", '"head_dim"', '"head_dim": 64, "head_dim"'), "config.json"),
    "half a config": ("vllm", lambda e: rewritten(e / "config.json", (e / "config.json").read_bytes()[:-9]), "config.json"),
    "a config that is nested too deep": ("vllm", lambda e: rewritten(e / "config.json", '{"a":' * 20000 + "1" + "}" * 20000), "config.json"),
    "a tokenizer that is no text": ("vllm", lambda e: rewritten(e / "tokenizer_config.json", b"\xff\xfe"), "tokenizer_config.json"),
    "normalizer": ("vllm", in_json("tokenizer.json", add_normalizer), "tokenizer.json:normalizer"),
    "swapped vocabulary": ("vllm", in_json("tokenizer.json", swap_tokens), "tokenizer.json:model.vocab.a"),
    "a merge lost": ("vllm", in_json("tokenizer.json", lose_merge), "tokenizer.json:model.merges[5]"),
    "a special token that is none": ("vllm", in_json("tokenizer.json", lose_special), "tokenizer.json:added_tokens.3.special"),
    "truncation": ("vllm", keys("tokenizer.json", truncation={"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}), "tokenizer.json:truncation"),
    "padding": ("vllm", keys("tokenizer.json", padding={"strategy": {"Fixed": 64}, "direction": "Left", "pad_id": 0}), "tokenizer.json:padding"),
    "post-processor": ("vllm", keys("tokenizer.json", post_processor={"type": "ByteLevel"}), "tokenizer.json:post_processor"),
    "pre-tokenizer": ("vllm", keys("tokenizer.json", pre_tokenizer={"type": "Whitespace"}), "tokenizer.json:pre_tokenizer"),
    "lengths": ("vllm", keys("tokenizer_config.json", model_max_length=12), "tokenizer_config.json:model_max_length"),
    "BOS": ("vllm", keys("tokenizer_config.json", add_bos_token=True), "tokenizer_config.json:add_bos_token"),
    "a second template": ("vllm", keys("tokenizer_config.json", chat_template="{{ messages[0].content }}"), "tokenizer_config.json:chat_template"),
    "fourth turn": ("vllm", longer_template, "chat_template.jinja:character"),
    "nobody planned": ("vllm", nobody_planned("special_tokens_map.json"), "special_tokens_map.json"),
    "weights nobody planned": ("vllm", lambda e: rewritten(e / "model-2.safetensors", (e / "model.safetensors").read_bytes()), "model-2.safetensors"),
    "code nobody planned": ("vllm", nobody_planned("modeling_x.py"), "modeling_x.py"),
    "lost file": ("vllm", lost("generation_config.json"), "generation_config.json"),
    "named a quant": ("vllm", in_manifest(quant="fp8"), "config.json:quantization_config"),
    "base of the adapter": ("adapter", keys("adapter_config.json", base_model_name_or_path="other/base"), "adapter_config.json:base_model_name_or_path"),
    "alpha": ("adapter", keys("adapter_config.json", lora_alpha=64), "adapter_config.json:lora_alpha"),
    "rslora": ("adapter", keys("adapter_config.json", use_rslora=True), "adapter_config.json:use_rslora"),
    "a module less": ("adapter", in_json("adapter_config.json", lambda c: c["target_modules"].pop()), "adapter_config.json:target_modules"),
    "rank of the manifest": ("adapter", in_manifest(rank=64), "lora2serve.json:rank"),
    "context length": ("gguf", gguf({"llama.context_length": 16}), "llama.context_length"),
    "add_eos": ("gguf", gguf({"tokenizer.ggml.add_eos_token": True}), "tokenizer.ggml.add_eos_token"),
    "end of turn": ("gguf", gguf({"tokenizer.ggml.eot_token_id": 17}), "tokenizer.ggml.eot_token_id"),
    "end token": ("gguf", gguf({"tokenizer.ggml.eos_token_id": 17}), "tokenizer.ggml.eos_token_id"),
    "swapped entries": ("gguf", gguf({"tokenizer.ggml.tokens": swapped}), "tokenizer.ggml.tokens[300]"),
    "token types": ("gguf", gguf({"tokenizer.ggml.token_type": lambda types: [1, *types[1:]]}), "tokenizer.ggml.token_type[0]"),
    "merges": ("gguf", gguf({"tokenizer.ggml.merges": lambda merges: [merges[1], merges[0], *merges[2:]]}), "tokenizer.ggml.merges[0]"),
    "pre-tokenizer's name": ("gguf", gguf({"tokenizer.ggml.pre": "qwen2"}), "tokenizer.ggml.pre"),
    "rope base": ("gguf", gguf({"llama.rope.freq_base": lambda base: 2 * base}), "llama.rope.freq_base"),
    "epsilon in the GGUF": ("gguf", gguf({"llama.attention.layer_norm_rms_epsilon": 1e-2}), "llama.attention.layer_norm_rms_epsilon"),
    "scaling in the GGUF": ("gguf", gguf({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}), "llama.rope.scaling.type"),
    "heads in the GGUF": ("gguf", gguf({"llama.attention.head_count_kv": 4}), "llama.attention.head_count_kv"),
    "experts": ("gguf", gguf({"llama.expert_count": 2}), "llama.expert_count"),
    "sampling in the GGUF": ("gguf", gguf({"general.sampling.temp": 1.9}), "general.sampling.temp"),
    "template in the GGUF": ("gguf", gguf({"tokenizer.chat_template": lambda template: FOURTH_TURN + template}), "tokenizer.chat_template"),
    "no template": ("gguf", gguf({}, lost=("tokenizer.chat_template",)), "tokenizer.chat_template"),
    "a template for tools": ("gguf", gguf({"tokenizer.chat_template.tool_use": "{{ tools }}"}), "tokenizer.chat_template.tool_use"),
    "file type": ("gguf", gguf({"general.file_type": 17}), "general.file_type"),
    "a projector's word": ("gguf", gguf({"general.type": "mmproj"}), "general.type"),
    "Q4_K_M named Q5_K_M": ("gguf", both(gguf({"general.file_type": 17}), lambda e: next(e.glob("*.gguf")).rename(e / "adapter-Q5_K_M.gguf"), in_manifest(quant="Q5_K_M", file="adapter-Q5_K_M.gguf")), "tensors.blk.0.attn_q.weight"),
    "another model": ("ollama", other_model, "Modelfile:from"),
    "a second model": ("ollama", second_from, "Modelfile:from"),
    "a temperature": ("ollama", text("Modelfile", "temperature 0.6", "temperature 1.9"), "Modelfile:temperature"),
    "no stops": ("ollama", lambda e: rewritten(e / "Modelfile", "".join(line for line in (e / "Modelfile").read_text().splitlines(True) if " stop " not in line)), "Modelfile:stop"),
    "a system prompt": ("ollama", lambda e: rewritten(e / "Modelfile", (e / "Modelfile").read_text() + 'SYSTEM """Be rude."""\n'), "Modelfile:system"),
    "a message": ("ollama", lambda e: rewritten(e / "Modelfile", (e / "Modelfile").read_text() + "MESSAGE user Hi\n"), "Modelfile:message"),
    "a short answer": ("ollama", lambda e: rewritten(e / "Modelfile", (e / "Modelfile").read_text() + "PARAMETER num_predict 3\n"), "Modelfile:num_predict"),
    "a renderer": ("ollama", lambda e: rewritten(e / "Modelfile", (e / "Modelfile").read_text() + "RENDERER qwen3\n"), "Modelfile:renderer"),
    "another adapter": ("ollama", lambda e: rewritten(e / "Modelfile", (e / "Modelfile").read_text() + "ADAPTER ./x.gguf\n"), "Modelfile:adapter"),
    "no Modelfile to Ollama": ("ollama", lambda e: rewritten(e / "Modelfile", "FROM\n"), "Modelfile"),
    "the Hub's template": ("ollama", text("template", "{{ .Content }}", "{{ .Content }} "), "template:character"),
    "the Hub's system": ("ollama", lambda e: rewritten(e / "system", "Be rude."), "system"),
    "the Hub's params": ("ollama", keys("params", temperature=1.9), "params:temperature"),
    "the kind of template": ("ollama", in_manifest(template={"kind": "jinja", "requires": "0.30.0"}), "lora2serve.json:template.kind"),
    "alpha of the GGUF adapter": ("gguf-adapter", gguf({"adapter.lora.alpha": 8.0}), "adapter.lora.alpha"),
    "family of the GGUF adapter": ("gguf-adapter", gguf({"general.architecture": "qwen2"}), "general.architecture"),
    "words to start an aLoRA": ("gguf-adapter", gguf({"adapter.alora.invocation_tokens": [5, 6]}), "adapter.alora.invocation_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("target", ["vllm", "adapter", "gguf", "ollama", "gguf-adapter"])
def test_a_sound_export_is_met(exports: Exports, target: str) -> None:
    result = exports.check(exports.paths[target])
    assert (result.gate.status, result.differences) == ("met", ()), result.gate


CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "type of the weights": ("vllm", {"dtype": "fp16"}),
    "name, scheme, shards": ("vllm", {"name": "mine", "quants": "w4a16", "dtype": "fp32", "shard_size": "300KB"}),
    "name of the base": ("adapter", {"served_base": "org/base"}),
    "types, split": ("gguf", {"quants": "Q8_0", "tensor_type": ["attn_v=F16"], "split_size": "300KB", "pre": "gpt-2"}),
    "folders": ("lmstudio", {"quants": "Q4_0", "name": "mine"}),
    "adapter in Ollama": ("ollama", {"as_kind": "adapter", "from_model": "llama3.2:1b"}),
}


# those that ask llama.cpp for what others show as well
BESIDE = ("folders", "adapter in Ollama", "float16", "tied, padded vocabulary")


def by_name(names: Iterable[str]) -> pytest.MarkDecorator:
    marked = [pytest.param(name, marks=pytest.mark.engine) if name in BESIDE else name for name in names]
    return pytest.mark.parametrize("name", marked)


@by_name(CHOICES)
def test_what_was_chosen_at_the_export(exports: Exports, name: str, tmp_path: Path) -> None:
    """Is on record, and no difference; also where an earlier version wrote the manifest, as far as it tells. The
    control: under the record of another choice.
    """
    target, options = CHOICES[name]
    export = exported(exports.adapter, tmp_path / "out", target, exports.base, **options)
    result = checked(export, exports.base, exports.adapter)
    assert (result.gate.status, result.differences) == ("met", ()), result.gate
    content = Manifest.read(export).to_json()
    if name in ("type of the weights", "name of the base", "folders", "adapter in Ollama"):
        rewritten(export / MANIFEST, json.dumps({key: value for key, value in content.items() if key != "options"}))
        assert checked(export, exports.base, exports.adapter).gate.status == "met"
    rewritten(export / MANIFEST, json.dumps(content | {"options": {}, "name": "other", "from": "other"}))
    assert checked(export, exports.base, exports.adapter).gate.status == "missed" or target == "adapter"


@pytest.mark.parametrize(
    ("quant", "known_quant", "size"),
    [("Q4_0", "F16", "600KB"), pytest.param("IQ3_XS", "Q8_0", "300KB", marks=pytest.mark.engine)],
)
def test_a_split_file_of_unknown_types(
    exports: Exports, quant: str, known_quant: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Types that an importance matrix decided are not planned again, nor how many files they fill, and that is said;
    also with a type that is taken for one of them: llama.cpp computes a second for the tables of a true one.

    The controls: a file that is none of the split one's, and one that is missing where the types are known.
    """
    monkeypatch.setattr(presets, "PRESETS_THAT_NEED_IMATRIX", (quant,))
    options = {"quants": quant, "imatrix": make_imatrix(tmp_path / "imatrix.gguf", exports.base)}
    split = exported(exports.adapter, tmp_path / "out", "gguf", exports.base, **options, split_size="100KB")
    result = checked(split, exports.base, exports.adapter)
    assert (result.gate.status, result.differences) == ("met", ()), result.gate
    assert any(note.endswith("and so how many files there are") for note in result.not_compared), "planned are others"

    foreign = ["another-00001-of-00002.gguf", f"{Manifest.read(split).name}-{quant}-more.gguf"]
    export = damaged(split, tmp_path / "more", both(*(nobody_planned(name) for name in foreign)))
    assert sorted(each.path for each in checked(export, exports.base, exports.adapter).differences) == sorted(foreign)

    known = exported(exports.adapter, tmp_path / "known", "gguf", exports.base, quants=known_quant, split_size=size)
    last = max(path.name for path in known.glob("*.gguf"))
    result = checked(damaged(known, tmp_path / "fewer", lost(last)), exports.base, exports.adapter)
    assert [each.path for each in result.differences] == [last]


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied, padded vocabulary": ("qwen2", {"tie_word_embeddings": True, "vocab_size": 1600}),
    "float16": ("llama", {"dtype": torch.float16}),
    "caps": ("gemma2", {"head_dim": 64, "query_pre_attn_scalar": 64}),
    "experts": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}),
}  # fmt: skip


@by_name(MODELS)
def test_sound_exports_of_other_models(name: str, tmp_path: Path) -> None:
    """Without a run, and without an adapter."""
    kind, changes = MODELS[name]
    base = make_chat_model(tmp_path / "base", kind=kind, **changes)
    targets = ("vllm",) if kind == "gemma2" else ("vllm", "gguf")  # whose GGUF wants a SentencePiece model
    for target in targets:
        options = {"quants": "Q8_0"} if target == "gguf" else {}
        result = checked(exported(base, tmp_path / "out", target, **options), base)
        assert (result.gate.status, result.differences) == ("met", ()), result.gate


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_is_red_and_named(exports: Exports, name: str, tmp_path: Path) -> None:
    target, damage, setting = DAMAGES[name]
    result = exports.check(damaged(exports.paths[target], tmp_path / "export", damage))
    assert result.gate.status == "missed"
    (named, *_) = [each for each in result.differences if setting in each.path]
    assert named.planned != named.actual
    assert str(result.differences[0]) == result.gate.first


def test_what_was_set_on_purpose(exports: Exports, tmp_path: Path) -> None:
    """By file and key, by file, by key; everything else stays red, and what is allowed is still shown."""
    damage = both(keys("generation_config.json", temperature=1.0, top_p=0.5), text("serve.yaml", "128", "64"))
    export = damaged(exports.paths["vllm"], tmp_path / "export", damage)
    result = exports.check(export, "generation_config.json:temperature", "serve.yaml", "top_?")
    assert result.gate.status == "met"
    assert {d.path: d.allowed for d in result.differences} == {
        "generation_config.json:temperature": "generation_config.json:temperature",
        "generation_config.json:top_p": "top_?",
        "serve.yaml:max-model-len": "serve.yaml",
    }
    result = exports.check(export, "generation_config.json:*")
    assert (result.gate.status, result.gate.first) == ("missed", "serve.yaml: max-model-len is 64, planned 128")
    assert exports.check(export, "temperature").gate.cause == (
        "generation_config.json:top_p is not as planned and 1 more"
    )


def test_only_the_way_it_is_written(exports: Exports, tmp_path: Path) -> None:
    """Spaces, the order of keys and of added tokens, a comment: nothing that is served differs."""

    def rewrite(export: Path) -> None:
        for name in ("config.json", "tokenizer.json", "generation_config.json"):
            content = json.loads((export / name).read_text(encoding="utf-8"))
            content = dict(reversed(content.items()))
            if "added_tokens" in content:
                content["added_tokens"].reverse()
            rewritten(export / name, json.dumps(content))
        rewritten(export / "serve.yaml", "# a word\n" + (export / "serve.yaml").read_text())

    result = exports.check(damaged(exports.paths["vllm"], tmp_path / "export", rewrite))
    assert (result.gate.status, result.differences) == ("met", ())


def test_the_manifests_checksums(exports: Exports, tmp_path: Path) -> None:
    """A file that changed since the export is named, weights too; one whose settings differ is named by these alone."""
    export = tmp_path / "export"
    shutil.copytree(exports.paths["vllm"], export)
    weights = bytearray((export / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (export / "model.safetensors").write_bytes(weights)
    keys("config.json", rms_norm_eps=0.1)(export)
    paths = {d.path: d.actual for d in exports.check(export).differences}
    assert paths == {
        "config.json:rms_norm_eps": "0.1",
        "model.safetensors": "content changed since the export (sha256 differs)",
    }


def test_made_by_another_version(exports: Exports, tmp_path: Path) -> None:
    """It may have planned otherwise; nothing is said where there is no difference."""
    export = damaged(exports.paths["vllm"], tmp_path / "export", in_manifest(lora2serve="0.0.1"))
    assert exports.check(export).not_compared == ()
    text("serve.yaml", "128", "64")(export)
    (note,) = exports.check(export).not_compared
    assert note.startswith("the plan of lora2serve 0.0.1, which made the export")


def test_a_long_list_is_cut(exports: Exports, tmp_path: Path) -> None:
    export = damaged(exports.paths["gguf"], tmp_path / "export", gguf({"tokenizer.ggml.tokens": lambda t: t[::-1]}))
    differences = exports.check(export).differences
    assert len(differences) == MOST_OF_FILE + 1
    assert differences[-1].actual.endswith("more differ")


def test_links_and_card(exports: Exports, tmp_path: Path) -> None:
    """A link in a file's place is red; a card beside it is not."""
    export = damaged(exports.paths["vllm"], tmp_path / "export", lambda e: rewritten(e / "README.md", "# mine"))
    assert exports.check(export).gate.status == "met"
    (export / "config.json").rename(tmp_path / "config.json")
    (export / "config.json").symlink_to(tmp_path / "config.json")
    assert [d.path for d in exports.check(export).differences] == ["config.json"]


def test_a_file_that_cannot_be_read(exports: Exports, tmp_path: Path) -> None:
    """A directory in a file's place: red, and no error."""
    export = damaged(exports.paths["vllm"], tmp_path / "export", lost("config.json"))
    (export / "config.json").mkdir()
    assert [d.path for d in exports.check(export).differences] == ["config.json"]


@pytest.fixture
def place(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the adapter's merged export in it."""
    monkeypatch.chdir(tmp_path)
    return damaged(exports.paths["vllm"], tmp_path / "exports" / "vllm", lambda export: None)


def test_the_command(exports: Exports, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Exit codes, the table, and the report in a folder of its own; no torch is loaded for it."""
    words = ["parity", str(exports.adapter), str(place), "--base", str(exports.base), "--gate", "settings"]
    words += ["--report", "report"]
    assert command(words) == 0
    assert capfd.readouterr().out == "report/report.html\n"
    signed_again(place)
    keys("generation_config.json", temperature=1.9)(place)
    assert command(words) == 3
    err = capfd.readouterr().err
    assert "vllm: settings: generation_config.json:temperature is not as planned" in err
    assert "generation_config.json: temperature is 1.9, planned 0.6" in err
    for name in ("report.html", "report.xml", "report.json"):
        assert "generation_config.json" in (place.parents[1] / "report" / name).read_text()
    assert command([*words, "--allow", "temperature", "--allow", "tempreature"]) == 0
    assert "allow tempreature: no setting that differs is named so" in capfd.readouterr().err
    assert "(allowed by temperature)" in (place.parents[1] / "report" / "summary.md").read_text()
    assert command([*words, "--engine", "vllm"]) == 2
    assert "--gate settings with --engine" in capfd.readouterr().err


@pytest.mark.engine
def test_it_loads_no_torch(exports: Exports, place: Path) -> None:
    """What makes it fast: the libraries of training are not loaded for a merged export."""
    program = (
        "import sys; from lora2serve.cli import run; "
        f"code = run(['parity', {str(exports.adapter)!r}, {str(place)!r}, '--base', {str(exports.base)!r}, "
        "'--gate', 'settings', '--report', 'report']); "
        "print(code, [name for name in ('torch', 'transformers', 'peft', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
