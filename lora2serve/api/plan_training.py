"""``lora2serve.plan``: the memory, disk and time of a training, before anything is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from lora2serve.api.exact_planning import ExactMemory, exact_planner
from lora2serve.api.train_run import fetch_base, settings, with_adapter
from lora2serve.config import recipe as recipes
from lora2serve.config.arguments import checked
from lora2serve.config.data_recipe import DataRecipe
from lora2serve.config.recipe import PRESETS, ModelRecipe, TrainRecipe
from lora2serve.config.train_methods import LORA
from lora2serve.console import default_progress
from lora2serve.errors import CheckpointError, UsageError, did_you_mean
from lora2serve.planning.disk_space import disk_bytes, host_bytes
from lora2serve.planning.gpus import GpuModel, find_gpu, gpu_of_driver
from lora2serve.planning.measured_memory import measured_ratio
from lora2serve.planning.memory_plan import (
    PlannedBytes,
    PlannedTraining,
    fitting_gpus,
    largest_batch,
    levers,
    planned_bytes,
)
from lora2serve.planning.model_shape import ModelShape, model_shape
from lora2serve.planning.plan_settings import METHODS, Method, PlanSettings, checkpoints, method_of, settings_of
from lora2serve.planning.static_memory import target_layers, trainable
from lora2serve.planning.step_choice import choose_parallel, share_of
from lora2serve.progress import Progress
from lora2serve.system.hardware import nvidia_gpus
from lora2serve.system.hub_snapshot import hub_snapshot
from lora2serve.weights.checkpoint import Checkpoint, read_config
from lora2serve.weights.tensors import TensorSpec


@dataclass(frozen=True)
class TrainingPlan:
    """What it takes to train a model in one or several ways; sizes in bytes."""

    model: str
    parameters: int
    layers: int
    gpu: str | None  # that it is planned for
    trainings: tuple[PlannedTraining, ...]
    shares: Mapping[str, float]  # preset of targets -> share of the model's values that it learns, at the first rank
    host_memory: int
    disk: Mapping[str, int]  # base, run, adapter, and exports by target and type
    time: str  # where it was measured
    notes: tuple[str, ...]  # what could not be known


@checked
def plan(
    model: str | Path | None = None, *,
    gpu: str | None = None, gpus: int = 1, methods: Sequence[str] = (), ranks: Sequence[int] = (),
    targets: Sequence[str] = (), batch: int | None = None, length: int | None = None, exact: bool = False,
    overrides: Mapping[str, object] | Sequence[str] = (), progress: Progress | None = None,
) -> TrainingPlan:  # fmt: skip
    """What training ``model`` takes: memory by part, the GPUs that hold it, the largest micro-batch, disk.

    model: a recipe (its path, or a built-in name), a model directory or a Hub id, of which only the small files and the
        headers of the weights are read; nothing for ``lora2serve.yaml`` here.
    gpu: a GPU's name (``"4090"``) or GiB (``"24"``), for the largest micro-batch; by default that of this machine.
    gpus: how many such GPUs train it together; the plan is of each. A base that one does not hold is cut into parts.
    methods: of ``full``, ``lora`` and ``qlora``; by default what the recipe trains, or all three of a model.
    ranks, targets: one plan for each; a target is a preset, or names of modules with ``+`` between.
    batch, length: rows that go through the model at once, and tokens of each; by default the recipe's, and of its rows
        as many as ``train`` would take at once on that GPU.
    exact: run the model's own code on fake tensors, which takes a minute, instead of the closed form.
    overrides: fields of the recipe, as for ``train``.
    Raises UsageError, CheckpointError for a model that no plan can be made of, HubError, and EngineError where
    ``exact`` does not run.
    """
    progress = progress or default_progress()
    chosen = find_gpu(gpu) if gpu else _gpu_here()
    subject = _subject(model, overrides, progress)
    path = fetch_base(subject.model, progress, weights=False)
    shape = _known_shape(path, exact, progress)
    ways = list(_ways(subject, path, chosen, methods, ranks, targets, batch, length))
    ratio, runs = measured_ratio(chosen.name) if chosen else (1.0, 0)
    if chosen and shape and subject.is_recipe and batch is None and not (exact and gpus > 1):
        ways = _as_trained(ways, shape, subject, chosen, gpus, ratio)
    elif gpus > 1:
        raise UsageError(f"--gpus {gpus}: of a recipe on a known GPU, without --batch and --exact", "--gpu names one")
    trainings, size = _trainings(path, ways, shape, chosen, ratio, exact=exact)
    return TrainingPlan(
        model=subject.model.path,
        parameters=size.parameters,
        layers=size.layers,
        gpu=chosen.name if chosen else None,
        trainings=trainings,
        shares=dict(_shares(shape, ways[0])) if shape and ways[0].kind == LORA else {},
        host_memory=max(host_bytes(training, ways[0].on_cpu, ways[0].shards) for training in trainings),
        disk=disk_bytes(size.parameters, shape.stored_bytes if shape else None, trainings[0]),
        time="not measured",
        notes=tuple(_notes(ways, exact, ratio, runs)),
    )


def _as_trained(
    ways: Sequence[PlanSettings], shape: ModelShape, subject: _Subject, gpu: GpuModel, gpus: int, ratio: float
) -> list[PlanSettings]:
    """As training by so many GPUs would choose the steps of each."""
    train = share_of(subject.train, gpus)
    return [choose_parallel(shape, way, train, gpu, gpus, ratio).settings for way in ways]


def _trainings(
    path: Path, ways: Sequence[PlanSettings], shape: ModelShape | None, gpu: GpuModel | None, ratio: float, *,
    exact: bool,
) -> tuple[tuple[PlannedTraining, ...], ModelShape | ExactMemory]:  # fmt: skip
    """In each of the ways, and what is known of the model's size."""
    if exact:
        return _exact_trainings(path, ways, shape, gpu, ratio)
    assert shape is not None
    return tuple(planned(shape, way, gpu, ratio) for way in ways), shape


