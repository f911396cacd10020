"""compressed-tensors' own scale, quantise and pack functions, at a price that an export can pay.

``import compressed_tensors`` executes transformers' model classes, torch._dynamo and triton: 260 MB and several
seconds, for functions that need none of them. Here the library's modules are loaded from its files, but neither
transformers, of which they want two names for annotations, nor the
``__init__`` of the packages around them; they stay out of ``sys.modules``, where the whole library may be or come.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Lock
from types import ModuleType, SimpleNamespace
from typing import Any

from lora2serve.errors import ExportError

NAME = "compressed_tensors"
# Packages whose ``__init__`` is left out, and the modules of theirs that names are looked up in.
BARE: Mapping[str, tuple[str, ...]] = {
    "": (),
    "utils": ("type", "helpers", "module"),
    "quantization": ("quant_args", "quant_scheme", "quant_config", "quant_metadata"),
    "quantization.lifecycle": ("forward",),
    "compressors": ("base",),
}
_lock = Lock()
_loaded: list[Library] = []


@dataclass(frozen=True)
class Library:
    """What is used of it."""

    version: str
    preset: Any  # preset_name_to_scheme
    config: Any  # QuantizationConfig
    scheme: Any  # QuantizationScheme
    qparams: Any  # calculate_qparams
    global_scale: Any  # generate_gparam
    limits: Any  # calculate_range
    rounded: Any  # round_to_quantized_type_args
    pad: Any  # maybe_pad_tensor_for_block_quant
    compressors: Any  # BaseCompressor: the registry of formats


def refuse_missing() -> None:
    """ExportError where the library is not installed."""
    if find_spec(NAME) is None:
        raise ExportError("compressed-tensors is not installed", "pip install compressed-tensors==0.17.0")


def library() -> Library:
    """The library, loaded once; safe from several threads."""
    with _lock:
        if not _loaded:
            with _apart(_root()):
                _loaded.append(_load())
        return _loaded[0]


def _root() -> Path:
    spec = find_spec(NAME)
    assert spec is not None and spec.submodule_search_locations, "refused when the sink was opened"
    return Path(spec.submodule_search_locations[0])


def _load() -> Library:
    for name in ("naive_quantized", "pack_quantized", "nvfp4", "mxfp4"):
        import_module(f"{NAME}.compressors.{name}.base")  # registers its formats
    schemes, helpers = import_module(f"{NAME}.quantization.quant_scheme"), import_module(f"{NAME}.quantization.utils")
    return Library(
        version(NAME.replace("_", "-")),
        schemes.preset_name_to_scheme,
        import_module(f"{NAME}.quantization.quant_config").QuantizationConfig,
        schemes.QuantizationScheme,
        helpers.calculate_qparams,
        helpers.generate_gparam,
        helpers.calculate_range,
        import_module(f"{NAME}.quantization.quant_args").round_to_quantized_type_args,
        helpers.maybe_pad_tensor_for_block_quant,
        import_module(f"{NAME}.compressors.base").BaseCompressor,
    )


@contextmanager
def _apart(root: Path) -> Iterator[None]:
    """Bare packages in the place of the library's, for as long as its modules are loaded."""
    import torch

    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == NAME}
    for name in before:
        del sys.modules[name]
    for package, parts in BARE.items():
        sys.modules[f"{NAME}.{package}".rstrip(".")] = _bare(root, package, parts)
    compiled = torch.compile
    # A kernel compiled for each shape of block would cost more than it saves, and needs a compiler.
    torch.compile = lambda function=None, **_: function  # type: ignore[assignment]
    try:
        _load_helpers(root)
        yield
    finally:
        torch.compile = compiled
        for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
            del sys.modules[name]
        sys.modules.update(before)


def _bare(root: Path, package: str, parts: tuple[str, ...]) -> ModuleType:
    name = f"{NAME}.{package}".rstrip(".")
    module = ModuleType(name)
    module.__path__ = [str(root.joinpath(*package.split(".")))]

    def find(wanted: str) -> Any:
        if not wanted.startswith("__"):
            for part in parts:
                found = import_module(f"{name}.{part}")
                if hasattr(found, wanted):
                    return getattr(found, wanted)
        raise AttributeError(f"{name} has no {wanted}")

    module.__getattr__ = find  # type: ignore[method-assign]
    return module


def _load_helpers(root: Path) -> None:
    """``utils.helpers`` without transformers, which it imports at its top."""
    name = f"{NAME}.utils.helpers"
    spec = spec_from_file_location(name, root / "utils" / "helpers.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)

    def light(wanted: str, *rest: Any, **named: Any) -> Any:
        names = SimpleNamespace(AutoConfig=object, PretrainedConfig=object)
        return names if wanted == "transformers" else __import__(wanted, *rest, **named)

    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": light}  # of this module only
    sys.modules[name] = module
    spec.loader.exec_module(module)
