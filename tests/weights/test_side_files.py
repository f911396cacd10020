"""What ships of the tokenizer: the base's, and of the adapter's what training changed, wherever it was written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lora2serve.errors import CheckpointError
from lora2serve.weights.chat_template import chat_template, special_tokens
from lora2serve.weights.side_files import side_files
from tests.support.runs import DEMO

OURS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
THEIRS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}"
LAYOUTS = ("jinja", "config", "list", "processor", "extra")


def make_tokenizer(path: Path, template: str | None, layout: str, end: str, vocabulary: str = "") -> Path:
    """The demo's tokenizer, its template where ``layout`` says, its end token under both names."""
    path.mkdir(parents=True)
    settings: dict[str, Any] = json.loads((DEMO / "base" / "tokenizer_config.json").read_text())
    content = (DEMO / "base" / "tokenizer.json").read_text()
    (path / "tokenizer.json").write_text(content.replace("<|im_start|>", vocabulary) if vocabulary else content)
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": f"{template}!"}]
    if template and layout == "config":
        settings["chat_template"] = template
    elif template and layout == "list":
        settings["chat_template"] = named
    elif template and layout == "processor":
        (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    elif template:
        (path / "chat_template.jinja").write_text(template)
        if layout == "extra":
            (path / "additional_chat_templates").mkdir()
            (path / "additional_chat_templates" / "tool_use.jinja").write_text(f"{template}!")
    settings["eos_token"] = end
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": end, "lstrip": False}}))
    return path


def shipped(base: Path, adapter: Path, out: Path) -> Path:
    out.mkdir()
    for name, path in side_files(base, adapter).items():
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copy(path, out / name)
    return out


OFTEN = [("config", "jinja", THEIRS), ("config", "config", THEIRS), ("jinja", "list", None)]


@pytest.mark.parametrize(
    ("of_base", "layout", "before"),
    [
        pytest.param(*case, marks=[] if case[::2] == ("jinja", THEIRS) or case in OFTEN else [pytest.mark.slow])
        for layout in LAYOUTS
        for case in (("jinja", layout, THEIRS), ("config", layout, THEIRS), ("jinja", layout, None))
    ],
)
def test_template_and_end_of_training(tmp_path: Path, layout: str, of_base: str, before: str | None) -> None:
    """transformers and gguf's reader see in the export what transformers saw in training."""
    from gguf import SpecialVocab
    from transformers import AutoTokenizer

    base = make_tokenizer(tmp_path / "base", before, of_base, "<|endoftext|>")
    adapter = make_tokenizer(tmp_path / "adapter", OURS, layout, "<|im_end|>")
    out = shipped(base, adapter, tmp_path / "out")
    trained, got = AutoTokenizer.from_pretrained(adapter), AutoTokenizer.from_pretrained(out)
    expected = {"default": OURS, "tool_use": f"{OURS}!"} if layout in ("list", "extra") else OURS
    assert got.chat_template == expected
    if layout != "processor":  # a tokenizer does not read a processor's
        assert trained.chat_template == expected
    assert got.eos_token == trained.eos_token == "<|im_end|>"
    seen = SpecialVocab(out)
    assert seen.special_token_ids["eos"] == got.eos_token_id
    template = seen.chat_template
    assert (template if isinstance(template, str) else template[0]["template"]) == OURS  # type: ignore[index]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_training_did_not_change_stays_the_base_s(tmp_path: Path, layout: str) -> None:
    """The control: the same template, written another way, and no file is touched."""
    base = make_tokenizer(tmp_path / "base", OURS, layout, "<|im_end|>")
    adapter = make_tokenizer(tmp_path / "adapter", OURS, "jinja" if layout == "config" else "config", "<|im_end|>")
    assert side_files(base, adapter) == side_files(base)
    assert all(path.is_relative_to(base) for path in side_files(base, adapter).values())


def test_another_vocabulary_leaves_what_is_no_tokenizer_s(tmp_path: Path) -> None:
    """Added tokens: the whole tokenizer is the adapter's, and how images are read stays the base's."""
    base = make_tokenizer(tmp_path / "base", THEIRS, "config", "<|endoftext|>")
    adapter = make_tokenizer(tmp_path / "adapter", OURS, "config", "<|im_end|>", vocabulary="<|turn|>")
    for name in ("preprocessor_config.json", "generation_config.json", "merges.txt"):
        (base / name).write_text("{}")
    (adapter / "generation_config.json").write_text("{}")
    files = side_files(base, adapter)
    own = {name for name, path in files.items() if path.is_relative_to(adapter)}
    assert own == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert files.keys() - own == {"preprocessor_config.json", "generation_config.json"}
    assert (chat_template(files), special_tokens(files)["eos_token"]) == (OURS, "<|im_end|>")


def test_made_files_go_with_their_holder(tmp_path: Path) -> None:
    base = make_tokenizer(tmp_path / "base", THEIRS, "config", "<|endoftext|>")
    files = side_files(base, make_tokenizer(tmp_path / "adapter", OURS, "config", "<|im_end|>"))
    made = files["tokenizer_config.json"]
    assert made.is_file()
    del files
    assert not made.parent.exists()


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json", "additional_chat_templates/x.jinja", "vocab.txt"])
@pytest.mark.parametrize("of_base", [True, False])
def test_a_link_to_another_file_of_this_machine(tmp_path: Path, of_base: bool, name: str) -> None:
    """It would be shipped, and pushed. Links in the folder and into the blobs of the Hub's cache are no others."""
    base = make_tokenizer(tmp_path / "repo" / "snapshots" / "abc", OURS, "extra", "<|im_end|>")
    adapter = make_tokenizer(tmp_path / "adapter", THEIRS, "extra", "<|im_end|>")
    folder = base if of_base else adapter
    for path, content in ((base, tmp_path / "repo" / "blobs" / "0"), (adapter, adapter / "own")):
        content.parent.mkdir(exist_ok=True)
        content.write_text("MIT")
        (path / "NOTICE").symlink_to(content)
    side_files(base, adapter)
    (tmp_path / "secret").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=rf"{name}: points to .*secret, outside the directory"):
        side_files(base, adapter)


NOT_READ = {
    "tokenizer_config.json": ("[]", "a list, expected a JSON object"),
    "special_tokens_map.json": ("{", "not JSON"),
    "generation_config.json": ('{"a":' + "[" * 20_000, "not JSON"),
    "chat_template.jinja": (b"\xff\xfe", "not UTF-8"),
}


def test_what_cannot_be_read_is_named_all_at_once(tmp_path: Path) -> None:
    base = make_tokenizer(tmp_path / "base", OURS, "jinja", "<|im_end|>")
    for name, (content, _) in NOT_READ.items():
        (base / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with (base / "tokenizer.json").open("ab") as file:
        file.truncate(3 << 30)
    with pytest.raises(CheckpointError) as caught:
        side_files(base)
    lines = caught.value.message.splitlines()
    assert len(lines) == len(NOT_READ) + 1
    reasons = {name: reason for name, (_, reason) in NOT_READ.items()} | {"tokenizer.json": "100000000 at most"}
    for name, reason in reasons.items():
        assert any(f"/{name}: " in line and reason in line for line in lines), name
