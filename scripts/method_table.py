"""Write the tables of docs/methods.md: which kinds of adapter train, and which target holds each (`make docs`).

Read from the tables that `train` and `export` go by.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- written by scripts/method_table.py -->\n", "<!-- end -->\n"
CELLS = {"merged": "merged", "adapter": "as it is", "lora": "nearest LoRA", "prompt": "as tokens", "no": ""}


def rows() -> list[str]:
    """A row for each kind that trains: how it trains, how each target holds it, and why some do not."""
    from lora2serve.adapters.kind_targets import TARGETS, as_named, serving_targets, way, why_not
    from lora2serve.adapters.peft_methods import BIAS_ALONE
    from lora2serve.config.train_methods import ON_FOUR_BITS, TRAINABLE

    lines = [
        "| `train.method` | on 4 bits | " + " | ".join(f"`{as_named(target)}`" for target in TARGETS) + " | otherwise |"
    ]
    lines.append("|---" * (len(TARGETS) + 3) + "|")
    for method in TRAINABLE:
        kind = method.upper()
        where = " where there is a bias" if kind in BIAS_ALONE else ""
        cells = [cell and f"{cell}{where}" for cell in (CELLS[way(kind, target)] for target in TARGETS)]
        refused = serving_targets(kind).get("no", [])
        reason = why_not(kind, refused[0]) if refused else ""
        lines.append(f"| `{method}` | {'yes' if method in ON_FOUR_BITS else ''} | {' | '.join(cells)} | {reason} |")
    return lines


def untrained() -> list[str]:
    """What does not train, and why."""
    from lora2serve.config.train_methods import UNTRAINABLE

    return ["", "Not trained:", "", *(f"- `{method}`: {why}." for method, why in UNTRAINABLE.items())]


def written() -> str:
    """The page as it must be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    lines = "".join(f"{line}\n" for line in [*rows(), *untrained()])
    return before + BEGIN + lines + END + rest.partition(END)[2]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(written(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
