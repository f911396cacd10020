"""The plan of a GGUF file: what it says of the file is what the file is, beside gguf's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFValueType

from converters.gguf import header
from converters.gguf.gguf_plan import GgufPlan
from converters.gguf.gguf_scan import scan
from converters.gguf.header import GgufTensor, TypedValue
from converters.gguf.shards import ShardFiles
from lora2serve.artifacts.staging import DryRunDir
from lora2serve.errors import ExportError

TENSORS = (
    GgufTensor("token_embd.weight", (10, 256), "Q4_K"),
    GgufTensor("blk.0.attn_norm.weight", (7,), "F32"),
    GgufTensor("blk.0.ffn_up.weight", (4, 64), "F16"),
)
VALUES = {"general.architecture": "llama", "llama.block_count": 1, "llama.rope": 1.5, "flag": False, "zero": 0}


def plan() -> GgufPlan:
    return GgufPlan(header.typed(VALUES), TENSORS)


def test_the_file_is_as_planned(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    plan().write_empty(path)
    assert path.stat().st_size == plan().size
    assert scan(path) == {tensor.name: tensor.type for tensor in TENSORS}
    reader = GGUFReader(path)
    assert {key: reader.fields[key].contents() for key in VALUES} == VALUES
    start = len(plan().header)
    for tensor, stored in zip(TENSORS, reader.tensors, strict=True):
        assert (int(stored.data_offset), int(stored.n_bytes)) == (start, tensor.nbytes)
        start += tensor.padded


def test_types_of_keys() -> None:
    """As llama.cpp reads them; a flag is no number, and what is empty is left out as gguf's writer does."""
    keys = header.typed({**VALUES, "text": "", "list": [], "words": ["a"]})
    kinds = {"flag": GGUFValueType.BOOL, "zero": GGUFValueType.UINT32, "llama.rope": GGUFValueType.FLOAT32}
    assert {key: keys[key].type for key in kinds} == kinds
    assert keys["words"].type == GGUFValueType.ARRAY
    assert not {"text", "list"} & keys.keys()


def test_split() -> None:
    """Tensors stay in order and whole, the first file carries the keys; a plan that fits is its own only part."""
    parts = plan().split(1600)
    assert [[tensor.name for tensor in part.tensors] for part in parts] == [
        ["token_embd.weight", "blk.0.attn_norm.weight"],
        ["blk.0.ffn_up.weight"],
    ]
    split = {"split.no", "split.count", "split.tensors.count"}
    assert parts[0].keys.keys() == VALUES.keys() | split
    assert parts[1].keys.keys() == split
    assert [part.keys["split.no"].value for part in parts] == [0, 1]
    assert [len(part.split(1)) for part in parts] == [2, 1], "a tensor that is larger has a file of its own"
    whole = plan()
    assert whole.split(None) == [whole]


def test_the_header_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For the proof and for the file; the control, another plan, makes its own."""
    encoded: list[int] = []
    encode = header.encode
    monkeypatch.setattr(
        header, "encode", lambda keys, tensors: (encoded.append(len(tensors)), encode(keys, tensors))[1]
    )
    whole = plan()
    whole.write_empty(tmp_path / "empty.gguf")
    out = DryRunDir(tmp_path / "out")
    assert ShardFiles(out, "model", whole).names == ["model.gguf"]
    assert out.sizes == {"model.gguf": whole.size}
    assert encoded == [3]
    ShardFiles(out, "model", plan(), split_size=1)
    assert encoded == [3, 1, 1, 1]
    out.discard()


@pytest.mark.parametrize("twins", [["a", "b", "a"], [b"a", b"b", b"a"]])
def test_two_tokens_of_one_text(twins: list[str] | list[bytes]) -> None:
    kind = int(GGUFValueType.ARRAY)
    with pytest.raises(ExportError, match="tokens 0 and 2 are both"):
        header.encode({header.TOKENS_KEY: TypedValue(twins, kind)}, ())
    header.encode({header.TOKENS_KEY: TypedValue(twins[:2], kind)}, ())
