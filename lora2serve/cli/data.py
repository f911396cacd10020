"""``lora2serve data``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora2serve.cli.options import Command, complete_runs, progress
from lora2serve.errors import UsageError

if TYPE_CHECKING:
    from lora2serve.data.preview import DataPreview, TrainedSample

SHOWN_ROWS = 3  # where none is named
BAR = 40  # characters of the longest


@click.command(
    cls=Command,
    short_help="Show what training would be given: each sample, and which tokens are learned.",
    examples=[
        ("lora2serve data", "of lora2serve.yaml here: the first rows, lengths, what is cut or dropped"),
        ("lora2serve data --row 17", "every sample of that row"),
        ("lora2serve data --report data.html", "a page to look through"),
        ("lora2serve data --json", "one object a sample: row, source, ids, labels, text, learned, side"),
    ],
)
@click.argument("recipe", required=False, shell_complete=complete_runs)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one field, as for `train`.")
@click.option("--row", type=int, help="Only this row: its line, or its number in an array or a table.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write an HTML page to this file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a sample, one a line.")
@click.pass_context
def data(
    ctx: click.Context, recipe: str | None, overrides: tuple[str, ...], row: int | None, report: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Show what `lora2serve train RECIPE` would be given, without training.

    What a loss is taken on is colored in a terminal, and stands between marks elsewhere. It is exactly what the trainer
    gets: the same ids, the same labels.
    """
    from lora2serve import console
    from lora2serve.api.data_preview import preview_data
    from lora2serve.data.preview import once

    found = preview_data(recipe, overrides=overrides, report=report, progress=progress(ctx))
    samples = found.samples if row is None else _of_row(found, row)
    if as_json:
        for sample in samples:
            console.result_line(sample.json())
        return
    for sample in found.pick(SHOWN_ROWS) if row is None else once(samples):
        _show(sample)
    if row is None:
        for line in [*found.summary(), "", *_histogram(found)]:
            console.result(line)
    if report:
        console.result(str(report))


def _of_row(found: DataPreview, row: int) -> Sequence[TrainedSample]:
    """Its samples; UsageError says why there are none."""
    samples = [sample for sample in found.samples if sample.row == row]
    if samples:
        return samples
    trained = [sample.row for sample in found.samples]
    rows = f"rows that are trained: {min(trained)} to {max(trained)}" if trained else "no row is trained"
    if row in found.numbers:
        reason = "nothing of this row is trained: it has no token to learn from, once cut"
    elif row in found.held_out:
        reason = "this row is held out, and not trained"
    else:
        reason = "there is no such row"
    raise UsageError(f"--row {row}: {reason}", rows)


def _show(sample: TrainedSample) -> None:
    from lora2serve import console

    cut, side = ", cut" if sample.cut else "", f" {sample.side}" if sample.side else ""
    counts = f"{len(sample.ids)} tokens, {sample.learned_tokens} learned{cut}"
    console.heading(f"{sample.source}:{sample.row}{side}: {counts}")
    console.marked([(part.text, part.learned) for part in sample.parts])


def _histogram(found: DataPreview) -> list[str]:
    bins = found.lengths()
    most = max(item.count for item in bins) or 1
    width = len(str(bins[-1].last))
    return [
        f"{item.first:>{width}}-{item.last:<{width}} {'#' * -(-BAR * item.count // most)} {item.count}" for item in bins
    ]
