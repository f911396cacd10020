"""Who may import whom: one number a folder, held against every import in the code."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.outlines import MODULES, ROOT, Outline, outline, outlines

# A module imports lower numbers or its own folder; siblings of one number never import each other.
# Parity stands above serving, whose engines it starts; evaluation above parity, whose engines it asks; the public API
# above all of them, since one command joins several.
LEVELS = (
    ("errors", "progress", "console", "bottleneck"),
    ("system", "config"),
    ("artifacts", "data", "weights"),
    ("adapters",),
    ("merge", "planning"),
    ("exporting",),
    ("training", "serving", "hub", "registry"),
    ("parity_check",),
    ("evaluation",),
    ("api",),
    ("sweeping", "gateway"),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}
CONVERTERS = LEVEL["exporting"]  # may import what export may, and export itself; found by string only
HEAVY = {
    "torch", "transformers", "peft", "trl", "bitsandbytes", "vllm", "llama_cpp", "gguf", "numpy", "huggingface_hub",
    "datasets", "accelerate", "safetensors", "matplotlib", "httpx", "httpx2", "jinja2", "yaml", "sqlalchemy",
    "fsspec", "optuna", "lm_eval", "scipy", "ray", "starlette", "uvicorn", "aiohttp", "prometheus_client",
}  # fmt: skip
# Folders whose modules import heavy libraries inside functions only; yaml is light enough for recipes.
LIGHT = set(LEVEL) - {"bottleneck", "training", "parity_check", "evaluation", "registry"}
# Neither these nor what they import import a library of training.
QUICK = LIGHT | {"evaluation", "registry"}
TRAINING_LIBRARIES = {"torch", "transformers", "peft", "trl", "bitsandbytes", "vllm", "datasets", "accelerate"}


# What `from lora2serve import NAME` may take beside folders; its functions are for users, and stand above all.
PUBLIC = {"__version__"}
# A format may use another one that it contains.
FORMATS = {
    "vllm": {"safetensors"},
    "adapter": {"safetensors"},
    "ollama": {"gguf"},
    "lmstudio": {"gguf", "ollama"},
}


@pytest.fixture
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Outline]:
    """What stands in each module."""
    return outlines(tmp_path_factory)


def imports(source: str, *, top: bool = False) -> set[str]:
    """Dotted names imported by a file; ``top``: only those that run when it is imported."""
    found = outline(source)
    return set(found.top if top else found.imports)


def violations(path: Path, names: set[str]) -> list[str]:
    """The imports that the numbers forbid."""
    package, part = path.relative_to(ROOT).parts[0], path.relative_to(ROOT).parts[1].removesuffix(".py")
    forbidden = []
    for name in names:
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        outside = name.startswith(".") or top in ("tests", "scripts", "benchmarks")
        public = top == "lora2serve" and rest and other not in LEVEL and other not in PUBLIC
        if outside or public or (top == "converters" and package == "lora2serve"):
            forbidden.append(name)
        elif top == "converters" and other:
            forbidden += [name] if other != part and other not in FORMATS.get(part, set()) else []
        elif top == "lora2serve" and other in LEVEL and package == "converters":
            forbidden += [name] if LEVEL[other] > CONVERTERS else []
        elif top == "lora2serve" and other in LEVEL and part != other:
            apart = LEVEL[other] > 0 or LEVEL.get(part) != 0  # those at the bottom are one folder
            forbidden += [name] if apart and LEVEL[other] >= LEVEL.get(part, len(LEVELS)) else []
    return forbidden


def test_numbers(code: dict[Path, Outline]) -> None:
    found = {}
    for path, content in code.items():
        names, own = set(content.imports), path.relative_to(ROOT)
        wrong = violations(path, names)
        if own.parts[1].removesuffix(".py") in LIGHT and any(name.split(".")[0] in HEAVY for name in names):
            wrong += [name for name in content.top if name.split(".")[0] in HEAVY]
        if wrong:
            found[str(own)] = wrong
    assert found == {}


def test_every_folder_has_a_number() -> None:
    own = [path.relative_to(ROOT / "lora2serve") for path in MODULES if path.is_relative_to(ROOT / "lora2serve")]
    parts = {path.parts[0].removesuffix(".py") for path in own}
    assert parts - LEVEL.keys() == {"__init__"}


def test_relative_and_public_imports_are_seen() -> None:
    inside = ROOT / "lora2serve" / "training" / "x.py"
    for line in (
        "from ..hub import push", "from .. import hub", "from lora2serve import export", "from lora2serve import *",
        "def f():\n    from lora2serve.hub import push",
    ):  # fmt: skip
        assert violations(inside, imports(line)), line
    assert violations(ROOT / "converters" / "ollama" / "x.py", imports("from converters.vllm import vllm_sink"))
    assert "torch" in {name.split(".")[0] for name in imports("import torch", top=True)}
    assert not imports("def f():\n    import torch", top=True)


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


def modules_of(names: set[str]) -> set[Path]:
    """Our own among imported names, which are of modules or of what stands in them."""
    paths = (Path(ROOT, *name.split(".")[:end]) for name in names for end in (name.count(".") + 1, name.count(".")))
    return {path.with_suffix(".py") for path in paths if path.with_suffix(".py").is_file()}


def reached(path: Path, code: dict[Path, Outline], seen: dict[Path, set[str]]) -> set[str]:
    """The libraries that importing a module imports, by whatever way."""
    if path not in seen:
        names = set(code[path].top)
        seen[path] = {name.split(".")[0] for name in names} & TRAINING_LIBRARIES
        seen[path] |= {library for other in modules_of(names) for library in reached(other, code, seen)}
    return seen[path]


def test_no_way_from_a_light_module_to_a_library_of_training(code: dict[Path, Outline]) -> None:
    """Statistics of a gateway do not wait ten seconds for torch, because a function of theirs stands beside a training."""
    seen: dict[Path, set[str]] = {}
    light = [path for path in MODULES if path.relative_to(ROOT).parts[1].removesuffix(".py") in QUICK]
    assert len(light) > 300
    assert {path.stem: reached(path, code, seen) for path in light if reached(path, code, seen)} == {}
    assert "torch" in reached(ROOT / "lora2serve" / "parity_check" / "engines" / "served_peft.py", code, seen)


def test_module_names_are_unique() -> None:
    """Apart from the commands, each of which is called after what it does."""
    names = [path.stem for path in MODULES if path.stem not in ("__init__", "__main__") and path.parent.name != "cli"]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_class_names_are_unique(code: dict[Path, Outline]) -> None:
    names = [name for content in code.values() for name in content.classes]
    assert len(names) > 500
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_what_stands_deep_inside_is_seen() -> None:
    """In whatever statement it stands."""
    deep = (
        "def f():\n    for i in x:\n        pass\n    else:\n        with a:\n            import torch\n",
        "try:\n    pass\nexcept E:\n    import torch\n", "try:\n    pass\nfinally:\n    import torch\n",
        "match x:\n    case 1:\n        import torch\n", "if x:\n    pass\nelif y:\n    import torch\n",
        "class A:\n    async def f(self):\n        while x:\n            import torch\n",
    )  # fmt: skip
    assert [imports(text) for text in deep] == [{"torch"}] * len(deep)
