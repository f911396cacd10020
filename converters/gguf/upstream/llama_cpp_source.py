"""llama.cpp's own source tree on this machine: where it is, and which architectures its converter knows."""

from __future__ import annotations

import ast
import re
from difflib import SequenceMatcher
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from lora2serve.errors import ExportError
from lora2serve.system.doctor import source_package

FETCH_COMMAND = "lora2serve doctor --fix"


def converter() -> Path | None:
    """The tree that holds ``conversion/``: ``LLAMA_CPP_DIR``, or what ``doctor --fix`` unpacked; None without."""
    tree = source_package()
    return tree if (tree / "conversion" / "__init__.py").is_file() else None


@lru_cache(maxsize=8)
def known(tree: Path, projector: bool = False) -> frozenset[str]:
    """The architectures of upstream's tables, text or multimodal projector; read, not imported."""
    wanted = "MMPROJ_MODEL_MAP" if projector else "TEXT_MODEL_MAP"
    source = ast.parse((tree / "conversion" / "__init__.py").read_text(encoding="utf-8"))
    for node in source.body:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == wanted and isinstance(node, ast.AnnAssign) and node.value:
            return frozenset(ast.literal_eval(node.value))
    raise ExportError(f"{tree}: its converter has no {wanted}", "LLAMA_CPP_DIR names another version of llama.cpp")


def pre_tokenizer_by_hash(path: Path) -> str | None:
    """Upstream's name for the pre-tokenizer of a tokenizer.json: a hash of the ids of one text tells real ones."""
    tree = converter()
    if tree is None:
        return None
    from tokenizers import Tokenizer

    source = (tree / "conversion" / "base.py").read_text(encoding="utf-8")
    text = re.search(r"^ +chktxt = ('.*')$", source, re.MULTILINE)
    table = dict(re.findall(r'if chkhsh == "([0-9a-f]{64})":\n(?: *#.*\n)* *res = "([^"]+)"', source))
    if text is None:
        return None
    ids = Tokenizer.from_file(str(path)).encode(ast.literal_eval(text[1])).ids
    return table.get(sha256(str(ids).encode()).hexdigest())


def refuse(name: str, native: list[str], tree: Path | None) -> ExportError:
    """What to say of an architecture that nobody knows: all that are known, the nearest first."""
    names = sorted({*native, *(known(tree) if tree else ())}, key=lambda other: (-_alike(name, other), other))
    near = f" (did you mean {names[0]!r}?)" if _alike(name, names[0]) > 0.8 else ""
    if tree is None:
        return ExportError(
            f"architecture {name}: no built-in GGUF conversion{near}",
            f"{FETCH_COMMAND} brings llama.cpp's converter, which knows many more; built in: {', '.join(names)}",
        )
    return ExportError(
        f"architecture {name}: unknown to lora2serve and to llama.cpp's converter{near}", f"known: {', '.join(names)}"
    )


def _alike(name: str, other: str) -> float:
    return SequenceMatcher(None, name.lower(), other.lower()).ratio()
