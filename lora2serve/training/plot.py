"""loss.png: what a fine-tune learned, at a glance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from lora2serve.artifacts.run import Run

MARGIN, ACCURACY = "rewards/margins", "rewards/accuracies"
REWARDS = ("rewards/", "eval_rewards/")  # of preferences; a batch of answers of one label has no margin
WINDOW = 0.04  # of all logged steps, that the smoothed curve looks back on


def plot(run: Run) -> None:
    """Training loss by step, as logged and smoothed, and the eval loss from the base (step 0) to the tuned model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if any(key.startswith(REWARDS) for line in lines for key in line):
        _plot_preferences(run, lines)
        return
    steps, losses = _series(lines, "loss")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    axes.plot(steps, smooth(losses), color="tab:blue", linewidth=2, label="training loss (smoothed)")
    evaluated = _evaluated(run, lines)
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", color="tab:orange", markersize=5, label="eval loss")
        for (step, loss), side in ((evaluated[0], "left"), (evaluated[-1], "right")):
            axes.annotate(f"{loss:.3g}", (step, loss), xytext=(0, 7), textcoords="offset points", ha=side)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=run.name)
    axes.set_ylim(bottom=0, top=1.08 * max([*losses, *(loss for _, loss in evaluated)], default=1) or 1)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(run.path / "loss.png", dpi=130)


def _plot_preferences(run: Run, lines: Sequence[Mapping[str, float]]) -> None:
    """Loss, margin and the share of pairs with the chosen answer in front: of training steps, and held-out pairs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {"loss": "loss", MARGIN: "margin of rewards (nats times beta)", ACCURACY: "chosen answer in front"}
    logged = {key.removeprefix("eval_") for line in lines for key in line}
    panels = {key: label for key, label in panels.items() if key in logged}
    for axes, (key, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        steps, values = _series(lines, key)
        if steps:
            axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
            axes.plot(steps, smooth(values), color="tab:blue", linewidth=2, label="training (smoothed)")
        steps, values = _series(lines, f"eval_{key}")
        if steps:
            axes.plot(steps, values, "o-", color="tab:orange", markersize=5, label="held out")
        axes.set(xlabel="step", title=label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(run.name)
    figure.savefig(run.path / "loss.png", dpi=130)


def smooth(values: Sequence[float]) -> list[float]:
    """An exponential moving average without the pull toward its start (Adam's bias correction)."""
    keep = 1 - 1 / max(1.0, WINDOW * len(values))
    total, weight, smoothed = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed


def _series(lines: Sequence[Mapping[str, float]], key: str) -> tuple[list[int], list[float]]:
    points = [(int(line["step"]), line[key]) for line in lines if key in line]
    return [step for step, _ in points], [value for _, value in points]


def _evaluated(run: Run, lines: Sequence[Mapping[str, float]]) -> list[tuple[int, float]]:
    """(step, eval loss): the base at step 0, then as logged."""
    base = run.record.metrics.base
    steps, losses = _series(lines, "eval_loss")
    return [*([(0, base.eval_loss)] if base else []), *zip(steps, losses, strict=True)]
