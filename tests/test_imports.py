"""Who may import whom: one number a folder, held against every import in the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module imports lower numbers or its own folder; siblings of one number never import each other.
# Parity stands above serving, whose engines it starts; the public API above both, since one command joins several.
LEVELS = (
    ("errors", "progress", "console"),
    ("system", "config"),
    ("artifacts", "data", "weights"),
    ("adapters",),
    ("merge",),
    ("exporting",),
    ("training", "serving", "hub", "registry"),
    ("parity_check", "evaluation"),
    ("api",),
    ("sweep", "gateway"),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}
CONVERTERS = LEVEL["exporting"]  # may import what export may, and export itself; found by string only
HEAVY = {
    "torch", "transformers", "peft", "trl", "bitsandbytes", "vllm", "llama_cpp", "gguf", "numpy", "huggingface_hub",
    "datasets", "accelerate", "safetensors", "matplotlib", "httpx", "httpx2", "jinja2", "yaml",
}  # fmt: skip
PACKAGES = ("lora2serve", "converters")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names imported by a file, at the top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def violations(path: Path, names: set[str]) -> list[str]:
    """The imports that the numbers forbid."""
    package, part = path.relative_to(ROOT).parts[0], path.relative_to(ROOT).parts[1].removesuffix(".py")
    forbidden = []
    for name in names:
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if top == "converters" and package == "lora2serve":
            forbidden.append(name)
        elif top == "lora2serve" and other in LEVEL and package == "converters":
            forbidden += [name] if LEVEL[other] > CONVERTERS else []
        elif top == "lora2serve" and other in LEVEL and part != other:
            apart = LEVEL[other] > 0 or LEVEL.get(part) != 0  # the three at the bottom are one folder
            forbidden += [name] if apart and LEVEL[other] >= LEVEL.get(part, len(LEVELS)) else []
    return forbidden


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_numbers(path: Path) -> None:
    assert violations(path, imports(path)) == []


def test_every_folder_has_a_number() -> None:
    own = [path.relative_to(ROOT / "lora2serve") for path in MODULES if path.is_relative_to(ROOT / "lora2serve")]
    parts = {path.parts[0].removesuffix(".py") for path in own}
    assert parts - LEVEL.keys() == {"__init__"}


def test_the_control() -> None:
    """The checks above do see an import that is forbidden, and one that is not."""
    assert violations(ROOT / "lora2serve" / "training" / "x.py", {"lora2serve.parity_check.gates"})
    assert violations(ROOT / "lora2serve" / "training" / "x.py", {"lora2serve.hub.push"})
    assert violations(ROOT / "converters" / "x.py", {"lora2serve.training.model"})
    assert violations(ROOT / "lora2serve" / "exporting" / "x.py", {"converters.gguf.presets"})
    assert not violations(
        ROOT / "lora2serve" / "training" / "x.py", {"lora2serve.data.rows", "lora2serve.training.model"}
    )


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from lora2serve.cli import run; code = run(['--help']);"
        f"print(code, sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "0 []"


def test_the_package_imports_nothing_heavy() -> None:
    script = f"import sys, lora2serve; print(sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_module_names_are_unique() -> None:
    """Apart from the commands, each of which is called after what it does."""
    names = [path.stem for path in MODULES if path.stem not in ("__init__", "__main__") and path.parent.name != "cli"]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_class_names_are_unique() -> None:
    names = [
        node.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []
