"""``lora2serve.preview_data``: what training would be given, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora2serve.api.train_run import fetch_base, settings
from lora2serve.config import recipe as recipes
from lora2serve.config.arguments import checked
from lora2serve.console import default_progress
from lora2serve.errors import UsageError
from lora2serve.progress import Progress

if TYPE_CHECKING:
    from lora2serve.data.preview import DataPreview


@checked
def preview_data(
    recipe: str | Path | None = None, *, overrides: Mapping[str, object] | Sequence[str] = (),
    report: str | Path | None = None, progress: Progress | None = None,
) -> DataPreview:  # fmt: skip
    """Every sample that ``train`` would be given, with the same ids and labels, and what the rows have that one should
    know: what is cut, dropped, repeated or held out, too.

    recipe, overrides: as for ``train``. Of a base on the Hub, all but its weights is fetched.
    report: an HTML file to write.
    progress: where messages and bars go. By default they are shown at a prompt or in a notebook only.

    Raises RecipeError, DataError, TrainError and HubError as ``train`` does.
    """
    from lora2serve.data import data_sets
    from lora2serve.data.base_template import base_template
    from lora2serve.data.preview import preview
    from lora2serve.data.preview_page import render_preview
    from lora2serve.hub import pin_data

    folder = Path(report or ".").parent
    if not folder.is_dir():
        raise UsageError(f"--report {report}: there is no folder {folder}", f"mkdir -p {folder}, or name another file")
    progress = progress or default_progress()
    chosen = recipes.load(recipes.find(str(recipe) if recipe else None), settings(overrides))
    sets = data_sets.load(chosen.data, pin_data, chosen.train.objective)
    base = fetch_base(chosen.model, progress, weights=False)
    template = base_template(base, chosen.data.chat_template, new_tokens=chosen.data.new_tokens)
    note = sets.train.note_of_form(chosen.data.form, template.tokenizer.chat_template)
    if note:
        progress.note(note)
    for text in template.new_tokens.notes():
        progress.note(text)
    found = preview(sets.in_form(chosen.data.form, template.tokenizer.chat_template), template, chosen.data, progress)
    if report is not None:
        Path(report).write_text(render_preview(found), encoding="utf-8")
    return found
