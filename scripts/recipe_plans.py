"""Write the plan of each built-in recipe into its first lines (`make docs`).

The shapes of the models stand in tests/support/published_shapes.py; nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
COMMAND = re.compile(
    r"# lora2serve plan (?P<name>\S+) --gpu (?P<gpu>\S+)(?: --gpus (?P<gpus>\d+))?\n"
)  # what the lines behind it came from
END = "#\n"


def planned() -> list[Path]:
    """The recipes that have a plan in their first lines."""
    return [path for path in sorted(RECIPES.glob("*.yaml")) if COMMAND.search(path.read_text(encoding="utf-8"))]


def written(path: Path) -> str:
    """The recipe as it must be."""
    from lora2serve.api.plan_training import plan
    from lora2serve.cli.plan import plan_lines
    from lora2serve.config.recipe import load
    from tests.support.published_shapes import write_shape

    text = path.read_text(encoding="utf-8")
    command = COMMAND.search(text)
    assert command is not None
    model = load(path).model.path
    with TemporaryDirectory() as folder:
        shape = write_shape(Path(folder) / "model", model)
        result = plan(path, gpu=command["gpu"], gpus=int(command["gpus"] or 1), overrides={"model.path": str(shape)})
        lines = [line.replace(str(shape), model) for line in plan_lines(result)]
    begin, rest = text[: command.end()], text[command.end() :]
    old = re.match(r"(?:#   .*\n|#\n(?=#   ))*", rest)
    assert old is not None
    shown = "".join(f"#   {line}".rstrip() + "\n" if line else END for line in lines)
    return begin + shown + rest[old.end() :]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    with TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # no measurements of this machine
        for recipe in planned():
            recipe.write_text(written(recipe), encoding="utf-8")
            print(recipe.relative_to(ROOT))
