"""Gateways in tests: a registry of versions with adapter exports, stubs behind, and a client that sees every byte."""

from __future__ import annotations

import http.client
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from lora2serve import Registry, start_gateway
from lora2serve.artifacts.manifest import FileEntry
from lora2serve.gateway import record_writer, routing
from lora2serve.gateway.request_record import RequestRecord, TrafficObserver
from lora2serve.gateway.run_gateway import RunningGateway
from lora2serve.gateway.traffic_store import Entry, TrafficStore
from lora2serve.system.small_files import digest
from tests.support.manifests import change_manifest
from tests.support.registries import add_export, make_run
from tests.support.stub_upstream import StubUpstream, end_all, running_stub
from tests.support.told import Told

CHAT = "/v1/chat/completions"


def add_versions(registry: Registry, folder: Path, count: int, name: str = "towns", *, start: int = 1) -> None:
    """Versions ``start`` and on, each with an adapter export of its own content."""
    for number in range(start, start + count):
        run = make_run(folder / f"{name}-run-{number}", seed=number)
        export = add_export(run, "adapter", rank=4)
        for path in run.adapter.iterdir():
            shutil.copy(path, export / path.name)
        entries = {path.name: FileEntry.from_json(digest(path), path.name).to_json() for path in run.adapter.iterdir()}
        change_manifest(export, files=entries)
        registry.add(run.path, name=name)


@dataclass
class Answer:
    """What a client got, to the byte."""

    status: int
    headers: dict[str, str]
    body: bytes
    chunks: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def version(self) -> str:
        return self.headers.get("x-lora2serve-version", "")

    @property
    def text(self) -> str:
        """What the model says, of a whole answer or of a stream."""
        if self.headers["content-type"].startswith("text/event-stream"):
            events = [json.loads(line[6:]) for line in self.body.split(b"\n") if line.startswith(b"data: {")]
            return "".join(
                (one.get("delta") or {}).get("content") or one.get("text", "") for e in events for one in e["choices"]
            )
        choice = self.json["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])


def call(
    url: str, path: str = CHAT, body: object = None, headers: Mapping[str, str] | None = None, method: str = ""
) -> Answer:
    """One request on a connection of its own."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    try:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        kinds = {"Content-Type": "application/json"} if data is not None else {}
        connection.request(method or ("GET" if data is None else "POST"), path, data, {**kinds, **(headers or {})})
        response = connection.getresponse()
        chunks = []
        while chunk := response.read1(1 << 16):
            chunks.append((time.monotonic(), chunk))
        names = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, names, b"".join(chunk for _, chunk in chunks), chunks)
    finally:
        connection.close()


def chat(
    url: str, text: str = "hi", model: str = "towns", headers: Mapping[str, str] | None = None, **more: Any
) -> Answer:
    return call(url, CHAT, {"model": model, "messages": [{"role": "user", "content": text}], **more}, headers)


@dataclass
class TestBed:
    """A gateway with everything around it."""

    __test__ = False

    folder: Path
    registry: Registry
    stubs: dict[str, StubUpstream]
    told: Told
    gateway: RunningGateway

    @property
    def url(self) -> str:
        return self.gateway.address

    @property
    def stub(self) -> StubUpstream:
        return next(iter(self.stubs.values()))

    def entries(self) -> list[Entry]:
        return list(TrafficStore(self.folder / "records").entries())

    def records(self, count: int) -> list[RequestRecord]:
        """The records, once so many are there."""
        wait_for(lambda: len(self.entries()) >= count, f"{count} records")
        found = [entry for entry in self.entries() if isinstance(entry, RequestRecord)]
        assert len(found) == count
        return found

    def version(self, alias: str = "champion", name: str = "towns") -> int | None:
        """What answers for an alias now."""
        figures = metrics(self.url)
        value = figures.get(("lora2serve_alias_version", frozenset({("adapter", name), ("alias", alias)})))
        return None if value is None else int(value)

    def becomes(self, number: int | None, alias: str = "champion") -> None:
        """Wait until that version answers for an alias."""
        wait_for(lambda: self.version(alias) == number, f"{alias} is {number}")


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def metrics(url: str) -> Samples:
    """The samples of /metrics, by Prometheus' own parser."""
    from prometheus_client.parser import text_string_to_metric_families

    text = call(url, "/metrics").body.decode()
    families = text_string_to_metric_families(text)
    return {(sample.name, frozenset(sample.labels.items())): sample.value for one in families for sample in one.samples}


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum over the series that have these labels."""
    wanted = set(labels.items())
    return sum(value for (own, pairs), value in samples.items() if own == name and wanted <= pairs)


def wait_for(condition: Callable[[], object], what: str, patience: float = 30.0) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, f"still not: {what}"
        time.sleep(0.02)


@contextmanager
def test_bed(
    folder: Path, seed: Path, *, aliases: Mapping[str, int] | None = None,
    stubs: Mapping[str, StubUpstream] | None = None, observers: Sequence[TrafficObserver] = (), **config: Any,
) -> Iterator[TestBed]:  # fmt: skip
    """A gateway in front of stubs, on a copy of the registry ``seed``; ``config`` goes over its gateway.yaml, and of
    upstreams over what each has. It looks at its registry, and for records to store, more often than others do.
    """
    wanted = dict(aliases or {"champion": 1})
    started = next(iter(wanted.items()), None) == ("champion", 1) and (seed / "started").is_dir()
    shutil.copytree(seed / ("started" if started else "registry"), folder / "registry")
    with ExitStack() as stack:
        patched = stack.enter_context(pytest.MonkeyPatch.context())
        patched.setattr(routing, "POLL", 0.1)
        patched.setattr(record_writer, "PAUSE", 0.02)
        own = stack.enter_context(Registry(folder / "registry", author="tester"))
        for alias, number in list(wanted.items())[started:]:
            own.promote(f"towns@{number}", alias)
        running = {
            name: stack.enter_context(running_stub(stub)) for name, stub in (stubs or {"prod": StubUpstream()}).items()
        }
        changes = config.pop("upstreams", {})
        upstreams = {name: {"url": stub.url, **changes.pop(name, {})} for name, stub in running.items()} | changes
        upstreams = {name: {"folder": str(folder / "copies"), **content} for name, content in upstreams.items()}
        capture = {"folder": str(folder / "records"), **config.pop("capture", {})}
        path = folder / "gateway.yaml"
        path.write_text(yaml.safe_dump({"upstreams": upstreams, "capture": capture, **config}))
        told = Told()
        gateway = stack.enter_context(start_gateway(path, registry=own, port=0, progress=told, observers=observers))
        try:
            yield TestBed(folder, own, running, told, gateway)
        finally:
            gateway.server.should_exit = True
            end_all()


test_bed.__test__ = False  # type: ignore[attr-defined]
