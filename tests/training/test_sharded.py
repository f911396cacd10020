"""Several processes that each hold a part of the base train what one process trains that holds all of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import lora2serve
from lora2serve.artifacts.run import Run
from lora2serve.config.recipe import TrainRecipe
from lora2serve.errors import RecipeError, TrainError
from lora2serve.planning.gpus import find_gpu
from lora2serve.planning.model_shape import model_shape
from lora2serve.planning.plan_settings import PlanSettings, settings_of
from lora2serve.planning.static_memory import static_memory
from lora2serve.planning.step_choice import choose_parallel
from lora2serve.training import base_parts, sharded_base
from lora2serve.training.model import Device, load_base
from lora2serve.weights.checkpoint import Checkpoint
from tests.planning.conftest import LLAMA3_70B
from tests.support.families import FAMILIES
from tests.support.ranks import ends, start_python, start_together, train_together
from tests.support.runs import DEMO, fit, logged, make_chat_model, recipe_file, uneven_data
from tests.training.test_processes import adapter, lines, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.skipif(torch.cuda.is_available(), reason="one CPU beside two")]

OPTIONS: dict[str, Any] = {
    "quantize": "nf4", "batch_size": 2, "accumulation": 2, "steps": None, "epochs": 2.0, "eval_steps": 3,
    "samples": ["Who governs Wexley?"], "gradient_checkpointing": True,
}  # fmt: skip
# What lies in each process once the base is cut into parts, and that of two losses.
LOOK = """
import json
import lora2serve
from lora2serve.training import base_parts, sharded_base

own = sharded_base.shard

def look(model, device):
    names = [name for name, _ in model.named_parameters()]
    whole = {name: weight.nbytes for name, weight in model.named_parameters()}
    own(model, device)
    parts = {name: weight for name, weight in model.named_parameters()}
    cut = [name for name in names if base_parts.is_part(parts[name])]
    held = sum(parts[name].to_local().nbytes if name in cut else parts[name].nbytes for name in names)
    print(json.dumps({
        "cut": sum(whole[name] for name in cut), "local": sum(parts[name].to_local().nbytes for name in cut),
        "whole": [name for name in names if name not in cut], "held": held,
    }))

sharded_base.shard = look
lora2serve.train()
"""


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Nine rows, of which the last step of an epoch has one; held-out ones of very different lengths."""
    return uneven_data(tmp_path_factory.mktemp("nine"), 9, 7)


def make_base(folder: Path, kind: str) -> Path:
    changes = {} if kind == "llama" else FAMILIES[kind]
    return make_chat_model(folder / kind, kind=kind, dtype=torch.float32, **changes)


@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_two_halves_train_what_a_whole_trains(tmp_path: Path, nine: dict[str, str], kind: str) -> None:
    base = make_base(tmp_path, kind)
    lora = {"rank": 4, **({"targets": "attention", "target_parameters": "experts"} if kind == "qwen3_moe" else {})}
    recipe_file(tmp_path, base, nine, **OPTIONS, lora=lora, parallel="fsdp")
    if kind == "llama":
        whole, _, _ = fit(tmp_path / "lora2serve.yaml", into=tmp_path / "whole")
    else:  # whose balance is taken over the rows of each process
        recipe_file(tmp_path / "ddp", base, nine, **OPTIONS, lora=lora, parallel="ddp")
        assert [each.returncode for each in train_together(tmp_path / "ddp")] == [0, 0]
        whole = Run(tmp_path / "ddp" / "runs" / "run")
    found = ends(start_python(tmp_path, ["-c", LOOK]))
    assert [code for code, _, _ in found] == [0, 0], [text for _, _, text in found]
    checkpoint = Checkpoint(base)
    settings = PlanSettings(dtype="float32", shards=2, rank=4)
    planned = static_memory(model_shape(checkpoint.config, checkpoint.specs()), settings)
    for _, out, _ in found:
        held = json.loads(out.splitlines()[0])
        assert held["local"] * 2 == held["cut"] > 0
        assert held["whole"] == ["model.norm.weight"], "every 4-bit weight is cut, and all else of size"
        assert held["held"] == pytest.approx(planned.weights, rel=0.02), "as planned"
    run = Run(tmp_path / "runs" / "run")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["latest", "run"]
    assert run.record.loop is not None and run.record.loop.sharded and run.record.loop.processes == 2
    assert whole.record.loop is not None and not whole.record.loop.sharded
    for key in ("loss", "grad_norm", "eval_loss"):
        assert logged(run, key) == pytest.approx(logged(whole, key), abs=1e-5), key
    assert len(logged(run)) == len(logged(whole)) > 3
    mine, other = adapter(run), adapter(whole)
    assert max(float((mine[name] - other[name]).abs().max()) for name in other) < 1e-5
    assert max(float(tensor.abs().max()) for name, tensor in other.items() if "lora_B" in name) > 1e-3, "the control"
    assert (run.path / "samples.jsonl").read_text() == (whole.path / "samples.jsonl").read_text()
    assert run.record.quantization == whole.record.quantization
    (export,) = lora2serve.export(run.path, targets="vllm", merge_base="trained", out=tmp_path / "out")
    assert (export.path / "model.safetensors").is_file()


