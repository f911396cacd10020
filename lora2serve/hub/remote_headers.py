"""Names, types and shapes of a model's tensors from the Hub, by range requests: no weight comes over the line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lora2serve.errors import CheckpointError
from lora2serve.hub.hub_client import hub_errors
from lora2serve.hub.retry import with_retries
from lora2serve.progress import Progress
from lora2serve.system.small_files import read_json
from lora2serve.weights.checkpoint import INDEX, SINGLE
from lora2serve.weights.tensors import DType, TensorSpec

if TYPE_CHECKING:
    from huggingface_hub.utils._safetensors import SafetensorsFileMetadata

CONNECTIONS = 8
LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def remote_specs(repo_id: str, commit: str, folder: Path, progress: Progress) -> list[TensorSpec]:
    """Every tensor of ``model*.safetensors`` in a repository, at that commit.

    Layers of a model are alike: of several files, only those are asked that hold a name of a new kind. Where what
    follows is not the total size that the index gives, all of them are.

    folder: where its small files are. HubError where the Hub does not give it, CheckpointError for a damaged index.
    """
    read = partial(_header, repo_id, commit, progress)
    if not (folder / INDEX).is_file():
        return read(SINGLE)
    index = read_json(folder / INDEX, "unreadable index")
    places, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(places, Mapping) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{folder / INDEX}: no weight_map", "the repository is damaged")
    first: dict[str, str] = {}
    for name, file in places.items():
        first.setdefault(_kind(name), file)
    known = {_kind(spec.name): spec for spec in _all(read, first.values())}
    if known.keys() >= first.keys():
        specs = [TensorSpec(name, known[_kind(name)].shape, known[_kind(name)].dtype) for name in places]
        total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
        if sum(spec.nbytes for spec in specs) == total:
            return specs
    return _all(read, places.values())


def _kind(name: str) -> str:
    """A tensor's name without the numbers of its layer and expert."""
    return LAYER.sub("*", name)


def _all(read: Callable[[str], list[TensorSpec]], files: Iterable[str]) -> list[TensorSpec]:
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return [spec for part in pool.map(read, dict.fromkeys(files)) for spec in part]


def _header(repo_id: str, commit: str, progress: Progress, file: str) -> list[TensorSpec]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    def fetch() -> SafetensorsFileMetadata:
        return HfApi().parse_safetensors_file_metadata(repo_id, file, revision=commit)

    try:
        with hub_errors(repo_id, commit):
            content = with_retries(fetch, progress, repo_id, reached=False)
    except (SafetensorsParsingError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{repo_id}: {file}: bad header ({str(error)[:100]})") from None
    return [
        TensorSpec(name, tuple(tensor.shape), cast(DType, str(tensor.dtype)))
        for name, tensor in content.tensors.items()
    ]
