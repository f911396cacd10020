"""Versions of a registry where commands take a run, an adapter or an export."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import lora2serve
from lora2serve import Registry
from lora2serve.api.inspect_path import InspectedExport, InspectedRun
from lora2serve.api.locate import find_export, find_run, locate
from lora2serve.api.registered import exports_home, exports_of
from lora2serve.api.verify_copy import Verified
from lora2serve.cli import cli
from lora2serve.errors import HubError, InputError, ParityNotMet, UsageError
from lora2serve.progress import Silent
from tests.support.registries import add_export, make_run


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """medical-qa@1 with two exports, live; medical-qa@2 without; the adapter alone as lora@1; a folder of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORA2SERVE_REGISTRY", raising=False)
    run = make_run(tmp_path / "runs" / "first", 1)
    add_export(run, "vllm")
    add_export(run, "gguf", quant="Q8_0")
    other = make_run(tmp_path / "runs" / "second", 2)
    with Registry() as registry:
        registry.add(run.path, name="medical-qa")
        registry.add("second", name="medical-qa", unproven=True)  # by its name under runs/
        registry.add(other.adapter.rename(tmp_path / "lora"), name="lora", unproven=True)
        registry.promote("medical-qa@1")
        yield registry


def test_names_of_versions(registered: Registry, tmp_path: Path) -> None:
    run = find_run("medical-qa@champion")
    assert run and run.name == "medical-qa-1" and [path.name for path in run.list_exports()] == ["gguf-Q8_0", "vllm"]
    assert locate("medical-qa@1", Silent()).run == run
    assert find_export("medical-qa@1/vllm") == run.exports / "vllm"
    assert locate("lora@1", Silent()).is_adapter and locate("lora@1", Silent()).path.name == "lora-1"
    assert exports_of(["medical-qa@champion"], ("gguf",)) == [run.exports / "gguf-Q8_0"]
    assert exports_home(run) == Path("exports/medical-qa-1"), "a version does not change"
    with pytest.raises(UsageError, match="has no exports"):
        exports_of(["medical-qa@2"])
    with pytest.raises(UsageError, match="no such alias"):
        find_run("medical-qa@live")
    with pytest.raises(UsageError, match="did you mean 'medical-qa'"):
        find_run("medcal-qa@champion")


def test_what_is_no_version(registered: Registry, tmp_path: Path) -> None:
    """A directory of that name goes first, and so does what nobody registered; without a registry there is none."""
    (tmp_path / "medical-qa@1").mkdir()
    with pytest.raises(InputError, match="medical-qa@1: not a run"):
        lora2serve.inspect("medical-qa@1")
    with pytest.raises(HubError, match="gpt2@main"):
        locate("gpt2@main", Silent())
    (tmp_path / "registry").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="no registry at"):
        locate("medical-qa@2", Silent())
    with pytest.raises(HubError):
        locate("medical-qa@champion", Silent())


def test_inspect_and_verify(registered: Registry) -> None:
    facts = lora2serve.inspect("medical-qa@champion")
    assert isinstance(facts, InspectedRun)
    assert isinstance(lora2serve.inspect("medical-qa@1/vllm"), InspectedExport)
    verified = lora2serve.verify("medical-qa@champion")
    assert isinstance(verified, Verified) and set(verified.exports) == {"vllm", "gguf-Q8_0"}
    with pytest.raises(UsageError, match="no exports"):
        lora2serve.verify("medical-qa@2")


def test_serve_takes_the_export_that_is_served(registered: Registry, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["serve", "--dry-run", "medical-qa@champion"], catch_exceptions=False)
    command = shlex.split(done.output)
    export = tmp_path / "registry" / "versions" / "medical-qa-1" / "exports" / "vllm"
    assert command[command.index("--model") + 1] == str(export)
    assert command[command.index("--served-model-name") + 1] == "medical-qa-1", "not first, as its run is called"
    done = CliRunner().invoke(cli, ["serve", "--dry-run", "medical-qa@champion/gguf-Q8_0"], catch_exceptions=False)
    assert "medical-qa-1/exports/gguf-Q8_0/model.gguf" in done.output and "--model_alias medical-qa-1" in done.output


def test_push_shows_what_would_go(registered: Registry) -> None:
    run = make_run(Path("runs/third"), 3)
    add_export(run, proven=False)
    registered.add(run.path, name="medical-qa", unproven=True)
    (result,) = lora2serve.push("medical-qa@3", repo_id="you/model", dry_run=True)
    assert "config.json" in result.uploaded and result.exports == ["vllm"] and result.unproven
    with pytest.raises(ParityNotMet):
        lora2serve.push("medical-qa@3", repo_id="you/model")
