"""One table says which target holds which kind of adapter: the docs have it, and an export goes by it."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora2serve
from lora2serve.adapters.kind_targets import TARGETS, as_named, way, why_not
from lora2serve.config.train_methods import TRAINABLE
from lora2serve.errors import AdapterError
from lora2serve.exporting.sinks import BUILTIN
from scripts import method_table
from tests.support.tiny import make_adapter, make_model

REFUSED = {
    method: targets
    for method in TRAINABLE
    if (targets := [target for target in TARGETS if way(method.upper(), target) == "no"])
}


def test_the_page_has_it() -> None:
    assert method_table.PAGE.read_text(encoding="utf-8") == method_table.written(), "make docs"
    assert set(TARGETS) == set(BUILTIN)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a base that is not there: nothing of it is read."""
    folder = tmp_path_factory.mktemp("kinds")
    path = make_adapter(folder / "adapter", make_model(folder / "base"))
    (folder / "base").rename(folder / "gone")
    return path


@pytest.mark.parametrize("method", REFUSED)
def test_what_cannot_be_is_refused_by_name_before_the_base_is_read(adapter: Path, tmp_path: Path, method: str) -> None:
    kind, config = method.upper(), (adapter / "adapter_config.json").read_text()
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(config.replace('"peft_type": "LORA"', f'"peft_type": "{kind}"'))
    beside = {"ollama-adapter": {"targets": "ollama", "as_kind": "adapter", "from_model": "x"}}
    for target in REFUSED[method]:
        with pytest.raises(AdapterError) as caught:
            lora2serve.export(other, out=tmp_path / "out", **{"targets": target, **beside.get(target, {})})
        said = f"{other}: {kind} cannot become --target {as_named(target)}: {why_not(kind, target)}"
        assert caught.value.message == said
        assert caught.value.hint


def test_all_pairs_at_once(adapter: Path, tmp_path: Path) -> None:
    config = (
        (adapter / "adapter_config.json").read_text().replace('"peft_type": "LORA"', '"peft_type": "PREFIX_TUNING"')
    )
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(AdapterError) as caught:
        lora2serve.export(tmp_path, targets=["vllm", "gguf", "adapter"], out=tmp_path / "out")
    assert [line.split("--target ")[1].split(":")[0] for line in caught.value.message.splitlines()] == [
        "vllm", "gguf", "adapter",
    ]  # fmt: skip
    assert (
        caught.value.hint
        == "no target can hold it: `lora2serve serve --engine peft` serves it; a LoRA goes into every target"
    )
