"""Exports that other tools made: by PEFT and transformers, and by llama.cpp's converter."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora2serve.cli import run as command
from lora2serve.parity_check.settings_gate import SettingsResult
from tests.support.runs import make_chat_model
from tests.support.settings import Damage, checked, gguf, in_json, keys, rewritten, text
from tests.support.tiny import load_model, make_adapter
from tests.support.upstream import convert


@dataclass(frozen=True)
class Merged:
    """By PEFT's own merge, saved by transformers."""

    base: Path
    adapter: Path
    path: Path

    def check(self, export: Path, *allow: str) -> SettingsResult:
        return checked(export, self.base, self.adapter, allow=allow)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Merged:
    from peft import PeftModel
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("foreign")
    base = make_chat_model(root / "base", hidden_size=256)
    (base / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": [3, 0]}))
    adapter = make_adapter(root / "adapter", base)
    PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload().save_pretrained(root / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(root / "merged")
    return Merged(base, adapter, root / "merged")


def copied(source: Path, out: Path, damage: Damage) -> Path:
    shutil.copytree(source, out)
    damage(out)
    return out


DAMAGES: dict[str, tuple[Damage, str]] = {
    "rope scaling": (keys("config.json", rope_scaling={"rope_type": "linear", "factor": 4.0}), "config.json:rope_scaling"),
    "epsilon": (keys("config.json", rms_norm_eps=0.1), "config.json:rms_norm_eps"),
    "end token": (keys("generation_config.json", eos_token_id=[0]), "generation_config.json:eos_token_id"),
    "temperature": (keys("generation_config.json", temperature=1.9), "generation_config.json:temperature"),
    "normalizer": (keys("tokenizer.json", normalizer={"type": "Lowercase"}), "tokenizer.json:normalizer"),
    "special token": (in_json("tokenizer.json", lambda c: c["added_tokens"].pop()), "tokenizer.json:added_tokens.3"),
    "template": (text("chat_template.jinja", "messages", "messages[:1]"), "chat template:character"),
    "no template": (lambda e: (e / "chat_template.jinja").unlink(), "chat template:character"),
}  # fmt: skip


def test_a_sound_one(merged: Merged) -> None:
    """What it wrote in its own way is no difference; what was not compared is said."""
    result = merged.check(merged.path)
    assert (result.gate.status, result.differences) == ("met", ()), result.gate
    assert "serve.yaml: planned, and not there" in result.not_compared
    assert any("checksums" in line for line in result.not_compared)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_one(merged: Merged, name: str, tmp_path: Path) -> None:
    damage, setting = DAMAGES[name]
    result = merged.check(copied(merged.path, tmp_path / "export", damage))
    assert result.gate.status == "missed"
    assert any(setting in difference.path for difference in result.differences), result.differences


@pytest.mark.engine
def test_llama_cpps_own(merged: Merged, tmp_path: Path) -> None:
    """Its converter, and a Modelfile for it; the controls: another rope base, one more end token, another model."""
    (tmp_path / "gguf").mkdir()
    convert(merged.path, tmp_path / "gguf" / "mine.gguf", pre="gpt-2")
    assert merged.check(tmp_path / "gguf").gate.status == "met"
    rewritten(tmp_path / "gguf" / "Modelfile", "FROM ./mine.gguf\n")
    assert merged.check(tmp_path / "gguf").gate.status == "met"
    rewritten(tmp_path / "gguf" / "Modelfile", "FROM llama3.2\nPARAMETER temperature 1.9\n")
    gguf({"llama.rope.freq_base": 2e4, "tokenizer.ggml.eot_token_id": 17})(tmp_path / "gguf")
    assert {difference.path for difference in merged.check(tmp_path / "gguf").differences} == {
        "Modelfile:from", "Modelfile:temperature", "mine.gguf:llama.rope.freq_base",
        "mine.gguf:tokenizer.ggml.eot_token_id",
    }  # fmt: skip


def test_the_command(
    merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Beside the model it was made from; the other gates need an export of ours."""
    monkeypatch.chdir(tmp_path)
    words = ["parity", str(merged.adapter), str(merged.path), "--base", str(merged.base)]
    assert command([*words, "--gate", "settings"]) == 0
    assert "merged: not compared: serve.yaml" in capfd.readouterr().err
    assert command(words) == 2
    assert "not an export" in capfd.readouterr().err
    (tmp_path / "empty").mkdir()
    assert command(["parity", str(merged.adapter), "empty", "--base", str(merged.base), "--gate", "settings"]) == 1
    assert "empty: not an export of lora2serve, and no merged model" in capfd.readouterr().err
