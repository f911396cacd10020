"""A GGUF is read as the gguf package reads it, without an object for each token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from converters.gguf.quick_reader import open_gguf

NUMBERS = [kind for kind in GGUFValueType if kind not in (GGUFValueType.STRING, GGUFValueType.ARRAY)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """With an array of each type, and two tensors behind them."""
    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_string("a.text", "é🙂")
    writer.add_uint32("a.number", 7)
    for kind in NUMBERS:
        writer.add_key_value(f"a.{kind.name}", [1, 0, 1], GGUFValueType.ARRAY, kind)
    writer.add_array("a.texts", ["", "é🙂", "\n", "x" * 300])
    writer.add_array("a.floats", [0.5, -1.0, 1e-3])
    writer.add_key_value("a.one", ["alone"], GGUFValueType.ARRAY, GGUFValueType.STRING)
    writer.add_tensor("first", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("second", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_all_that_it_reads_is_what_gguf_reads(file: Path) -> None:
    ours, theirs = open_gguf(file), GGUFReader(file)
    assert ours.fields.keys() == theirs.fields.keys() and "a.texts" in ours.fields
    for key, field in theirs.fields.items():
        found = ours.fields[key]
        assert repr(found.contents()) == repr(field.contents()), key
        assert found.types == field.types, key
    assert ours.data_offset == theirs.data_offset
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors] == ["first", "second"]
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert np.array_equal(one.data, other.data)
        assert (one.data_offset, one.tensor_type, list(one.shape)) == (
            other.data_offset, other.tensor_type, list(other.shape)
        )  # fmt: skip


def test_a_vocabulary_has_no_object_for_each_number(file: Path) -> None:
    """The control: gguf's own has, which is what takes the time."""
    assert len(open_gguf(file).fields["a.floats"].parts) == 6
    assert len(GGUFReader(file).fields["a.floats"].parts) == 8
