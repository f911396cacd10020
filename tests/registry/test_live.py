"""The demo's run from registration to a served answer and back, as commands: real parity, real vLLM."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import yaml

import lora2serve
from lora2serve.artifacts.run import Run
from lora2serve.system.http import HttpClient
from tests.conftest import lora2serve as command

pytestmark = pytest.mark.engine
QUESTION = "Who governs Wexley?"


@pytest.mark.parametrize("served", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_life_of_a_version(demo_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: bool) -> None:
    """In the usual suite what would be started; that versions are served by vLLM, tests/gateway/test_vllm.py shows."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo_run.path, "runs/demo", ignore=shutil.ignore_patterns("checkpoints", "exports", "parity"))
    recipe = yaml.safe_load(Path("runs/demo/recipe.yaml").read_text())
    recipe["parity"] |= {"tokens": 256, "prompts": 2}  # what it finds is the main job's to show
    Path("runs/demo/recipe.yaml").write_text(yaml.safe_dump(recipe))
    command("registry", "add", "runs/demo", "--name", "towns", cwd=tmp_path, code=3)  # parity was not run
    assert command("registry", "add", "runs/demo", "--name", "towns", "--unproven", cwd=tmp_path) == "towns@1\n"
    command("registry", "promote", "towns@1", cwd=tmp_path, code=3)  # the gate of parity

    (path,) = command("export", "towns@1", "-t", "adapter", cwd=tmp_path).split()
    assert Path(path) == tmp_path / "exports" / "towns-1" / "adapter", "a version does not change: new exports lie here"
    page = command("parity", path, "--engine", "peft", cwd=tmp_path).strip()
    assert Path(page).is_file()
    assert command("registry", "add", path, "--name", "towns", cwd=tmp_path) == "towns@1\n"
    assert command("registry", "promote", "towns@1", "--why", "proven", cwd=tmp_path) == "towns@1\n"
    shown = json.loads(command("registry", "show", "towns@champion", "--json", cwd=tmp_path))
    assert (shown["name"], shown["number"], shown["aliases"]) == ("towns", 1, ["champion"])
    assert [export["unproven"] for export in shown["exports"]] == [""]
    verified = json.loads(command("verify", "towns@champion", "--json", cwd=tmp_path))
    assert verified["exports"] == ["adapter"] and not verified["unproven"]

    if served:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with lora2serve.serve("towns@champion", port=port) as server:
            base, adapter = server.models
            assert (base, adapter) == ("base", "towns-1")
            body = {
                "model": adapter,
                "messages": [{"role": "user", "content": QUESTION}],
                "temperature": 0,
                "max_tokens": 32,
            }
            answer = HttpClient(server.address, patience=120.0).call("POST", "/v1/chat/completions", body)
        assert "Leon Lake" in json.dumps(answer), answer
    else:
        plan = command("serve", "towns@champion", "--dry-run", cwd=tmp_path)
        assert "--served-model-name base" in plan and '"name": "towns-1"' in plan, plan

    other = Run(tmp_path / "runs" / "other")  # the control: a version that is worse is refused, and can be left again
    shutil.copytree("runs/demo", other.path)
    record = json.loads((other.path / "run.json").read_text())
    for loss in record["metrics"].values():
        loss["eval_loss"] = 9.0
    (other.path / "run.json").write_text(json.dumps(record))
    config = json.loads((other.adapter / "adapter_config.json").read_text())
    (other.adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.1}))
    command("registry", "add", "runs/other", "--name", "towns", "--unproven", cwd=tmp_path)
    (tmp_path / "registry" / "gates.yaml").write_text("suites: {heldout.loss: 0.1}\n")
    command("registry", "promote", "towns@2", cwd=tmp_path, code=3)
    command("registry", "promote", "towns@2", "--force", "--why", "to see it", cwd=tmp_path)
    assert command("registry", "rollback", "towns", "--why", "worse", cwd=tmp_path) == "towns@1\n"
    moves = [
        event for event in json.loads(command("registry", "history", "towns", "--json", cwd=tmp_path)) if event["alias"]
    ]
    assert [(event["kind"], event["new"], event["why"]) for event in moves] == [
        ("promote", 1, "proven"), ("promote", 2, "to see it"), ("rollback", 1, "worse"),
    ]  # fmt: skip
    assert "heldout.loss: 9" in moves[1]["overridden"]
    command("registry", "verify", cwd=tmp_path)
