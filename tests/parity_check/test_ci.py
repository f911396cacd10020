"""What people put into their CI: the action, a baseline, the pytest plugin, the files of both services."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora2serve.artifacts.run import Run
from lora2serve.cli import cli
from lora2serve.cli import run as command
from tests.conftest import lora2serve

RECIPES = Path(__file__).parents[2] / "recipes" / "ci"


@pytest.fixture(scope="module")
def place(demo_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run in it as ``runs/latest``, scoring little, and the exports that the action makes."""
    root = tmp_path_factory.mktemp("ci")
    run = root / "runs" / "demo"
    shutil.copytree(
        demo_run.path, run, symlinks=True, ignore=shutil.ignore_patterns("exports", "checkpoints", "parity")
    )
    (run.parent / "latest").symlink_to("demo")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["parity"] |= {"tokens": 200, "prompts": 2}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="module")
def exported(place: Path) -> Path:
    """The run's GGUF."""
    lora2serve("export", "runs/latest", "--target", "gguf", cwd=place)
    return place / "runs" / "demo" / "exports" / "gguf-Q4_K_M"


def test_the_action_is_sound() -> None:
    """Inputs reach the shell through the environment only, and every option is one of the command's."""
    action = yaml.safe_load((RECIPES / "action.yml").read_text())
    inputs = {f"${{{{ inputs.{name} }}}}" for name in action["inputs"]}
    steps = action["runs"]["steps"]
    assert [step["name"] for step in steps] == ["Export", "Parity", "Summary"]
    for step in steps:
        assert "${{" not in step["run"]
        assert set(step.get("env", {}).values()) <= inputs
        for name, options in re.findall(r"lora2serve (\w+)(.*)", step["run"]):
            known = {option for parameter in cli.commands[name].params for option in parameter.opts}
            assert set(re.findall(r"--[a-z-]+", options)) <= known


@pytest.mark.slow
def test_a_bound_that_cannot_be_met_is_exit_code_3(exported: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Met without it, the control: see the next, which has the exit code; such a bound is in the one after it, too."""
    assert command(["parity", str(exported), "--threshold", "Q4_K_M.mean_kl=1e-9"]) == 3
    err = capfd.readouterr().err
    assert "parity not met: 1 of 1 rows failed" in err
    assert "gguf-Q4_K_M in llama.cpp: behaviour" in err


def test_worse_than_before_is_red(place: Path, exported: Path) -> None:
    """Of an export, whose path alone finds its run, and of all that the run has, which is the same one."""
    words = ("--require", "llama.cpp", "--report", "parity")
    lora2serve("parity", exported, *words, cwd=place)
    assert "| gguf-Q4_K_M | llama.cpp | ✅ met |" in (place / "parity" / "summary.md").read_text()
    report = json.loads((place / "parity" / "report.json").read_text())
    (row,) = report["rows"]
    for check in row["gates"][-1]["checks"]:
        if check["name"] == "mean_kl":
            check |= {"value": 1e-9, "low": 1e-9, "high": 1e-9}
    (place / "better.json").write_text(json.dumps(report))
    lora2serve("parity", "runs/latest", *words, "--baseline", "better.json", cwd=place, code=3)


@pytest.mark.slow
def test_the_plugin(place: Path, exported: Path) -> None:
    """One test for each export and gate; with a bound that cannot be met, one of them fails and says why."""
    run = exported.parents[1]
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rA", "--lora2serve-exports"]
    done = subprocess.run([*words, run / "exports"], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for gate in ("settings", "tokens", "tensors", "behaviour"):
        assert re.search(rf"PASSED .*gguf-Q4_K_M-llama.cpp-{gate}", done.stdout), done.stdout
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["parity"]["thresholds"] = {"Q4_K_M": {"mean_kl": 1e-12}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run([*words, run / "exports"], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "1 failed, 3 passed" in done.stdout
    assert "first: " in done.stdout
    done = subprocess.run([*words, place], cwd=place, capture_output=True, text=True, check=False)
    assert "expected the exports/ folder of a run" in done.stdout + done.stderr


def commands(lines: Any) -> list[str]:
    return [line for line in lines if line.startswith("lora2serve ")]


def test_the_files_of_both_services() -> None:
    """They train, export and compare, and keep the report whatever comes out."""
    (job,) = yaml.safe_load((RECIPES / "github.yml").read_text())["jobs"].values()
    assert [one["run"].split("#")[0].strip() for one in job["steps"] if one.get("name") == "Train"] == [
        "lora2serve train"
    ]
    assert "./recipes/ci" in [one.get("uses") for one in job["steps"]]
    (kept,) = [one for one in job["steps"] if "upload-artifact" in one.get("uses", "")]
    assert kept["if"] == "always()"
    gitlab = yaml.safe_load((RECIPES / "gitlab.yml").read_text())["parity"]
    assert [line.split()[1] for line in commands(gitlab["script"])] == ["train", "export", "parity"]
    assert gitlab["artifacts"]["reports"]["junit"] == "parity/report.xml"
    assert gitlab["artifacts"]["when"] == "always"
    own = yaml.safe_load((RECIPES.parents[1] / ".github" / "workflows" / "ci.yml").read_text())
    assert "./recipes/ci" in [one.get("uses") for one in own["jobs"]["parity"]["steps"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--require", "vlm"], "unknown engine 'vlm' (did you mean 'vllm'?)"),
        (["--engine", "lama.cpp"], "did you mean 'llama.cpp'?"),
        (["--engine", "vllm"], "no export here is compared in vllm"),
        (["--require", "vllm"], "--require vllm: no export here is compared in it"),
    ],
)
def test_engines_that_cannot_be(exported: Path, capfd: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    """Refused before any work: an engine that is required and never asked could not turn red."""
    assert command(["parity", str(exported), *words]) == 2
    assert said in capfd.readouterr().err
