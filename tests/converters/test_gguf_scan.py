"""Broken GGUF files: the classes of llama.cpp's ``tests/test-gguf.cpp``, beside the verdict of ggml's own loader."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.gguf.ggml import ggml
from converters.gguf.gguf_scan import scan
from converters.gguf.quick_reader import open_gguf
from lora2serve.errors import CheckpointError
from tests.support.drawn import examples

U32, F32_TYPE, STRING, ARRAY = 4, 0, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str | bytes = "w", shape: tuple[int, ...] = (32,), kind: int = F32_TYPE, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARCH = key("general.architecture", STRING, text("llama"))


def file(
    keys: tuple[bytes, ...] = (ARCH,), tensors: tuple[bytes, ...] = (tensor(),), data: int = 128, magic: bytes = b"GGUF",
    version: int = 3, counts: tuple[int, int] | None = None, align: int = 32,
) -> bytes:  # fmt: skip
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys))))
    raw = head + b"".join(keys) + b"".join(tensors)
    return raw + bytes(-len(raw) % align) + bytes(data)


def align(value: int) -> bytes:
    return key("general.alignment", U32, struct.pack("<I", value))


BROKEN = {
    "empty file": b"",
    "bad magic": file(magic=b"GGML"),
    "version 0": file(version=0),
    "version 1": file(version=1),
    "version of the future": file(version=4),
    "too many tensors": file(counts=(2**62, 1)),
    "too many keys": file(counts=(1, 2**62)),
    "cut in the counts": file()[:12],
    "key longer than the file": file(keys=(struct.pack("<Q", 2**63) + b"x",)),
    "empty key": file(keys=(key("", U32, bytes(4)),)),
    "key twice": file(keys=(ARCH, key("a", U32, bytes(4)), key("a", U32, bytes(4)))),
    "unknown value type": file(keys=(key("a", 13, bytes(4)),)),
    "array of 2^63 numbers": file(keys=(key("a", ARRAY, struct.pack("<IQ", 0, 2**63)),), tensors=(), data=0),
    "array of 2^63 strings": file(keys=(key("a", ARRAY, struct.pack("<IQ", STRING, 2**63)),)),
    "array of arrays": file(keys=(key("a", ARRAY, struct.pack("<IQ", ARRAY, 1)),)),
    "string longer than the file": file(keys=(key("a", STRING, struct.pack("<Q", 2**40)),)),
    "alignment 0": file(keys=(ARCH, align(0))),
    "alignment 13": file(keys=(ARCH, align(13))),
    "alignment of another type": file(keys=(ARCH, key("general.alignment", 6, struct.pack("<f", 32.0)))),
    "tensor name too long": file(tensors=(tensor("n" * 64),)),
    "five dimensions": file(tensors=(tensor(shape=(32, 1, 1, 1, 1)),)),
    "rows of no whole block": file(tensors=(tensor(shape=(33,), kind=8),)),
    "too many elements": file(tensors=(tensor(shape=(2**62, 2**62)),)),
    "bytes beyond 64 bits": file(tensors=(tensor(shape=(2**62,)),)),
    "unknown tensor type": file(tensors=(tensor(kind=999),)),
    "offset with a hole": file(tensors=(tensor(), tensor("v", offset=256)), data=512),
    "offset inside another": file(tensors=(tensor(), tensor("v", offset=64)), data=256),
    "tensor twice": file(tensors=(tensor(), tensor(offset=128)), data=256),
    "data cut": file(data=127),
    "no data": file(data=0),
}
SOUND = {
    "plain": file(),
    "no tensors": file(tensors=(), data=0),
    "two tensors": file(tensors=(tensor(), tensor("v", offset=128)), data=256),
    "another alignment": file(keys=(ARCH, align(64)), align=64),
    "text that is not UTF-8": file(keys=(ARCH, key("a", STRING, text(b"\xff\xfe")))),
}


class Params(ctypes.Structure):
    """``gguf_init_params`` (ggml/include/gguf.h)."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def ggml_takes(path: Path) -> bool:
    """Whether ggml's own loader takes the file with its data."""
    library: Any = ggml()
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
    library.gguf_free.argtypes = [ctypes.c_void_p]
    context = ctypes.c_void_p()
    opened = library.gguf_init_from_file(
        str(path).encode(), Params(False, ctypes.cast(ctypes.byref(context), ctypes.c_void_p))
    )
    if opened:
        library.gguf_free(opened)
    library.ggml_free.argtypes = [ctypes.c_void_p]
    library.ggml_free(context)
    return bool(opened)


@pytest.mark.parametrize("name", BROKEN)
def test_broken(tmp_path: Path, name: str) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(BROKEN[name])
    with pytest.raises(CheckpointError, match="not a valid GGUF file"):
        scan(path)
    assert not ggml_takes(path)


@pytest.mark.parametrize("name", SOUND)
def test_sound(tmp_path: Path, name: str) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(SOUND[name])
    scan(path)
    assert ggml_takes(path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "real.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_array("tokens", ["a", "bc", "def"])
    writer.add_array("scores", [1.0, 2.0])
    writer.add_tensor("w", np.ones((2, 32), np.float32))
    writer.add_tensor("v", np.ones(7, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_passes_is_read_by_both(written: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Any damage to a real file is found, or ggml and gguf read the file all the same."""
    raw = bytearray(written)
    for position in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=3)):
        raw[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw[: data.draw(st.integers(len(raw) // 2, len(raw)))])
    try:
        scan(path)
    except CheckpointError:
        return
    assert ggml_takes(path)
    assert GGUFReader(path).tensors is not None
    assert open_gguf(path).tensors is not None