def _known_shape(path: Path, exact: bool, progress: Progress) -> ModelShape | None:
    """The shape of a model; None where it is not known and need not be."""
    try:
        return shape_at(path, progress)
    except CheckpointError:
        if not exact:
            raise
        return None


def _exact_trainings(
    path: Path, ways: Sequence[PlanSettings], shape: ModelShape | None, gpu: GpuModel | None, ratio: float
) -> tuple[tuple[PlannedTraining, ...], ExactMemory]:
    """By the real code, and what it knows of the model; levers and the largest batch are of the closed form."""
    with exact_planner() as planner:
        measured = [planner.measure(path, way, ratio) for way in ways]
    parts = [_Parts(memory.bytes, memory.trainable, memory.parameters, exact=True) for memory in measured]
    trainings = tuple(_planned(part, way, shape, gpu, ratio) for part, way in zip(parts, ways, strict=True))
    return trainings, measured[0]


def planned(shape: ModelShape, way: PlanSettings, gpu: GpuModel | None, ratio: float = 1.0) -> PlannedTraining:
    """One way to train a model of that shape, by the closed form."""
    count = shape.parameters if way.method == "full" else trainable(shape, way)
    return _planned(_Parts(planned_bytes(shape, way, ratio), count, shape.parameters), way, shape, gpu, ratio)


@dataclass(frozen=True)
class _Parts:
    """What either way finds."""

    bytes: PlannedBytes
    trainable: int
    parameters: int
    exact: bool = False


def _planned(
    parts: _Parts, way: PlanSettings, shape: ModelShape | None, gpu: GpuModel | None, ratio: float
) -> PlannedTraining:
    is_lora = way.method != "full" and way.kind == LORA
    return PlannedTraining(
        method=way.method,
        kind=way.kind,
        answers=way.answers,
        rank=way.rank if is_lora else None,
        targets=way.targets if is_lora else None,
        batch=way.batch,
        length=way.length,
        checkpointing=way.checkpointing,
        bytes=parts.bytes,
        trainable=parts.trainable,
        share=parts.trainable / parts.parameters,
        exact=parts.exact,
        fits=() if way.on_cpu else fitting_gpus(parts.bytes.total),
        largest_batch=largest_batch(shape, way, gpu, ratio) if gpu and shape else None,
        levers=levers(shape, way, ratio) if shape else (),
    )


def shape_at(path: Path, progress: Progress) -> ModelShape:
    """The shape of the model there, by its small files and headers, here or on the Hub."""
    return model_shape(read_config(path), stored_specs(path, progress))


def _gpu_here() -> GpuModel | None:
    """The first NVIDIA GPU of this machine."""
    return next((gpu_of_driver(gpu.name, gpu.memory) for gpu in nvidia_gpus()), None)


def _notes(ways: Sequence[PlanSettings], exact: bool, ratio: float, runs: int) -> Iterator[str]:
    if runs:
        yield f"counted {ratio - 1:.1%} more: of the last {runs} runs on this GPU one took that much beyond its plan"
    if not exact and any(way.kind != LORA for way in ways):
        yield f"activations are counted as those of a LoRA: only --exact knows what {ways[0].kind} keeps"
    if any(way.objective == "dpo" for way in ways):
        yield (
            "two answers to each prompt go through at once, and then once more with the adapter off, as the reference: "
            "a forward more in each step, which keeps nothing for a gradient"
        )
    if any(way.objective == "kto" for way in ways):
        yield (
            "each prompt is also asked for its neighbor's answer, and both again with the adapter off, as the "
            "reference: three forwards more in each step, which keep nothing for a gradient"
        )
    if not exact and any(way.dora for way in ways):
        yield "DoRA keeps more than a LoRA: only --exact knows how much"


