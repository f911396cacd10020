"""Room for the adapters of a registry: slots, ranks and memory, as `serve --allow-updates` gives them to vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora2serve import Registry
from lora2serve.api.serve_model import serving_command
from lora2serve.api.served_room import registry_room
from lora2serve.planning.model_shape import model_shape
from lora2serve.serving.lora_room import MOST_SLOTS, lora_room, slot_values
from lora2serve.serving.server import ServeOptions
from tests.support.registries import add_export, make_run

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


def test_a_slot_of_a_model_of_8b() -> None:
    """By hand: A and B of q, k, v, o, gate, up and down, 32 times; those of embeddings and head."""
    layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    values = 16 * (32 * layer + 2 * (128256 + 4096))
    assert slot_values(model_shape(LLAMA, None), 16) == values
    room = lora_room(2, 3, [9, 16], model_shape(LLAMA, None), 2)
    assert (room.max_loras, room.max_cpu_loras, room.max_lora_rank, room.slot_bytes) == (2, 3, 16, 2 * values)
    assert lora_room(100, 200, [17], None, 2).flags == [
        "--max-loras", str(MOST_SLOTS), "--max-cpu-loras", "200", "--max-lora-rank", "32",
    ]  # fmt: skip
    assert lora_room(0, 0, [], None, 2).flags[1::2] == ["1", "1", "1"]


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with two names on one base, and one on another."""
    folder = tmp_path_factory.mktemp("room")
    with Registry(folder / "registry") as registry:
        for seed, (name, base, rank) in enumerate(
            [
                ("a", "org/base", 4),
                ("a", "org/base", 16),
                ("b", "org/base", 8),
                ("c", "org/other", 64),
                ("a", "org/base", 32),
            ]
        ):
            run = make_run(folder / f"run-{seed}", seed, base=base, rank=rank)
            add_export(run, "adapter", rank=rank, name=name)
            registry.add(run.path, name=name)
        registry.promote("a@1")
        registry.promote("a@2")  # 1 is what a rollback brings back
        registry.promote("a@1", "challenger")
        registry.promote("b@1")
        registry.promote("c@1")
        registry.retire("a@3", why="too large")
    return folder / "registry"


@pytest.fixture
def registered(seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In a folder with a copy of it: the adapter export of the first version."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORA2SERVE_REGISTRY", raising=False)
    shutil.copytree(seed, "registry")
    with Registry("registry") as registry:
        return registry.path("a@1/adapter")


class Heard(list[str]):
    """A progress that keeps what it is told."""

    note = warn = list.append


def test_room_by_the_registry(registered: Path) -> None:
    """Versions of this base that answer, and the one that is given; the retired one of rank 32 wants no room."""
    heard = Heard()
    room = registry_room([registered], heard)  # type: ignore[arg-type]
    assert room and (room.max_loras, room.max_cpu_loras, room.max_lora_rank) == (4, 4, 16)
    assert heard == ["room by the registry: 4 adapters in slots of rank 16; 4 in memory"]
    with Registry() as registry:
        registry.promote("a@2", "challenger")
    room = registry_room([registered], heard)  # type: ignore[arg-type]
    assert room and (room.max_loras, room.max_cpu_loras) == (3, 4)


def test_the_command(registered: Path) -> None:
    heard = Heard()
    line = serving_command([registered], ServeOptions(allow_updates=True), heard)  # type: ignore[arg-type]
    words = line.split()
    last = {flag: words[len(words) - 1 - words[::-1].index(flag) + 1] for flag in ("--max-loras", "--max-lora-rank")}
    assert last == {"--max-loras": "4", "--max-lora-rank": "16"} and "--max-cpu-loras 4" in line
    assert len(heard) == 1
    alone = serving_command([registered], ServeOptions(), heard)  # type: ignore[arg-type]
    assert "--max-cpu-loras" not in alone and "--max-loras 1 " in alone and len(heard) == 1


def test_without_a_registry(registered: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = registered.resolve()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert registry_room([path], Heard()) is None  # type: ignore[arg-type]
    manifest = json.loads((path / "lora2serve.json").read_text())
    assert manifest["target"] == "adapter"
