"""The preview of a data set as one HTML file that needs nothing else."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from lora2serve.data.preview import DataPreview

if TYPE_CHECKING:
    from jinja2 import Template

MOST_ROWS = 200  # shown


def render_preview(preview: DataPreview) -> str:
    """The page; ``templates/preview.html.j2`` is its form."""
    most = max(item.count for item in preview.lengths()) or 1
    return _page().render(preview=preview, shown=preview.pick(MOST_ROWS), most=most)


@cache  # compiled once
def _page() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lora2serve.data"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("preview.html.j2")