def stored_specs(path: Path, progress: Progress) -> Sequence[TensorSpec] | None:
    """The tensors of a model by their headers, here or on the Hub; None where there is config.json alone."""
    if not any(path.glob("*.safetensors*")) and hub_snapshot(path) is None:
        return None
    try:
        return Checkpoint(path).specs()
    except CheckpointError:
        snapshot = hub_snapshot(path)
        if snapshot is None:
            raise
    from lora2serve.hub.remote_headers import remote_specs

    return remote_specs(snapshot.id, snapshot.commit, path, progress)


@dataclass(frozen=True)
class _Subject:
    """What is planned for: the model, and how a recipe trains it, or the defaults do."""

    model: ModelRecipe
    train: TrainRecipe
    data: DataRecipe
    methods: tuple[Method, ...]
    is_recipe: bool = False


def _subject(
    model: str | Path | None, overrides: Mapping[str, object] | Sequence[str], progress: Progress
) -> _Subject:  # fmt: skip
    """The recipe that ``model`` names, or the model itself with the defaults of a recipe."""
    name = None if model is None else str(model)
    path = Path(name or recipes.FILE).expanduser()
    if name is None or path.is_file() or (not path.exists() and name in recipes.built_in()):
        file, changes = recipes.find(name), settings(overrides)
        recipe = with_adapter(recipes.load(file, changes, progress), recipes.named_keys(file, changes), progress)
        return _Subject(recipe.model, recipe.train, recipe.data, (method_of(recipe.train),), is_recipe=True)
    if overrides:
        raise UsageError("--set changes a recipe, and a model was named", "use --rank, --targets, --batch and --length")
    repo, _, revision = name.partition("@")
    known = ModelRecipe(name) if path.exists() else ModelRecipe(repo, revision or None)
    return _Subject(known, TrainRecipe(), DataRecipe(train=""), METHODS)


def _ways(
    subject: _Subject, path: Path, gpu: GpuModel | None, methods: Sequence[str], ranks: Sequence[int],
    targets: Sequence[str], batch: int | None, length: int | None,
) -> Iterator[PlanSettings]:  # fmt: skip
    """One for each combination."""
    if subject.train.method != LORA:
        of_lora = {"method": methods, "rank": ranks, "targets": targets}
        yield _other_way(subject, path, gpu, of_lora, batch, length)
        return
    data, dtype = subject.data, gpu.dtype if gpu else "bfloat16"
    base = settings_of(subject.train, length or data.max_length, dtype, len(data.new_tokens))
    base = replace(base, batch=batch or base.batch, rank=ranks[0] if ranks else base.rank)
    for method in dict.fromkeys([_method(name) for name in methods] or subject.methods):
        way = replace(base, method=method, checkpointing=checkpoints(subject.train, method))
        if method == "full":
            yield way
            continue
        wanted = [_targets(text) for text in targets] or [base.targets]
        for rank, target in product(dict.fromkeys(ranks or [base.rank]), dict.fromkeys(wanted)):
            yield replace(way, rank=rank, targets=target)


def _other_way(
    subject: _Subject, path: Path, gpu: GpuModel | None, of_lora: Mapping[str, Sequence[object]], batch: int | None,
    length: int | None,
) -> PlanSettings:  # fmt: skip
    """Of another adapter than a LoRA, whose own code says how much it learns."""
    from lora2serve.training.method_outlook import plan_settings

    train = subject.train
    if named := [f"--{name}" for name, values in of_lora.items() if values]:
        raise UsageError(f"{', '.join(named)}: of a LoRA, and train.method is {train.method}", "--set train.options...")
    data = replace(subject.data, max_length=length or subject.data.max_length)
    settings = plan_settings(train, data, path, gpu.dtype if gpu else "bfloat16")
    return replace(settings, batch=batch or settings.batch)


def _method(name: str) -> Method:
    for method in METHODS:
        if method == name:
            return method
    raise UsageError(f"--method {name}: unknown{did_you_mean(name, METHODS)}", f"known: {', '.join(METHODS)}")


def _targets(text: str) -> str | tuple[str, ...]:
    """A preset or one module, or several modules with ``+`` between."""
    names = tuple(name.strip() for name in text.split("+") if name.strip())
    return names if len(names) > 1 else text


def _shares(shape: ModelShape, way: PlanSettings) -> Iterator[tuple[str, float]]:
    """Of each preset that finds a layer."""
    for preset in PRESETS:
        try:
            target_layers(shape, preset)
        except UsageError:
            continue
        changed = replace(way, method="qlora", targets=preset, modules_to_save=())
        yield preset, trainable(shape, changed) / shape.parameters
