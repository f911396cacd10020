"""What a newcomer runs first: the set-up script, and the wheel in an empty environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = ROOT / "scripts" / "setup.sh"
HEAVY = "torch|transformers|peft|trl|bitsandbytes|vllm|llama_cpp|gguf|numpy|huggingface_hub"


def bash(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )


def test_setup_is_bash() -> None:
    assert bash(f"bash -n {SETUP}").returncode == 0
    assert bash(f"bash -n <(cat {SETUP}; echo 'if')").returncode != 0, "the control"
    assert SETUP.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -Eeuo pipefail" in SETUP.read_text()


def test_shellcheck() -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not tool:
        pytest.skip("shellcheck is not installed")
    done = bash(f"{tool} {SETUP} {ROOT}/.ci/run")
    assert done.returncode == 0, done.stdout
    assert bash(f"{tool} <(echo '#!/bin/sh'; echo 'cd $1')").returncode != 0, "the control"


def test_setup_names_the_python_it_needs(tmp_path: Path) -> None:
    """The real script, in a copy of the tree's head: it stops before it makes anything."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SETUP, tmp_path / "scripts")
    done = bash(f"bash {tmp_path}/scripts/setup.sh", PYTHON="/bin/false")
    assert done.returncode == 1
    assert done.stderr == "setup: PYTHON=/bin/false is no Python 3.11 to 3.14\n"
    assert not (tmp_path / ".venv").exists()


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
    ("release", "amx", "without"),
    [
        ("10.2.1", True, True),
        ("11.4.0", True, True),
        ("12.2.0", True, True),
        ("12.2.0", False, False),
        ("12.4.0", True, False),
        ("13.2.0", True, True),
        ("14.1.0", True, False),
        ("14.2.0", True, False),
        ("15.1.0", True, False),
    ],
)
def test_llama_cpp_is_built_without_amx_where_gcc_breaks_it(
    tmp_path: Path, release: str, amx: bool, without: bool
) -> None:
    """The real lines of the script, with another compiler and another processor."""
    script = SETUP.read_text()
    (lines,) = re.findall(r"^gcc_before\(\) .*?^fi$", script, re.MULTILINE | re.DOTALL)
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: avx512f {'amx_tile' if amx else ''}\n")
    (tmp_path / "gcc").write_text(f"#!/bin/sh\necho {release}\n")
    (tmp_path / "gcc").chmod(0o755)
    lines = lines.replace("/proc/cpuinfo", str(tmp_path / "cpuinfo"))
    asked = f'set -e; say() {{ :; }}\n{lines}\necho "${{CFLAGS:-}}"'
    done = bash(asked, PATH=f"{tmp_path}:{os.environ['PATH']}", CFLAGS="")
    assert done.returncode == 0, done.stderr
    assert ("-mno-amx-tile" in done.stdout) == without


def test_a_second_make_installs_nothing(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "scripts").mkdir()
    shutil.copy(SETUP, tmp_path / "scripts")
    (tmp_path / ".venv").mkdir()
    for target in ("demo", "test", "lint"):
        (tmp_path / ".venv" / ".ready").touch()
        assert "setup.sh" not in bash(f"make -n -C {tmp_path} {target}").stdout
        os.utime(tmp_path / ".venv" / ".ready", (1, 1))
        assert "bash scripts/setup.sh" in bash(f"make -n -C {tmp_path} {target}").stdout, "the control: an older one"


def test_pins_of_the_script_are_those_of_the_project() -> None:
    project, script = (ROOT / "pyproject.toml").read_text(), SETUP.read_text()
    (llama,) = re.findall(r'^llama="(llama-cpp-python==[\d.]+)"$', script, re.MULTILINE)
    assert f'"{llama.replace("==", "[server]==")}"' in project
    (torch,) = re.findall(r'"torch==(2\.13)\.\*"\n    "transformers', project.replace(", ", "\n    "))
    assert f"torch=={torch}.0+cpu" in script
    assert f'"torch=={torch}.*"' in script


def test_classes_of_transformers_import_here() -> None:
    """What the script checks: beside a CPU build of torch, stock torchvision would break it."""
    (classes,) = re.findall(r"^classes='(.+)'$", SETUP.read_text(), re.MULTILINE)
    assert bash(f'{sys.executable} -c "{classes}"').returncode == 0


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
    assert "lora2serve = lora2serve.cli:main" in points
    assert re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE) == ["click", "pyyaml", "rich"]
    assert "License-Expression: Apache-2.0" in metadata


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
