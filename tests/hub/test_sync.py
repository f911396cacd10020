"""A registry's versions as tags and branches of a repository, by the real client."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lora2serve import Registry
from lora2serve.cli import run as command_line
from lora2serve.errors import HubError, UsageError
from lora2serve.hub import fetch
from lora2serve.progress import Silent
from tests.support.hub_server import HubServer
from tests.support.registries import add_export, make_run

REPO = "user/medical-qa"


def test_versions_become_tags_and_aliases_branches(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with Registry(tmp_path / "registry") as registry:
        for seed in range(3):
            run = make_run(tmp_path / f"run-{seed}", seed)
            export = add_export(run, proven=seed != 1)
            registry.add(run.path, name="medical-qa", unproven=True)
        registry.promote("medical-qa@1")
        planned = registry.sync("medical-qa", to=f"hub:{REPO}", dry_run=True, progress=Silent())
        assert planned.changes == ("send medical-qa@1", "send medical-qa@3", "move medical-qa@champion - -> 1")
        assert {request.method for request in hub.requests} == {"GET"} and REPO not in hub.repos
        assert not (tmp_path / "registry" / "versions").exists(), "no directory is made of what would be sent"
        synced = registry.sync("medical-qa", to=f"hub:{REPO}", progress=Silent())
        assert planned == replace(synced, dry_run=True)
        assert synced.pushed == ("medical-qa@1", "medical-qa@3") and synced.moved == ("medical-qa@champion",)
        assert synced.left_out == ("medical-qa@2: vllm: parity was not run",)
        refs = hub.repos[REPO].refs
        assert refs["champion"] == refs["v1"] != refs["v3"] == refs["main"] and "v2" not in refs
        assert (fetch(f"{REPO}@champion").path / "config.json").read_bytes() == (export / "config.json").read_bytes()

        before = len(hub.requests)
        again = registry.sync("medical-qa", to=f"hub:{REPO}", progress=Silent())
        assert (again.pushed, again.moved) == ((), ())
        assert {request.method for request in hub.requests[before:]} == {"GET"}
        registry.promote("medical-qa@3")
        assert command_line(["registry", "sync", "medical-qa", "--to", f"hub:{REPO}", "--dry-run"]) == 0
        assert capsys.readouterr().out == "move medical-qa@champion 1 -> 3\n" and refs["champion"] == refs["v1"]
        assert command_line(["registry", "sync", "medical-qa", "--to", f"hub:{REPO}"]) == 0
        assert capsys.readouterr().out == "medical-qa@champion\n" and refs["champion"] == refs["v3"]
        registry.rollback("medical-qa")
        registry.sync("medical-qa", to=f"hub:{REPO}", progress=Silent())
        assert refs["champion"] == refs["v1"]
        registry.promote("medical-qa@3", "staging")
        registry.sync("medical-qa", to=f"hub:{REPO}", progress=Silent())
        assert refs["staging"] == refs["v3"]
        registry.unset("medical-qa@staging")
        planned = registry.sync("medical-qa", to=f"hub:{REPO}", dry_run=True, progress=Silent())
        assert planned.changes == ("move medical-qa@staging 3 -> -",) and refs["staging"] == refs["v3"]
        assert registry.sync("medical-qa", to=f"hub:{REPO}", progress=Silent()).moved == ("medical-qa@staging",)
        assert "staging" not in refs and "champion" in refs
        for to in ("user/x", "hub:", "hub:medical-qa", "s3://bucket"):
            with pytest.raises(UsageError, match="--to"):
                registry.sync("medical-qa", to=to, progress=Silent())


@pytest.mark.parametrize("dry_run", [True, False])
def test_without_the_hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool) -> None:
    """A repository to send to is none to download."""
    from huggingface_hub import constants

    with Registry(tmp_path / "registry") as registry:
        run = make_run(tmp_path / "run")
        add_export(run)
        registry.add(run.path, name="medical-qa")
        with monkeypatch.context() as offline:
            offline.setattr(constants, "HF_HUB_OFFLINE", True)
            with pytest.raises(HubError) as refused:
                registry.sync("medical-qa", to=f"hub:{REPO}", dry_run=dry_run, progress=Silent())
            assert refused.value.message == f"asking the Hub about {REPO}: HF_HUB_OFFLINE is set"
            assert refused.value.hint == "unset it, or set it to 0" and not hub.repos
        assert registry.sync("medical-qa", to=f"hub:{REPO}", dry_run=dry_run, progress=Silent()).pushed, "the control"