LONG = {**OPTIONS, "steps": 24, "eval_steps": 8, "samples": [], "lora": {"dropout": 0.1, "rank": 8}, "parallel": "fsdp"}


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_and_resumed(tmp_path: Path, nine: dict[str, str], killed: int) -> None:
    """Bit for bit as unbroken, whichever process it was."""
    recipe_file(tmp_path / "whole", DEMO / "base", nine, **LONG)
    assert [each.returncode for each in train_together(tmp_path / "whole")] == [0, 0]
    recipe_file(tmp_path, DEMO / "base", nine, **LONG)
    children = start_together(tmp_path)
    wait_for(lambda: lines(tmp_path) >= 7, children)
    children[killed].send_signal(signal.SIGKILL)
    found = ends(children)
    assert found[1 - killed][0] == 1 and "has ended without a word" in found[1 - killed][2]
    done = train_together(tmp_path, "--resume")
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    run, whole = (Run(folder / "runs" / "run") for folder in (tmp_path, tmp_path / "whole"))
    assert logged(run) == logged(whole) and logged(run, "eval_loss") == logged(whole, "eval_loss")
    mine, other = adapter(run), adapter(whole)
    assert all(torch.equal(mine[name], other[name]) for name in other)


def test_a_whole_weight_is_refused(tmp_path: Path) -> None:
    """As it is before it is cut."""
    model = load_base(make_base(tmp_path, "qwen3_moe"), TrainRecipe(), Device("cpu", "float32"), sharded=True)
    message = r"fsdp: model.layers.0.self_attn.q_proj.weight and \d+ more: in 4 bits, and whole in every process"
    with pytest.raises(TrainError, match=message):
        sharded_base.refuse_whole(model)
    assert not base_parts.is_sharded(model)


def test_the_plan_decides() -> None:
    """Of a base that one card holds each process has all; on request, or where it is too large, a part."""
    shape, card = model_shape(LLAMA3_70B, None), find_gpu("24")
    train = TrainRecipe(batch_size=1, gradient_checkpointing=True)
    settings = settings_of(train, 512, "bfloat16")
    assert choose_parallel(shape, settings, train, card, 2).settings.shards == 2
    assert choose_parallel(shape, settings, train, card, 1).settings.shards == 1
    assert choose_parallel(shape, settings, train, find_gpu("h100"), 2).settings.shards == 1
    asked = TrainRecipe(batch_size=1, parallel="fsdp")
    assert choose_parallel(shape, settings, asked, find_gpu("h100"), 2).settings.shards == 2
    refused = TrainRecipe(batch_size=1, parallel="ddp")
    assert choose_parallel(shape, settings, refused, card, 2).settings.shards == 1


def test_what_cannot_be_cut(tmp_path: Path, nine: dict[str, str], small: Path) -> None:
    recipe_file(tmp_path, small, nine, parallel="fsdp", lora={"dora": True, "modules_to_save": ["lm_head"]})
    with pytest.raises(RecipeError) as caught:
        lora2serve.train(tmp_path / "lora2serve.yaml")
    assert "train.parallel: fsdp: train.lora.dora: True" in caught.value.message
    assert "train.parallel: fsdp: train.lora.modules_to_save: " in caught.value.message
