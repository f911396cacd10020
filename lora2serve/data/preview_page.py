"""The preview of a data set as one HTML file that needs nothing else."""

from __future__ import annotations

from lora2serve.data.preview import DataPreview

MOST_ROWS = 200  # shown


def render_preview(preview: DataPreview) -> str:
    """The page; ``templates/preview.html.j2`` is its form."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lora2serve.data"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    most = max(item.count for item in preview.lengths()) or 1
    page = environment.get_template("preview.html.j2")
    return page.render(preview=preview, shown=preview.pick(MOST_ROWS), most=most)
