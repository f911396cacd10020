"""Where versions are served: adapters that the gateway loads into vLLM, warms, keeps and unloads again."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Protocol, TypeAlias

from lora2serve.adapters.lint import next_rank
from lora2serve.artifacts.export_dir import Export
from lora2serve.errors import EngineError, Lora2ServeError
from lora2serve.gateway.model_names import parse_object
from lora2serve.gateway.upstreams import Upstream, UpstreamError, own_headers
from lora2serve.serving import runtime_lora
from lora2serve.system.json_values import objects

Key: TypeAlias = tuple[str, int]  # the name and the number of a version
WARMING = {"prompt": "Hello", "max_tokens": 1, "temperature": 0}  # the first request pays for what loading leaves out


@dataclass(frozen=True)
class VersionPlacement:
    """A version at a server, and what it is called there; ``loaded``: by the gateway, as an adapter."""

    upstream: Upstream
    model: str
    loaded: bool = True


@dataclass
class _Slots:
    """The adapters of one server, the one that was used longest ago first."""

    loaded: OrderedDict[Key, str] = field(default_factory=OrderedDict)
    busy: Counter[Key] = field(default_factory=Counter)  # requests under way
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    takes_adapters: bool = True
    looked: bool = False  # whether what it has already was asked for


class LoadObserver(Protocol):
    """Hears what becomes of loads."""

    def loaded(self, key: Key, upstream: str, result: str, seconds: float) -> None:
        """A load that ended: "ok" or "failed"."""
        ...

    def unloaded(self, key: Key, upstream: str) -> None:
        """An adapter made room."""
        ...

    def size(self, key: Key, disk: int, slot: int) -> None:
        """Bytes of an adapter: of its files, and in a slot of the engine."""
        ...


class AdapterCache:
    """The versions that servers have. ``directory`` gives the adapter export of a version, and may take its time."""

    def __init__(
        self, upstreams: Mapping[str, Upstream], directory: Callable[[str, int], Path], observer: LoadObserver
    ) -> None:
        self._upstreams, self._directory, self._observer = upstreams, directory, observer
        self._slots: dict[str, _Slots] = defaultdict(_Slots)
        self._pinned: frozenset[Key] = frozenset()
        self._served = {
            name: {_key(version): model for version, model in upstream.config.serves.items()}
            for name, upstream in upstreams.items()
        }

    def pin(self, keys: Collection[Key]) -> None:
        """The versions that stay loaded from now on."""
        self._pinned = frozenset(keys)

    def ready(self, key: Key) -> list[VersionPlacement]:
        """Where a version answers at once: servers that were there a moment ago first."""
        found = [
            VersionPlacement(self._upstreams[name], models[key], loaded=False)
            for name, models in self._served.items()
            if key in models
        ]
        found += [
            VersionPlacement(self._upstreams[name], slots.loaded[key])
            for name, slots in self._slots.items()
            if key in slots.loaded
        ]
        return sorted(found, key=lambda placement: placement.upstream.away)

    async def ensure(self, key: Key) -> list[VersionPlacement]:
        """Where a version answers, after it was loaded and warmed if it must be; EngineError where it cannot be."""
        found = self.ready(key)
        if found and not found[0].upstream.away:
            return found
        problems = []
        for name, upstream in self._upstreams.items():
            if not upstream.config.adapters or not self._slots[name].takes_adapters:
                continue
            try:
                await self._load(key, upstream)
                return self.ready(key)
            except Lora2ServeError as error:
                problems.append(f"{name}: {error.message.removeprefix(f'{name}: ')}")
            except OSError as error:  # a folder that cannot be written
                problems.append(f"{name}: {error.filename}: {error.strerror}")
        if found:
            return found
        reason = "; ".join(problems) or "no server has it, and none takes adapters"
        raise EngineError(f"{key[0]}@{key[1]} cannot be served: {reason}", "docs/gateway.md says what a server needs")

    def hold(self, key: Key, upstream: str) -> None:
        """A request to that version begins: it is not unloaded before ``release``."""
        slots = self._slots[upstream]
        slots.busy[key] += 1
        if key in slots.loaded:
            slots.loaded.move_to_end(key)

    def release(self, key: Key, upstream: str) -> None:
        """That request is over."""
        self._slots[upstream].busy[key] -= 1

    def forget(self, key: Key, upstream: str) -> None:
        """A server that does not know an adapter any more, such as one that was started again."""
        slots = self._slots[upstream]
        slots.looked = False
        if slots.loaded.pop(key, None):
            self._observer.unloaded(key, upstream)

    def loaded(self) -> dict[str, list[Key]]:
        """What was loaded, by server."""
        return {name: list(slots.loaded) for name, slots in self._slots.items()}

    async def _load(self, key: Key, upstream: Upstream) -> None:
        slots = self._slots[upstream.name]
        async with slots.lock:
            if key in slots.loaded:
                return
            start, result = time.monotonic(), "failed"
            try:
                copy = await asyncio.to_thread(self._copy, key, upstream)
                await self._look(upstream, slots)
                if slots.loaded.get(key) is None:
                    await self._make_room(upstream, slots)
                    await self._post(upstream, runtime_lora.LOAD, runtime_lora.load_request(model_name(key), copy))
                await self._post(upstream, "/v1/completions", {"model": model_name(key), **WARMING})
                slots.loaded[key] = model_name(key)
                result = "ok"
            finally:
                self._observer.loaded(key, upstream.name, result, time.monotonic() - start)

    def _copy(self, key: Key, upstream: Upstream) -> Path:
        folder = Path(upstream.config.folder) if upstream.config.folder else None
        copy = runtime_lora.immutable_copy(model_name(key), self._directory(*key), folder)
        export = Export.open(copy)
        disk = sum(file.stat().st_size for file in copy.iterdir())
        weights, rank = (copy / "adapter_model.safetensors").stat().st_size, export.manifest.rank
        self._observer.size(key, disk, weights * (next_rank(rank) or rank) // rank if rank else weights)
        return copy

    async def _look(self, upstream: Upstream, slots: _Slots) -> None:
        """What it has of ours already: from another gateway, or from before this one was started again."""
        if slots.looked:
            return
        answer = await upstream.send("GET", "/v1/models", own_headers(upstream.config), None)
        body = await answer.body()
        content = parse_object(body)
        if answer.status != HTTPStatus.OK or content is None:
            raise _refusal(upstream, "/v1/models", answer.status, body)
        for entry in objects(content.get("data")):
            name, root = str(entry.get("id")), str(entry.get("root"))
            match = re.fullmatch(r"(.+)-(\d+)", name)
            if match and entry.get("parent") and re.fullmatch(re.escape(name) + "-[0-9a-f]{16}", Path(root).name):
                slots.loaded.setdefault((match[1], int(match[2])), name)
        slots.looked = True

    async def _make_room(self, upstream: Upstream, slots: _Slots) -> None:
        while len(slots.loaded) >= upstream.config.max_cpu_loras:
            free = (key for key in slots.loaded if key not in self._pinned and not slots.busy[key])
            oldest = next(free, None)
            if oldest is None:
                return  # vLLM keeps what it can, and reads the others from disk again
            await self._post(upstream, runtime_lora.UNLOAD, {"lora_name": slots.loaded[oldest]})
            del slots.loaded[oldest]
            self._observer.unloaded(oldest, upstream.name)

    async def _post(self, upstream: Upstream, path: str, body: Mapping[str, object]) -> None:
        answer = await upstream.send("POST", path, own_headers(upstream.config), json.dumps(body).encode())
        content = await answer.body()
        if answer.status == HTTPStatus.NOT_FOUND and path == runtime_lora.LOAD:
            self._slots[upstream.name].takes_adapters = False
            raise EngineError(f"{upstream.name}: takes no adapters", "start it with `lora2serve serve --allow-updates`")
        gone = path == runtime_lora.UNLOAD and answer.status == HTTPStatus.NOT_FOUND
        there = path == runtime_lora.LOAD and b"already been loaded" in content  # by another gateway, just now
        if answer.status >= HTTPStatus.MULTIPLE_CHOICES and not gone and not there:
            raise _refusal(upstream, path, answer.status, content)


def model_name(key: Key) -> str:
    """What a version is called at a server: ``medical-qa-7``."""
    return f"{key[0]}-{key[1]}"


def _key(version: str) -> Key:
    name, _, number = version.partition("@")
    return name, int(number)


def _refusal(upstream: Upstream, path: str, status: int, body: bytes) -> UpstreamError:
    text = " ".join(body.decode("utf-8", "replace").split())[:300]
    return UpstreamError("http", f"{upstream.name}: {path} answers {status}: {text}")
