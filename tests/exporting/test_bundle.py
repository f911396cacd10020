"""A bundle of adapters: whole or not at all, of one base, and told to vLLM as vLLM reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora2serve.artifacts.export_dir import Export
from lora2serve.cli import run
from lora2serve.errors import UsageError
from lora2serve.serving import server
from lora2serve.serving.server import ServeOptions
from tests.support.manifests import change_manifest
from tests.support.tiny import make_adapter, make_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters on it of rank 3 and 12."""
    root = tmp_path_factory.mktemp("made")
    base = make_model(root / "base-model")
    make_adapter(root / "red", base, r=3)
    make_adapter(root / "blue", base, r=12, seed=2)
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bundle(made: Path, *words: str, code: int = 0) -> None:
    assert run(["export", str(made / "red"), str(made / "blue"), "-t", "adapter", *words]) == code


def parsed_by_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``vllm serve --config serve.yaml`` understands, by vLLM's own parser."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.chdir(folder)
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return parser.parse_args(["serve", "--config", "serve.yaml"])


def test_layout(made: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle(made)
    folder = here / "exports" / "red+blue"
    out, err = capfd.readouterr()
    assert out.split() == [str(folder)]
    assert f"cd {folder} && vllm serve --config serve.yaml" in err
    assert sorted(path.name for path in (folder / "adapters").iterdir()) == ["blue", "red"]
    assert [path.name for path in folder.parent.iterdir()] == ["red+blue"], "no lock, no partial directory"
    assert Export.open(folder).manifest.bundle == ("red", "blue") and Export.open(folder).verify() == []
    seen = yaml.safe_load((folder / "serve.yaml").read_text())
    assert seen["enable-lora"] and seen["max-loras"] == 2
    assert seen["max-lora-rank"] == 16, "the next allowed over 12"
    assert seen["model"] == str(made / "base-model")
    for name in ("red", "blue"):
        assert Export.open(folder / "adapters" / name).verify() == []
        config = json.loads((folder / "adapters" / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == seen["model"], "what the filesystem resolver compares"


@pytest.mark.engine
def test_vllm_reads_it(made: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle(made)
    seen = parsed_by_vllm(here / "exports" / "red+blue", monkeypatch)
    assert seen.enable_lora and (seen.max_loras, seen.max_lora_rank) == (2, 16)
    assert seen.model == str(made / "base-model")
    assert [(one.name, one.path) for one in seen.lora_modules] == [("red", "adapters/red"), ("blue", "adapters/blue")]


def test_verify_sees_each_file(made: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle(made, "-o", "b")
    change_manifest(here / "b" / "adapters" / "red", parity={"met": True})
    assert Export.open(here / "b").verify() == [], "a measured adapter is no damage"
    with (here / "b" / "adapters" / "red" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    (here / "b" / "adapters" / "stray.txt").write_text("")
    assert [problem.split(":")[0] for problem in Export.open(here / "b").verify()] == [
        "adapters/red/adapter_model.safetensors", "adapters/stray.txt",
    ]  # fmt: skip


@pytest.mark.engine
def test_vllm_resolves_it(made: Path, here: Path) -> None:
    """vLLM's own resolver on the folder; the control is another name of the base."""
    import asyncio

    from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

    bundle(made, "-o", "b", "--served-base", "org/model")
    resolver = FilesystemResolver(str(here / "b" / "adapters"))
    found = asyncio.run(resolver.resolve_lora("org/model", "blue"))
    assert found is not None and found.lora_path == str(here / "b" / "adapters" / "blue")
    assert asyncio.run(resolver.resolve_lora("org/other", "blue")) is None
    assert yaml.safe_load((here / "b" / "serve.yaml").read_text())["model"] == "org/model"


def refused(made: Path, capfd: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(["export", *words, "-o", "b"]) in (1, 2)
    assert not Path("b").exists() and not list(Path.cwd().glob("*partial*"))
    return capfd.readouterr().err


def test_refusals(made: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    red, blue = str(made / "red"), str(made / "blue")
    other = make_adapter(here / "other", make_model(here / "other-base", num_hidden_layers=3))
    assert "adapters of different bases: red of" in refused(made, capfd, red, str(other), "-t", "adapter")
    twin = shutil.copytree(made / "red", here / "deep" / "red")
    assert "several adapters are called red" in refused(made, capfd, red, str(twin), "-t", "adapter")
    base = shutil.copytree(made / "red", here / "base")
    assert "an adapter is called base" in refused(made, capfd, red, str(base), "-t", "adapter")
    assert "only --target adapter, alone" in refused(made, capfd, red, blue, "-t", "vllm")
    assert "only --target adapter, alone" in refused(made, capfd, red, blue, "-t", "adapter", "-t", "vllm")
    assert "--name x with 2 runs" in refused(made, capfd, red, blue, "-t", "adapter", "--name", "x")
    bundle(made, "-o", "b")  # the control


def test_one_refused_adapter_leaves_nothing(made: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("dora", "more"):
        make_adapter(here / name, made / "base-model", use_dora=True)
    said = refused(made, capfd, str(made / "red"), str(here / "dora"), str(here / "more"), "-t", "adapter")
    assert "dora: vLLM does not serve this adapter (dora)" in said and "more: vLLM does not serve" in said
    assert (
        run(["export", str(made / "red"), str(here / "dora"), "-t", "adapter", "-o", "b", "--as-lora-rank", "64"]) == 0
    )
    about = Export.open(here / "b" / "adapters" / "dora").manifest.to_json()
    assert about["rank"] == 64 and not about["lossless"]


def test_an_old_bundle_stays_until_the_new_one_is_whole(
    made: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle(made, "-o", "b")
    before = Export.open(here / "b").manifest.to_json()
    bundle(made, "-o", "b", code=1)
    assert "already exists" in capfd.readouterr().err

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("converters.adapter.adapter_sink.AdapterSink.finish", full)
        bundle(made, "-o", "b", "--overwrite", code=1)
    assert Export.open(here / "b").manifest.to_json() == before and Export.open(here / "b").verify() == []
    assert [path.name for path in here.iterdir()] == ["b"]
    bundle(made, "-o", "b", "--overwrite")


def test_plan_writes_nothing(made: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle(made, "--plan", "--json", "-o", "b")
    plan = json.loads(capfd.readouterr().out)
    assert sorted(Path(name).name for name in plan["outputs"]) == ["blue", "red"]
    assert list(here.iterdir()) == []
    bundle(made, "-o", "b")
    sizes = {path.parent.name: path.stat().st_size for path in here.glob("b/adapters/*/*.safetensors")}
    assert sizes == {Path(name).name: size["bytes"] for name, size in plan["outputs"].items()}


def test_how_it_is_served(made: Path, here: Path) -> None:
    bundle(made, "-o", "b")
    serving = server.plan([Path("b")], ServeOptions(engine_arguments=("--dtype", "float32")))
    assert serving.models == ("base", "red", "blue") and serving.folder is None, "it works from any folder"
    assert str(here / "b" / "adapters" / "red") in serving.line and serving.line.endswith("--dtype float32")
    assert "--model" not in serving.command and server.RESOLVER not in serving.environment
    updating = server.plan([Path("b")], ServeOptions(allow_updates=True))
    assert updating.environment[server.RESOLVER] == str(here / "b" / "adapters")
    shutil.copytree(made / "red", here / "third")
    assert run(["export", str(here / "third"), "-t", "adapter", "-o", "more"]) == 0
    mixed = server.plan([Path("b"), Path("more/adapter")], ServeOptions())
    assert mixed.models == ("base", "third", "red", "blue") and mixed.folder is None
    assert run(["export", str(made / "red"), "-t", "adapter", "-o", "again"]) == 0
    with pytest.raises(UsageError, match="models share a name"):
        server.plan([Path("b"), Path("again/adapter")], ServeOptions())


def test_served_where_the_base_lies_elsewhere(made: Path, here: Path) -> None:
    """Exported for a container, tried on this machine: the base that is here is loaded."""
    bundle(made, "-o", "b", "--served-base", "/models/base")
    command = server.plan([Path("b")], ServeOptions()).command
    assert command[command.index("--model") + 1] == str(made / "base-model")
    command = server.plan([Path("b")], ServeOptions(base="org/copy")).command
    assert command[command.index("--model") + 1] == "org/copy"


def test_a_bundle_is_not_pushed_as_one(made: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle(made, "-o", "b")
    assert run(["push", "b", "--repo-id", "you/model", "--dry-run"]) == 2
    assert "b: a bundle of adapters" in capfd.readouterr().err
