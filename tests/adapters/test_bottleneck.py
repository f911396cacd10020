"""Bottleneck adapters: the arithmetic by hand, what is saved and loaded, and behind which modules they stand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora2serve.bottleneck as bottleneck
from lora2serve.adapters.adapter import open_adapter
from lora2serve.adapters.peft_loading import load_adapter
from lora2serve.config.recipe import TrainRecipe
from lora2serve.errors import TrainError
from lora2serve.parity_check.engines.chat_engine import AnswerOptions
from lora2serve.parity_check.engines.served_peft import Prompt, ServedPeft
from lora2serve.training import method_config
from lora2serve.training import model as models
from lora2serve.training.model import device
from lora2serve.training.weightless import check_adapter, learned_values
from tests.support.families import FAMILIES, HANDFUL, make_family
from tests.support.runs import make_chat_model
from tests.support.tiny import load_model, make_adapter, make_model

IDS = torch.arange(5, 25)[None]
PLACES = ["o_proj", "down_proj"]
BY_HAND = {
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bottleneck") / "base")


@contextmanager
def by_hand(model: Any, tensors: Mapping[str, torch.Tensor], activation: str) -> Iterator[None]:
    """A plain model with h + W_up act(W_down h + b_down) + b_up behind each module that the file has tensors of."""
    modules = {name.removeprefix("base_model.model.").rpartition(".bottleneck_")[0] for name in tensors}

    def hook(name: str) -> Any:
        part = {kind: tensors[f"base_model.model.{name}.bottleneck_{kind}"] for kind in KINDS}

        def changed(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
            inner = BY_HAND[activation](out @ part["down.weight"].T + part["down.bias"])
            return out + inner @ part["up.weight"].T + part["up.bias"]

        return model.get_submodule(name).register_forward_hook(changed)

    hooks = [hook(name) for name in modules]
    yield
    for each in hooks:
        each.remove()


KINDS = ("down.weight", "down.bias", "up.weight", "up.bias")


@pytest.mark.parametrize(
    "activation", [pytest.param(name, marks=[] if name in ("relu", "gelu") else pytest.mark.slow) for name in BY_HAND]
)
def test_it_computes_what_is_written_down(base: Path, tmp_path: Path, activation: str) -> None:
    """Logits and gradients, from the saved file; switched off it is the base."""
    adapter = make_adapter(
        tmp_path / "a", base, method="BOTTLENECK", std=0.3, target_modules=PLACES, activation=activation
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.bottleneck_down.weight"].shape == (4, 64)
    assert len(tensors) == 2 * len(PLACES) * len(KINDS)
    plain, tuned = load_model(base).eval(), load_adapter(load_model(base), adapter).eval()
    learned = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    with by_hand(plain, learned, activation):
        expected = plain(input_ids=IDS).logits
        expected.square().mean().backward()
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_("bottleneck_" in name)
    got = tuned(input_ids=IDS).logits
    got.square().mean().backward()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    gradients = {name.replace(".default", ""): p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    assert gradients.keys() == learned.keys()
    for name, tensor in learned.items():
        torch.testing.assert_close(gradients[name], tensor.grad, rtol=1e-4, atol=1e-7)
    bare = plain(input_ids=IDS).logits
    assert (got - bare).abs().max() > 0.1, "the control: it changes something"
    with tuned.disable_adapter():
        assert torch.equal(tuned(input_ids=IDS).logits, bare)


def test_a_fresh_one_changes_nothing_and_learns(base: Path, tmp_path: Path) -> None:
    """And what it learned comes back from its file, bit by bit."""
    recipe = TrainRecipe("bottleneck", {"reduction_factor": 8}, quantize="none")
    plain = load_model(base)
    bare = plain(input_ids=IDS).logits
    tuned = models.add_adapter(plain, method_config.adapter_config(plain, recipe, base))
    assert torch.equal(tuned(input_ids=IDS).logits, bare)
    learned = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    size, width = 64 // 8, 64
    count = 2 * 2 * (2 * width * size + size + width)
    assert sum(parameter.numel() for parameter in learned) == count == learned_values(base, recipe)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(tuned(input_ids=IDS).logits[0, :-1], IDS[0, 1:])
        loss.backward()
        torch.optim.SGD(learned, lr=0.5).step()
    after = tuned.eval()(input_ids=IDS).logits
    assert not torch.equal(after, bare)
    tuned.save_pretrained(tmp_path / "a")
    assert torch.equal(load_adapter(load_model(base), tmp_path / "a").eval()(input_ids=IDS).logits, after)
    assert open_adapter(tmp_path / "a").method == "BOTTLENECK"


def test_several_on_one_base(base: Path, tmp_path: Path) -> None:
    """One after the other, and together: their changes add up, where they stand behind one module."""
    last = [f"layers.1.mlp.{name}" for name in ("down_proj",)]
    paths = [
        make_adapter(
            tmp_path / f"a{n}", base, seed=n, method="BOTTLENECK", std=0.3, target_modules=last, reduction_factor=2**n
        )
        for n in (2, 3)
    ]
    tuned = load_adapter(load_model(base), paths[0], "one").eval()
    tuned.load_adapter(str(paths[1]), "two")
    alone = [load_adapter(load_model(base), path).eval() for path in paths]
    for name, other in zip(("one", "two"), alone, strict=True):
        tuned.set_adapter(name)
        assert torch.equal(tuned(input_ids=IDS).logits, other(input_ids=IDS).logits)
    tuned.base_model.set_adapter(["one", "two"])
    layer = "base_model.model.model.layers.1.mlp.down_proj"
    seen: list[torch.Tensor] = []
    for model in (*alone, tuned):
        model.get_submodule(layer).register_forward_hook(lambda module, given, out: seen.append(out))
        model(input_ids=IDS)
    with tuned.disable_adapter():
        tuned(input_ids=IDS)
    one, two, both, bare = seen
    torch.testing.assert_close(both - bare, (one - bare) + (two - bare), rtol=1e-4, atol=1e-4)
    assert (one - two).abs().max() > 1e-2, "the control"


# Behind what mixes tokens, and behind the MLP.
PLACES_OF: dict[str, tuple[list[str], list[str]]] = {
    "llama": (["o_proj"], ["down_proj"]),
    "gemma2": (["o_proj"], ["down_proj"]),
    "phi3": (["o_proj"], ["down_proj"]),
    "opt": (["out_proj"], ["fc2"]),
    "gpt2": (["c_proj"], ["mlp.c_proj"]),
    "gpt_neox": (["dense"], ["dense_4h_to_h"]),
    "qwen3_moe": (["o_proj"], ["mlp"]),
    "gpt_oss": (["o_proj"], ["mlp"]),
    "deepseek_v3": (["o_proj"], ["1.mlp", "mlp.down_proj"]),
    "qwen3_5_text": (["o_proj", "out_proj"], ["down_proj"]),
    "lfm2": (["out_proj"], ["w2"]),
}


def config_of(model: Any, kind: str) -> Any:
    recipe = TrainRecipe("bottleneck", {"kind": kind, "activation": "gelu"}, quantize="none")
    return method_config.adapter_config(model, recipe, Path("base"))


def placed(family: str, kind: str) -> Any:
    """A model of the family with what the recipe puts on it, not as it begins."""
    model = make_family(family)
    tuned = models.add_adapter(model, config_of(model, kind))
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "bottleneck_up" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return tuned


@pytest.mark.parametrize("family", PLACES_OF)
def test_where_they_stand(family: str) -> None:
    """Houlsby behind attention and MLP, Pfeiffer behind the MLP; a mixture of experts has one behind all of it."""
    attention, mlp = PLACES_OF[family]
    model = make_family(family)
    assert sorted(config_of(model, "pfeiffer").target_modules) == sorted(mlp)
    both = attention if family == "gpt2" else [*attention, *mlp]
    assert sorted(config_of(model, "houlsby").target_modules) == sorted(both)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in HANDFUL else pytest.mark.slow) for name in FAMILIES]
)
def test_it_learns_in_every_layer(tmp_path: Path, family: str) -> None:
    """And its file holds what it is."""
    if family in NO_MLP:
        with pytest.raises(TrainError, match=r"train\.method: bottleneck finds no way out of an MLP in this model"):
            placed(family, "pfeiffer")
        return
    tuned = placed(family, "houlsby").train()
    tuned(input_ids=IDS).logits.square().mean().backward()
    learned = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    assert learned and all(parameter.grad is not None and parameter.grad.any() for parameter in learned)
    tuned.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        again = load_adapter(make_family(family), tmp_path).eval()
        assert torch.equal(again(input_ids=IDS).logits, tuned(input_ids=IDS).logits)


NO_MLP = ("mamba", "mamba2")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["up_proj"]}, "train.options: model.layers.0.mlp.up_proj gives 128 values, expected the"),
    ({"target_modules": ["dwn_proj"]}, "train.options.target_modules: no module 'dwn_proj' in this model (did you"),
    ({"reduction_factor": 0}, "train.options: reduction_factor is 0, expected 1 or more"),
]


@pytest.mark.parametrize(("options", "said"), WRONG)
def test_what_a_model_cannot_carry(base: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainError) as caught:
        check_adapter(base, TrainRecipe("bottleneck", options, quantize="none"), device())
    assert caught.value.message.startswith(said), caught.value.message


def test_served_by_name(tmp_path: Path) -> None:
    """Two beside each other, greedily as PEFT answers."""
    base = make_chat_model(tmp_path / "base", dtype=torch.float32)
    paths = {
        name: make_adapter(tmp_path / name, base, seed=n, method="BOTTLENECK", std=0.5, target_modules=PLACES)
        for n, name in enumerate(("one", "two"))
    }
    served = ServedPeft(str(base), {name: str(path) for name, path in paths.items()})
    assert served.models == ("one", "two", "base")
    said = {}
    for name in served.models:
        words: list[str] = []
        served.answer(name, Prompt(ids=[20, 21, 22]), AnswerOptions(max_tokens=6, temperature=0), [], words.append)
        model = load_model(base) if name == "base" else load_adapter(load_model(base), paths[name])
        out = [20, 21, 22]
        with torch.no_grad():
            for _ in range(6):
                out.append(int(model.eval()(input_ids=torch.tensor([out]), use_cache=False).logits[0, -1].argmax()))
        said[name] = "".join(words)
        assert said[name] == served._engines[name].tokenizer.decode(out[3:], skip_special_tokens=True)
    assert len(set(said.values())) > 1, "the control"


@pytest.mark.engine
@pytest.mark.slow
def test_peft_alone_knows_no_such_method(base: Path, tmp_path: Path) -> None:
    """It says so, and is told by one import."""
    adapter = make_adapter(tmp_path / "a", base, method="BOTTLENECK", target_modules=PLACES)
    script = (
        "from peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(adapter)!r})\n"
        "print(type(model.base_model).__name__)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", first + script], capture_output=True, text=True, check=False)
        for first in ("", f"import {bottleneck.__name__}\n")
    ]
    assert runs[0].returncode == 1 and "BOTTLENECK" in runs[0].stderr.splitlines()[-1]
    assert (runs[1].returncode, runs[1].stdout.strip()) == (0, "BottleneckModel"), runs[1].stderr
