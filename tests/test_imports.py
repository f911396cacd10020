"""Who may import whom: the table of the design, held against the imports in the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "vllm",
    "llama_cpp",
    "gguf",
    "numpy",
    "huggingface_hub",
    "yaml",
}
# Modules that stay light at the top, whatever is used inside their functions.
LIGHT = (
    "cli",
    "recipe",
    "errors",
    "run",
    "tensors",
    "exporter",
    "manifest",
    "output",
    "progress",
    "checkpoint",
    "adapter",
    "console",
)
# What a part of the toolchain must not import, at the top or inside a function.
APART = {part: {"train", "stream", "parity", "hub"} - {part} for part in ("train", "stream", "parity", "hub")}
CONVERTERS_MAY = {
    "tensors",
    "errors",
    "checkpoint",
    "adapter",
    "manifest",
    "exporter",
    "output",
    "progress",
    "lint",
    "child",
    "environment",
    "doctor",
}
CONVERTER_PAIRS = {
    "vllm": {"safetensors", "compressed", "calibrated", "serving"},
    "calibrated": {"safetensors", "compressed"},
    "adapter": {"safetensors"},
    "ollama": {"gguf"},
    "lmstudio": {"gguf", "ollama"},
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path, *, top: bool = False) -> set[str]:
    """Dotted names imported by a file; ``top``: only those that run on import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(path: Path) -> str:
    """``hub`` for lora2serve/hub.py and for anything below lora2serve/hub/."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", modules("lora2serve"), ids=lambda p: str(p.relative_to(ROOT)))
def test_toolchain(path: Path) -> None:
    names = imports(path)
    assert not {n for n in names if n.split(".")[0] == "converters"}, "formats are found by name, never imported"
    if part_of(path) in LIGHT:
        heavy = {n for n in imports(path, top=True) if n.split(".")[0] in HEAVY}
        assert not heavy, f"imported at the top: {heavy}"
    forbidden = APART.get(part_of(path), set())
    assert not {n for n in names if n.startswith("lora2serve.") and n.split(".")[1] in forbidden}


@pytest.mark.parametrize("path", modules("converters"), ids=lambda p: str(p.relative_to(ROOT)))
def test_converters(path: Path) -> None:
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lora2serve":
            assert parts[1] in CONVERTERS_MAY or parts[1] == "__version__", name
        if parts[0] == "converters" and len(parts) > 1:
            own = part_of(path)
            assert parts[1] == own or parts[1] in CONVERTER_PAIRS.get(own, set()), name


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from lora2serve.cli import run; code = run(['--help']);"
        f"print(code, sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "0 []"


def test_the_control() -> None:
    """The checks above do see an import."""
    assert "lora2serve.tensors.Source" in imports(ROOT / "lora2serve" / "exporter.py", top=True)
    assert any(name.split(".")[0] == "torch" for name in imports(ROOT / "lora2serve" / "merge.py"))
