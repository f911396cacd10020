"""Exports that are wrong in one known way each, merged and as GGUF: every one is red, and for the right reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from lora2serve.artifacts import manifest
from lora2serve.artifacts.parity_report import ComparisonResult, ParityReport
from lora2serve.artifacts.run import Run
from lora2serve.exporting import open_model as models
from lora2serve.exporting import sinks, stream
from lora2serve.parity_check.comparator import check
from lora2serve.parity_check.comparisons import Comparison, of_exports
from lora2serve.parity_check.trained_model import TrainedModel, of_run
from lora2serve.progress import Silent
from tests.conftest import lora2serve
from tests.support.manifests import change_manifest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]  # the one fixture compares thirty exports

Weights = dict[str, torch.Tensor]
Q = "model.layers.{}.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Control:
    """``gate`` is the one that must be missed, ``cause`` and ``first`` parts of what it says.

    ``blind`` is the cause without the tensor gate; ``in_gguf`` what stands in ``first`` for a GGUF, whose names differ.
    """

    damage: Callable[[Path, Run], None]
    gate: str
    cause: str
    first: str = ""
    blind: str | None = None
    in_gguf: str = ""


def weights(change: Callable[[Weights, Weights], None]) -> Callable[[Path, Run], None]:
    """Damage the merged weights; the base's are at hand."""

    def damage(export: Path, run: Run) -> None:
        base = load_file(Path(run.record.base.path) / "model.safetensors")
        merged = load_file(export / "model.safetensors")
        change(merged, base)
        save_file({name: tensor.contiguous() for name, tensor in merged.items()}, export / "model.safetensors")

    return damage


def text(name: str, old: str, new: str) -> Callable[[Path, Run], None]:
    def damage(export: Path, run: Run) -> None:
        content = (export / name).read_text()
        assert old in content
        (export / name).write_text(content.replace(old, new, 1))

    return damage


def not_applied(merged: Weights, base: Weights) -> None:
    merged.update(base)


def too_strong(merged: Weights, base: Weights) -> None:
    for name, tensor in merged.items():
        merged[name] = (base[name] + 1.1 * (tensor.float() - base[name].float())).to(tensor.dtype)


def other_layer(merged: Weights, base: Weights) -> None:
    deltas = [merged[Q.format(n)].float() - base[Q.format(n)].float() for n in (0, 1)]
    merged[Q.format(0)] = (base[Q.format(0)].float() + deltas[1]).to(merged[Q.format(0)].dtype)


def transposed(merged: Weights, base: Weights) -> None:
    merged[Q.format(1)] = merged[Q.format(1)].T


def other_base(merged: Weights, base: Weights) -> None:
    torch.manual_seed(0)
    for name, tensor in merged.items():
        noise = 1.5 * base[name].float().std() * torch.randn(tensor.shape)
        merged[name] = (tensor.float() + noise).to(tensor.dtype)


def one_nan(merged: Weights, base: Weights) -> None:
    merged[Q.format(0)][3, 5] = torch.nan


def two_ids_swapped(export: Path, run: Run) -> None:
    content = json.loads((export / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    (export / "tokenizer.json").write_text(json.dumps(content))


def double_bos(export: Path, run: Run) -> None:
    text("chat_template.jinja", "{%- for", "{{- bos_token + bos_token }}{%- for")(export, run)


def no_eos(export: Path, run: Run) -> None:
    """The end of a turn is gone: what is left is a token that the model never says."""
    (export / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": PAD}))
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "eos_token_id": PAD}))
    text("tokenizer_config.json", '"eos_token": "<|im_end|>"', '"eos_token": "<|pad|>"')(export, run)


PAD = 1  # <|pad|> of the demo


CONTROLS = {
    "adapter not applied": Control(weights(not_applied), "tensors", "adapter: not applied", blind="adapter: not applied"),
    "alpha times 1.1": Control(weights(too_strong), "tensors", "scale: the adapter is there at 1.10", blind="scale or rounding"),
    "another layer's B": Control(weights(other_layer), "tensors", "one part is damaged", Q.format(0), blind="", in_gguf="blk.0.attn_q.weight"),
    "one matrix transposed": Control(weights(transposed), "tensors", "one part is damaged", Q.format(1), blind="", in_gguf="blk.1.attn_q.weight"),
    "wrong base": Control(weights(other_base), "tensors", "wrong base", blind="wrong base"),
    "one NaN": Control(weights(one_nan), "tensors", "NaN", Q.format(0), blind="NaN", in_gguf="blk.0.attn_q.weight"),
    "template lost a newline": Control(text("chat_template.jinja", r"+ '\n' }}{%- endfor", "}}{%- endfor"), "tokens", "template: white space"),
    "double BOS": Control(double_bos, "tokens", "BOS: the template writes it", "BOS 2 times"),
    "two ids swapped": Control(two_ids_swapped, "tokens", "tokenizer"),
    "no end token": Control(no_eos, "tokens", "end token"),
}  # fmt: skip


@pytest.fixture(scope="module")
def report(demo_run: Run, demo_exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ParityReport:
    """Every control, and again without a path so that only behavior can find it, and as GGUF, beside sound ones."""
    root = tmp_path_factory.mktemp("controls")
    run = Run(root / "run")
    shutil.copytree(demo_run.path, run.path, symlinks=True, ignore=shutil.ignore_patterns("exports", "checkpoints"))
    origin = allowing_all(of_run(run, Path(run.record.base.path)))
    wide = ("export", run.path, "-t", "vllm", "-t", "gguf", "-q", "F32", "--dtype", "fp32", "-o", root / "wide")
    exact, gguf = map(Path, lora2serve(*wide, cwd=root).split())
    subjects: list[Comparison] = []
    for name, control in {"sound": None, **CONTROLS}.items():
        export = damaged(demo_exports["vllm"], root / name, control, run)
        seen = next(s for s in of_exports(origin, [export]) if s.engine == "transformers")
        subjects.append(seen)
        if control is None or control.blind is not None:
            subjects.append(replace(seen, name=f"{name}, blind", path=None))
        made = as_gguf(damaged(exact, root / f"{name} fp32", control, run), gguf, root / f"{name}, gguf")
        subjects += of_exports(origin, [made])
    return check(origin, subjects, progress=Silent())


def allowing_all(origin: TrainedModel) -> TrainedModel:
    """The settings gate, which is before the others and sees some of this too, is in test_settings.py.

    A quarter of the text is enough to see these; as much as a run scores, the main job does.
    """
    return replace(origin, settings=replace(origin.settings, tokens=512, prompts=4, allow=("*",)))


def damaged(sound: Path, out: Path, control: Control | None, run: Run) -> Path:
    shutil.copytree(sound, out)
    if control:
        control.damage(out, run)
    return out


def as_gguf(merged: Path, sound: Path, out: Path) -> Path:
    """A GGUF of damaged weights and files, under the manifest of a sound one."""
    weights = load_file(merged / "model.safetensors")
    broken = {name: tensor for name, tensor in weights.items() if tensor.isnan().any()}
    if broken:  # the exporter refuses what is not finite: a bit of the file went over
        save_file({n: t.nan_to_num(1.0) for n, t in weights.items()}, merged / "model.safetensors")
    model = models.open_plain(merged, "damaged", models.OpenOptions(name="demo"))
    sink = sinks.find("gguf")
    stream.export(model, [stream.Plan("gguf", sink, sink.Options(quant="F32"), out)], Silent())
    for _ in broken:
        file = next(out.glob("*.gguf"))
        found = next(t for t in GGUFReader(file, "r+").tensors if t.name == "blk.0.attn_q.weight")
        found.data[3, 5] = np.nan
        found.data.flush()
    shutil.copy(sound / manifest.NAME, out / manifest.NAME)
    return out


def row_of(report: ParityReport, name: str) -> ComparisonResult:
    return next(row for row in report.rows if row.export == name)


@pytest.mark.parametrize("name", ["sound", "sound, gguf"])
def test_the_sound_export_is_met(report: ParityReport, name: str) -> None:
    row = row_of(report, name)
    assert [gate.status for gate in row.gates] == ["met", "met", "met", "met"], row.gate
    assert row_of(report, "sound, blind").status == "met"


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("format", ["", ", gguf"])
def test_red_for_the_right_reason(report: ParityReport, name: str, format: str) -> None:
    control, row = CONTROLS[name], row_of(report, name + format)
    assert row.red
    assert row.gate is not None
    assert row.gate.name == control.gate
    assert control.cause in row.gate.cause
    assert (control.in_gguf or control.first if format else control.first) in row.gate.first
    assert [gate.status for gate in row.gates][-1] == "skipped"


@pytest.mark.parametrize("name", [name for name, control in CONTROLS.items() if control.blind is not None])
def test_behavior_alone_finds_it(report: ParityReport, name: str) -> None:
    row = row_of(report, f"{name}, blind")
    assert row.red
    assert row.gate is not None
    assert row.gate.name == "behaviour"
    assert (CONTROLS[name].blind or "") in row.gate.cause
    assert row.gate.first


@pytest.mark.slow
def test_a_coarser_type_under_a_finer_name(demo_run: Run, demo_exports: dict[str, Path], tmp_path: Path) -> None:
    """A Q4_0 file named Q8_0."""
    (made,) = lora2serve("export", demo_run.path, "-t", "gguf", "-q", "Q4_0", "-o", tmp_path, cwd=tmp_path).split()
    named = tmp_path / "gguf-Q8_0"
    Path(made).rename(named)
    change_manifest(named, quant="Q8_0")
    origin = allowing_all(of_run(demo_run, Path(demo_run.record.base.path)))
    (row,) = check(origin, of_exports(origin, [named]), progress=Silent()).rows
    assert row.red
    assert row.gate is not None
    assert (row.gate.name, row.gate.cause) == ("tensors", "rounding: stored more coarsely than its name says")
