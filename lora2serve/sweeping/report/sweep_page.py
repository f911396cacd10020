"""report.html of a sweep: one file that needs nothing else, light and dark."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from lora2serve.console import size, upper_first
from lora2serve.sweeping.report.sweep_charts import curve_chart, front_charts
from lora2serve.sweeping.search_plan import KEPT_GAIN
from lora2serve.sweeping.sweep_report import SweepReport

if TYPE_CHECKING:
    from jinja2 import Environment

TITLES = {"quality": "Where quality counts", "memory": "Where memory is scarce", "time": "Where time is scarce"}
NAMES = {"train.learning_rate": "learning rate", "train.lora.targets": "layers", "train.lora.rank": "rank"}


def render(report: SweepReport) -> str:
    """The page."""
    return (
        _environment()
        .get_template("sweep.html.j2")
        .render(
            report=report,
            choices=sorted(report.choices, key=lambda choice: choice.constraint != report.constraint),
            charts=front_charts(report),
            curves=curve_chart(report),
            shown=report.quality.shown,
            unit=" points" if report.quality.of_suite else " %",
            importance={NAMES.get(key, key): share for key, share in report.importance.items()},
        )
    )


@cache  # its templates are compiled once
def _environment() -> Environment:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    own, style = PackageLoader("lora2serve.sweeping.report"), PackageLoader("lora2serve.parity_check.report")
    environment = Environment(
        loader=ChoiceLoader([own, style]), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["upper_first"] = upper_first
    environment.globals |= {"size": size, "titles": TITLES, "kept_gain": KEPT_GAIN}
    return environment
