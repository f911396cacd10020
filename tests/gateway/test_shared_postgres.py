"""Several gateways, as on several machines: one Postgres, one secret, and nothing else that they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from lora2serve import Registry, start_gateway
from tests.support.gateways import add_versions, chat, metrics, total, wait_for
from tests.support.registries import empty_database, running_postgres
from tests.support.runs import Told
from tests.support.stub_upstream import StubUpstream, running_stub

pytestmark = pytest.mark.engine
ROUTE = {"challenger": {"share": 0.5}, "decisions": {"client_hours": 0, "rules": [{"measure": "errors"}]}}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    """The address of a registry with three versions, of which the first is champion and the second challenger."""
    with running_postgres() as server:
        url = empty_database(server, "gateways")
        Registry.create(url, content=tmp_path / "content").close()
        with Registry(url, author="tester") as registry:
            add_versions(registry, tmp_path, 3)
            registry.promote("towns@1")
            registry.promote("towns@2", "challenger")
        yield url


def test_they_agree(tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user has one arm at all of them, a move reaches each, and of their verdicts one is carried out."""
    monkeypatch.setenv("LORA2SERVE_GATEWAY_SECRET", "the same for all of them")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stubs, told = {"prod": StubUpstream(models=("merged",), takes_adapters=False), "staging": StubUpstream()}, Told()
    with ExitStack() as stack:
        urls = {name: stack.enter_context(running_stub(stub)).url for name, stub in stubs.items()}
        registry = stack.enter_context(Registry(database, author="tester"))
        gateways = []
        for number in range(2):
            upstreams = {
                "prod": {"url": urls["prod"], "serves": {"towns@1": "merged"}},
                "staging": {"url": urls["staging"], "folder": str(tmp_path / "copies")},
            }
            capture = {"folder": str(tmp_path / f"records-{number}")}
            path = tmp_path / f"gateway-{number}.yaml"
            path.write_text(yaml.safe_dump({"upstreams": upstreams, "routes": {"towns": ROUTE}, "capture": capture}))
            own = stack.enter_context(Registry(database))
            gateways.append(stack.enter_context(start_gateway(path, registry=own, port=0, progress=told)).address)

        def versions(unit: str) -> set[str]:
            return {chat(url, headers={"x-session-id": unit}).version for url in gateways}

        arms = [versions(f"user-{number}") for number in range(30)]
        assert {"towns@1"} in arms and {"towns@2"} in arms and all(len(each) == 1 for each in arms)
        registry.promote("towns@3", "challenger")
        wait_for(lambda: all(alias(url, "challenger") == 3 for url in gateways), "both see it")
        wait_for(lambda: all(total(metrics(url), "lora2serve_trial_verdict") == 0 for url in gateways), "a new trial")
        stubs["staging"].faults.status = 500
        for number in range(200):
            for url in gateways:
                chat(url, headers={"x-session-id": f"other-{number}"})
            if number % 20 == 19 and registry.aliases("towns")["challenger"] == 1:
                break
        wait_for(lambda: all(alias(url, "challenger") == 1 for url in gateways), "both see that, too")
        assert {version for number in range(10) for version in versions(f"third-{number}")} == {"towns@1"}
        moves = [event.kind for event in registry.history("towns") if event.who == "gateway"]
    assert moves == ["rollback"], told.notes


def alias(url: str, name: str) -> float:
    return total(metrics(url), "lora2serve_alias_version", alias=name)
